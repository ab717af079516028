"""The store's tables as frames, made small: what the report does not show is not read, what repeats is coded."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd

from diffprune.core.records import TABLES, Cell, Provenance
from diffprune.report.analysis import labels
from diffprune.store import Store

SETTING = ("model", "protocol", "split", "limit", "dtype", "mode", "batch")  # accuracies of one chapter share these
_LEARNT = ("model_hash", "pruner_hash", "revision")  # what changes when weights or data change under the same name
_CELL = tuple(f.name for f in fields(Cell))
_SOURCE = tuple(f.name for f in fields(Provenance))
_CODED = ("kind", "arm")
TEXTS = ("question", "answer")  # of predictions: most of their bytes, and a page shows a dozen
_OF_CELLS = ("predictions", "timings", "costs", "outcomes")


@dataclass(frozen=True)
class Records:
    """Frames by table, without provenance, and two frames about them.

    frames:  rows name their cell in `cell`, and predictions come without `TEXTS`; tables of no cell (steps, curve, trials,
             choices) have `run` and `hardware`.
    cells:   index `cell`; a cell's fields, `label` (method), `replaced`, `replicate` (scorer seed), `started`.
    sources: distinct provenance with the table it is of.
    problems: files the store set aside and results that newer ones replaced, one sentence each.
    """

    frames: dict[str, pd.DataFrame]
    cells: pd.DataFrame
    sources: pd.DataFrame
    problems: tuple[str, ...]
    store: Store

    def texts(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Rows of predictions with their `TEXTS`, in the same order; only the parts of their cells are read."""
        found = self.store.read("predictions", ["cell", "sample", *TEXTS], cells=set(rows["cell"]))
        return rows.merge(found, "left", ["cell", "sample"], validate="m:1").set_axis(rows.index)

    def of(self, table: str, cells: pd.DataFrame) -> pd.DataFrame:
        """Rows of `table` that belong to `cells`."""
        frame = self.frames[table]
        return where(frame, frame["cell"].isin(cells.index))


def where(frame: pd.DataFrame, mask: pd.Series) -> pd.DataFrame:
    """Rows where `mask` holds; the frame itself where it holds everywhere, because a million texts are slow to copy."""
    return frame if mask.all() else frame[mask]


def read(root: Path | str) -> Records:
    """All tables of a store. A store without records gives empty frames, not an error."""
    store = Store(root)
    frames: dict[str, pd.DataFrame] = {}
    cells: list[pd.DataFrame] = []
    sources: list[pd.DataFrame] = []
    for table in TABLES:
        own = [f.name for f in fields(TABLES[table])]
        if table in _OF_CELLS:  # a million rows: only what they say of their own, and who made them once per part
            frames[table] = store.read(table, ["cell", *(c for c in own if c not in TEXTS)], coded=True)
            made = store.origins(table)
            cells.append(_cells(made))
        else:
            made = store.read(table)
            frames[table] = _small(made, own)
        sources.append(_sources(table, made))
    every = pd.concat([c for c in cells if len(c)] or cells[:1])
    known, replaced = _newest(every[~every.index.duplicated()].sort_index())
    return Records(frames, known, pd.concat(sources, ignore_index=True), (*map(str, store.problems), *replaced), store)


def _column(frame: pd.DataFrame, owner: str, name: str) -> str:
    """Where a field stands: `<owner>_<name>` when another record of the row has a field of that name, else `name`."""
    return f"{owner}_{name}" if f"{owner}_{name}" in frame.columns else name


def _cells(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per cell of a frame: its fields, method and replicate."""
    one = frame.drop_duplicates("cell", keep="last")
    one = one[one["cell"] != ""]
    index = pd.Index(one["cell"].astype(str).to_numpy(object))
    cells = pd.DataFrame({name: one[_column(one, "cell", name)].to_numpy(object) for name in _CELL}, index=index)
    for name in ("started", "run", "dirty"):
        cells[name] = one[_column(one, "provenance", name)].to_numpy(object)
    methods = [labels.method(str(p)) for p in cells["pruner"]]
    cells["label"] = [m.label for m in methods]
    cells["replaced"] = [m.replaced for m in methods]
    cells["replicate"] = [f"{p} seed {s}" for p, s in zip(cells["pruner"], cells["seed"], strict=True)]
    cells["limit"] = ["all" if pd.isna(x) else str(x) for x in cells["limit"]]
    return cells


def _sources(table: str, frame: pd.DataFrame) -> pd.DataFrame:
    """Distinct provenance of a frame."""
    columns = [_column(frame, "provenance", name) for name in _SOURCE]
    one = frame.drop_duplicates([c for c in ("cell", "run", "attempt", "provenance_seed") if c in frame.columns])
    found = one[columns].astype(object).set_axis(list(_SOURCE), axis=1).drop_duplicates()
    found["table"] = table
    return found


def _small(frame: pd.DataFrame, own: list[str]) -> pd.DataFrame:
    """The record's own fields, the run and the hardware; strings that repeat become categories."""
    frame = frame[["run", "hardware", *(c for c in own if c not in ("run", "hardware"))]]
    return frame.astype({name: "category" for name in _CODED if name in frame.columns})


def _newest(cells: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Only the newest of cells that differ in nothing but weights or data; a sentence per pruner that lost some."""
    if cells.empty:
        return cells, []
    same = ["verb", *SETTING, "pruner", "seed"]
    last = (
        cells.sort_values("started", kind="stable")
        .groupby([*same, "benchmark"], sort=False, dropna=False)[list(_LEARNT)]
        .transform("last")
    )
    current = (last == cells[list(_LEARNT)].loc[last.index]).all(axis=1).reindex(cells.index)
    notes = [
        f"{len(old)} older {'cell' if len(old) == 1 else 'cells'} of {labels.method(str(pruner)).label} left out: weights or "
        f"data changed under the same name"
        for pruner, old in cells[~current].groupby("pruner", sort=True)
    ]
    return cells[current], notes
