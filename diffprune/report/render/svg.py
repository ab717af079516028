"""Figures as SVG text: words stay words, the same records give the same bytes, nothing points outside."""

from __future__ import annotations

import hashlib
import html
import io
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # to import it takes most of a second, of which a command that draws nothing has no use
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
INK = "#333333"
WIDTH, HALF, NARROW, DPI = 8.8, 5.7, 4.0, 100  # inches of a page, of half a page and of a telephone; dots are for laying out text
SHOWN = 9  # methods in one figure; the others are in the tables
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
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
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # words stay words: the reader's fonts have it
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def axes(width: float, height: float, rows: int = 1, columns: int = 1, share: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure in inches with rows x columns axes, in raster order."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasSVG(figure)
    made = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)
    return figure, list(made.ravel())


def power_of_ten(value: float, _: float = 0.0) -> str:
    """A tick of a logarithmic axis, `10⁴`: matplotlib's own are formulas, which no figure here reads."""
    exponent = math.log10(value) if value > 0 else math.nan
    whole = round(exponent) if math.isfinite(exponent) else 0
    return f"10{str(whole).translate(SUPERSCRIPT)}" if math.isclose(exponent, whole, abs_tol=1e-9) else f"{value:g}"


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
    return _compact(text)


def _compact(text: str) -> str:
    """The same drawing in half the bytes: hundredths of a point, no groups that say nothing, no white space between elements."""
    text = re.sub(r"<[^>]+>", lambda m: re.sub(r"(\.\d\d)\d+", r"\1", re.sub(r"\s+", " ", m[0])), text)
    text = re.sub(r"""( transform="rotate\(-0 [^"]*"| style=""|; stroke-linecap: square)""", "", re.sub(r">\s+<", "><", text))
    kept: list[str] = []
    named: list[bool] = []
    for part in re.split(r"(</?g\b[^>]*>)", text):
        if part.startswith("<g") and not part.endswith("/>"):
            named.append(part != "<g>")
        if part not in ("<g>", "</g>", "<g/>") or (part == "</g>" and named.pop()):
            kept.append(part)
    return "".join(kept)


@dataclass(frozen=True)
class Plot:
    """A figure drawn for a page and again for a telephone, and what it shows in words."""

    wide: str
    narrow: str
    alt: str

    @property
    def file(self) -> str:
        """The figure by itself: the words as its title, on paper that is white in dark surroundings too."""
        paper = '<rect width="100%" height="100%" fill="#ffffff"/>'
        return re.sub(r"<svg[^>]*>", lambda m: f"{m[0]}<title>{html.escape(self.alt)}</title>{paper}", self.wide, count=1)


def plot(draw: Callable[[float], str | None], alt: str, width: float = WIDTH) -> Plot | None:
    """`draw` (inches of width -> SVG text) at both widths; None where there is nothing to draw."""
    wide = draw(width)
    narrow = draw(NARROW) if wide else None
    return Plot(wide, narrow, alt) if wide and narrow else None


def inline(text: str, key: str, alt: str) -> str:
    """A figure for the page: as wide as there is room, at most its own size by half; named for who cannot see it.

    key: before every id, so that no figure refers to another. Inks and colours become the page's, which are others in the dark.
    """
    short = {name: f"{key}{number:x}" for number, name in enumerate(dict.fromkeys(re.findall(r' id="([^"]+)"', text)))}
    text = re.sub(r'( id="|href="#|url\(#)([^")]+)', lambda m: m[1] + short[m[2]], text)
    text = re.sub(r": #([0-9a-f]{6})\b", r": var(--x\1,#\1)", text)
    text = _classed(re.sub(r' d="([^"]*)"', lambda m: f' d="{_path(m[1])}"', text))
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    name = f'role="img" aria-label="{html.escape(alt)}"'
    return re.sub(
        r'(<svg[^>]*?) width="([0-9.]+)pt"', lambda m: f'{m[1]} style="max-width:{1.5 * float(m[2]):g}pt" {name}', text, count=1
    )


def _path(data: str) -> str:
    """The commands of a path without the white space that they do not need."""
    return re.sub(r" ?([A-Za-z]) ?", r"\1", data).replace(" -", "-")


def _classed(text: str) -> str:
    """Styles that stand on several elements, as classes: most of a figure's bytes. A class is named by what it says, so that it
    means the same in every figure of a page."""
    styles = Counter(re.findall(r' style="([^"]*)"', text))
    names = {style: "s" + hashlib.sha256(style.encode()).hexdigest()[:6] for style, times in styles.items() if times > 1}
    text = re.sub(r' style="([^"]*)"', lambda m: f' class="{names[m[1]]}"' if m[1] in names else m[0], text)
    rules = "".join(f".{name}{{{style}}}" for style, name in names.items())
    return text.replace("</style>", f"{rules}</style>", 1)
