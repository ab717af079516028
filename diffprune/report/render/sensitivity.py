"""How much each training setting matters: the trials of a search, one panel per setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from diffprune.report.analysis.records import Records
from diffprune.report.analysis.search import COMPLETE, trials
from diffprune.report.render.escape import plain
from diffprune.report.render.svg import NARROW, SHOWN, Plot, axes, plot, styled, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPAN = 10  # a setting whose largest value is so many times its smallest is drawn on a logarithmic scale
NUM_COLUMNS = 4


def sensitivity(records: Records) -> Plot | None:
    """Validation of every trial against each setting; filled: after the full training, open: where it was stopped."""
    found, settings = trials(records)
    found = found[np.isfinite(found["validation_hard"])] if len(found) else found
    if found.empty:
        return None
    shown = [x for x in records.methods if (found["label"] == x).any()][:SHOWN]
    best = [f"{x} {found.loc[found['label'] == x, 'validation_hard'].min():.2f}" for x in shown]
    alt = f"Validation of every trial of the search by {', '.join(settings)}; lowest, in nats per token: {'; '.join(best)}."
    return plot(lambda width: _drawn(records, found, settings, shown, width), plain(alt, 900))


def _drawn(records: Records, found: pd.DataFrame, settings: Sequence[str], shown: Sequence[str], width: float) -> str:
    num_columns = NUM_COLUMNS if width > NARROW else 2
    num_rows = math.ceil(len(settings) / num_columns)
    with styled():
        figure, panels = axes(width, 2.0 * num_rows + 0.4, num_rows, num_columns)
        for ax, setting in zip(panels, settings, strict=False):
            for label in shown:
                part = found[found["label"] == label].dropna(subset=[setting])
                color, marker, _ = records.styles[label]
                for ended, fill in ((True, color), (False, "white")):
                    mine = part[(part["trial_state"] == COMPLETE) == ended]
                    ax.plot(
                        mine[setting], mine["validation_hard"], color=color, marker=marker, mfc=fill, ls="none", ms=4,
                        label=label if ended else None,
                    )  # fmt: skip
            _axis(ax, setting, found[setting].dropna().to_numpy(float))
        for ax in panels[len(settings) :]:
            ax.set_axis_off()
        for ax in panels[::num_columns]:
            ax.set_ylabel("NLL, nats")
        handles, words = panels[0].get_legend_handles_labels()
        figure.legend(handles, words, loc="outside lower center", ncols=max(1, round(width / 2)))
        return svg(figure)


def _axis(ax: Axes, setting: str, values: np.ndarray) -> None:
    from matplotlib.ticker import NullFormatter

    ax.set_title(setting.replace("_", " "), fontsize=8.5)
    if len(values) and values.min() > 0 and values.max() >= SPAN * values.min():
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
