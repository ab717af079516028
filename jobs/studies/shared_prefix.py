"""What it saves to prefill an image once for all questions about it: answers per second on the embedded model's ten benchmarks.

    python jobs/studies/shared_prefix.py --out reports/shared_prefix

One thread, two arms in shuffled turns: `alone` prefills every question with its image, `shared` prefills an image once and lets the
questions go on from there. A turn asks all ten benchmarks for one method and budget, grading included. Pictures are encoded and
questions tokenised before, as they are for all methods of a sweep but its first; prefixes are made anew in every turn. `rows that
differ` counts answers, grades and token counts over all turns.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from diffprune.core import registry
from diffprune.core.budget import Keep
from diffprune.core.cell import Cell
from diffprune.core.records import Prediction
from diffprune.evaluate.cache import Prefixes
from diffprune.evaluate.cells import Evaluation, cells
from diffprune.evaluate.evaluator import Evaluator
from diffprune.evaluate.transformers_backend import TransformersBackend
from diffprune.statistics import median_ratio
from diffprune.store.provenance import collect
from diffprune.vlm.load import load

ARMS = ("alone", "shared")
COUNTS = (48, 32, 16, 7)
NAMES = ("Unpruned", *(f"Attention, {count}" for count in COUNTS))
PREFIX_MIB = 1024
GOALS = {"Unpruned": 5.0, "Attention, 32": 3.0}  # answers per second of `shared` over those of `alone`


def asked(vlm: Any, limit: int | None) -> dict[str, list[Cell]]:
    """The ten cells of every method and budget, by name."""
    options = Evaluation(limit=limit)
    unpruned, attention = (registry.spec("pruners", name) for name in ("unpruned", "attention"))
    found = {"Unpruned": cells(vlm, [unpruned], [], options)}
    return found | {f"Attention, {count}": cells(vlm, [attention], [Keep(count)], options) for count in COUNTS}


def turn(backend: TransformersBackend, evaluator: Evaluator, asked: list[Cell]) -> tuple[float, list[Prediction]]:
    """(seconds, rows) of one method and budget."""
    backend.prefixes = Prefixes(backend.vlm.device, PREFIX_MIB)
    start = time.perf_counter()
    rows = [row for cell in asked for row in evaluator.run(cell)]
    return time.perf_counter() - start, rows


def measure(names: Sequence[str], limit: int | None, rounds: int) -> pd.DataFrame:
    """One row per method and budget; the first turn of every arm is not timed."""
    vlm: Any = load("embedded")
    backends = {arm: TransformersBackend(vlm, shares=arm == "shared") for arm in ARMS}
    evaluators, order, found = {arm: Evaluator(backend) for arm, backend in backends.items()}, random.Random(0), []
    every = asked(vlm, limit)
    for name in names:
        seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
        differing = 0
        for number in range(1 + rounds):
            rows = {}
            for arm in order.sample(ARMS, len(ARMS)):
                spent, rows[arm] = turn(backends[arm], evaluators[arm], every[name])
                seconds[arm] += [spent] if number else []
            differing += sum(one != other for one, other in zip(rows["alone"], rows["shared"], strict=True))
        ratio, answers = median_ratio(seconds["alone"], seconds["shared"]), len(rows["alone"])
        rates = {f"{arm}_per_s": answers / float(pd.Series(times).median()) for arm, times in seconds.items()}
        bounds = {"ratio": ratio.estimate, "ratio_low": ratio.low, "ratio_high": ratio.high}
        prefixes = backends["shared"].prefixes.prefilled
        found.append({"method": name, "answers": answers, "prefixes": prefixes, "rounds": rounds, **rates, **bounds,
                      "differing": differing})  # fmt: skip
        print(f"{name}: {rates['alone_per_s']:.0f} -> {rates['shared_per_s']:.0f} answers/s, {ratio.estimate:.2f}", flush=True)
    return pd.DataFrame(found)


def page(table: pd.DataFrame, origin: str) -> str:
    """The table as Markdown."""
    goals = ", ".join(f"{name} >= {goal:g}" for name, goal in GOALS.items())
    lines = [
        "# Questions that share the prefill of their image", "", (__doc__ or "").split("\n\n", 2)[2].strip(), "",
        f"Goals of shared / alone: {goals}. {origin}", "",
        "| method, tokens of 144 | answers | prefixes | alone, answers/s | shared, answers/s | shared / alone | rows that differ |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for _, row in table.iterrows():
        missed = " (below)" if row.ratio < GOALS.get(row.method, 0) else ""
        rates = f"{row.alone_per_s:.0f} | {row.shared_per_s:.0f}"
        ratio = f"{row.ratio:.2f} [{row.ratio_low:.2f}, {row.ratio_high:.2f}]{missed}"
        lines.append(f"| {row.method} | {row.answers} | {row.prefixes} | {rates} | {ratio} | {row.differing} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write table.csv and README.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--limit", type=int, help="questions per benchmark; all of them, unless given")
    parser.add_argument("--method", action="append", choices=NAMES, help="all of them, unless given")
    given = parser.parse_args()
    torch.set_num_threads(1)
    table, made = measure(given.method or NAMES, given.limit, given.rounds), collect("shared_prefix", 1, 0)
    given.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(given.out / "table.csv", index=False, float_format="%.4f")
    origin = f"Commit {made.commit[:12]}{' (changed)' if made.dirty else ''}, {made.started}."
    (given.out / "README.md").write_text(page(table, origin), encoding="utf-8")


if __name__ == "__main__":
    main()
