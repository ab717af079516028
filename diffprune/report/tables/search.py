"""What a search of training settings found for each method, and what it cost."""

from __future__ import annotations

import numpy as np
import pandas as pd

from diffprune.report.analysis.records import Records
from diffprune.report.analysis.search import COMPLETE, STOPPED, trials
from diffprune.report.render.table import Entry, Number, Table

COLUMNS = (
    "Method", "trials", "stopped early", "diverged", "recipe's own", "best", "worst", "best settings", "minutes",
)  # fmt: skip
NOTES = (
    "Recipe's own, best, worst: validation after the full training, answer NLL in nats per token with tokens removed, mean over "
    "the budgets, on held-out images that are no test images; worst is of the trials that were not stopped. A dash: stopped early. "
    "Every method had as many configurations, each of the same training images, with the same settings drawn beside its own "
    "options. Minutes: of training and validation, one CPU each.",
)


def searched(records: Records) -> Table | None:
    """One row per method."""
    found, settings = trials(records)
    if found.empty:
        return None
    rows: list[tuple[Entry, ...]] = []
    for label in [x for x in records.methods if (found["label"] == x).any()]:
        part = found[found["label"] == label]
        states, ended = part["trial_state"], part[part["trial_state"] == COMPLETE]
        own = ended.loc[ended["configuration"] == 0, "validation_hard"]
        best = ended.loc[ended["validation_hard"].idxmin()] if len(ended) else None
        rows.append(
            (
                label,
                Number(len(part), digits=0),
                Number((states == STOPPED).sum(), digits=0),
                Number((~states.isin((STOPPED, COMPLETE))).sum(), digits=0),
                Number(own.iloc[0] if len(own) else np.nan, digits=4),
                Number(ended["validation_hard"].min(), digits=4),
                Number(ended["validation_hard"].max(), digits=4),
                "–" if best is None else _spelled(best, settings),
                Number(part["spent_s"].sum() / 60, digits=1),
            )
        )
    return Table("search", "Search of training settings", COLUMNS, tuple(rows), NOTES)


def _spelled(trial: pd.Series, settings: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {trial[name]:g}" for name in settings if pd.notna(trial[name]))
