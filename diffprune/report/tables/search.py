"""What a search of training settings found for each method, and what it cost."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from diffprune.report.analysis.records import Records
from diffprune.report.analysis.search import COMPLETE, STOPPED, trials
from diffprune.report.render.table import Entry, Number, Table

COLUMNS = (
    "Method",
    "trials",
    "stopped early",
    "diverged",
    "recipe's own",
    "best",
    "worst",
    "minutes",
)  # then the best one's settings
NOTES = (
    "Recipe's own, best, worst: validation after the full training, answer NLL in nats per token with tokens removed, mean over "
    "the budgets, on held-out images that are no test images; worst is of the trials that were not stopped. "
    "A dash: stopped early, or a setting that the method does not use. "
    "Every method had as many configurations, each of the same training images, with the same settings drawn beside its own "
    "options. Minutes: of training and validation, one CPU each. The other columns: settings of the best.",
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
                Number(part["spent_s"].sum() / 60, digits=1),
                *(Number(math.nan if best is None else float(best[name]), digits=_digits(found[name])) for name in settings),
            )
        )
    columns = (*COLUMNS, *(name.replace("_", " ") for name in settings))
    return Table("search", "Search of training settings", columns, tuple(rows), NOTES)


def _digits(values: pd.Series) -> int:
    """As many as tell the values of a setting apart: none of whole numbers, three significant ones of others."""
    known = values.dropna().abs()
    whole = bool((known == known.round()).all())
    return 0 if whole else max(0, 3 - math.ceil(math.log10(known[known > 0].min())))
