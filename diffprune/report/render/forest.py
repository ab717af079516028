"""DiffPrune minus each other, one row per budget: the difference with its interval, and every scorer seed as a dot."""

from __future__ import annotations

from diffprune.report.analysis import verdicts
from diffprune.report.analysis.comparison import FULL, Budget, Comparison
from diffprune.report.analysis.labels import SUBJECT
from diffprune.report.analysis.seeds import differences
from diffprune.report.analysis.verdicts import RULE, Judged
from diffprune.report.render.escape import plain
from diffprune.report.render.svg import HALF, INK, SHOWN, Plot, axes, plot, styled, svg
from diffprune.report.render.table import Number
from diffprune.statistics.verdict import BETTER, WORSE

COLOR = {BETTER: "#009e73", WORSE: "#d55e00"}
Group = tuple[str, list[tuple[Budget, Judged]]]


def _groups(chapter: Comparison) -> list[Group]:
    """(whom DiffPrune is held against, its comparisons, most tokens first)."""
    every = verdicts.of(chapter)
    against = dict.fromkeys(key[0] for key in every)
    shown = [x for x in against if x not in (RULE, FULL)][: SHOWN - 2] + [x for x in (RULE, FULL) if x in against]
    return [(x, [(b, every[x, b.spelling]) for b in chapter.budgets if (x, b.spelling) in every]) for x in shown]


def forest(chapter: Comparison) -> Plot | None:
    """None where DiffPrune was compared with nothing."""
    groups = _groups(chapter)
    if not groups:
        return None
    told = [
        f"{against} with {budget.short} {Number(one.verdict.found.estimate, signed=True).main} {one.verdict.word}".strip()
        for against, found in groups
        for budget, one in found
    ]
    alt = f"Forest plot of {SUBJECT} minus other methods, points of mean credit: {'; '.join(told)}."
    return plot(lambda width: _draw(chapter, groups, width), plain(alt, 1500), HALF)


def _draw(chapter: Comparison, groups: list[Group], width: float) -> str:
    rows = sum(len(found) + 1 for _, found in groups)
    with styled():
        figure, (ax,) = axes(width, 0.165 * rows + 0.75)
        ax.axvline(0, color=INK, lw=0.9)
        ticks: list[tuple[float, str]] = []
        y = 0.0
        for against, found in groups:
            ax.annotate(f"minus {plain(against, 44)}", (0, y), xycoords=("axes fraction", "data"), fontsize=8, weight="bold",
                        va="center", xytext=(3, 0), textcoords="offset points")  # fmt: skip
            for budget, one in found:
                y += 1
                _row(chapter, ax, y, budget, one)
                ticks.append((y, budget.short))
            y += 1.15
        ax.set_yticks([place for place, _ in ticks], [text for _, text in ticks])
        ax.set_ylim(y - 0.4, -0.7)
        ax.grid(visible=False, axis="y")
        ax.margins(x=0.06)
        ax.set_xlabel(f"{SUBJECT} minus the other, points of mean credit" + (" (right: better)" if width >= HALF else ""))
        return svg(figure)


def _row(chapter: Comparison, ax, y: float, budget: Budget, one: Judged) -> None:  # type: ignore[no-untyped-def]
    """Interval and estimate, filled where there is a verdict; seeds a little below."""
    found = one.verdict.found
    color = COLOR.get(one.verdict.word, "#777777")
    filled = color if one.verdict.word in COLOR else "white"
    seeds = differences(chapter, SUBJECT, one.other, budget.spelling)
    if len(seeds) > 1:
        ax.plot(seeds, [y + 0.3] * len(seeds), ls="none", marker="o", ms=2.4, color=INK, alpha=0.7, mew=0)
    ax.plot([found.low, found.high], [y, y], color=color, lw=1.4, solid_capstyle="butt")
    ax.plot([found.estimate], [y], color=color, marker="D", ms=4.5, mfc=filled, mew=1.2)
