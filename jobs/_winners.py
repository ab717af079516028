"""What the searches found for each trained method, on the calibration split and by equal budgets: spelling and settings.

`SHORT` is of jobs/tune_training.py, 400 training images a configuration; `LONG` of jobs/tune_longer.py, 1,200. Their pages and
stores are in reports/tune_training and reports/tune_longer. A method's own option is part of what is searched, so the winner may be
spelled with one; methods that were not searched train with their recipe's own settings.
"""

from typing import Any

SLOW_COOLING = {
    "steps": 200, "images": 2, "learning_rate": 0.00599, "warmup_share": 0.16,
    "temperature_start": 1.35, "temperature_end": 0.347, "anneal_share": 0.964, "ease_share": 0.0,
}  # fmt: skip
ATP = {
    "steps": 133, "images": 3, "learning_rate": 0.00361, "warmup_share": 0.16,
    "temperature_start": 3.65, "temperature_end": 0.0572, "anneal_share": 0.465, "ease_share": 1.0,
}  # fmt: skip
SHORT: dict[str, dict[str, Any]] = {
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
        "steps": 200, "images": 2, "learning_rate": 0.00253, "warmup_share": 0.12,
        "temperature_start": 0.676, "temperature_end": 0.0652, "anneal_share": 0.529, "ease_share": 0.0,
    },
    "atp": ATP,
    "atp(slack=1.0)": ATP,  # as it was searched
    "dynamic_llava": {
        "steps": 100, "images": 4, "learning_rate": 0.003, "warmup_share": 0.03,
        "temperature_start": 2.0, "temperature_end": 0.1, "anneal_share": 0.9, "ease_share": 0.75,
    },
}  # fmt: skip
ATP_LONG = {
    "steps": 400, "images": 3, "learning_rate": 0.00169, "warmup_share": 0.082,
    "temperature_start": 1.27, "temperature_end": 0.295, "anneal_share": 0.454, "ease_share": 1.0,
}  # fmt: skip
LONG: dict[str, dict[str, Any]] = {
    "diffprune": {
        "steps": 300, "images": 4, "learning_rate": 0.0016, "warmup_share": 0.123,
        "temperature_start": 0.978, "temperature_end": 0.205, "anneal_share": 0.316, "ease_share": 0.5,
    },
    "gumbel_topk": {
        "steps": 300, "images": 4, "learning_rate": 0.003, "warmup_share": 0.03,
        "temperature_start": 2.0, "temperature_end": 0.1, "anneal_share": 0.9, "ease_share": 0.75,
    },
    "gumbel_keepdrop": {
        "steps": 600, "images": 2, "learning_rate": 0.00599, "warmup_share": 0.16,
        "temperature_start": 1.35, "temperature_end": 0.347, "anneal_share": 0.964, "ease_share": 0.0,
    },
    "gumbel_keepdrop(offset=True)": {
        "steps": 300, "images": 4, "learning_rate": 0.00966, "warmup_share": 0.047,
        "temperature_start": 2.01, "temperature_end": 0.419, "anneal_share": 0.411, "ease_share": 0.5,
    },
    "learnpruner": {
        "steps": 600, "images": 2, "learning_rate": 0.00353, "warmup_share": 0.082,
        "temperature_start": 1.08, "temperature_end": 0.0687, "anneal_share": 0.728, "ease_share": 0.5,
    },
    "visionselector": {
        "steps": 300, "images": 4, "learning_rate": 0.003, "warmup_share": 0.03,
        "temperature_start": 2.0, "temperature_end": 0.1, "anneal_share": 0.9, "ease_share": 0.75,
    },
    "ocvtp": {
        "steps": 400, "images": 3, "learning_rate": 0.00163, "warmup_share": 0.146,
        "temperature_start": 1.56, "temperature_end": 0.171, "anneal_share": 0.739, "ease_share": 0.5,
    },
    "atp": ATP_LONG,
    "atp(slack=1.0)": ATP_LONG,  # as it was searched
    "dynamic_llava(ratio_weight=30.0)": {
        "steps": 400, "images": 3, "learning_rate": 0.00361, "warmup_share": 0.16,
        "temperature_start": 3.65, "temperature_end": 0.0572, "anneal_share": 0.465, "ease_share": 1.0,
    },
}  # fmt: skip
SETTINGS = {400: SHORT, 1200: LONG}  # by training images
AS = {"diffprune(dpp=0.5)": "diffprune"}  # not searched: trains with the settings of the one that it is a form of


def spelled(*methods: str, images: int = 400) -> tuple[str, ...]:
    """The methods as their winners are spelled: with an option where the winner has one that the method's name leaves open."""
    found = SETTINGS[images]
    options = {won.partition("(")[0]: won for won in found}
    return tuple(method if method in found else options.get(method, method) for method in methods)


def winners(*methods: str, images: int = 400) -> tuple[dict[str, Any], ...]:
    """Spelling and settings of those of the methods that were searched, or are a form of one (`AS`), as recipes take them.

    images: of a training, and of a configuration of the search.
    """
    found = SETTINGS[images]
    named = ((won, AS.get(won, won)) for won in spelled(*methods, images=images))
    return tuple({"pruner": won, **found[name]} for won, name in named if name in found)
