"""Trained scorers whose best tokens are kept, against the same scorers with tokens chosen by volume.

    diffprune run compare_volume

Recipes, seeds and questions are those of jobs/compare_trained.py.
"""

from _winners import spelled, winners

from diffprune.job import Evaluation, Job, Recipe

METHODS = spelled("diffprune", "gumbel_keepdrop", "learnpruner", images=1200)

job = Job(
    name="compare_volume",
    title="Tokens by score and by volume, five scorer seeds",
    train=Recipe(
        pruners=METHODS,
        seeds=tuple(range(5)),
        budgets=("Share(1/3)", "Share(2/9)", "Share(1/9)", "Share(1/20)"),
        workers=2,
        validate_every=0,
        grad_cosine_every=0,
        methods=winners(*METHODS, images=1200),
    ),
    evaluate=Evaluation(split="confirmation", limit=180),
    baselines=("unpruned", "divprune", "cdpruner(question=False)"),
    budgets=("Share(1/3)", "Share(2/9)", "Share(1/9)", "Share(1/20)"),
    workers=2,
)
