"""DiffPrune against Gumbel-Softmax over ten scorer seeds and all budgets: top-K, keep/drop, and keep/drop that sees the budget.

    diffprune run compare_gumbel

Every method sees the same data and budget draws, 1,200 images, and trains with the settings that one equal search of that length
found for it on the calibration split (jobs/tune_longer.py). What is asked is the split `confirmation`: pictures that no study has
looked at, nor whoever chose lengths and settings. About fifty minutes on two cores; interrupted, the same command resumes.
"""

from _winners import winners

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
        methods=winners(*METHODS, images=1200),
    ),
    evaluate=Evaluation(split="confirmation", limit=180),  # more than twice as many pictures as the demo: they are the sample
    baselines=("unpruned", "random", "grid", "attention", "divprune"),
    budgets=BUDGETS,
    workers=2,
)
