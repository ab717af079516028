"""Methods that are trained through cuts inside the decoder against those before it, at budgets that both can meet.

    diffprune run compare_inside

A budget is the average over layers, so what a late cut leaves is far less: a third of the tokens on average is a ninth behind a cut
after one of four layers. ATP-LLaVA is there twice, with counts of each image's own and with exact ones. Settings are the winners of
jobs/tune_longer.py, 1,200 training images a scorer. Dynamic-LLaVA is there twice as well: the winner of jobs/tune_training.py, 400
images, answered the held-out questions of the searches better than that of the longer one.
"""

from _winners import spelled, winners

from diffprune.job import Evaluation, Job, Recipe

BUDGETS = ("Share(1/2)", "Share(1/3)")
METHODS = spelled("diffprune", "learnpruner", "atp", "atp(slack=1.0)", "dynamic_llava", images=1200)
BRIEF = spelled("dynamic_llava", images=400)

job = Job(
    name="compare_inside",
    title="Trained methods inside the decoder and before it, five scorer seeds",
    train=Recipe(
        pruners=(*METHODS, *BRIEF),
        seeds=tuple(range(5)),
        budgets=("Share(1/3)", "Share(2/9)", "Share(1/9)", "Share(1/20)"),
        workers=2,
        validate_every=0,
        grad_cosine_every=0,
        methods=(*winners(*METHODS, images=1200), *winners(*BRIEF, images=400)),
    ),
    evaluate=Evaluation(split="confirmation", limit=180),
    baselines=("unpruned", "random", "attention", "divprune", "fastv", "pyramiddrop"),
    budgets=BUDGETS,
    workers=2,
)
