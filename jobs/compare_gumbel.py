"""DiffPrune against Gumbel-Softmax over ten scorer seeds and all budgets: top-K, keep/drop, and keep/drop that sees the budget.

    diffprune run compare_gumbel

Every method sees the same data and budget draws, 1,200 images, and trains with the settings that one equal search found for it
on the calibration split (jobs/tune_training.py). Takes about an hour on two cores; interrupted, the same command resumes.
"""

from _winners import LONGER, winners

from diffprune.job import Evaluation, Job, Recipe

BUDGETS = ("Share(1/3)", "Share(2/9)", "Share(1/9)", "Share(1/20)")
METHODS = ("diffprune", "gumbel_topk", "gumbel_keepdrop", "gumbel_keepdrop(offset=True)")

job = Job(
    name="compare_gumbel",
    title="DiffPrune against Gumbel-Softmax, ten scorer seeds",
    train=Recipe(
        pruners=METHODS,
        seeds=tuple(range(10)),
        budgets=BUDGETS,
        workers=2,
        validate_every=0,
        grad_cosine_every=50,
        methods=winners(*METHODS, longer=LONGER),
    ),
    evaluate=Evaluation(limit=180),  # more than twice as many pictures as the demo: they, not the questions, are the sample
    baselines=("unpruned", "random", "grid", "attention"),
    budgets=BUDGETS,
    workers=2,
)
