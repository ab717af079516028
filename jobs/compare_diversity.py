"""Trained scorers whose best tokens are kept, against the same scorers with diversity: by a determinantal point process.

    diffprune run compare_diversity

Recipes, seeds and questions are those of jobs/compare_trained.py; nothing is trained for `dpp(...)`, which asks the same scorers.
`diffprune(dpp=0.5)` is trained for the diversity it is used with, with DiffPrune's settings. The weight of scores beside diversity
was chosen for each method on the calibration split, of 0.25, 0.5, 1 and 2 (of 0.25, 0.5 and 1 where it is trained for): the best
mean over these budgets, of 900 questions and five seeds (DiffPrune's two best, 0.25 and 0.5, tied). LearnPruner's own share of
unlike tokens is as its search has it. CDPruner without the question is diversity alone. About half an hour on two cores.
"""

from _winners import spelled, winners

from diffprune.job import Evaluation, Job, Measurement, Recipe

BUDGETS = ("Share(1/3)", "Share(2/9)", "Share(1/9)", "Share(1/20)")
METHODS = spelled("diffprune", "diffprune(dpp=0.5)", "gumbel_keepdrop", "learnpruner", images=1200)

job = Job(
    name="compare_diversity",
    title="Trained scorers with and without diversity, five scorer seeds",
    subject="dpp(diffprune)",
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
    measure=Measurement(rounds=20, warmup=3, inputs=1, slow_rounds=2, decode_tokens=4, spans=("prefill",), sessions=1),
    wrapped=("dpp(diffprune)", "dpp(gumbel_keepdrop, weight=0.25)", "dpp(learnpruner, weight=1.0)"),
    baselines=("unpruned", "divprune", "cdpruner(question=False)"),
    budgets=BUDGETS,
    workers=2,
)
