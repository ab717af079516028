"""What jobs/tune_training.py found for each trained method, by one equal search on the calibration split: spelling and settings.

The search's page and store are in reports/tune_training. A method's own option is part of what is searched, so the winner may be
spelled with one; methods that were not searched train with their recipe's own settings.

The search trains on 400 images a configuration, which is too few for a scorer's seeds to agree (reports/training_length).
`compare_gumbel` and `compare_trained` train each winner `LONGER` times as long: 1,200 images, over which learning rate,
temperatures and easing are stretched. That length is the same for all methods and was read from test answers, so it favours none of
them by design, only by luck.
"""

from typing import Any

LONGER = 3  # times the 400 images of the search

SLOW_COOLING = {
    "steps": 200, "images": 2, "learning_rate": 0.00599, "warmup_share": 0.16,
    "temperature_start": 1.35, "temperature_end": 0.347, "anneal_share": 0.964, "ease_share": 0.0,
}  # fmt: skip
ATP = {
    "steps": 133, "images": 3, "learning_rate": 0.00361, "warmup_share": 0.16,
    "temperature_start": 3.65, "temperature_end": 0.0572, "anneal_share": 0.465, "ease_share": 1.0,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "diffprune": {
        "steps": 100, "images": 4, "learning_rate": 0.0015, "warmup_share": 0.075,
        "temperature_start": 0.668, "temperature_end": 0.463, "anneal_share": 0.79, "ease_share": 0.5,
    },
    "gumbel_topk": {
        "steps": 133, "images": 3, "learning_rate": 0.00725, "warmup_share": 0.064,
        "temperature_start": 0.966, "temperature_end": 0.0996, "anneal_share": 0.782, "ease_share": 1.0,
    },
    "gumbel_keepdrop": SLOW_COOLING,
    "gumbel_keepdrop(offset=True)": SLOW_COOLING,
    "learnpruner(diversity=0.2)": SLOW_COOLING,
    "visionselector(agreement=4.0)": {
        "steps": 100, "images": 4, "learning_rate": 0.00966, "warmup_share": 0.047,
        "temperature_start": 2.01, "temperature_end": 0.419, "anneal_share": 0.411, "ease_share": 0.5,
    },
    "ocvtp": {
        "steps": 100, "images": 4, "learning_rate": 0.0016, "warmup_share": 0.123,
        "temperature_start": 0.978, "temperature_end": 0.205, "anneal_share": 0.316, "ease_share": 0.5,
    },
    "atp": ATP,
    "atp(slack=1.0)": ATP,  # as it was searched
    "dynamic_llava": {
        "steps": 100, "images": 4, "learning_rate": 0.003, "warmup_share": 0.03,
        "temperature_start": 2.0, "temperature_end": 0.1, "anneal_share": 0.9, "ease_share": 0.75,
    },
}  # fmt: skip


def spelled(*methods: str) -> tuple[str, ...]:
    """The methods as their winners are spelled: with an option where the winner has one that the method's name leaves open."""
    options = {won.partition("(")[0]: won for won in SETTINGS}
    return tuple(method if method in SETTINGS else options.get(method, method) for method in methods)


def winners(*methods: str, longer: int = 1) -> tuple[dict[str, Any], ...]:
    """Spelling and settings of those of the methods that were searched, as a recipe's `methods` take them.

    longer: the steps in units of the search's; what depends on time is a share of them, so it stretches along.
    """
    found = ((won, SETTINGS[won]) for won in spelled(*methods) if won in SETTINGS)
    return tuple({"pruner": won, **own, "steps": longer * own["steps"]} for won, own in found)
