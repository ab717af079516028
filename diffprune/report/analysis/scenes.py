"""For every picture whose kept tokens are in the store: one question about it and what each method answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from diffprune.report.analysis.comparison import FULL, Comparison
from diffprune.report.analysis.records import Records


@dataclass(frozen=True)
class Asked:
    """A question about a picture. answers: {label: (answer, credit)}."""

    question: str
    target: str
    answers: Mapping[str, tuple[str, float]]


@dataclass(frozen=True)
class Scene:
    """A picture of the embedded world. masks: {label: bool [tokens]}; asked: None where no question about it is in the store."""

    seed: int
    masks: Mapping[str, np.ndarray]
    asked: Asked | None = field(default=None)


def scenes(records: Records, chapters: list[Comparison]) -> list[Scene]:
    """In the order of their seeds, those with answers (of the first chapter that has them) before the others."""
    found = [Scene(seed, masks, _first(records, chapters, str(seed), list(masks))) for seed, masks in sorted(records.masks.items())]
    return sorted(found, key=lambda one: one.asked is None)


def _first(records: Records, chapters: list[Comparison], picture: str, methods: list[str]) -> Asked | None:
    found = (_asked(records, chapter, picture, methods) for chapter in chapters if str(chapter.setting["model"]) == "embedded")
    return next((asked for asked in found if asked), None)


def _asked(records: Records, chapter: Comparison, picture: str, methods: list[str]) -> Asked | None:
    """The question in which the methods differ most of those the unpruned model has right, the first by name of equals; each
    method's first scorer seed at the budget whose tokens are shown. None where no method answered one there."""
    chosen = records.told("kept_tokens", "label", "budget", "started").sort_values("started", kind="stable")
    budget = chosen.drop_duplicates("label", keep="last").set_index("label")["budget"].astype(str)
    arms = {label: chapter.arms.get((label, "" if label == FULL else budget.get(label, "")), {}) for label in (FULL, *methods)}
    first = {str(cell): label for label, arm in arms.items() if arm for cell in arm[min(arm)].values()}
    rows = chapter.rows[(chapter.rows["group"].astype(str) == picture) & chapter.rows["cell"].astype(str).isin(list(first))]
    if rows.empty:
        return None
    benchmark = rows["cell"].map(chapter.evaluated["benchmark"]).astype(str)
    rows = rows.assign(label=rows["cell"].astype(str).map(first), asked=benchmark + "\t" + rows["sample"].astype(str))
    wide = rows.pivot_table(index="asked", columns="label", values="credit", aggfunc="first", observed=True).sort_index()
    pruned = wide.drop(columns=FULL, errors="ignore")
    if pruned.empty:  # this chapter did not ask at the budget of the newest selection, or not about this picture
        return None
    spread = (pruned.max(axis=1) - pruned.min(axis=1)) * (1 if FULL not in wide else wide[FULL] >= 1)
    told = records.texts(rows[rows["asked"] == spread.idxmax()]).drop_duplicates("label").set_index("label")
    about = told.iloc[0]
    answers = {label: (str(told.loc[label, "answer"]), float(told.loc[label, "credit"])) for label in arms if label in told.index}
    return Asked(str(about["question"]), str(about["target"]), answers)
