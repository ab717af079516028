"""DiffPrune beside scorers that read the question, at 1,200 training images, and beside rules that read it.

    diffprune run ablation_questions

The part of jobs/ablation_throttler.py that jobs/ablation_longer.py leaves out, as each of the same ten questions about a picture
has a row of its own here, which takes six times as long. Settings are those of the whole method in jobs/tune_longer.py; asked are
pictures that no search has looked at. `dpp(...)` asks the same scorers for tokens that are diverse as well; its weight is that of
jobs/compare_diversity.py, the best for cross-attention, too. Rules that read the question are there as their papers have them, and
CDPruner without it, too; those that cut inside the decoder meet the largest budget alone. About an hour on two cores.
"""

from _winners import LONG
from ablation_throttler import PARTS, WHOLE

from diffprune.job import Evaluation, Job, Recipe

VARIANTS = (WHOLE, *(part for part in PARTS if "question_aware" in part))

job = Job(
    name="ablation_questions",
    title="Scorers and rules that read the question, 1,200 training images",
    subject="dpp(diffprune(question_aware='cross'))",
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
    wrapped=("dpp(diffprune)", "dpp(diffprune(question_aware='cross'))"),
    baselines=("unpruned", "cdpruner", "cdpruner(question=False)", "fastv", "sparsevlm", "pyramiddrop"),
    budgets=("Share(1/3)", "Share(1/9)", "Share(1/20)"),
    leave_out=True,
    workers=2,
)
