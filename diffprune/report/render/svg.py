"""Figures as SVG text: words stay words, the same records give the same bytes, nothing points outside."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
INK = "#333333"
WIDTH, DPI = 8.8, 100  # inches; dots only matter while text is laid out
SHOWN = 9  # methods in one figure; the others are in the tables
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "diffprune",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.7,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#ececec",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,
    "axes.unicode_minus": True,
}
_NO_METADATA = {key: None for key in ("Date", "Creator", "Format", "Type")}


@contextmanager
def styled() -> Iterator[None]:
    """matplotlib with this report's style and nothing of the user's."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def axes(width: float, height: float, rows: int = 1, columns: int = 1, share: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure in inches with rows x columns axes, in raster order."""
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasSVG(figure)
    made = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)
    return figure, list(made.ravel())


def svg(figure: Figure) -> str:
    """The figure's <svg> element: no prolog, no metadata, no ids but those that are referred to."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=_NO_METADATA)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: m.group(0) if m.group(1) in used else "", text)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ((?:bold )?[0-9.]+px) 'DejaVu Sans'", lambda m: f"font: {m.group(1)} {FONT}", text)
    return text


def inline(text: str) -> str:
    """A figure for the page: as wide as there is room, at most its own size by half."""
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return re.sub(
        r'(<svg[^>]*?) width="([0-9.]+)pt"', lambda m: f'{m[1]} style="max-width:{1.5 * float(m[2]):g}pt" role="img"', text, count=1
    )
