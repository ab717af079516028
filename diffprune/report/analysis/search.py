"""Trials of a search of training settings as a frame: one row per trial, what it set in columns."""

from __future__ import annotations

import json

import pandas as pd

from diffprune.report.analysis.records import Records

COMPLETE, STOPPED = "complete", "stopped"  # states of a trial (`core/records.py`)


def trials(records: Records) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """(trials, names of the settings that any of them sets). Of trials of one configuration the newest counts.

    Columns: label, pruner, configuration, trial_state, validation_hard (mean over seeds at its last look), spent_s (of all its
    scorers), training_images, and a column per setting, nan where a method has no such setting.
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
    return found.join(settings.astype(float)).sort_values(["label", "configuration"], kind="stable").reset_index(drop=True), names
