"""Every trained method that removes tokens before the decoder, over five scorer seeds and all budgets, under one verdict rule.

    diffprune run compare_trained

Settings of each are the winners of jobs/tune_training.py where that search has been run; the page says how the trainings differ.
Methods that cut inside the decoder stand in jobs/compare_inside.py: the first layer of the embedded one alone is a quarter of it.
"""

from diffprune.job import Evaluation, Job, Recipe

BUDGETS = ("Share(1/3)", "Share(2/9)", "Share(1/9)", "Share(1/20)")
METHODS = (  # the winners of jobs/tune_training.py; those that it has not searched yet train with the recipe's own settings
    {
        "pruner": "diffprune", "steps": 100, "images": 4, "learning_rate": 0.0015, "warmup_share": 0.075,
        "temperature_start": 0.668, "temperature_end": 0.463, "anneal_share": 0.79, "ease_share": 0.5,
    },
    {
        "pruner": "gumbel_topk", "steps": 133, "images": 3, "learning_rate": 0.00725, "warmup_share": 0.064,
        "temperature_start": 0.966, "temperature_end": 0.0996, "anneal_share": 0.782, "ease_share": 1.0,
    },
    {
        "pruner": "gumbel_keepdrop(offset=True)", "steps": 200, "images": 2, "learning_rate": 0.00599, "warmup_share": 0.16,
        "temperature_start": 1.35, "temperature_end": 0.347, "anneal_share": 0.964, "ease_share": 0.0,
    },
)  # fmt: skip

job = Job(
    name="compare_trained",
    title="Trained methods before the decoder, five scorer seeds",
    train=Recipe(
        pruners=("diffprune", "gumbel_topk", "gumbel_keepdrop(offset=True)", "learnpruner", "visionselector", "ocvtp"),
        seeds=tuple(range(5)),
        steps=100,
        images=4,
        budgets=BUDGETS,
        workers=2,
        validate_every=0,
        grad_cosine_every=0,
        methods=METHODS,
    ),
    evaluate=Evaluation(limit=80),
    baselines=("unpruned", "random", "grid", "attention"),
    budgets=BUDGETS,
    workers=2,
)
