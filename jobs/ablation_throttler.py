"""DiffPrune's parts, one taken out or replaced at a time: five scorer seeds each, 400 training images, one verdict rule.

    diffprune run ablation_throttler

Every variant trains with the settings that the search found for the whole method (jobs/tune_training.py), on the same images and
budget draws. The table of variants holds each against it, as the forest of differences does. Scorers that read the question see the
same ten questions about each picture as the others, every one in a row of its own. About 25 minutes on two cores.
"""

from _winners import SHORT

from diffprune.job import Evaluation, Job, Recipe

WHOLE = "diffprune"
PARTS = (
    "diffprune(throttle='gate')",  # scaling in place of variance-preserving noise
    "diffprune(throttle='additive')",  # noise that is added, of the same ratio to the signal
    "diffprune(throttle='removal')",  # a throttled token is drowned as a key as well
    "diffprune(denoiser=False)",
    "diffprune(denoiser='global')",  # one that sees all tokens of an image
    "diffprune(total='penalty')",  # a mean penalty in place of the soft top-K
    "diffprune(scale='free')",  # scores as they come
    "diffprune(trained_share=0.111)",  # one budget in place of drawn ones
    "diffprune(temperature_end=0.1)",
    "diffprune(temperature_end=1.0)",
    "diffprune(depth=0)",  # a linear scorer in place of one block
    "diffprune(depth=2)",
    "diffprune(attention=True)",  # blocks that look at other tokens
    "diffprune(question_aware=True)",  # reads the question, by late interaction
    "diffprune(question_aware='cross')",  # and by cross-attention
    "diffprune(diversity=0.2)",  # trained as the whole, but a fifth of what is kept are tokens unlike the others
    "diffprune(sinks=4)",  # the same, with the four tokens of largest norm always kept
)

job = Job(
    name="ablation_throttler",
    title="DiffPrune's parts, one taken out or replaced at a time",
    train=Recipe(
        pruners=(WHOLE, *PARTS),
        seeds=tuple(range(5)),
        questions=10,
        questions_alone=10,
        budgets=("Share(1/3)", "Share(2/9)", "Share(1/9)", "Share(1/20)"),
        workers=2,
        validate_every=0,
        grad_cosine_every=0,
        methods=tuple({"pruner": variant, **SHORT[WHOLE]} for variant in (WHOLE, *PARTS)),
    ),
    evaluate=Evaluation(limit=80),
    baselines=("unpruned",),
    budgets=("Share(1/9)", "Share(1/20)"),
    workers=2,
)
