"""DiffPrune's parts, one taken out or replaced at a time: five scorer seeds each, 400 training images, one verdict rule.

    diffprune run ablation_throttler

Every variant trains with the settings that the search found for the whole method (jobs/tune_training.py), on the same images and
budget draws. The table of variants holds each against it, as the forest of differences does. Under 25 minutes on two cores.
"""

from _winners import SETTINGS

from diffprune.job import Evaluation, Job, Recipe

WHOLE = "diffprune"
PARTS = (
    "diffprune(throttle='gate')",  # scaling in place of variance-preserving noise
    "diffprune(throttle='additive')",  # noise that is added, of the same ratio to the signal
    "diffprune(throttle='removal')",  # a throttled token is drowned as a key as well
    "diffprune(denoiser=False)",
    "diffprune(total='penalty')",  # a mean penalty in place of the soft top-K
    "diffprune(scale='free')",  # scores as they come
    "diffprune(trained_share=0.111)",  # one budget in place of drawn ones
    "diffprune(temperature_end=0.1)",
    "diffprune(temperature_end=1.0)",
    "diffprune(depth=2)",  # two blocks in place of one
    "diffprune(attention=True)",  # blocks that look at other tokens
)

job = Job(
    name="ablation_throttler",
    title="DiffPrune's parts, one taken out or replaced at a time",
    train=Recipe(
        pruners=(WHOLE, *PARTS),
        seeds=tuple(range(5)),
        budgets=("Share(1/3)", "Share(2/9)", "Share(1/9)", "Share(1/20)"),
        workers=2,
        validate_every=0,
        grad_cosine_every=0,
        methods=tuple({"pruner": variant, **SETTINGS[WHOLE]} for variant in (WHOLE, *PARTS)),
    ),
    evaluate=Evaluation(limit=80),
    baselines=("unpruned",),
    budgets=("Share(1/9)", "Share(1/20)"),
    workers=2,
)
