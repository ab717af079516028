"""The short table a run ends with, in plain text."""

from __future__ import annotations

from pathlib import Path

from diffprune.report.analysis import records, speed
from diffprune.report.analysis.comparison import chapters
from diffprune.report.render import escape
from diffprune.report.render.table import Entry
from diffprune.report.tables import accuracy as accuracy_tables
from diffprune.report.tables import verdict
from diffprune.report.tables.caveats import caveats


def summary(store_root: Path | str) -> str:
    """Method x budget: accuracy with interval, relative accuracy, measured prefill speedup, overhead; verdict and caveats.

    Plain text without escape sequences; a store without results gives one sentence.
    """
    found = records.read(store_root)
    blocks = []
    for chapter in chapters(found):
        _, fast, batch = speed.of(chapter)
        table = accuracy_tables.headline(chapter, fast)
        if not table.rows:
            continue
        lines = _lines([tuple(table.columns), *table.rows], table.rule_before)
        about = escape.plain(
            f"{chapter.setting['model']}: accuracy on {len(chapter.benchmarks)} benchmarks, prefill at batch {batch or '–'}"
        )
        blocks.append(
            "\n".join(
                [
                    about,
                    "",
                    *lines,
                    "",
                    verdict.short(chapter),
                    *(escape.plain(f"{flag}: {says}", 400) for flag, says in caveats(chapter)),
                ]
            )
        )
    return (
        "\n\n".join(blocks)
        if blocks
        else "This store holds no results yet: run `diffprune evaluate` and `diffprune measure` on it."
    )


def _lines(rows: list[tuple[Entry, ...]], breaks: frozenset[int]) -> list[str]:
    """Columns aligned, the first to the left; flags left out, they are on the page."""
    cells = [
        [escape.plain("–" if e is None else str(e).split(" (")[0] if not isinstance(e, str) else e) for e in row] for row in rows
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
