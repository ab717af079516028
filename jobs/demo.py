"""The main job: train, tune, evaluate, measure and report on the embedded model, offline, on two cores, in minutes.

make demo        or        diffprune demo
"""

from diffprune.job import Evaluation, Job, Measurement, Recipe, Tuning

BUDGETS = ("Share(1/3)", "Share(2/9)", "Share(1/9)", "Share(1/20)")

job = Job(
    name="demo",
    title="DiffPrune and Gumbel-Softmax on the embedded model",
    train=Recipe(
        pruners=(
            "diffprune",
            "gumbel_topk",
            "gumbel_keepdrop(ratio_weight=10)",
        ),  # reading the question needs longer training: compare_gumbel
        seeds=(0, 1, 2, 3, 4),
        steps=100,
        images=4,
        budgets=BUDGETS,
        workers=2,
        validate_every=100,
        grad_cosine_every=50,
        methods=({"pruner": "gumbel_keepdrop(ratio_weight=10)", "ease_share": 0.0}, {"pruner": "gumbel_topk", "ease_share": 1.0}),
    ),
    tune=Tuning(
        benchmarks=("world(like='gqa')", "world(like='textvqa')", "world(like='pope')"),
        curve_repeats=10,
        warmup=3,
        repeats=1,
        corrections=2,
        candidates=1,
        calibration=72,
        held_out=72,
    ),
    evaluate=Evaluation(blind=True, limit=80),  # the world's ten benchmarks, each also asked without its pictures
    measure=Measurement(warmup=5, inputs=1, slow_rounds=3, decode_tokens=8),
    baselines=("unpruned", "random", "grid", "attention"),
    replaced=("diffprune",),
    budgets=BUDGETS,
    workers=2,
)
