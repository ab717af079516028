"""Every trained method that removes tokens before the decoder, over five scorer seeds and all budgets, under one verdict rule.

    diffprune run compare_trained

Settings and options of each are the winners of jobs/tune_longer.py, over 1,200 images; the page says how the trainings differ.
Questions are those of jobs/compare_gumbel.py, and so are the scorers of the methods that are in both: the same recipe and seeds.
Methods that cut inside the decoder stand in jobs/compare_inside.py: the first layer of the embedded one alone is a quarter of it.
"""

from _winners import spelled, winners

from diffprune.job import Evaluation, Job, Recipe

BUDGETS = ("Share(1/3)", "Share(2/9)", "Share(1/9)", "Share(1/20)")
METHODS = spelled("diffprune", "gumbel_topk", "gumbel_keepdrop", "learnpruner", "visionselector", "ocvtp", images=1200)

job = Job(
    name="compare_trained",
    title="Trained methods before the decoder, five scorer seeds",
    train=Recipe(
        pruners=METHODS,
        seeds=tuple(range(5)),
        budgets=BUDGETS,
        workers=2,
        validate_every=0,
        grad_cosine_every=0,
        methods=winners(*METHODS, images=1200),
    ),
    evaluate=Evaluation(split="confirmation", limit=180),
    baselines=("unpruned", "random", "attention", "divprune"),
    budgets=BUDGETS,
    workers=2,
)
