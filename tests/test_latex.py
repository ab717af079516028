"""The LaTeX document: pdflatex takes it where there is one; no cell is wider than its column, no table than the page."""

from __future__ import annotations

import re
import shutil
import subprocess
import unicodedata
from functools import cache
from pathlib import Path

import matplotlib
import pytest
from matplotlib.ft2font import FT2Font

from diffprune.report.render.latex import LINE, document
from diffprune.report.render.table import Number, Table

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
# of the small sizes relative to the ten-point face: widths of a digit in cmr9, cmr8, cmr7 and cmr5, from their metrics
DRAWN = {"small": (9, 1.03), "footnotesize": (8, 1.06), "scriptsize": (7, 1.14), "tiny": (5, 1.36)}
SIGNS = {r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"\textless{}": "<",
         r"\textgreater{}": ">", r"\textbar{}": "|", r"$\times$": "+", r"$-$": "+", r"$\pm$": "+", r"$\le$": "+", r"$\ge$": "+",
         r"$\tau$": "x",
         r"$\cdot$": ".", r"$\approx$": "+", r"$\to$": "MM"}  # fmt: skip
EVIL = (r"\input{/etc/passwd} $x$ 100%", "答案是红色 and more", "سؤال بالعربية", "naïve café Łódź", "x" * 300, "a_b/" * 30,
        "–×−±≤≥τ·|<>~^")  # fmt: skip


def tables() -> list[Table]:
    number = Number(-12345.678, -20000.0, 3.5, 1, "×", "cannot tell", True, True, "p 0.12 after Holm; these scorers only",
                    "cpu_only")  # fmt: skip
    few = Table("budget_keep_16", "Accuracy with 16 of 144 tokens (11 %)", ("Method", "GQA"), (("Ours & theirs_1", number),) * 3)
    many = Table("differences", "Differences", ("Method", *(f"Benchmark {i}" for i in range(40))), (("x" * 20, *(number,) * 40),))
    evil = Table("evil", EVIL[0], ("what", *EVIL), tuple((str(i), *EVIL) for i in range(3)), notes=EVIL, rule_before=frozenset({1}))
    long = Table("long", "Long", ("a", "b"), tuple((f"row {i}", None) for i in range(120)))
    return [few, many, evil, long]


@cache
def face(bold: bool) -> FT2Font:
    found = FT2Font(str(FONTS / ("cmb10.ttf" if bold else "cmr10.ttf")))
    found.set_size(100, 72)
    return found


def width(text: str, size: str, bold: bool) -> float:
    """Points of a line of Computer Modern."""
    points, relative = DRAWN[size]
    letters = [c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)]
    face(bold).set_text("".join(c if c.isascii() else "M" for c in letters))
    return face(bold).get_width_height()[0] / 64 / 100 * points * relative


def lines_of(cell: str) -> list[tuple[str, bool]]:
    """What may not be broken, and whether it is bold."""
    bold = cell.startswith(r"\textbf{")
    main, _, below = cell.removeprefix(r"\textbf{").partition(r"\linebreak{} ")
    found = []
    for text, heavy in ((main.rstrip("}") if bold and r"\text" not in main else main, bold), (below, False)):
        for sign, like in SIGNS.items():
            text = text.replace(sign, like)
        for piece in re.split(r"\\allowbreak\{\}| ", text):
            found.append((re.sub(r"\\([{}$&#_%])", r"\1", piece).replace("--", "-"), heavy))
    return found


def faults(text: str) -> list[str]:
    """What pdflatex would complain of, as far as it can be told without it."""
    found = [f"a character outside Latin 1: {c!r}" for c in text if ord(c) > 0xFF and c not in "ŁłŒœĐđ"]
    open_ = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            open_.append(name)
        elif not open_ or open_.pop() != name:
            found.append(f"\\end{{{name}}} without its beginning")
    found += [f"{name} is not ended" for name in open_]
    bare = re.sub(r"\\[{}\\]", "", text)
    found += ["braces do not balance"] if bare.count("{") != bare.count("}") else []
    labels = re.findall(r"\\label\{([^}]*)\}", text)
    found += ["two tables of one label"] if len(labels) != len(set(labels)) else []
    for size, spec, body in re.findall(r"\{\\(\w+)\n\\begin\{longtable\}\{([^\n]*)\}\n(.*?)\\end\{longtable\}", text, re.DOTALL):
        widths = [float(w) for w in re.findall(r"p\{([\d.]+)pt\}", spec)]
        if sum(widths) + 6 * len(widths) > LINE:
            found.append(f"a table of {sum(widths) + 6 * len(widths):.0f} points")
        for row in [line for line in body.splitlines() if line.endswith(r" \\")]:
            cells = re.split(r"(?<!\\) & ", row.removesuffix(r" \\"))
            if len(cells) != len(widths):
                found.append(f"{len(cells)} cells in {len(widths)} columns: {row[:60]}")
            for cell, room in zip(cells, widths, strict=False):
                found += [f"{piece!r} in {room} points" for piece, bold in lines_of(cell) if width(piece, size, bold) > room]
    return found


def test_nothing_sticks_out_and_everything_is_closed() -> None:
    text = document("A % title_with $ signs", tables())
    assert not faults(text)
    assert text.count(r"\begin{longtable}") > len(tables()), "forty columns stand in parts"
    assert r"\input" not in text and "passwd" in text, "printed, not executed"
    assert "[5 characters] and more" in text and "naïve café Łódz" in text and "x" * 30 not in text
    assert text.index("tab:paper-1") < text.index("tab:paper-2") < text.index(r"\appendix")


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("p{", "p{9", "points"),
        (r"\end{longtable}", "", "not ended"),
        (r"\allowbreak{}", "", "points"),
        (" & ", " ", "columns"),
        ("row 1 ", "row 紅 ", "outside Latin 1"),
        (r"\textbf{", "{{", "braces"),
    ],
)
def test_a_planted_fault_is_found(old: str, new: str, fault: str) -> None:
    assert any(fault in one for one in faults(document("Title", tables()).replace(old, new)))


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex on this machine")
def test_pdflatex_takes_it_without_a_complaint(tmp_path: Path) -> None:
    (tmp_path / "report.tex").write_text(document("Title", tables()), "utf-8")
    for _ in range(2):
        subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "report.tex"], cwd=tmp_path, check=True,
                       stdout=subprocess.DEVNULL, timeout=120)  # fmt: skip
    log = (tmp_path / "report.log").read_text("latin-1")
    assert not re.findall(r"^(?:! .*|Overfull .*|.*undefined.*)$", log, re.MULTILINE)
