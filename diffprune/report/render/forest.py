"""Forest plots: one row per difference, with its interval and every scorer seed as a dot."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffprune.report.analysis import verdicts
from diffprune.report.analysis.comparison import FULL, Comparison
from diffprune.report.analysis.seeds import differences
from diffprune.report.analysis.two_runs import TwoRuns
from diffprune.report.analysis.verdicts import QUESTION_RULE, RULE
from diffprune.report.render.escape import plain
from diffprune.report.render.svg import HALF, INK, Plot, axes, plot, styled, svg
from diffprune.report.render.table import Number
from diffprune.statistics.verdict import BETTER, WORSE, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 18  # methods in one figure; the others are in the table
TICKS, LETTER = 0.9, 0.0635  # inches of the names of ticks, and of a letter below the axis
COLOR = {BETTER: "#009e73", WORSE: "#d55e00"}


@dataclass(frozen=True)
class Row:
    """One difference: the tick beside it, its verdict, and what each scorer seed by itself says."""

    tick: str
    verdict: Verdict
    seeds: Sequence[float] = ()


Group = tuple[str, list[Row]]  # heading, rows


def _groups(chapter: Comparison) -> list[Group]:
    """(whom the subject is held against, its comparisons, most tokens first)."""
    peers, aware = verdicts.of(chapter), verdicts.with_question(chapter)
    every = {**peers, **aware}
    against = dict.fromkeys(key[0] for key in every)
    last = [x for x in (RULE, FULL, QUESTION_RULE) if x in against]
    found: list[Group] = []
    for x in [x for x in against if x not in last][: MOST - len(last)] + last:
        judged = [(b, every[x, b.spelling]) for b in chapter.budgets if (x, b.spelling) in every]
        rows = [Row(b.short, one.verdict, differences(chapter, chapter.about, one.other, b.spelling)) for b, one in judged]
        found.append((f"minus {plain(x, 48)}", rows))
    return found


def forest(chapter: Comparison) -> Plot | None:
    """None where the subject was compared with nothing."""
    return drawn(_groups(chapter), f"{chapter.about} minus other methods", f"{chapter.about} minus the other")


def of_variants(chapter: Comparison) -> Plot | None:
    """Methods with options minus the plain one, a group for each; None where there are none."""
    groups: dict[str, list[Row]] = {}
    for (label, spelling), one in verdicts.variants(chapter).items():
        short = next(b.short for b in chapter.budgets if b.spelling == spelling)
        seeds = differences(chapter, label, one.other, spelling)
        groups.setdefault(plain(label, 44), []).append(Row(short, one.verdict, seeds))
    return drawn(list(groups.items())[:MOST], "methods with options minus the plain one", "variant minus the plain method")


def of_runs(two: TwoRuns) -> Plot | None:
    """The second run minus the first, a group for each method; None where nothing can be compared."""
    groups: dict[str, list[Row]] = {}
    for (label, budget), one in two.compared.items():
        groups.setdefault(plain(label, 44), []).append(
            Row(f"{two.two[0].kept_by(label, budget):.0f} tokens" if budget else "all tokens", one.verdict, one.seeds)
        )
    shown = list(groups.items())[:MOST]
    about = " minus ".join(plain(name, 20) for name in reversed(two.names))
    return drawn(shown, f"{about}, by method", about)


def drawn(groups: Sequence[Group], says: str, axis: str) -> Plot | None:
    """says: what the figure is of, for who cannot see it; axis: what is subtracted from what."""
    if not groups:
        return None
    told = [
        f"{heading} with {row.tick} {Number(row.verdict.found.estimate, signed=True).main} {row.verdict.word}".strip()
        for heading, rows in groups
        for row in rows
    ]
    alt = f"Forest plot of {says}, points of mean credit: {'; '.join(told)}."
    return plot(lambda width: _draw(groups, axis, width), plain(alt, 1500), HALF)


def _draw(groups: Sequence[Group], axis: str, width: float) -> str:
    num_rows = sum(len(rows) + 1 for _, rows in groups)
    with styled():
        figure, (ax,) = axes(width, 0.165 * num_rows + 0.75)
        ax.axvline(0, color=INK, lw=0.9)
        ticks: list[tuple[float, str]] = []
        y = 0.0
        for heading, rows in groups:
            ax.annotate(heading, (0, y), xycoords=("axes fraction", "data"), fontsize=8, weight="bold", va="center", xytext=(3, 0),
                        textcoords="offset points", bbox={"fc": "white", "ec": "none", "pad": 0.6})  # fmt: skip
            for row in rows:
                y += 1
                _row(ax, y, row)
                ticks.append((y, row.tick))
            y += 1.15
        ax.set_yticks([place for place, _ in ticks], [text for _, text in ticks])
        ax.set_ylim(y - 0.4, -0.7)
        ax.grid(visible=False, axis="y")
        ax.margins(x=0.06)
        below = f"{axis}, points of mean credit" + (" (right: better)" if width >= HALF else "")
        ax.set_xlabel(textwrap.fill(below, int((width - TICKS) / LETTER)))
        return svg(figure)


def _row(ax: Axes, y: float, row: Row) -> None:
    """Interval and estimate, filled where there is a verdict; seeds a little below."""
    found = row.verdict.found
    color = COLOR.get(row.verdict.word, "#777777")
    filled = color if row.verdict.word in COLOR else "white"
    if len(row.seeds) > 1:
        ax.plot(row.seeds, [y + 0.3] * len(row.seeds), ls="none", marker="o", ms=2.4, color=INK, alpha=0.7, mew=0)
    ax.plot([found.low, found.high], [y, y], color=color, lw=1.4, solid_capstyle="butt")
    ax.plot([found.estimate], [y], color=color, marker="D", ms=4.5, mfc=filled, mew=1.2)
