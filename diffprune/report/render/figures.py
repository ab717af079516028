"""The figures. Each takes what the tables take and answers SVG text, or None where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from diffprune.report.analysis.comparison import FULL, Comparison
from diffprune.report.analysis.speed import Headline, Speed
from diffprune.report.render.escape import plain
from diffprune.report.render.svg import DPI, HALF, INK, NARROW, SHOWN, WIDTH, Plot, axes, plot, styled, svg
from diffprune.report.tables.accuracy import kind_curves
from diffprune.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

HANDLE, LETTER = 0.5, 0.062  # inches of a legend's marker, and of a letter beside it
FAR = 0.5  # of the span of points: what of an interval is beyond it is not drawn
LONGEST = 37  # characters of a name in a legend
LONG = 28  # characters of a name beside the end of its line
MANY = "bound", "trained", "calibrated", "rule", "control"  # kinds in a legend, in this order


def _shown(chapter: Comparison) -> list[str]:
    return [label for label in chapter.methods if chapter.part(label) < 2]


def _said(name: str, lines: Mapping[str, list[tuple[float, Interval]]], unit: str) -> str:
    """A figure of lines in words: where each begins and ends."""
    ends = [f"{label} {points[0][1].estimate:.1f} at {points[0][0]:.3g} to {points[-1][1].estimate:.1f} at {points[-1][0]:.3g}"
            for label, points in lines.items()]  # fmt: skip
    return plain(f"{name} in percent by {unit}: {'; '.join(ends)}.", 1500)


def _legend(chapter: Comparison, figure: Figure, labels: Sequence[str], bound: bool, width: float) -> None:
    """Names below the axes, by kind of method; where there are few each beside its marker, without the kinds."""
    from matplotlib.lines import Line2D

    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(chapter.methods[label].kind, []).append(label)
    columns, longest = _columns(labels, width)
    handles = [Line2D([], [], color=chapter.style(FULL)[0], label=FULL)] if bound else []
    for kind in sorted(groups, key=lambda k: MANY.index(k) if k in MANY else len(MANY)):
        if len(labels) > SHOWN:
            handles.append(Line2D([], [], ls="none", label=f"{kind}:"))
        for label in groups[kind]:
            color, marker, dash = chapter.style(label)
            handles.append(Line2D([], [], color=color, marker=marker, ls=dash, label=plain(label, longest)))
    _keep_headings(handles, columns)
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=7.5)
    for text in legend.get_texts():
        if text.get_text().endswith(":"):
            text.set_fontweight("bold")


def _columns(labels: Collection[str], width: float) -> tuple[int, int]:
    """(columns of a legend, characters that a name in it may have)."""
    most = max(1, round(width / 2))
    if width <= NARROW:
        return most, int((width / most - HANDLE) / LETTER)
    longest = min(LONGEST, max(map(len, labels), default=1))
    return max(1, min(most, int(width / (HANDLE + LETTER * longest)))), LONGEST


def _keep_headings(handles: list[Line2D], columns: int) -> None:
    """Move each heading that would end a column of the legend to the next one, by a blank line before it."""
    from matplotlib.lines import Line2D

    for _ in range(len(handles)):
        ends = np.cumsum([len(part) for part in np.array_split(np.arange(len(handles)), columns)])[:-1] - 1
        orphan = next((end for end in ends if str(handles[end].get_label()).endswith(":")), None)
        if orphan is None:
            return
        handles.insert(orphan, Line2D([], [], ls="none", label=" "))


def _named(chapter: Comparison, figure: Figure, ax: Axes, ends: list[tuple[str, float, float]], width: float) -> None:
    """Names of lines: at their ends where there is room, else in a legend."""
    labels = [label for label, _, _ in ends if label != FULL]
    if _below(labels, width):
        _legend(chapter, figure, labels, len(labels) < len(ends), width)
    else:
        _end_labels(chapter, ax, ends)


def _below(labels: Collection[str], width: float) -> bool:
    """Whether names stand in a legend: of many methods, of long names, and on a telephone."""
    return len(labels) > SHOWN or width <= NARROW or any(len(label) > LONG for label in labels)


def _height(labels: Collection[str], width: float, height: float) -> float:
    """Inches: room for the legend below."""
    return height + (0.16 * math.ceil((len(labels) + 6) / _columns(labels, width)[0]) if _below(labels, width) else 0)


def _line(
    chapter: Comparison, ax: Axes, label: str, x: list[float], y: list[Interval], across: list[Interval] | None = None,
    many: bool = False,
) -> None:  # fmt: skip
    """One method's line with intervals in both directions, faint ones among `many` lines."""
    color, marker, dash = chapter.style(label)
    up = np.array([[max(0.0, i.estimate - i.low), max(0.0, i.high - i.estimate)] for i in y]).T
    side = np.array([[i.estimate - i.low, i.high - i.estimate] for i in across]).T.clip(0) if across else None
    *_, bars = ax.errorbar(x, [i.estimate for i in y], yerr=up, xerr=side, color=color, marker=marker, ls=dash, elinewidth=0.8,
                           capsize=0 if many else 1.5, markeredgewidth=1.2, label=label)  # fmt: skip
    for bar in bars if many else ():
        bar.set_alpha(0.3)


def _end_labels(chapter: Comparison, ax: Axes, ends: list[tuple[str, float, float]]) -> None:
    """Names beside the ends of lines, moved apart where they would overlap."""
    if not ends:
        return
    low, high = ax.get_ylim()
    gap = (high - low) * 11 / (ax.bbox.height * 72 / DPI)  # eleven points, in units of the axis
    ends = sorted(ends, key=lambda e: e[2])
    places = [e[2] for e in ends]
    for _ in range(200):
        moved = False
        for i in range(len(places) - 1):
            short = gap - (places[i + 1] - places[i])
            if short > 1e-9:
                places[i], places[i + 1], moved = places[i] - short / 2, places[i + 1] + short / 2, True
        if not moved:
            break
    edge = ax.get_xlim()[1]
    for (label, end, y), place in zip(ends, places, strict=True):
        x = edge if math.isnan(end) else end
        color = chapter.style(label)[0]
        leader = {"arrowstyle": "-", "color": color, "lw": 0.9, "shrinkA": 0, "shrinkB": 4}
        ax.annotate(f" {plain(label, 34)}", (x, y), xytext=(edge, place), textcoords="data", fontsize=8, va="center", ha="left",
                    annotation_clip=False, arrowprops=None if math.isnan(end) else leader)  # fmt: skip


def _bound(chapter: Comparison, ax: Axes, found: Interval | None) -> list[tuple[str, float, float]]:
    """The unpruned model as a line with its interval; what `_end_labels` needs to name it."""
    if not found:
        return []
    ax.axhline(found.estimate, color=chapter.style(FULL)[0], lw=1)
    ax.axhspan(found.low, found.high, color="#000000", alpha=0.06, lw=0)
    return [(FULL, math.nan, found.estimate)]


def pareto(chapter: Comparison, fast: dict[tuple[str, str], Speed], timed: Headline | None) -> Plot | None:
    """Accuracy against measured net prefill speedup, one line per method; tokens kept beside the first method's points."""
    lines = {}
    for label in _shown(chapter):
        points = [
            (s.net, a, f"{chapter.kept_by(label, b.spelling):.0f}")
            for b in chapter.budgets
            if (s := fast.get((label, b.spelling))) and s.net and (a := chapter.accuracy(label, b.spelling))
        ]
        if points:
            lines[label] = points
    if not lines:
        return None
    said = {label: [(net.estimate, found) for net, found, _ in points] for label, points in lines.items()}
    return plot(lambda width: _pareto(chapter, lines, str(timed), width), _said("Accuracy", said, "net prefill speedup"), HALF)


def _pareto(chapter: Comparison, lines: Mapping[str, list[tuple[Interval, Interval, str]]], timed: str, width: float) -> str:
    with styled():
        figure, (ax,) = axes(width, _height(lines, width, 4.0))
        full = _bound(chapter, ax, chapter.accuracy(FULL, ""))
        for label, points in lines.items():
            net, found = [n for n, _, _ in points], [a for _, a, _ in points]
            _line(chapter, ax, label, [n.estimate for n in net], found, net, many=len(lines) > SHOWN)
        for speed, share, kept in next(iter(lines.values())):
            ax.annotate(kept, (speed.estimate, share.estimate), xytext=(5, 5), textcoords="offset points", fontsize=7.5, color=INK)
        ax.set(xlabel=f"net prefill speedup, ×, {timed}", ylabel="accuracy, % (mean over benchmarks)")
        if full:
            ax.plot([1], [full[0][2]], color=chapter.style(FULL)[0], marker="*", ms=8, ls="none")
        ax.margins(x=0.04)
        _near(ax, [net for points in lines.values() for net, _, _ in points])
        _named(chapter, figure, ax, [(label, p[-1][0].estimate, p[-1][1].estimate) for label, p in lines.items()] + full, width)
        return svg(figure)


def accuracy(chapter: Comparison, inches: float = WIDTH) -> Plot | None:
    """Accuracy against kept tokens."""
    lines = {
        x: [(chapter.kept_by(x, b.spelling), a) for b in chapter.budgets if (a := chapter.accuracy(x, b.spelling))]
        for x in _shown(chapter)
    }
    lines = {x: points for x, points in lines.items() if points}
    return plot(lambda width: _accuracy(chapter, lines, width), _said("Accuracy", lines, "tokens kept"), inches) if lines else None


def _accuracy(chapter: Comparison, lines: Mapping[str, list[tuple[float, Interval]]], width: float) -> str:
    with styled():
        figure, (ax,) = axes(width, _height(lines, width, 3.8))
        full = _bound(chapter, ax, chapter.accuracy(FULL, ""))
        for label, points in lines.items():
            _line(chapter, ax, label, [_place(k) for k, _ in points], [a for _, a in points], many=len(lines) > SHOWN)
        _token_axis(ax, chapter, [k for points in lines.values() for k, _ in points])
        ax.set(xlabel=f"tokens kept, of {chapter.budgets[0].total:.0f} (log scale)", ylabel="accuracy, % (mean over benchmarks)")
        _named(chapter, figure, ax, [(label, _place(p[-1][0]), p[-1][1].estimate) for label, p in lines.items()] + full, width)
        return svg(figure)


def _near(ax: Axes, found: Sequence[Interval]) -> None:
    """An axis on which the points can be told apart, also where an interval of few sessions reaches a hundred times as far."""
    low, high = min(1.0, *(one.estimate for one in found)), max(1.0, *(one.estimate for one in found))
    room = FAR * (high - low or 1.0)
    left, right = ax.get_xlim()
    ax.set_xlim(max(left, low - room), min(right, high + room))


def _place(kept: float) -> float:
    """Kept tokens on an axis that runs from many to few, by factors."""
    return -math.log2(kept)


def _token_axis(ax: Axes, chapter: Comparison, points: Sequence[float]) -> None:
    """The budgets as ticks, wide enough for counts of single methods. (A logarithmic axis says the same, and is slow to draw.)"""
    kept = [b.kept for b in chapter.budgets]
    ax.set_xticks([_place(k) for k in kept], [f"{k:.0f}" for k in kept])
    ax.set_xlim(_place(max(kept + [*points])) - 0.15, _place(min(kept + [*points])) + 0.15)


def retention(chapter: Comparison) -> Plot | None:
    """Small multiples: accuracy per kind of question against kept tokens."""
    kinds = sorted({kind for kind, _ in kind_curves(chapter)})
    if not kinds or not chapter.budgets:
        return None
    alt = f"Accuracy by tokens kept, a panel for each kind of question: {', '.join(kinds)}; every value is in kinds.csv."
    return plot(lambda width: _retention(chapter, kinds, width), plain(alt, 600))


def _retention(chapter: Comparison, kinds: list[str], width: float) -> str:
    curves, labels = kind_curves(chapter), _shown(chapter)[:SHOWN]
    columns = min(4 if width > NARROW else 2, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    with styled():
        figure, panels = axes(width, 1.75 * rows + (0.6 if width > NARROW else 0.9), rows, columns, share=True)
        for ax, kind in zip(panels, kinds, strict=False):
            full = curves.get((kind, FULL))
            if full:
                ax.axhline(full[0][1].estimate, color=chapter.style(FULL)[0], lw=1)
            for label in [x for x in labels if (kind, x) in curves]:
                points = curves[kind, label]
                color, marker, dash = chapter.style(label)
                x, y = [_place(point[0]) for point in points], [point[1].estimate for point in points]
                ax.plot(x, y, color=color, marker=marker, ls=dash, ms=3.2, lw=1.2, label=label)
            questions = max((p[0][1].num_rows for (k, _), p in curves.items() if k == kind), default=0)
            ax.set_title(f"{plain(kind, 24)} ({questions:,})", fontsize=8.5)
            _token_axis(ax, chapter, [point[0] for label in labels for point in curves.get((kind, label), ())])
        for ax in panels[len(kinds) :]:
            ax.set_axis_off()
        _legend(chapter, figure, [x for x in labels if any(label == x for _, label in curves)], False, width)
        for i, ax in enumerate(panels[: len(kinds)]):
            if i + columns >= len(kinds):
                ax.set_xlabel("tokens kept")
                ax.tick_params(labelbottom=True)
            if i % columns == 0:
                ax.set_ylabel("accuracy, %")
        return svg(figure)


def breakdown(chapter: Comparison, found: list[Speed], timed: Headline | None) -> Plot | None:
    """Stacked bars: encoder, overhead, prefill of the first decoded token, full, pruned and natively short."""
    mine = [s for s in found if timed and timed.holds(s) and s.label in _shown(chapter) and ("pruned", "prefill") in s.spans]
    one = next((x for x in _shown(chapter) if any(s.label == x for s in mine)), None)
    mine = sorted((s for s in mine if s.label == one), key=lambda s: -s.kept)
    if not mine:
        return None
    bars: list[tuple[str, list[float]]] = []
    top = mine[0].spans
    encoder = top.get(("full", "encoder")) or top.get(("pruned", "encoder"))
    if ("full", "prefill") in top:
        bars.append(("unpruned", [encoder.median if encoder else 0, 0, top["full", "prefill"].median]))
    for s in mine:
        enc = s.spans.get(("pruned", "encoder")) or encoder
        over = s.spans.get(("pruned", "overhead"))
        spans = [enc.median if enc else 0, over.median if over else 0, s.spans["pruned", "prefill"].median]
        bars.append((f"{s.kept:.0f} kept", spans))
        if ("native", "prefill") in s.spans:
            bars.append((f"{s.kept:.0f} native", [enc.median if enc else 0, 0, s.spans["native", "prefill"].median]))
    about = f"ms, median ({timed}, {plain(one, 40)})"
    alt = f"Encoder, overhead and prefill, {about}: {'; '.join(f'{name} {sum(parts):.1f}' for name, parts in bars)}."
    return plot(lambda width: _breakdown(bars, about, width), plain(alt, 1500))


def _breakdown(bars: list[tuple[str, list[float]]], about: str, width: float) -> str:
    parts = (("encoder", "#BBBBBB"), ("overhead (pruner)", "#D55E00"), ("prefill (decoder)", "#0072B2"))
    with styled():
        figure, (ax,) = axes(width, 0.27 * len(bars) + 1.1)
        start = np.zeros(len(bars))
        place = np.arange(len(bars))[::-1]
        for i, (name, color) in enumerate(parts):
            spans = np.array([b[1][i] for b in bars])
            ax.barh(place, spans, left=start, height=0.68, color=color, label=name)
            start = start + spans
        for y, total in zip(place, start, strict=True):
            ax.annotate(f"{total:.1f}", (total, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        ax.set_yticks(place, [b[0] for b in bars])
        ax.grid(visible=False, axis="y")
        ax.margins(x=0.1)
        ax.set(xlabel=about)
        figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3 if width > NARROW else 2)
        return svg(figure)
