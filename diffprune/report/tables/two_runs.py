"""Tables and sentences of two runs side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

import pandas as pd

from diffprune.report.analysis import speed
from diffprune.report.analysis.comparison import Comparison
from diffprune.report.analysis.records import SETTING
from diffprune.report.analysis.two_runs import TwoRuns
from diffprune.report.render.table import Entry, Number, Table
from diffprune.report.tables.accuracy import judged_entry, kept_entry, net_speedup, shown, words
from diffprune.report.tables.verdict import counts, joined

SPEEDS = "Speedups stand side by side without a verdict: they were measured in two sessions, if not on two machines."
UNPAIRED = (
    "No question is common to both runs, so nothing is paired: the runs are independent samples, and a difference may be one of "
    "the questions."
)

Fact = tuple[str, ...]  # what; how it is in the first run, and in the second


def lead(two: TwoRuns, differing: Iterable[str]) -> list[str]:
    """Three sentences: the sum of the verdicts, on what they rest, and what differs between the runs."""
    first, second = two.names
    found = [one.verdict for one in two.compared.values()]
    if not found:
        said = f"{first} and {second} have no method at a shared budget and benchmark in common, so no answers can be compared."
        return [said, _differs(differing)]
    number = f"{len(found)} comparison{'s' * (len(found) != 1)}"
    return [f"{second} against {first}, {number}: {counts(found)}.", _rests(two), _differs(differing)]


def _rests(two: TwoRuns) -> str:
    most = max((one.verdict.found for one in two.compared.values()), key=lambda found: found.num_rows)
    if not two.paired:
        return UNPAIRED
    return f"Paired on {most.num_rows:,} questions about {most.num_groups:,} pictures that both were asked."


def _differs(differing: Iterable[str]) -> str:
    return (
        f"The runs differ in {joined(found)}."
        if (found := list(differing))
        else "The runs differ in nothing that the store records."
    )


def compared(two: TwoRuns) -> Table | None:
    """Method x budget: accuracy of both, the difference with its verdict, net prefill speedups of runs that have some; None
    where nothing is shared."""
    first, second = two.names
    fast = {name: (chapter, found) for name, chapter in zip(two.names, two.two, strict=True) if (found := speed.of(chapter)[1])}
    rows: list[tuple[Entry, ...]] = []
    for (label, budget), one in two.compared.items():
        net = [
            net_speedup(chapter, s, set(s.flags)) if (s := found.get((label, budget))) else None for chapter, found in fast.values()
        ]
        own = two.kept((label, budget))[0]
        kept = kept_entry(two.two[0], label, budget, own) if budget else Number(two.two[0].total, digits=0)
        rows.append((label, kept, shown(one.first), shown(one.second), judged_entry(one.verdict), *net))
    columns = ("Method", "kept tokens", f"{first}: accuracy %", f"{second}: accuracy %", "second − first, points",
               *(f"{name}: net speedup" for name in fast))  # fmt: skip
    breaks = frozenset(i for i in range(1, len(rows)) if str(rows[i][1]) != str(rows[i - 1][1]))
    keys = tuple(f"{label} | {budget}" for label, budget in two.compared)
    notes = (_questions(two), words("all rows of this table"), *([SPEEDS] if len(fast) > 1 else []))
    return Table("compared", f"{second} minus {first}", columns, tuple(rows), notes, breaks, keys) if rows else None


def _questions(two: TwoRuns) -> str:
    """On which benchmarks the accuracies rest, and what was left out of them."""
    if not two.paired:
        return UNPAIRED
    out = [two.two[0].heading(b) for b in two.benchmarks if b not in two.questions]
    said = "Accuracy: mean credit, unweighted over the benchmarks, of the questions that both runs were asked: "
    said += "; ".join(f"{two.two[0].heading(b)} {len(asked):,}" for b, asked in two.questions.items()) + "."
    return said + (f" Left out, for want of common questions: {', '.join(out)}." if out else "")


def kinds(differing: Table) -> list[str]:
    """What differs, each kind once: `weights`, however many methods have others."""
    return list(dict.fromkeys(str(row[0]).partition(" of ")[0].partition(" behind ")[0] for row in differing.rows))


def differs(two: TwoRuns) -> Table:
    """Everything that the stores record of both runs and that is not the same: what, and how it is in each."""
    rows = tuple((what, one or "–", other or "–") for what, one, other in _facts(two) if one != other)
    return Table("differs", "What differs between the runs", ("what", *two.names), rows)


def _facts(two: TwoRuns) -> Iterator[Fact]:
    """(what, in the first run, in the second), the gravest first."""
    one, other = two.two
    for name in SETTING:
        yield name.replace("_", " "), *(str(chapter.setting.get(name, "")) for chapter in (one, other))
    yield "weights of the model", *(_several(chapter.evaluated["model_sha256"], 12) for chapter in (one, other))
    yield from _benchmarks(two)
    yield "budgets", *(", ".join(b.short for b in chapter.budgets) for chapter in (one, other))
    yield from _methods(two)
    yield "commit", *map(_commits, (one, other))
    for column in ("versions", "hardware"):
        found = [_parts(chapter, column) for chapter in (one, other)]
        for key in dict.fromkeys([*found[0], *found[1]]):
            yield key.replace("_", " "), *(part.get(key, "") for part in found)


def _benchmarks(two: TwoRuns) -> Iterator[Fact]:
    sides = [
        {chapter.heading(b): chapter.evaluated[chapter.evaluated["benchmark"] == b] for b in chapter.benchmarks}
        for chapter in two.two
    ]
    yield "benchmarks", *(", ".join(side) for side in sides)
    for name in [name for name in sides[0] if name in sides[1]]:
        yield f"data of {name}", *(_several(side[name]["revision"], 40) for side in sides)
    asked = [chapter.rows.groupby("cell", observed=True).size() for chapter in two.two]
    counts = [
        size.groupby(chapter.evaluated["benchmark"].reindex(size.index).astype(str)).max().sum()
        for size, chapter in zip(asked, two.two, strict=True)
    ]
    told = [f"{int(count):,}" for count in counts]
    if told[0] == told[1]:  # as many, but perhaps others
        names = [set(chapter.rows["sample"].unique()) for chapter in two.two]
        alone = [_several(pd.Series(sorted(mine - theirs, key=str)), 20) for mine, theirs in (names, names[::-1])]
        told = [f"{count}; only here {name}" if name else count for count, name in zip(told, alone, strict=True)]
    yield "questions", *told


def _methods(two: TwoRuns) -> Iterator[Fact]:
    sides = [chapter.methods for chapter in two.two]
    yield "methods", *(", ".join(side) for side in sides)
    for label in [label for label in sides[0] if label in sides[1]]:
        cells = [chapter.evaluated[chapter.evaluated["label"] == label] for chapter in two.two]
        yield f"recipe of {label}", *(_several(part["recipe"], 8) for part in cells)
        yield f"scorer seeds of {label}", *(_several(part["scorer_seed"].dropna().astype(int)) for part in cells)
        yield f"weights of {label}", *(_several(part["weights_sha256"], 8) for part in cells)
        yield f"code behind {label}", *_code(*cells)


def _code(one: pd.DataFrame, other: pd.DataFrame) -> tuple[str, str]:
    """Digests of the code behind the answers of one method, of the questions that both asked."""
    same = ["budget", "benchmark", "scorer_seed"]
    both = one.merge(other, on=same, suffixes=("", "_other"))
    changed = both[both["code"] != both["code_other"]]
    return _several(changed["code"], 8), _several(changed["code_other"], 8)


def _several(column: pd.Series, digits: int = 40) -> str:
    """The distinct values, each cut to `digits`; how many more than three there are."""
    found = sorted({str(value)[:digits] for value in column if str(value)})
    return ", ".join(found) if len(found) <= 10 else f"{', '.join(found[:3])} and {len(found) - 3} more"


def _commits(chapter: Comparison) -> str:
    told = chapter.records.sources
    dirty = {str(c): bool(told.loc[told["commit"] == c, "dirty"].any()) for c in sorted(set(told["commit"]))}
    return ", ".join((c[:12] or "outside a repository") + (" with uncommitted changes" if d else "") for c, d in dirty.items())


def _parts(chapter: Comparison, column: str) -> dict[str, str]:
    """Key -> the values that JSON texts of provenance give it."""
    found: dict[str, set[str]] = {}
    for text in chapter.records.sources[column].astype(str).unique():
        try:
            told = json.loads(text)
        except ValueError:
            continue
        for key, value in told.items() if isinstance(told, dict) else ():
            shown_as = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            found.setdefault(str(key), set()).add(shown_as)
    return {key: ", ".join(sorted(values)) for key, values in found.items()}
