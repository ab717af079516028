"""The search that gives every trained method its settings: equal budget for each, judged on images of the calibration split.

    diffprune run tune_training

Steps x images stay at 400 training images. The winners are printed as text for a job file; `jobs/demo.py` and the comparisons carry
them, with other scorer seeds. A method that cuts inside the decoder is judged at the budgets it can meet.
"""

from diffprune.job import Job, Recipe, Search

BUDGETS = ("Share(1/3)", "Share(2/9)", "Share(1/9)", "Share(1/20)")

job = Job(
    name="tune_training",
    title="Search of training settings on the calibration split",
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
            steps=100,
            images=4,
            budgets=BUDGETS,
        ),
        configurations=12,
        seeds=(1000,),
        validation_images=48,
    ),
    budgets=BUDGETS,
    workers=2,
)
