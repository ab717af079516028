"""Methods that tables of papers print for models of seven billion parameters, as our trainings and tables of these take them.

Only those that we have: VoCo-LLaMA, VTW, HiRED, HiMAP, iLLaVA and TokenCarve are not among them. All are in the table of every
model, so that one rule of verdicts covers them; which numbers were printed for which model is in reports/published. `attention`
is FasterVLM's, `gumbel_topk` the control of DiffPrune's paper. Depths of cuts are those of the papers, which the methods have by
themselves, and a budget of those that cut inside the decoder is the average over its layers.
"""

from pathlib import Path
from typing import Any

from diffprune.core.spec import Spec
from diffprune.job import Job

CONTROLS = (*(f"random(seed={seed})" for seed in range(3)), "grid")
RULES = (
    "attention", "visionzip", "prumerge", "prumerge(plus=True)", "tome", "divprune", "cdpruner", "vispruner", "holov", "prunesid",
    "fastv", "dart", "sparsevlm", "pyramiddrop",
)  # fmt: skip
TRAINED = (
    "diffprune", "gumbel_topk", "gumbel_keepdrop", "learnpruner", "visionselector", "ocvtp", "atp", "dynamic_llava",
)  # fmt: skip
CALIBRATED = ("btp", "pore(fastv)")
STORED = {"checkpointing": False, "micro_images": 2}  # cuts inside the decoder are not there when its layers are computed again
SETTINGS: tuple[dict[str, Any], ...] = (  # that a method's own paper states; of what it does not state, the recipe's
    {"pruner": "visionselector", "learning_rate": 5e-5},
    {"pruner": "ocvtp", "learning_rate": 1e-3, "warmup_share": 0.13},  # 4 epochs of 30
    {"pruner": "dynamic_llava", "weight_decay": 0.0, "temperature_start": 1.0, **STORED},
    {"pruner": "atp", **STORED},
)


def compared(training: Job, without: tuple[str, ...] = ()) -> tuple[str | Spec, ...]:
    """The bound, the controls, the rules but those `without`, and what a training fits, with weights from where it leaves them."""
    places = training.scorers((Path("runs") / training.name).absolute())
    rules = (rule for rule in RULES if rule not in without)
    return ("unpruned", *CONTROLS, *rules, *(spec.at(weights=place) for (spec, _), place in places.items()))
