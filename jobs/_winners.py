"""Training settings that jobs/tune_training.py found: each method's own, of one equal search on the calibration split.

The search's page and store are in reports/tune_training; methods it has not searched yet train with their recipe's own settings.
"""

from typing import Any

KEEP_DROP = {
    "steps": 200, "images": 2, "learning_rate": 0.00599, "warmup_share": 0.16,
    "temperature_start": 1.35, "temperature_end": 0.347, "anneal_share": 0.964, "ease_share": 0.0,
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
    "gumbel_keepdrop": KEEP_DROP,
    "gumbel_keepdrop(offset=True)": KEEP_DROP,
}  # fmt: skip


def winners(*methods: str) -> tuple[dict[str, Any], ...]:
    """Settings of those of the methods that were searched, as a recipe's `methods` take them."""
    return tuple({"pruner": method, **SETTINGS[method]} for method in methods if method in SETTINGS)
