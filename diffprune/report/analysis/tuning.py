"""The tuner's answers to one target held against the most accurate of them, paired over the calibration questions."""

from __future__ import annotations

import pandas as pd

from diffprune.report.analysis.panel import MeanCredit, distinct
from diffprune.report.analysis.records import Records
from diffprune.statistics import Difference, Verdict, judged

WHO = ["model", "dtype", "pruner", "weights_sha256"]  # whose calibration answers; with the budget, all of a candidate


def _answered(records: Records, cells: pd.DataFrame) -> pd.DataFrame:
    """Calibration answers: candidate, group and credit. Of a candidate's to one benchmark the newest count: where a tuning was
    repeated with another number of questions, those of before belong to no answer of now."""
    cells = cells.sort_values("started", kind="stable").drop_duplicates([*WHO, "budget", "benchmark"], keep="last")
    rows = records.of("predictions", cells)
    candidate = cells[[*WHO, "budget"]].astype(str).agg("\t".join, axis=1)
    return pd.DataFrame({
        "cell": rows["cell"].astype(object).map(candidate), "group": rows["group"].astype(object), "credit": rows["credit"]
    })  # fmt: skip


def against_best(records: Records, answers: pd.DataFrame) -> dict[object, Verdict | None]:
    """By index of `answers` (rows of choices with `WHO`): mean credit minus that of the most accurate answer to the same target, in
    points; None for that answer itself. Answers whose questions are not in the store are left out. All are one family."""
    cells = records.cells[records.cells["verb"] == "calibrate"]
    if cells.empty:
        return {}
    rows = _answered(records, cells)
    credits = MeanCredit(rows, distinct(rows["group"]), "calibration")
    candidate = answers[[*WHO, "chosen_budget"]].astype(str).agg("\t".join, axis=1)
    known = answers[candidate.isin(list(credits.columns))]
    family: dict[object, Difference] = {}
    best: list[object] = []
    for _, part in known.groupby(["model", "dtype", "target_speedup"], observed=True):
        first = part["accuracy"].idxmax()
        best.append(first)
        for other in part.index.drop(first):
            pair = credits.estimates([[credits.columns[candidate[one]]] for one in (other, first)])
            family[other] = (pair[0] - pair[1]).difference()
    return {**dict.fromkeys(best), **judged(family)}
