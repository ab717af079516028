"""Trials of a search of training settings as a frame: one row per trial, what it set in columns."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache

import pandas as pd

from diffprune.core import registry
from diffprune.core.fitted import Annealing, Progress, TrainablePruner
from diffprune.report.analysis.records import Records

ANNEALED = {"temperature_start": "start", "temperature_end": "end", "anneal_share": "share"}  # settings -> fields of `Annealing`
COMPLETE, STOPPED = "complete", "stopped"  # states of a trial (`core/records.py`)


def trials(records: Records) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """(trials, names of the settings that any of them sets). Of trials of one configuration the newest counts.

    Columns: label, pruner, configuration, trial_state, validation_hard (mean over seeds at its last look), spent_s (of all its
    scorers), training_images, and a column per setting, nan where a method has no such setting or does not use it.
    """
    rows = records.told("search", "label", "pruner", "started")
    if rows.empty:
        return rows, ()
    rows = rows.astype({name: str for name in ("label", "pruner", "searched_settings", "trial_state", "started")})
    rows = rows[rows["started"] == rows.groupby(["label", "configuration"])["started"].transform("max")]
    last = rows[rows["training_step"] == rows.groupby("cell", observed=True)["training_step"].transform("max")]
    about = ["label", "pruner", "configuration", "trial_state", "searched_settings", "training_images"]
    found = last.groupby("cell", observed=True)[about].first()
    found["validation_hard"] = last.groupby("cell", observed=True)["validation_hard"].mean()
    found["spent_s"] = rows.groupby("cell", observed=True)["spent_s"].sum()
    settings = pd.DataFrame([json.loads(text) for text in found["searched_settings"]], index=found.index)
    names = tuple(settings.columns)
    settings = settings.astype(float)
    for spelling in set(found["pruner"]):
        settings.loc[found["pruner"] == spelling, [name for name in unused(spelling) if name in names]] = float("nan")
    return found.join(settings).sort_values(["label", "configuration"], kind="stable").reset_index(drop=True), names


@lru_cache(maxsize=256)
def unused(spelling: str) -> tuple[str, ...]:
    """Shared settings that the training of a method does not use; () where it is not installed.

    Nothing states them: of a recipe's temperatures a method sees what its `temperature` makes of them, so a setting that moves this
    at no step is not used. (A list beside `searched` would be part of the code that names every answer ever paid for.)
    """
    try:
        method = registry.load("pruners", spelling)
    except ValueError:
        return ()
    if not isinstance(method, TrainablePruner):
        return ()
    own = Annealing(2.0, 0.1, 0.5)

    def temperatures(asked: Annealing) -> list[float]:
        return [method.temperature(Progress(step, 8), asked) for step in range(8)]

    return tuple(
        name for name, field in ANNEALED.items()
        if temperatures(replace(own, **{field: 0.75 * getattr(own, field)})) == temperatures(own)
    )  # fmt: skip
