"""The short table a run ends with, in plain text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from diffprune.report.analysis import records, speed
from diffprune.report.analysis.comparison import Comparison, chapters
from diffprune.report.render import escape
from diffprune.report.render.table import Entry, Table
from diffprune.report.tables import accuracy as accuracy_tables
from diffprune.report.tables import errors, provenance, verdict
from diffprune.report.tables import search as search_tables
from diffprune.report.tables import speed as speed_tables
from diffprune.report.tables.caveats import caveats


def summary(store_root: Path | str | records.Records, asked: Mapping[str, str] | None = None) -> str:
    """Method x budget: accuracy with interval, relative accuracy, measured prefill speedup, overhead; verdict, failed questions and
    caveats. Then what was tuned, what a search of training settings found, and what failed.

    asked: the setting whose block comes first (`comparison.chapters`). Plain text without escape sequences; a store without results
    gives one sentence.
    """
    found = records.read(store_root)
    blocks = [block for chapter in chapters(found, asked) if (block := _block(chapter))]
    if tuned := speed_tables.tuned(found):
        rows = [tuple(row[i] for i, name in enumerate(tuned.columns) if name in TUNED) for row in (tuned.columns, *tuned.rows)]
        blocks.append("\n".join([tuned.title, "", *_lines(rows, tuned.rule_before)]))
    if searched := search_tables.searched(found):
        rows = [
            tuple(row[i] for i, name in enumerate(searched.columns) if name in SEARCHED)
            for row in (searched.columns, *searched.rows)
        ]
        blocks.append("\n".join([searched.title, "", *_lines(rows, searched.rule_before)]))
    if failed := [row for row in (provenance.failures(found) or _NOTHING).rows if row[0] == "cell failed"]:
        _, label, where, reason = failed[0]
        blocks.append(escape.plain(f"{len(failed)} cell{'s' * (len(failed) > 1)} failed; first {label} {where}: {reason}", 400))
    return (
        "\n\n".join(blocks)
        if blocks
        else "This store holds no results yet: run `diffprune evaluate` and `diffprune measure` on it."
    )


TUNED = ("target", "Method", "kind", "verdict", "budget", "measured", "accuracy %")  # what the terminal shows of a tuning
SEARCHED = ("Method", "trials", "stopped early", "recipe's own", "best", "minutes")  # and of a search
NOTES = re.compile(  # behind a number
    r" \((?!asked |without |range |timed ).*|(?<= rounds); .*(?=\))|(?<= kept); (?!range).*(?=\))"
)
_NOTHING = Table("", "", (), ())


def _block(chapter: Comparison) -> str:
    """One chapter; "" where it has nothing."""
    found, fast, timed = speed.of(chapter)
    table = accuracy_tables.headline(chapter, fast)
    if table.rows:
        num = f"{len(chapter.benchmarks)} benchmark{'s' * (len(chapter.benchmarks) != 1)}"
        about = f"{chapter.setting['model']}: accuracy on {num}, prefill at {timed or 'batch –'}"
    elif chapter.errors:
        return escape.plain(f"{chapter.setting['model']}: {_failed(chapter)}", 400)
    elif found:
        about, table = f"{chapter.setting['model']}: timings", speed_tables.latency(chapter, found)
    else:
        return ""
    asked = [verdict.short(chapter), escape.plain(_failed(chapter), 400)] if chapter.benchmarks else []
    told = [escape.plain(f"{flag}: {says}", 400) for flag, says in caveats(chapter)]
    notes = [escape.plain(note, 400) for note in table.notes]
    counted = {budget.spelling for budget in chapter.budgets}
    if beside := sorted({budget for _, budget in chapter.arms} - counted - {""}):
        notes.append(escape.plain(f"On the page alone, as they keep another count of every picture: {', '.join(beside)}.", 400))
    return "\n".join(
        [escape.plain(about), "", *_lines([tuple(table.columns), *table.rows], table.rule_before), "", *notes, *asked, *told]
    )


def _failed(chapter: Comparison) -> str:
    """How many questions had no answer, and why the first had none."""
    total = chapter.errors + len(chapter.rows)
    if not chapter.errors:
        return f"questions failed: 0 of {total:,}"
    first = next(iter((errors.by_class(chapter) or _NOTHING).rows))[-1]
    return f"questions failed: {chapter.errors:,} of {total:,}, left out of the accuracies; first {first}"


def _lines(rows: list[tuple[Entry, ...]], breaks: frozenset[int]) -> list[str]:
    """Columns aligned, the first to the left; flags are on the page alone, not what was asked, what a mean lacks, a range
    and the count of tokens that was timed where it is another."""
    cells = [
        [escape.plain("–" if e is None else NOTES.sub("", str(e)) if not isinstance(e, str) else e) for e in row] for row in rows
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in cells
    ]
    rule = "-" * max(map(len, lines))
    out = [lines[0], rule]
    for i, line in enumerate(lines[1:]):
        out += [rule] if i in breaks and i > 0 else []
        out.append(line)
    return out
