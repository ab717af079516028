"""Lines with their intervals over an axis of a study's own, one panel beside the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffprune.report.render.svg import WIDTH, axes, styled, svg

STYLES = (("#0072B2", "o", "-"), ("#D55E00", "s", (0, (4, 2))), ("#009E73", "^", (0, (1, 1))), ("#CC79A7", "D", (0, (5, 1, 1, 1))))


@dataclass(frozen=True)
class Line:
    """One line of a panel. x, y: points; low, high: their intervals, () for none."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def lines(panels: Mapping[str, Sequence[Line]], x_label: str, y_label: str, *, log_x: bool = False, share: bool = True) -> str:
    """SVG text: a panel for each title, all with the same lines in the same order, named below.

    share: panels have one y axis.
    """
    with styled():
        figure, drawn = axes(WIDTH, 3.4, 1, len(panels), share=share)
        for ax, (title, found) in zip(drawn, panels.items(), strict=True):
            for line, (color, marker, dash) in zip(found, STYLES, strict=False):
                ax.plot(line.x, line.y, color=color, marker=marker if len(line.x) < 15 else None, ls=dash, lw=1.3, label=line.label)
                if len(line.low):
                    ax.fill_between(np.asarray(line.x, float), line.low, line.high, color=color, alpha=0.15, lw=0)
            ax.set_title(title)
            ax.set_xlabel(x_label)
            if log_x:
                ticks = sorted({x for line in found for x in line.x})
                ax.set_xscale("log")
                ax.set_xticks(ticks, labels=[f"{x:g}" for x in ticks])
                ax.minorticks_off()
        drawn[0].set_ylabel(y_label)
        handles, words = drawn[0].get_legend_handles_labels()
        figure.legend(handles, words, loc="outside lower center", ncols=len(words))
        return svg(figure)
