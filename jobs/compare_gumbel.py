"""DiffPrune against Gumbel-Softmax over ten scorer seeds and all budgets: top-K, keep/drop, and keep/drop that sees the budget.

    diffprune run compare_gumbel

Every method sees the same data and budget draws, as many images, and trains with the settings that one equal search found for it
on the calibration split (jobs/tune_training.py). Takes about half an hour on two cores; interrupted, the same command resumes.
"""

from diffprune.job import Evaluation, Job, Recipe

BUDGETS = ("Share(1/3)", "Share(2/9)", "Share(1/9)", "Share(1/20)")
METHODS = (  # the winners of jobs/tune_training.py: each method's own, of one equal search on the calibration split
    {
        "pruner": "diffprune", "steps": 100, "images": 4, "learning_rate": 0.0015, "warmup_share": 0.075,
        "temperature_start": 0.668, "temperature_end": 0.463, "anneal_share": 0.79, "ease_share": 0.5,
    },
    {
        "pruner": "gumbel_topk", "steps": 133, "images": 3, "learning_rate": 0.00725, "warmup_share": 0.064,
        "temperature_start": 0.966, "temperature_end": 0.0996, "anneal_share": 0.782, "ease_share": 1.0,
    },
    {
        "pruner": "gumbel_keepdrop", "steps": 200, "images": 2, "learning_rate": 0.00599, "warmup_share": 0.16,
        "temperature_start": 1.35, "temperature_end": 0.347, "anneal_share": 0.964, "ease_share": 0.0,
    },
    {
        "pruner": "gumbel_keepdrop(offset=True)", "steps": 200, "images": 2, "learning_rate": 0.00599, "warmup_share": 0.16,
        "temperature_start": 1.35, "temperature_end": 0.347, "anneal_share": 0.964, "ease_share": 0.0,
    },
)  # fmt: skip

job = Job(
    name="compare_gumbel",
    title="DiffPrune against Gumbel-Softmax, ten scorer seeds",
    train=Recipe(
        pruners=("diffprune", "gumbel_topk", "gumbel_keepdrop", "gumbel_keepdrop(offset=True)"),
        seeds=tuple(range(10)),
        budgets=BUDGETS,
        workers=2,
        validate_every=0,
        grad_cosine_every=50,
        methods=METHODS,
    ),
    evaluate=Evaluation(limit=180),  # more than twice as many pictures as the demo: they, not the questions, are the sample
    baselines=("unpruned", "random", "grid", "attention"),
    budgets=BUDGETS,
    workers=2,
)
