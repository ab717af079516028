"""What a run's folder says that it did not say at the last look: steps of the log, cells of the store. Read little by little."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diffprune.core.records import Step
from diffprune.io.blob_store import remote
from diffprune.report.analysis.speed import Headline, headline
from diffprune.statistics import speedup
from diffprune.store import Store
from diffprune.store.manifest import BUNDLES, MANIFESTS
from diffprune.track.tracker import Scalars
from diffprune.train.checkpoints import as_step, verified
from diffprune.train.step_log import opened
from diffprune.watch.snapshot import Curve, Failure, Point

BINS = 120  # points of a loss curve
SHOWN_FAILURES = 20
TOLD = (
    "loss", "penalty", "temperature", "kept", "grad_norm", "score_sd", "overlap", "step_ms", "validation_soft", "validation_hard",
)  # fmt: skip
ABOUT = ["cell", "verb", "method", "method_kind", "budget", "benchmark", "benchmark_label", "blind", "pruner", "scorer_seed"]


class News:
    """Steps and cells of one run's folder as far as they were read. steps: of each scorer, as the recipe has them.

    planned: keys of the cells that the run asks for, by verb. Others in its store, asked with another limit, other weights or other
    code, are no part of what is shown; of a verb that is not among these all are.
    """

    def __init__(self, folder: Path, steps: Mapping[str, int]) -> None:
        self.folder, self.steps = folder, dict(steps)
        self.store, self.statuses = Store(folder / "store"), dict[str, str]()
        self._steps_log, self._place, self._listed = opened(folder), None, tuple[int, ...]()
        self._log: dict[str, dict[int, Step]] = {}
        self.planned: Mapping[str, Collection[str]] = {}
        self._accuracy: dict[str, dict[str, Any]] = {}  # by cell to evaluate
        self._timed: dict[str, dict[str, Any]] = {}  # by cell to measure
        self._failures: dict[str, tuple[str, Failure]] = {}  # by cell: its verb, and what is told of it

    def look(self) -> list[Scalars]:
        """Take up what is new; returns it as trackers are told it."""
        return [*self._steps(), *self._cells()]

    # -- the step log ------------------------------------------------------------------------------------------------

    def _steps(self) -> Iterator[Scalars]:
        whole, self._place = self._steps_log.newer(self._place)
        for line in filter(None, map(verified, whole.splitlines())):
            if "begin" in line:  # what an earlier process did from here on is done again
                scorer, start = line["begin"]
                self._log[scorer] = {step: row for step, row in self._log.get(scorer, {}).items() if step < start}
            elif (found := as_step(line)) is not None:
                scorer, row = found
                self._log.setdefault(scorer, {})[row.step] = row
                yield Scalars(f"train/{scorer}", row.step, {name: float(getattr(row, name)) for name in TOLD})

    def curves(self) -> tuple[Curve, ...]:
        """The loss of every scorer."""
        return tuple(_curve(scorer, rows, self.steps.get(scorer, 0)) for scorer, rows in self._log.items() if rows)

    # -- the store ---------------------------------------------------------------------------------------------------

    def _cells(self) -> list[Scalars]:
        """Cells with a new outcome. A folder of manifests is listed only when a file came into it; a bucket tells no such time."""
        if not remote(self.folder):
            folders = [self.folder / "store" / name for name in (MANIFESTS, BUNDLES)]
            listed = tuple(folder.stat().st_mtime_ns for folder in folders if folder.is_dir())
            if listed == self._listed:
                return []
            self._listed = listed
        before, self.statuses = self.statuses, self.store.statuses()
        new = {cell for cell, status in self.statuses.items() if before.get(cell) != status}
        failed = {cell for cell in new if self.statuses[cell] == "failed"}
        for row in self.store.read("outcomes", [*ABOUT, "reason"], cells=failed).to_dict("records") if failed else ():
            seed = "" if pd.isna(row["scorer_seed"]) else f"seed {int(row['scorer_seed'])}"
            blind = "without image" if row["blind"] else ""
            what = " ".join(filter(None, (row["verb"], row["method"], seed, row["budget"], row["benchmark_label"], blind)))
            self._failures[row["cell"]] = str(row["verb"]), Failure(what=what, reason=str(row["reason"]))
        good = new - failed
        for cell in good:
            self._failures.pop(cell, None)
        return [*self._answers(good), *self._timings(good), *self._looks(good)] if good else []

    def _answers(self, cells: set[str]) -> Iterator[Scalars]:
        rows = self.store.read("predictions", [*ABOUT, "credit", "visual_kept", "error"], cells=cells)
        for cell, part in rows[(rows["verb"] == "evaluate") & ~rows["blind"].astype(bool)].groupby("cell", observed=True):
            first, graded = part.iloc[0], part[part["error"] == ""]
            if len(graded) and first["method_kind"] != "diagnostic":
                told = {name: str(first[name]) for name in ("method", "method_kind", "budget", "benchmark", "benchmark_label")}
                accuracy, kept = float(graded["credit"].mean()), float(graded["visual_kept"].mean())
                self._accuracy[str(cell)] = told | {"accuracy": accuracy, "kept": kept}
                name = told["benchmark_label"] or told["benchmark"]
                yield Scalars(f"evaluate/{_seeded(first)}", round(kept), {name: accuracy})

    def _timings(self, cells: set[str]) -> Iterator[Scalars]:
        names = [*ABOUT, "batch", "mode", "span", "arm", "repetition", "value_ms", "visual_kept", "flags"]
        for cell, part in self.store.read("timings", names, cells=cells).groupby("cell", observed=True):
            first, rounds = part.iloc[0], speedup.rounds(part)
            try:
                net = speedup.prefill_speedup_net(rounds).estimate
            except (ValueError, KeyError):  # spans that were not asked for
                continue
            if not part["flags"].astype(str).str.contains("overhead_excluded").any():
                about = {name: first[name] for name in ("method", "budget", "batch", "mode")}
                session = tuple(rounds["full", "prefill"])  # its cells share the unpruned arm
                self._timed[str(cell)] = about | {"session": session, "net": net}
            kept = part.loc[part["arm"] == "pruned", "visual_kept"].mean()
            yield Scalars(f"measure/{_seeded(first)}", round(kept), {"net_speedup": net})

    def _looks(self, cells: set[str]) -> Iterator[Scalars]:
        names = ["pruner", "method", "configuration", "training_seed", "training_step", "validation_hard"]
        for row in self.store.read("search", names, cells=cells).to_dict("records"):
            name = f"configuration {row['configuration']}, seed {row['training_seed']}"
            yield Scalars(f"search/{row['method']}", int(row["training_step"]), {name: float(row["validation_hard"])})

    def _asked(self, verb: str, cell: str) -> bool:
        """Whether the run asks for a cell."""
        return cell in self.planned.get(verb, (cell,))

    def points(self) -> tuple[Point, ...]:
        """Methods at their budgets: benchmarks count alike, and so do seeds."""
        table = pd.DataFrame([row for cell, row in self._accuracy.items() if self._asked("evaluate", cell)])
        if table.empty:
            return ()
        _, nets = self.speedups()
        found = []
        for (method, budget), part in table.groupby(["method", "budget"], sort=False):
            found.append(
                Point(
                    method=method, budget=budget, kept=float(part["kept"].mean()), cells=len(part),
                    accuracy=float(part.groupby("benchmark")["accuracy"].mean().mean()),
                    bound=bool((part["method_kind"] == "bound").all()), speedup=nets.get((method, budget)),
                )
            )  # fmt: skip
        return tuple(sorted(found, key=lambda point: (not point.bound, point.method, -point.kept)))

    def speedups(self) -> tuple[Headline | None, dict[tuple[str, str], float]]:
        """With which batch and mode the report's first speedups are timed, and those by method and budget: of scorers in a session
        the mean, of sessions the geometric mean."""
        table = pd.DataFrame([row for cell, row in self._timed.items() if self._asked("measure", cell)])
        if table.empty:
            return None, {}
        arms = table[["method", "budget", "batch", "mode"]].drop_duplicates()
        first = headline((int(batch), str(mode), True) for batch, mode in zip(arms["batch"], arms["mode"], strict=True))
        assert first is not None, "something was timed"
        mine = table[(table["batch"] == first.batch) & (table["mode"] == first.mode)]
        sessions = np.log(mine.groupby(["method", "budget", "session"])["net"].mean())
        return first, {at: math.exp(one) for at, one in sessions.groupby(level=["method", "budget"]).mean().items()}

    def failures(self) -> tuple[tuple[Failure, ...], int]:
        """(the first failures, how many there are)."""
        found = [told for cell, (verb, told) in self._failures.items() if self._asked(verb, cell)]
        return tuple(found[:SHOWN_FAILURES]), len(found)


def _seeded(row: Any) -> str:
    """The method of a row, and which of its seeds."""
    return str(row["pruner"]) + ("" if pd.isna(row["scorer_seed"]) else f", seed {int(row['scorer_seed'])}")


def _curve(scorer: str, rows: Mapping[int, Step], steps: int) -> Curve:
    done = max(rows) + 1
    width = max(1, math.ceil(max(steps, done) / BINS))
    bins: dict[int, list[float]] = defaultdict(list)
    for step, row in rows.items():
        if math.isfinite(row.loss):
            bins[step // width].append(row.loss)
    checked = [row.validation_hard for row in rows.values() if math.isfinite(row.validation_hard)]
    last = rows[done - 1].loss
    return Curve(
        scorer=scorer, step=done, steps=max(steps, done), loss=last if math.isfinite(last) else None,
        validation=checked[-1] if checked else None,
        points=tuple((width * number + (width - 1) / 2, sum(values) / len(values)) for number, values in sorted(bins.items())),
    )  # fmt: skip
