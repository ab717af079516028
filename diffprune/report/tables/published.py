"""Our numbers beside those printed in papers, where the model is the same; nothing of theirs enters a figure of ours."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from diffprune.report.analysis import labels
from diffprune.report.analysis.comparison import FULL, Comparison
from diffprune.report.render.table import Entry, Number, Table
from diffprune.report.tables.caveats import benchmark_flags

PACKAGE = Path(__file__).parents[2]
FOLDERS = (PACKAGE / "published", PACKAGE.parent / "reports" / "published")  # of an installed package, of a checkout
FOLDER = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])
COLUMNS = (
    "source", "table", "model", "method", "num_kept", "total", "share", "benchmark", "value", "unit", "protocol", "note",
)  # fmt: skip
UNPRUNED = "unpruned"
NO_BENCHMARK = ("average", "latency")
MODELS = {  # the last part of a checkpoint's name -> what papers call it
    r"(llava-)?llava-(v)?1\.5-7b(-hf)?": "LLaVA-1.5-7B",
    r"(llava-)?llava-(v)?1\.5-13b(-hf)?": "LLaVA-1.5-13B",
    r"llava-v1\.6-vicuna-7b(-hf)?": "LLaVA-NeXT-7B",
    r"qwen2\.5-vl-7b(-instruct)?": "Qwen2.5-VL-7B",
}
SAME = {"pdrop": "pyramiddrop", "gumbeltopk": "gumbeldiffprune", "atp": "atpllava"}  # our names -> the papers'


@dataclass(frozen=True)
class Printed:
    """One published number. share: kept / total; benchmark may be `average` or `latency`; unit: the figure it is."""

    source: str
    table: str
    model: str
    method: str
    num_kept: float
    total: float
    share: float
    benchmark: str
    value: float
    unit: str
    protocol: str
    note: str


def _number(text: str) -> float:
    return float(text) if text else math.nan


def _row(row: dict[str, str]) -> Printed:
    return Printed(
        row["source"], row["table"], row["model"], row["method"], _number(row["num_kept"]), _number(row["total"]),
        _number(row["share"]), row["benchmark"], float(row["value"]), row["unit"], row["protocol"], row["note"],
    )  # fmt: skip


@lru_cache(maxsize=4)
def read(folder: Path = FOLDER) -> tuple[Printed, ...]:
    """Every row of every CSV of a folder, files by name; () where there is no such folder.

    Raises:
        ValueError: a file with other columns, or a row whose number is none; file and line are named.
    """
    found = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, restval="")
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(
                    f"{path.name} has the columns {reader.fieldnames}: a table of published numbers has {list(COLUMNS)}"
                )
            for row in reader:
                try:
                    found.append(_row(row))
                except ValueError as error:
                    raise ValueError(
                        f"{path.name}, line {reader.line_num}: {error}; value must be a number, "
                        "and num_kept, total and share a number or empty"
                    ) from None
    return tuple(found)


def model_of(spelling: str) -> str | None:
    """What papers call a checkpoint, whatever options stand behind its name; None for one they do not tabulate, as the embedded."""
    last = spelling.partition("(")[0].rstrip("/").rsplit("/", 1)[-1].lower()
    return next((name for pattern, name in MODELS.items() if re.fullmatch(pattern, last)), None)


def _key(method: str) -> str:
    plain = re.sub(r"[^a-z0-9]", "", method.lower())
    return SAME.get(plain, plain)


def beside(chapter: Comparison, folder: Path = FOLDER) -> Table | None:
    """Published rows of this model, unpruned and at the budgets we ran, each method followed by ours; None for another model."""
    model = model_of(str(chapter.setting["model"]))
    theirs = [p for p in read(folder) if p.model == model and p.benchmark not in NO_BENCHMARK and p.unit != "mme_cognition"]
    names = {p.benchmark for p in theirs}
    benchmarks = {b: key for b in chapter.benchmarks if (key := b.partition("(")[0]) in names}
    if model is None or not benchmarks:
        return None
    rows: list[tuple[Entry, ...]] = []
    keys: dict[int, str] = {}
    breaks: set[int] = set()
    used: list[Printed] = []
    for budget, share in [("", 1.0), *((b.spelling, b.kept / b.total) for b in chapter.budgets)]:
        at = _at(theirs, budget, share, 0.5 / chapter.total)
        breaks.add(len(rows))
        used += [p for p in at if p.benchmark in benchmarks.values()]
        for method in sorted({p.method for p in at}, key=lambda m: (m != UNPRUNED, m)):
            mine = [p for p in at if p.method == method]
            rows += _printed_rows(mine, list(benchmarks.values()), share * chapter.total, str(chapter.setting["protocol"]))
            label = _ours_called(chapter, method, budget)
            if label:
                cells = [_ours(chapter, label, budget, b, [p for p in mine if p.benchmark == key]) for b, key in benchmarks.items()]
                keys[len(rows)] = f"ours | {label} | {budget}"
                rows.append((label, "ours", Number(chapter.kept_by(label, budget), digits=0), *cells))
    if not rows:
        return None
    columns = ("Method", "from", "kept", *map(chapter.heading, benchmarks))
    notes = tuple(_notes(chapter, used))
    return Table(
        "published", "Beside published numbers", columns, tuple(rows), notes, frozenset(breaks - {0}),
        tuple(keys.get(i, f"theirs | {row[0]} | {row[1]}") for i, row in enumerate(rows)),
        ("Method", "from", "kept", *benchmarks),
    )  # fmt: skip


def _at(theirs: list[Printed], budget: str, share: float, tolerance: float) -> list[Printed]:
    """Rows at a budget: with its count, if it is one (a larger share where pictures have fewer tokens), else with its share."""
    kind, num = labels.budget(budget)
    if kind == "Keep" and (same := [p for p in theirs if p.num_kept == num]):
        return same
    return [p for p in theirs if abs(p.share - share) < tolerance + 1e-6]


def _ours_called(chapter: Comparison, method: str, budget: str) -> str | None:
    """The label of our plain form of a published method, if it was evaluated."""
    plain = [x for x, m in chapter.methods.items() if x == m.base and _key(m.plugin) == _key(method)]
    return next((x for x in ([FULL] if method == UNPRUNED else plain) if (x, budget) in chapter.arms), None)


def _printed_rows(printed: list[Printed], benchmarks: list[str], kept: float, protocol: str) -> list[tuple[Entry, ...]]:
    """One row per source and table that has any of the benchmarks; flagged where its protocol is not `protocol`."""
    rows: list[tuple[Entry, ...]] = []
    for source, table in dict.fromkeys((p.source, p.table) for p in printed):
        group = {p.benchmark: p for p in printed if (p.source, p.table) == (source, table)}
        cells: list[Entry] = [_theirs(group[b]) if b in group else None for b in benchmarks]
        if any(cells):
            one = next(iter(group.values()))
            flag = f" (protocol {one.protocol})" if one.protocol != protocol else ""
            where = f"{source}, {'table ' if table.isdigit() else ''}{table}{flag}"
            rows.append((one.method, where, Number(one.num_kept if math.isfinite(one.num_kept) else kept, digits=0), *cells))
    return rows


def _theirs(printed: Printed) -> Number:
    return Number(printed.value, digits=0 if printed.value > 200 else 1, note=_points(printed.unit))


def _points(figure: str) -> str:
    """Which of MME's sums a figure is; "" for all else."""
    return figure.removeprefix("mme_") if figure.startswith("mme_") else ""


def _ours(chapter: Comparison, label: str, budget: str, benchmark: str, printed: list[Printed]) -> Number | None:
    """Our figure in the unit of the first published one if our benchmark gives it, else its main one; flags say what differs."""
    unit = printed[0].unit if printed else ""
    figure, value = chapter.native_of(label, budget, benchmark, unit)
    flags = list(benchmark_flags(chapter, benchmark))
    if not math.isfinite(value):
        figure, value = chapter.native_of(label, budget, benchmark)
        flags += [f"unit: {figure.replace('_', ' ')}, theirs {unit.replace('_', ' ')}"] if unit else []
    return (
        Number(value, digits=0 if value > 200 else 1, note=_points(figure), flags="; ".join(flags))
        if math.isfinite(value)
        else None
    )


def _notes(chapter: Comparison, theirs: list[Printed]) -> list[str]:
    mine, stated = str(chapter.setting["protocol"]), sorted({p.protocol for p in theirs})
    notes = ["Published numbers are copied as printed, without intervals; ours rest on our own runs and nothing else."]
    if stated != [mine]:
        notes.append(
            f"Protocols differ: ours is {mine!r}, theirs as said in brackets; a difference of a point means little. "
            "Flags name other differences: substitute (other data than the published number is on), incomplete, fixture, unit."
        )
    if chapter.setting["limit"] != "all":
        notes.append(f"Ours is no full run: at most {chapter.setting['limit']} questions per benchmark.")
    special: dict[str, set[str]] = {}
    for p in theirs:
        for note in filter(None, p.note.split("; ")):
            special.setdefault(note, set()).add(f"{p.method} ({p.source})")
    return [*notes, *(f"{note[0].upper()}{note[1:]}: {', '.join(sorted(methods))}." for note, methods in sorted(special.items()))]
