"""The search of jobs/tune_training.py at three times its length, for the methods of the comparisons: 1,200 training images.

    diffprune run tune_longer

What is best at 400 images need not be at 1,200: a large learning rate is, for some, only quick. The same twelve configurations,
the same held-out images; Ray Tune looks at 300 and at 600 images, and each time stops those in the worse half. About 80
minutes on two cores.
"""

from diffprune.job import Job, Recipe, Search

BUDGETS = ("Share(1/3)", "Share(2/9)", "Share(1/9)", "Share(1/20)")

job = Job(
    name="tune_longer",
    title="Search of training settings at 1,200 images, on the calibration split",
    search=Search(
        recipe=Recipe(
            pruners=(
                "diffprune",
                "gumbel_topk",
                "gumbel_keepdrop",
                "gumbel_keepdrop(offset=True)",
                "learnpruner",
                "visionselector",
                "ocvtp",
                "atp(slack=1.0)",  # exact counts: a looser one would be chosen for the tokens it keeps above its budget
                "dynamic_llava",
            ),
            seeds=tuple(range(10)),  # those of the comparison, which the search leaves alone
            steps=300,
            images=4,
            budgets=BUDGETS,
        ),
        configurations=12,
        seeds=(1000,),
        validation_images=48,
        halvings=2,
    ),
    budgets=BUDGETS,
    workers=2,
)
