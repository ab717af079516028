"""DiffPrune against both Gumbel-Softmax variants over three scorer seeds and all budgets, and what its parts contribute.

    diffprune run compare_gumbel

Same data, steps, seeds and budget draw for every arm. Question-aware, scorer self-attention, denoiser and a second block are
switched one at a time. May take half an hour on two cores; interrupted, the same command resumes.
"""

from diffprune.job import Evaluation, Job, Recipe

BUDGETS = ("Share(1/3)", "Share(2/9)", "Share(1/9)", "Share(1/20)")

job = Job(
    name="compare_gumbel",
    title="DiffPrune against Gumbel-Softmax, three scorer seeds",
    train=Recipe(
        pruners=(
            "diffprune",
            "gumbel_topk",
            "gumbel_keepdrop",
            "diffprune(question_aware=True)",
            "diffprune(attention=False)",
            "diffprune(denoiser=False)",
            "diffprune(depth=2)",
        ),
        seeds=(0, 1, 2),
        steps=150,
        images=8,
        budgets=BUDGETS,
        workers=2,
    ),
    evaluate=Evaluation(limit=180),  # half as many pictures again as the demo: they, not the questions, are the sample
    baselines=("unpruned", "random", "grid", "attention"),
    budgets=BUDGETS,
    workers=2,
)
