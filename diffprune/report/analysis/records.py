"""The store's tables as frames, made small: what the report does not show is not read, what repeats is coded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from diffprune.core import registry
from diffprune.core.cell import CellColumns
from diffprune.core.records import TABLES, VIEWS, Provenance
from diffprune.core.spec import Call, Name, Spec, parse
from diffprune.report.analysis import labels
from diffprune.report.analysis.labels import Method, Style
from diffprune.store import Store

# Accuracies of one chapter share these.
SETTING = ("model", "protocol", "split", "limit", "dtype", "answer_tokens", "batch")
_LEARNT = ("model_sha256", "weights_sha256", "revision", "code")  # what changes when weights, data or code do, names do not
_CELL = tuple(f.name for f in fields(CellColumns))
_SOURCE = tuple(f.name for f in fields(Provenance))
_MADE = ("started", "run", "dirty", "hardware")
TEXTS = ("question", "answer")  # of predictions: most of their bytes, and a page shows a dozen


@dataclass(frozen=True)
class Records:
    """Frames by table, without provenance, and two frames about them.

    frames:  rows name their cell in `cell`; predictions come without `TEXTS`.
    cells:   index `cell`; a cell's columns, `label` (method, and its plug-in or recipe where several share a label), `replaced`,
             `replicate` (scorer seed), `started`.
    sources: distinct provenance with the table it is of.
    problems: files the store set aside, results that newer ones replaced, runs that were merged; one sentence each.
    asked:   label of the method that a report is to be about, or "".
    """

    frames: dict[str, pd.DataFrame]
    cells: pd.DataFrame
    sources: pd.DataFrame
    problems: tuple[str, ...]
    store: Store
    asked: str = ""

    @cached_property
    def _methods(self) -> list[Method]:
        """All methods of the store, in no order; see `methods`."""
        rows = self.cells[~self.cells["replaced"].astype(bool) & (self.cells["label"] != "")].drop_duplicates("label")
        found = [labels.of_row(row, str(row["label"])) for row in rows.to_dict("records")]
        plain = {labels.SUBJECT, *(method.label for method in found)}
        return [method if method.base in plain else replace(method, base=method.label) for method in found]

    @cached_property
    def subject(self) -> Method:
        """Whom a report is about (`labels.chosen`)."""
        return labels.chosen(self._methods, self.asked)

    @cached_property
    def methods(self) -> dict[str, Method]:
        """Every method of the store by label, in the order of tables; diagnostics are left out.

        A trained method that is there with options alone, as a search has chosen them, is no variant: it stands for its method.
        """
        return {method.label: method for method in labels.ordered(self._methods, self.subject)}

    @cached_property
    def styles(self) -> dict[str, Style]:
        """Colour, marker and dash of every method."""
        return labels.styles(self.methods.values())

    @cached_property
    def masks(self) -> dict[int, dict[str, np.ndarray]]:
        """What each method keeps of scenes of the embedded world: {scene seed: {label: bool [tokens]}}, the newest selection."""
        rows = self.told("kept_tokens", "label", "started").sort_values(["started", "picture", "token"], kind="stable")
        newest = where(rows, rows["started"] == rows.groupby("label", observed=True)["started"].transform("max"))
        found: dict[int, dict[str, np.ndarray]] = {}
        for label in [x for x in self.methods if (newest["label"] == x).any()]:
            for picture, part in newest[newest["label"] == label].groupby("picture", observed=True):
                if str(picture).isdecimal():
                    found.setdefault(int(str(picture)), {})[label] = part["token_kept"].to_numpy(bool)
        return found

    def texts(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Rows of predictions with their `TEXTS`, in the same order; only the parts of their cells are read."""
        found = self.store.read("predictions", ["cell", "sample", *TEXTS], cells=set(rows["cell"]))
        return rows.merge(found, "left", ["cell", "sample"], validate="m:1").set_axis(rows.index)

    def of(self, table: str, cells: pd.DataFrame) -> pd.DataFrame:
        """Rows of `table` that belong to `cells`."""
        frame = self.frames[table]
        return where(frame, frame["cell"].isin(cells.index))

    def told(self, table: str, *columns: str) -> pd.DataFrame:
        """All rows of a table with columns of their cells beside them, those of current cells only."""
        return self.frames[table].join(self.cells[list(columns)], on="cell", how="inner")


def where(frame: pd.DataFrame, mask: pd.Series) -> pd.DataFrame:
    """Rows where `mask` holds; the frame itself where it holds everywhere, because a million texts are slow to copy."""
    return frame if mask.all() else frame[mask]


def read(root: Path | str | Records, subject: str = "") -> Records:
    """All tables of a store; what has been read already as it is. A store without records gives empty frames, not an error.

    subject: label of the method that a report is about; "" for the usual one (`labels.chosen`).
    """
    if isinstance(root, Records):
        return root
    store = Store(root)
    frames: dict[str, pd.DataFrame] = {}
    cells: list[pd.DataFrame] = []
    sources: list[pd.DataFrame] = []
    shown = VIEWS | {table: kind for table, kind in TABLES.items() if table not in ("answers", "grades")}  # joined in the view
    for table in shown:  # a million rows: only what they say of their own, and who made them once per part
        own = [f.name for f in fields(shown[table])]
        frames[table] = store.read(table, ["cell", *(c for c in own if c not in TEXTS)], coded=True)
        made = store.origins(table)
        cells.append(made.drop_duplicates("cell", keep="last").set_index("cell").rename_axis(None)[[*_CELL, *_MADE]])
        found = made[list(_SOURCE)].drop_duplicates()
        sources.append(found.assign(table=table))
    every = pd.concat([c for c in cells if len(c)] or cells[:1])
    known, replaced = _newest(_labelled(every[~every.index.duplicated()].sort_index()))
    known, elsewhere = _one_machine(known)
    told = pd.concat(sources, ignore_index=True)
    problems = (*map(str, store.problems), *replaced, *elsewhere, *_stale(known, store.graders()), *_merged(told))
    return Records(frames, known, told, problems, store, subject)


def _stale(cells: pd.DataFrame, graders: Mapping[str, str]) -> list[str]:
    """A sentence per benchmark whose answers were graded by other code than is here; nothing where it is not installed."""
    found = []
    for (spelling, label), part in cells[cells["verb"] == "evaluate"].groupby(["benchmark", "benchmark_label"], observed=True):
        try:
            call = parse(str(spelling))
            here = registry.grader(Spec(call.name, call.options))
        except ValueError:
            continue
        if old := [cell for cell in part.index if graders.get(cell, here) not in (here, "")]:
            found.append(
                f"{len(old)} of {len(part)} cells of {label or spelling} were graded by other code than is here now: "
                "`diffprune run` or `evaluate` grades their answers again, without the model"
            )
    return found


def _merged(sources: pd.DataFrame) -> list[str]:
    """A sentence where several runs have written into one store."""
    runs = sorted(set(sources["run"]))
    return [f"records of {len(runs)} runs stand in this store: {', '.join(runs)}"] if len(runs) > 1 else []


def _one_machine(cells: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Without timings that were taken on another machine than those of most methods, at equally many than the newest: overheads and
    speedups of two machines are not of one table. A sentence per method that lost some."""
    timed = cells[cells["verb"] == "measure"].copy()
    about = {text: json.loads(text) for text in timed["hardware"].astype(str).unique()}
    timed["machine"] = [str([about[text].get("cpu"), about[text].get("gpus")]) for text in timed["hardware"].astype(str)]
    group = [*SETTING, "mode"]
    by_machine = timed.groupby([*group, "machine"], dropna=False, observed=True)
    timed["methods"], timed["last"] = by_machine["label"].transform("nunique"), by_machine["started"].transform("max")
    ranked = timed.sort_values(["methods", "last"], kind="stable")
    main = ranked.groupby(group, dropna=False, observed=True)["machine"].transform("last").reindex(timed.index)
    here = timed["machine"] == main
    notes = [
        f"timings of {label or 'the model'} on another machine ({about[str(part['hardware'].iloc[0])].get('cpu')}) left out: "
        "ratios between machines are no speedups, so measure all methods on one"
        for label, part in timed[~here].groupby("label", sort=True)
    ]
    return cells.drop(timed.index[~here]), notes


def _labelled(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells with the method's label, whether its tokens were replaced instead of removed, and the replicate."""
    cells = cells.copy()
    for column in ("limit", "answer_tokens"):
        cells[column] = ["all" if pd.isna(x) else str(int(x)) for x in cells[column]]
    cells["trained_as"] = cells["recipe"].where(cells["recipe"] != "", cells["weights_sha256"])  # unknown: nobody's replicate
    plugin = pd.Series([_plugin(*told) for told in zip(cells["pruner"], cells["method_kind"], strict=True)], cells.index)
    by_plugin, by_recipe = _ambiguous(cells, plugin), _ambiguous(cells, cells["trained_as"])
    behind = (" (" + plugin + ")").where(by_plugin, "") + (" (recipe " + cells["trained_as"].str[:6] + ")").where(by_recipe, "")
    cells["label"] = cells["method"] + behind
    cells["replaced"] = cells["method_kind"] == "diagnostic"
    seeds = ["" if pd.isna(s) else f"{int(s):09d}" for s in cells["scorer_seed"]]
    cells["replicate"] = [f"{seed} {sha}".strip() for seed, sha in zip(seeds, cells["weights_sha256"], strict=True)]
    return cells


def _ambiguous(cells: pd.DataFrame, told: pd.Series) -> pd.Series:
    """Cells whose method's label belongs to several of `told`: plug-ins, or recipes."""
    several = told[told != ""].groupby(cells["method"]).nunique()
    return cells["method"].isin(several.index[several > 1]) & (told != "")


def _plugin(pruner: str, kind: str) -> str:
    """The plug-in whose label a cell has: of a diagnostic that of the method inside, of a bound none."""
    try:
        call = parse(pruner) if kind != "bound" else None
    except ValueError:
        return ""
    if call and kind == "diagnostic" and (inner := [value for _, value in call.options if isinstance(value, (Call, Name))]):
        call = inner[0] if isinstance(inner[0], Call) else Call(inner[0])
    return call.name if call else ""


def _newest(cells: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Only the newest of cells that differ in nothing but weights, data or code, and of each benchmark's data the newest that any
    method was asked about: others are no rows of one table. A sentence per method that lost some."""
    if cells.empty:
        return cells, []
    same = ["verb", *SETTING, "mode", "pruner", "trained_as", "scorer_seed"]
    last = (
        cells.sort_values("started", kind="stable")
        .groupby([*same, "benchmark"], sort=False, dropna=False)[list(_LEARNT)]
        .transform("last")
    )
    current = (last == cells[list(_LEARNT)].loc[last.index]).all(axis=1).reindex(cells.index)
    notes = [
        f"{len(old)} older {'cell' if len(old) == 1 else 'cells'} of {label or 'the model'} left out: weights, data or code "
        "changed under the same name"
        for label, old in cells[~current].groupby("label", sort=True)
    ]
    cells = cells[current]
    data = cells["revision"].fillna("").astype(str)
    newest = (
        cells.assign(data=data).sort_values("started", kind="stable")
        .groupby(["verb", *SETTING, "benchmark"], sort=False, dropna=False)["data"].transform("last").reindex(cells.index)
    )  # fmt: skip
    notes += [
        f"{len(old)} {'cell' if len(old) == 1 else 'cells'} of {label or 'the model'} left out: other data than those that "
        f"{benchmark} was asked about last"
        for (label, benchmark), old in cells[data != newest].groupby(["label", "benchmark"], sort=True)
    ]
    return cells[data == newest], notes
