"""Hold what a report prints against what SQL over the Parquet files says, number by number."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffprune.store.views import connect
from diffprune.verify import accuracy, forms, page, speed, tuning
from diffprune.verify.integrity import unsound
from diffprune.verify.page import Printed

SLACK = 1e-6  # relative, beside the printed rounding: sums in another order
INTERVAL = "intervals of the bootstrap, checked to contain their estimate"
NOTED = "p values and detectable differences of the bootstrap, failed seeds and other counts, in small print"
COPIED = "numbers printed in papers, copied"
TEXT = "text of the store: names, hashes, versions, answers, reasons"

TABLES = """
CREATE TABLE expected (chapter VARCHAR, "table" VARCHAR, "row" VARCHAR, "column" VARCHAR, value DOUBLE, low DOUBLE, high DOUBLE,
    reason VARCHAR);
CREATE TABLE printed (place BIGINT, chapter VARCHAR, "table" VARCHAR, "row" VARCHAR, "column" VARCHAR, value DOUBLE,
    printed VARCHAR, note VARCHAR);
"""
MATCHED = """
SELECT p.place, e.value, e.low, e.high, e.reason FROM printed p JOIN expected e ON e.chapter = p.chapter AND e."table" = p."table"
    AND trim(regexp_replace(e."row", '\\s+', ' ', 'g')) = p."row" AND e."column" = p."column"
WHERE e.value IS NOT NULL QUALIFY row_number() OVER (PARTITION BY p.place ORDER BY abs(e.value - p.value)) = 1
"""


@dataclass
class Verified:
    """recomputed: numbers that agree; differences: a sentence each; left: reason -> how many numbers were not recomputed."""

    recomputed: int = 0
    intervals: int = 0
    differences: list[str] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [*self.differences, f"{self.recomputed} numbers and {self.intervals} intervals recomputed from Parquet"]
        lines += [f"{num} not recomputed: {reason}" for reason, num in sorted(self.left.items())]
        return "\n".join([*lines, f"{len(self.differences)} differences"])


def verify(place: Path | str) -> Verified:
    """Every number of the report of a run's folder, or of a report with a folder `store` beside its page: what `numbers.csv` has of
    it against the store, and what its other files print against that (`forms`).

    Raises:
        ValueError: there is no report or no store, or a file of either is missing or damaged.
    """
    folder = Path(place)
    report = folder / "report" if (folder / "report" / "report.html").is_file() else folder
    if not any((report / name).is_file() for name in ("report.html", "numbers.csv")):
        raise ValueError(f"{folder} holds no report that could be verified: write it with `diffprune report {folder}`")
    entries = page.read(report / "numbers.csv")
    found = Verified(differences=unsound(folder / "store"))
    for entry, told in zip(entries, _recomputed(folder / "store", entries), strict=True):
        _compare(found, entry, told)
    found.differences += forms.disagreements(report, entries)
    return found


def _recomputed(store: Path, entries: list[Printed]) -> Iterator[dict[str, Any] | None]:
    """What SQL says of each entry; None where it says nothing."""
    with connect(store) as data:
        data.execute(TABLES)
        rows = [
            (i, e.chapter, e.family, e.row, e.column, None if math.isnan(e.value) else e.value, e.printed, e.note)
            for i, e in enumerate(entries)
        ]
        data.execute("INSERT INTO printed SELECT " + ", ".join(["unnest(?)"] * 8), [list(one) for one in zip(*rows, strict=True)])
        for statement in (*accuracy.STATEMENTS, *speed.STATEMENTS, *tuning.STATEMENTS):
            data.execute(statement)
        names = ("value", "low", "high", "reason")
        told = {place: dict(zip(names, rest, strict=True)) for place, *rest in data.execute(MATCHED).fetchall()}
    return (told.get(i) for i in range(len(entries)))


def _compare(found: Verified, entry: Printed, told: dict[str, Any] | None) -> None:
    """One entry: agrees, differs, or is not recomputed with a reason."""
    if any(mark.isdigit() for mark in entry.note):
        found.left[NOTED] += 1
    if not entry.digits:
        found.left[TEXT] += any(mark.isdigit() for mark in entry.printed)
        return
    if math.isnan(entry.value) and entry.printed.startswith("–"):
        return
    pairs = [(entry.main, entry.value), *zip(entry.interval or (), (entry.low, entry.high), strict=False)]
    if not all(abs(printed - value) <= entry.rounding * (1 + SLACK) for printed, value in pairs):
        ends = f" [{entry.low}, {entry.high}]" if entry.interval else ""
        found.differences.append(f"{entry.where}: prints {entry.printed!r} for {entry.value}{ends}")
    elif entry.row.startswith("theirs |"):
        found.left[COPIED] += 1
    elif told is None:
        found.differences.append(f"{entry.where}: prints {entry.printed!r}, nothing in the store says so")
    elif not _near(entry.main, told["value"], entry):
        found.differences.append(f"{entry.where}: prints {entry.printed!r}, the store says {told['value']:.10g}")
    elif told["reason"]:
        found.left[told["reason"]] += 1
    else:
        found.recomputed += 1
        _interval(found, entry, told)


def _near(printed: float, value: float, entry: Printed) -> bool:
    return abs(printed - value) <= entry.rounding + SLACK * max(1.0, abs(value))


def _interval(found: Verified, entry: Printed, told: dict[str, Any]) -> None:
    """The printed interval: recomputed where the store gives one, else it must contain its estimate."""
    if entry.interval is None:
        return
    low, high = entry.interval
    if told["low"] is not None:
        if _near(low, told["low"], entry) and _near(high, told["high"], entry):
            found.intervals += 1
        else:
            ends = f"[{told['low']:.6g}, {told['high']:.6g}]"
            found.differences.append(f"{entry.where}: prints {entry.printed!r}, the store says {ends}")
    elif low - 2 * entry.rounding <= told["value"] <= high + 2 * entry.rounding:
        found.left[INTERVAL] += 1
    else:
        found.differences.append(f"{entry.where}: prints {entry.printed!r}, which does not contain {told['value']:.10g}")
