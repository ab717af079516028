"""Curves over training steps and over thresholds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from diffprune.report.analysis.records import Records
from diffprune.report.render.escape import plain
from diffprune.report.render.svg import INK, NARROW, SHOWN, Plot, axes, plot, power_of_ten, styled, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _smooth(part: pd.DataFrame, column: str, points: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """Means of at most `points` bins of steps, over seeds; gaps (nan) left out."""
    part = part[["step", column]].dropna()
    if part.empty:
        return np.zeros(0), np.zeros(0)
    width = max(1, math.ceil((part["step"].max() + 1) / points))
    mean = part.groupby(part["step"] // width).mean()
    return mean["step"].to_numpy(float), mean[column].to_numpy(float)


def training(records: Records) -> Plot | None:
    """Loss, hard validation, temperature, kept tokens, scores and gradients per step; step cost per method."""
    steps = records.told("steps", "label")
    if steps.empty:
        return None
    methods = [x for x in records.methods if (steps["label"] == x).any()]
    ends = steps.groupby("label", observed=True)["step"].transform("max")
    last = steps[steps["step"] >= 0.9 * ends].groupby("label", observed=True)["loss"].mean()
    alt = "Training by step: loss, validation, temperature, kept tokens, scores, gradients, step cost. Loss over the last tenth: "
    alt += "; ".join(f"{x} {last[x]:.2f}" for x in methods if x in last) + "."
    return plot(lambda width: _training(records, steps, width), plain(alt, 900))


def _training(records: Records, steps: pd.DataFrame, width: float) -> str:
    shown = [x for x in records.methods if (steps["label"] == x).any()][:SHOWN]
    wanted = (
        ("loss", "loss, nats per token"),
        ("validation_hard", "validation, tokens removed, nats"),
        ("temperature", "temperature"),
        ("kept", "kept tokens (relaxation)"),
        ("score_sd", "standard deviation of scores"),
        ("overlap", "let through of those selected"),
        ("grad_norm", "gradient norm, before clipping"),
        ("grad_cosine", "gradient cosine"),
    )
    with styled():
        figure, panels = axes(width, 6.4, 3, 3) if width > NARROW else axes(width, 9.5, 5, 2)
        for ax in panels[9:]:
            ax.set_axis_off()
        for ax, (column, title) in zip(panels, wanted, strict=False):
            for label in shown:
                x, y = _smooth(steps[steps["label"] == label], column)
                color, _, dash = records.styles[label]
                ax.plot(x, y, color=color, ls=dash, lw=1.3, label=label, marker="o" if 0 < len(x) < 15 else None, ms=3)
            ax.set_title(title, fontsize=8.5)
            if not any(np.size(line.get_xdata()) for line in ax.lines):
                ax.annotate("not recorded", (0.5, 0.5), xycoords="axes fraction", ha="center", color="#888888")
                ax.set(xticks=[], yticks=[])
        norms = [y for line in panels[6].lines for y in np.asarray(line.get_ydata(), float)]
        if any(y > 0 for y in norms):  # they differ by powers of ten; a zero has no place among them
            panels[6].set_yscale("log", nonpositive="mask")
            panels[6].yaxis.set_major_formatter(power_of_ten)
        _costs(panels[8], steps, {x: records.styles[x][0] for x in shown})
        handles, words = panels[0].get_legend_handles_labels()
        figure.legend(handles, words, loc="outside lower center", ncols=max(1, round(width / 2)))
        for ax in panels[6:8]:
            ax.set_xlabel("training step")
        return svg(figure)


def _costs(ax: Axes, steps: pd.DataFrame, shown: dict[str, str]) -> None:
    place = np.arange(len(shown))[::-1]
    spread = [steps.loc[steps["label"] == x, "step_ms"].quantile([0.1, 0.5, 0.9]).to_numpy() for x in shown]
    ax.barh(place, [s[1] for s in spread], color=list(shown.values()), height=0.6,
            xerr=np.array([[s[1] - s[0], s[2] - s[1]] for s in spread]).T.clip(0), error_kw={"elinewidth": 0.8})  # fmt: skip
    for y, (_, middle, high) in zip(place, spread, strict=True):
        ax.annotate(f"{middle:.0f}", (high, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    ax.set_yticks([])
    ax.margins(x=0.15)
    ax.grid(visible=False, axis="y")
    ax.set_title("ms a step (median, p10–p90)", fontsize=8.5)


def tuning(records: Records) -> Plot | None:
    """Tokens -> prefill; threshold -> kept tokens; threshold -> speedup with the tuned points and their measurements."""
    curve = records.told("curve", "batch")
    trials, choices = (records.told(table, "label", "tuned_kind", "target_speedup") for table in ("trials", "choices"))
    trials = trials[trials["tuned_kind"] == "threshold"]
    if curve.empty and trials.empty:
        return None
    labels = [x for x in records.methods if (trials["label"] == x).any()][:SHOWN]
    alt = "Prefill time by sequence length; kept tokens and net speedup by threshold, for " + ", ".join(labels or ["no method"])
    alt = plain(f"{alt}; the answers are in tuned.csv.", 600)
    return plot(lambda width: _tuning(records, curve, trials, choices, labels, width), alt)


def _tuning(
    records: Records, curve: pd.DataFrame, trials: pd.DataFrame, choices: pd.DataFrame, labels: list[str], width: float
) -> str:
    with styled():
        figure, (left, middle, right) = axes(width, 2.9, 1, 3) if width > NARROW else axes(width, 7.6, 3, 1)
        _latency_curve(left, curve)
        for label in labels:
            color, marker, dash = records.styles[label]
            part = trials[trials["label"] == label].groupby("value")[["kept", "predicted_speedup"]].mean()
            middle.plot(part.index, part["kept"], color=color, ls=dash, lw=1.3, label=label)
            right.plot(part.index, part["predicted_speedup"], color=color, ls=dash, lw=1.3)
            tuned = choices[
                (choices["label"] == label) & (choices["tuned_kind"] == "threshold") & choices["measured_speedup"].notna()
            ]
            error = np.array(
                [tuned["measured_speedup"] - tuned["measured_low"], tuned["measured_high"] - tuned["measured_speedup"]]
            ).clip(0)
            right.errorbar(
                tuned["value"],
                tuned["measured_speedup"],
                yerr=error,
                color=color,
                marker=marker,
                ls="none",
                mfc="white",
                elinewidth=0.9,
            )
            middle.plot(tuned["value"], tuned["kept"], color=color, marker=marker, ls="none", mfc="white")
        _targets(right, sorted(choices["target_speedup"].unique()))
        middle.set(xlabel="threshold, standard deviations", title="kept tokens (mean)")
        right.set(xlabel="threshold, standard deviations", title="net speedup: line predicted,\npoints measured")
        handles, words = middle.get_legend_handles_labels()
        if handles:
            figure.legend(handles, words, loc="outside lower center", ncols=max(1, round(width / 2)))
        return svg(figure)


def _targets(ax: Axes, targets: list[float]) -> None:
    """Targets as dashed lines, those far beyond what was reached left out (the table names them)."""
    top = 1.25 * ax.get_ylim()[1]
    for target in [t for t in targets if t <= top]:
        ax.axhline(target, color=INK, lw=0.6, ls=(0, (4, 3)))
        ax.annotate(
            f"{target:g}×",
            (1, target),
            xycoords=("axes fraction", "data"),
            xytext=(2, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )


def _latency_curve(ax: Axes, curve: pd.DataFrame) -> None:
    """Prefill latency against sequence length, one line per batch size."""
    shades = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
    for color, (batch, part) in zip(shades, curve.sort_values("sequence").groupby("batch", sort=True), strict=False):
        ax.fill_between(part["sequence"], part["p10_ms"], part["p90_ms"], color=color, alpha=0.15, lw=0)
        ax.plot(part["sequence"], part["prefill_ms"], color=color, marker="o", ms=3, ls="none")
        ax.plot(part["sequence"], part["fitted_ms"], color=color, lw=1.2)
        last = part.iloc[-1]
        ax.annotate(
            f"batch {batch}",
            (last["sequence"], last["fitted_ms"]),
            xytext=(-4, 5),
            textcoords="offset points",
            ha="right",
            fontsize=7.5,
            color=color,
        )
    if curve.empty:
        ax.annotate("not measured", (0.5, 0.5), xycoords="axes fraction", ha="center", color="#888888")
    ax.set_ylim(bottom=0)
    ax.set(xlabel="sequence length, tokens", title="prefill, ms: points measured,\nline fitted, band p10–p90")
