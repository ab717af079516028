"""What a job would cost on a cluster: cells, answers, hours, bytes and files; of each whether it was measured or is assumed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from diffprune.core.cell import Cell, Questions
from diffprune.evaluate.asked import made_ready
from diffprune.io.blob_store import remote
from diffprune.job.plan import CELLS, Plan
from diffprune.store import Store, bundles

ASSUMED_BYTES = 40.0  # of an answer with its grade, compressed, where no store tells: about what the committed reports take
OF_CELLS = ["verb", "model", "method", "budget", "status", "rows", "seconds", "hardware"]


@dataclass(frozen=True)
class Rates:
    """What cells took in a store. seconds: one row per cell that did not fail, `OF_CELLS`; step_ms: by method; bytes_per_answer: of
    the parts of answers and grades."""

    place: Path
    machine: str
    seconds: pd.DataFrame
    step_ms: dict[str, float]
    bytes_per_answer: float | None


def read(place: Path, gpu: str | None) -> Rates:
    """The rates of the run in a folder, or of a report beside whose page its store lies; gpu: a part of the name of the GPU wanted.

    Raises:
        ValueError: it holds no timed cell, or none on such a GPU, or those of several machines and `gpu` does not say of which.
    """
    store = _store(place)
    found = _timed(store)
    if found.empty:
        raise ValueError(f"{place} holds no cell that was timed: name the folder of a run that evaluated, as in --rates runs/demo")
    kinds = sorted(set(found["machine"]))
    wanted = [kind for kind in kinds if gpu is None or gpu.lower() in kind.lower()]
    if not wanted:
        raise ValueError(f"{place} was measured on {' and '.join(kinds)}, not on {gpu!r}: name a run on that with --rates")
    if len(wanted) > 1:
        raise ValueError(f"{place} was measured on {' and '.join(wanted)}: say with --gpu which of them counts")
    steps = store.read("steps", ["method", "step_ms", "hardware"])
    steps = steps[steps["hardware"].map(machine) == wanted[0]]
    size, answers = store.bytes_of("answers") + store.bytes_of("grades"), len(store.read("answers", ["sample"]))
    return Rates(
        place, wanted[0], found[found["machine"] == wanted[0]], dict(steps.groupby("method")["step_ms"].mean()),
        size / answers if answers else None,
    )  # fmt: skip


def own(folder: Path) -> Rates | None:
    """The rates of the run in this folder, where it has timed anything yet."""
    return None if _timed(_store(folder)).empty else read(folder, None)


def _store(place: Path) -> Store:
    return Store(place / "store" if remote(place) or (place / "store").is_dir() else place)


def _timed(store: Store) -> pd.DataFrame:
    found = store.read("outcomes", OF_CELLS)
    return found[(found["status"] == "ok") & (found["seconds"] > 0)].assign(machine=lambda rows: rows["hardware"].map(machine))


def machine(hardware: str) -> str:
    """The GPU of a record's hardware, else its processor."""
    told = json.loads(hardware)
    return str((told.get("gpus") or [told.get("cpu") or "an unknown machine"])[0])


def lines(plan: Plan, stages: Sequence[str], rates: Rates | None) -> list[str]:
    """What is left of a job, stage by stage."""
    done, workers = plan.store.done(), plan.job.workers
    found = [f"plan: {plan.job.name} on {workers} worker{'s' * (workers != 1)}, one {_unit(rates)} each"]
    if rates is None:
        found.append("no rates: name a run with --rates, and hours are told as well")
    found += _training(plan, rates) if "train" in stages and plan.job.train else []
    if "search" in stages and plan.job.search:
        found.append(f"search: {len(plan.trials())} trials, hours not estimated")
    for stage in CELLS:
        if stage in stages:
            cells = plan.cells(stage)
            left = [cell for cell in cells if cell.key not in done]
            found.append(f"{stage}: {len(cells):,} cells, {len(cells) - len(left):,} done, {len(left):,} to do")
            found += (_evaluating(left, rates, workers) if stage == "evaluate" else _alone(stage, left, rates)) if left else []
    return found


def _unit(rates: Rates | None) -> str:
    return rates.machine if rates else "GPU or core"


def _training(plan: Plan, rates: Rates | None) -> list[str]:
    recipe, left = plan.job.train, plan.untrained()
    assert recipe is not None
    told = [f"train: {len(recipe.pruners) * len(recipe.seeds)} scorers, {len(left)} to do"]
    known = rates.step_ms if rates else {}
    mean = sum(known.values()) / len(known) if known else math.nan
    hours = sum(recipe.of(spec).steps for spec, _ in left) * mean / 3.6e6
    if left and known:
        told.append(f"  {_hours(hours)} at {mean:,.0f} ms a step, the mean of methods measured; other batches or models differ")
    elif left:
        told.append("  hours unknown: no step of training was measured")
    return told


def _evaluating(left: Sequence[Cell], rates: Rates | None, workers: int) -> list[str]:
    """Answers, hours, bytes and files of cells to evaluate."""
    sizes: dict[Questions, int] = {}
    for cell in left:
        (asked,) = cell.questions
        sizes[asked] = sizes[asked] if asked in sizes else len(made_ready(asked).samples)
    counts = [sizes[cell.questions[0]] for cell in left]
    told = [f"  {sum(counts):,} answers, counted"]
    if rates is not None:
        told += _answering(left, counts, rates, workers)
    each = rates.bytes_per_answer if rates else None
    how = "measured" if each else "assumed"
    size = sum(counts) * (each or ASSUMED_BYTES) / 2**20
    files = bundles.files_left(len(left))
    told.append(f"  {size:,.1f} MiB at {each or ASSUMED_BYTES:.0f} bytes an answer ({how}), in some {files:,} files at most")
    return told


def _answering(left: Sequence[Cell], counts: Sequence[int], rates: Rates, workers: int) -> list[str]:
    rows = rates.seconds[(rates.seconds["verb"] == "evaluate") & (rates.seconds["rows"] > 0)]
    rows = rows[rows["model"] == str(left[0].model)]
    if rows.empty:
        return [f"  hours unknown: {rates.place} has no answers of {left[0].model}"]
    sums = rows.groupby(["method", "budget"])[["seconds", "rows"]].sum()
    known = (sums["seconds"] / sums["rows"]).to_dict()
    mean = rows["seconds"].sum() / rows["rows"].sum()
    asked = [(cell.columns().method, cell.columns().budget) for cell in left]
    total = sum(number * known.get(one, mean) for number, one in zip(counts, asked, strict=True))
    own = sum(number for number, one in zip(counts, asked, strict=True) if one in known)
    measured = f"{own / sum(counts):.0%} of the answers at the measured rate of their method and budget"
    return [
        f"  {_hours(total / 3600)} of {rates.machine}: {measured}, the rest at the mean, {1000 * mean:,.1f} ms",
        f"  {_hours(total / 3600 / workers)} on the clock: assumed that work is shared evenly and models load at no cost",
    ]


def _alone(stage: str, left: Sequence[Cell], rates: Rates | None) -> list[str]:
    """Hours of cells that one process does after the other."""
    rows = rates.seconds[rates.seconds["verb"] == stage] if rates else None
    if rates is None:
        return []
    if rows is None or rows.empty:
        return [f"  hours unknown: {rates.place} has no cell to {stage}"]
    mean = rows["seconds"].mean()
    how = f"one after the other, at the mean of {len(rows)} measured cells, {mean:,.1f} s"
    return [f"  {_hours(len(left) * mean / 3600)} on the clock, {how}"]


def _hours(hours: float) -> str:
    """A quantity of hours with three digits; below a tenth in seconds."""
    return f"{3600 * hours:,.3g} s" if hours < 0.1 else f"{hours:,.3g} h"
