"""The main job: train, tune, evaluate, measure and report on the embedded model, offline, on two cores, in minutes.

make demo        or        diffprune demo
"""

from _winners import winners

from diffprune.job import Evaluation, Job, Measurement, Recipe, Tuning

BUDGETS = ("Share(1/3)", "Share(2/9)", "Share(1/9)", "Share(1/20)")
METHODS = ("diffprune", "gumbel_topk", "gumbel_keepdrop")

job = Job(
    name="demo",
    title="DiffPrune and Gumbel-Softmax on the embedded model",
    train=Recipe(
        pruners=METHODS,
        seeds=(0, 1, 2, 3, 4),
        budgets=BUDGETS,
        workers=2,
        validate_every=200,  # at the end of every scorer
        validation_images=4,
        grad_cosine_every=100,
        methods=winners(*METHODS),
    ),
    tune=Tuning(
        benchmarks=("world(like='gqa')", "world(like='textvqa')", "world(like='pope')"),
        targets=(2.0, 2.85),  # the second is the published prefill speedup
        curve_repeats=8,
        warmup=3,
        repeats=1,
        corrections=2,
        candidates=1,
        calibration=72,
        held_out=72,
    ),
    evaluate=Evaluation(blind=True, limit=80),  # the world's ten benchmarks, each also asked without its pictures
    measure=Measurement(rounds=10, warmup=3, inputs=1, slow_rounds=3, decode_tokens=8),
    baselines=("unpruned", "random", "grid", "attention"),
    replaced=("diffprune",),
    tuned=("diffprune", "gumbel_keepdrop", "grid", "attention"),  # rules too: the best is chosen by their trials
    budgets=BUDGETS,
    workers=2,
)
