"""Tables as a LaTeX document that pdflatex takes as it is: two for a paper, the others as long tables in an appendix.

No line is wider than the page: columns of words break where they must, and a table too wide for the smallest print is printed in
parts, the first column repeated. Widths are those of Computer Modern, taken a little too large.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from diffprune.report.render import escape
from diffprune.report.render.table import Entry, Number, Table

PAPER = ("budget_", "differences")  # tables a paper prints: the first of each name
LINE = 728.0  # points of a line: A4 across, margins of 2 cm
GAP = 3.0  # points on either side of a column
# Small sizes of Computer Modern are wider than the large one scaled down: points of the ten-point face that is as wide.
SIZES = ((r"\small", 9.3), (r"\footnotesize", 8.5), (r"\scriptsize", 8.0), (r"\tiny", 6.8))
WIDEST = 24  # characters of a word that may not be broken
HEAD = r"""\documentclass[10pt]{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\IfFileExists{lmodern.sty}{\usepackage{lmodern}}{}
\usepackage[a4paper,landscape,margin=2cm]{geometry}
\usepackage{array,booktabs,longtable}
\setlength{\tabcolsep}{3pt}
\setlength{\LTcapwidth}{\linewidth}
\emergencystretch=3em
\begin{document}
"""


def document(title: str, tables: Sequence[Table]) -> str:
    """The whole document. label of a table: `tab:paper-1`, `tab:7`, and `-2` for its second part."""
    first = {stem: next((t for t in tables if t.name.startswith(stem)), None) for stem in PAPER}
    paper = [t for t in first.values() if t is not None]
    rest = [t for t in tables if all(t is not p for p in paper)]
    parts = [HEAD + rf"\section*{{{_breakable(title)}}}", *(_table(t, f"paper-{i}") for i, t in enumerate(paper, 1))]
    if rest:
        parts += [r"\clearpage", r"\appendix", r"\section{All tables}", *(_table(t, str(i)) for i, t in enumerate(rest, 1))]
    return "\n".join([*parts, r"\end{document}", ""])


def _table(table: Table, label: str) -> str:
    """A longtable, in as many parts as its columns need."""
    cells = [[_cell(entry, table.longest) for entry in row] for row in (table.columns, *table.rows)]
    size, widths, parts = _fitted(cells)
    found = ((part, label + (f"-{number}" if number > 1 else "")) for number, part in enumerate(parts, 1))
    return "\n".join(_part(table, cells, part, size, widths, name) for part, name in found)


Cell = tuple[str, str]  # what is printed, and what below it


def _cell(entry: Entry, longest: int) -> Cell:
    if not isinstance(entry, Number):
        return ("--" if entry is None else escape.plain(entry, longest)), ""
    interval = entry.interval.replace(", ", ",")  # one word, which breaks nowhere
    return entry.main, " ".join(part for part in (interval, entry.word, f"({entry.aside})" if entry.aside else "") if part)


def _need(cell: Cell, points: float) -> tuple[float, float]:
    """Points of width below which a word would stick out, and with which nothing breaks."""
    lines = [[_width(piece, points) for word in _words(text) for piece in word] for text in cell]
    return max(max(line, default=0.0) for line in lines), max(sum(line) + 0.4 * points * len(line) for line in lines)


def _words(text: str, limit: int = 1200) -> list[list[str]]:
    """The words of a text, each in parts between which a line may break: after marks, and anywhere in what is too long."""
    plain = escape.latin(escape.plain(text.replace("\u202f", ","), limit))
    split = [re.findall(r"\(+[^/_=(;]+$|[^/_=(;]*[/_=(;]|[^/_=(;]+$", word) for word in plain.split()]
    return [[piece[i : i + WIDEST] for piece in word for i in range(0, len(piece), WIDEST)] for word in split]


def _width(word: str, points: float) -> float:
    """Points; of Computer Modern bold at this size, rounded up."""
    wide, narrow = set("mwMWQ@%&+=<>×−±≤≥"), set("ijl.,:;|!'[]()I")
    return points * sum(1.05 if c in wide else 0.42 if c in narrow else 0.85 if c.isupper() else 0.62 for c in word)


def _fitted(cells: list[list[Cell]]) -> tuple[str, list[float], list[list[int]]]:
    """(size, width of every column in points, columns of every part): the largest print in which all columns fit."""
    for size, points in SIZES:
        needs = [[_need(row[i], points) for row in cells] for i in range(len(cells[0]))]
        least = [max(n for n, _ in column) + 1 for column in needs]
        if sum(least) + 2 * GAP * len(least) <= LINE or size == SIZES[-1][0]:
            break
    parts: list[list[int]] = [[0]]
    for i in range(1, len(least)):
        if len(parts[-1]) > 1 and sum(least[k] + 2 * GAP for k in (*parts[-1], i)) > LINE:
            parts.append([0])
        parts[-1].append(i)
    widths = list(least)
    for part in parts:
        room = LINE - sum(least[i] + 2 * GAP for i in part) - 1
        wish = {i: max(0.0, max(n for _, n in needs[i]) - least[i]) for i in part}
        share = min(1.0, max(0.0, room) / sum(wish.values())) if sum(wish.values()) else 0.0
        for i in part if len(parts) == 1 else part[1:]:  # the first column is as wide in every part
            widths[i] = least[i] + share * wish[i]
    return size, widths, parts


def _breakable(text: str, limit: int = 1200) -> str:
    return " ".join(r"\allowbreak{}".join(map(escape.latex, word)) for word in _words(text, limit))


def _printed(cell: Cell, best: bool) -> str:
    main = rf"\textbf{{{_breakable(cell[0])}}}" if best else _breakable(cell[0])
    below = re.sub(r"(\[\S+?),(\S+\])", r"\1,\\,\2", _breakable(cell[1]))
    return main + (rf"\linebreak{{}} {below}" if below else "")


def _part(table: Table, cells: list[list[Cell]], part: list[int], size: str, widths: list[float], label: str) -> str:
    kinds = [(r"\raggedleft" if table.numeric(i) else r"\raggedright") for i in part]
    columns = "".join(rf">{{{kind}\arraybackslash}}p{{{widths[i]:.1f}pt}}" for kind, i in zip(kinds, part, strict=True))
    again = part[0] == 0 and len(part) < len(table.columns) and 1 not in part
    caption = _breakable(table.title + (", further columns" if again else "") + ".")
    head = " & ".join(rf"\textbf{{{_breakable(cells[0][i][0])}}}" for i in part) + r" \\"
    rows = []
    for at, row in enumerate(table.rows):
        rows += [r"\midrule"] if at in table.rule_before and at else []
        shown = [_printed(cells[at + 1][i], isinstance(e := row[i], Number) and e.best) for i in part]
        rows.append(" & ".join(shown) + r" \\")
    notes = "" if again else "\n\n".join(_breakable(note) for note in table.notes)
    return "\n".join([
        "{" + size, rf"\begin{{longtable}}{{{columns}}}", rf"\caption{{{caption}}}\label{{tab:{label}}}\\",
        r"\toprule", head, r"\midrule", r"\endfirsthead", r"\toprule", head, r"\midrule", r"\endhead",
        r"\bottomrule", r"\endfoot", *rows, r"\end{longtable}", *([r"\noindent " + notes, ""] if notes else []), r"\par}", "",
    ])  # fmt: skip
