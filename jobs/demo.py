"""The main job: train, tune, evaluate, measure and report on the embedded model, offline, on two cores, in minutes.

make demo        or        diffprune demo
"""

from diffprune.job import Evaluation, Job, Measurement, Recipe, Tuning

BUDGETS = ("Share(1/3)", "Share(2/9)", "Share(1/9)", "Share(1/20)")
METHODS = (  # the winners of jobs/tune_training.py: each method's own, of one equal search on the calibration split
    {
        "pruner": "diffprune", "steps": 100, "images": 4, "learning_rate": 0.0015, "warmup_share": 0.075,
        "temperature_start": 0.668, "temperature_end": 0.463, "anneal_share": 0.79, "ease_share": 0.5,
    },
    {
        "pruner": "gumbel_topk", "steps": 133, "images": 3, "learning_rate": 0.00725, "warmup_share": 0.064,
        "temperature_start": 0.966, "temperature_end": 0.0996, "anneal_share": 0.782, "ease_share": 1.0,
    },
    {
        "pruner": "gumbel_keepdrop", "steps": 200, "images": 2, "learning_rate": 0.00599, "warmup_share": 0.16,
        "temperature_start": 1.35, "temperature_end": 0.347, "anneal_share": 0.964, "ease_share": 0.0,
    },
)  # fmt: skip

job = Job(
    name="demo",
    title="DiffPrune and Gumbel-Softmax on the embedded model",
    train=Recipe(
        pruners=("diffprune", "gumbel_topk", "gumbel_keepdrop"),
        seeds=(0, 1, 2, 3, 4),
        budgets=BUDGETS,
        workers=2,
        validate_every=200,  # at the end of every scorer
        validation_images=4,
        grad_cosine_every=100,
        methods=METHODS,
    ),
    tune=Tuning(
        benchmarks=("world(like='gqa')", "world(like='textvqa')", "world(like='pope')"),
        curve_repeats=8,
        warmup=3,
        repeats=1,
        corrections=2,
        candidates=1,
        calibration=72,
        held_out=72,
    ),
    evaluate=Evaluation(blind=True, limit=80),  # the world's ten benchmarks, each also asked without its pictures
    measure=Measurement(rounds=20, warmup=5, inputs=1, slow_rounds=3, decode_tokens=8),
    baselines=("unpruned", "random", "grid", "attention"),
    replaced=("diffprune",),
    tuned=("diffprune", "gumbel_keepdrop", "grid", "attention"),  # rules too: the best is chosen by their trials
    budgets=BUDGETS,
    workers=2,
)
