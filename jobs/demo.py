"""The main job: train, tune, evaluate, measure and report on the embedded model, offline, on two cores, in minutes.

make demo        or        diffprune demo
"""

from diffprune.evaluate import Evaluation
from diffprune.job import Job
from diffprune.measurement import Measurement
from diffprune.recipe import Recipe
from diffprune.tune import Tuning

BUDGETS = ("Share(1/3)", "Share(2/9)", "Share(1/9)", "Share(1/20)")

job = Job(
    name="demo",
    title="DiffPrune and Gumbel-Softmax on the embedded model",
    train=Recipe(
        arms=("diffprune", "gumbel_topk", "gumbel_keepdrop", "diffprune(question_aware=True)"),
        seeds=(0,),
        steps=60,
        images=8,
        budgets=BUDGETS,
        workers=2,
        validate_every=60,
    ),
    tune=Tuning(
        targets=(1.5, 2.0, 2.85),
        curve_repeats=12,
        warmup=3,
        repeats=1,
        corrections=1,
        candidates=1,
        calibration=96,
        held_out=96,
        margin=0.06,
    ),
    evaluate=Evaluation(blind=True, limit=100),  # the world's ten benchmarks, each also asked without its pictures
    measure=Measurement(warmup=3, slow_rounds=4, decode_tokens=8),
    baselines=("none", "random", "grid", "attention"),
    replaced=("diffprune",),
    replaced_budgets=BUDGETS[1:3],
    budgets=BUDGETS,
    workers=2,
)
