"""The ablation at 1,200 training images, where scorers of one recipe lie closer together than at 400.

    diffprune run ablation_longer

The variants of jobs/ablation_throttler.py but those that read the question, whose rows show one question each and cost six times as
much. Settings are those of the whole method in jobs/tune_longer.py; asked are pictures that no search has looked at. About 50
minutes on two cores.
"""

from _winners import LONG
from ablation_throttler import PARTS, WHOLE

from diffprune.job import Evaluation, Job, Recipe

VARIANTS = (WHOLE, *(part for part in PARTS if "question_aware" not in part))

job = Job(
    name="ablation_longer",
    title="DiffPrune's parts at 1,200 training images, one taken out or replaced at a time",
    train=Recipe(
        pruners=VARIANTS,
        seeds=tuple(range(5)),
        budgets=("Share(1/3)", "Share(2/9)", "Share(1/9)", "Share(1/20)"),
        workers=2,
        validate_every=0,
        grad_cosine_every=0,
        methods=tuple({"pruner": variant, **LONG[WHOLE]} for variant in VARIANTS),
    ),
    evaluate=Evaluation(split="confirmation", limit=180),
    baselines=("unpruned",),
    budgets=("Share(1/9)", "Share(1/20)"),
    workers=2,
)
