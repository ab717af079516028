"""DiffPrune beside scorers that read the question, at 1,200 training images: by late interaction and by cross-attention.

    diffprune run ablation_questions

The part of jobs/ablation_throttler.py that jobs/ablation_longer.py leaves out, as each of the same ten questions about a picture
has a row of its own here, which takes six times as long. Settings are those of the whole method in jobs/tune_longer.py; asked are
pictures that no search has looked at. About an hour on two cores.
"""

from _winners import LONG
from ablation_throttler import PARTS, WHOLE

from diffprune.job import Evaluation, Job, Recipe

VARIANTS = (WHOLE, *(part for part in PARTS if "question_aware" in part))

job = Job(
    name="ablation_questions",
    title="DiffPrune beside scorers that read the question, 1,200 training images",
    train=Recipe(
        pruners=VARIANTS,
        seeds=tuple(range(5)),
        questions=10,
        questions_alone=10,
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
