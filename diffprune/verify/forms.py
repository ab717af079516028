"""The forms in which a report prints its entries, Markdown, HTML and CSV, held against `numbers.csv` and against each other.

Not read are `report.tex` and what is drawn in figures; their descriptions are.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path

from diffprune.verify.page import Printed, text, without_mark

BESIDE = ("latency_spans", "benchmarks_", "pictures")  # tables beside the page or under its pictures, not among its tables
PARTS = ("low", "high", "verdict", "note", "flags")  # of a number, which have columns of their own in CSV
CUT = (300, 500, 900)  # characters of settings, caveats and sentences, of which the page prints no more
ESTIMATE = re.compile(r"[+−]?\d[\d ]*(?:\.\d+)?×? \[[+−]?\d[^\]]*\]")


@dataclass
class _Cell:
    """A cell of a table of the page. value: in full precision; said: its texts by their class, "" of what has none."""

    value: str
    said: dict[str, str] = field(default_factory=dict)


class _Page(HTMLParser):
    """tables: (name of the table, its title, its cells); attached: (name, CSV) of every one, in full precision.

    notes: those below tables; drawn: what the figures show, in words."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables, self.attached = list[tuple[str, str, list[_Cell]]](), list[tuple[str, str]]()
        self.notes, self.drawn = list[str](), list[str]()
        self._title, self._kind, self._cells = "", "", list[_Cell]()
        self._cell: _Cell | None = None
        self._below = self._plot = self._note = False  # whether one is below a table, in a figure, in a note
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        about = {name: value or "" for name, value in attrs}
        if tag == "div" and about.get("role") == "region":
            self._title, self._cells = about.get("aria-label", ""), []
        elif tag == "td" or (tag == "th" and about.get("scope") == "row"):
            self._cell, self._kind = _Cell(about.get("data-v", "")), ""
            self._cells.append(self._cell)
        elif tag == "span":
            self._kind = about.get("class", "").rpartition("ci ")[2].split(" ")[0]
        elif tag == "figure":
            self._plot = about.get("class") == "plot"
        elif tag == "svg" and self._plot and "aria-label" in about:
            self.drawn.append(" ".join(about["aria-label"].split()))
        elif tag == "p" and self._below:
            self._note = True
            self.notes.append("")
        elif tag == "a" and about.get("class") == "csv":
            name = about.get("download", "").removesuffix(".csv")
            self.attached.append((name, _decoded(about.get("href", ""))))
            if self._cells:
                self.tables.append((name, self._title, self._cells))
                self._below = True
            self._cells = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = None
        self._below = self._below and tag != "div"
        self._note = self._note and tag != "p"
        self._kind = "" if tag == "span" else self._kind

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.said[self._kind] = " ".join((self._cell.said.get(self._kind, "") + data).split())
        if self._note:
            self.notes[-1] += data


def disagreements(report: Path, entries: Sequence[Printed]) -> Iterator[str]:
    """A sentence for each cell, sentence, note or description that does not print what the entries, or the other forms, say.

    Raises:
        ValueError: a file of the report is missing or damaged.
    """
    markdown, page = text(report / "report.md"), text(report / "report.html")
    yield from _in_markdown(entries, markdown)
    tables: dict[str, list[list[Printed]]] = {}
    for (_, name, _), group in groupby(entries, lambda entry: (entry.chapter, entry.table, entry.title)):
        tables.setdefault(name, []).append(list(group))
    files: dict[str, list[str]] = {}
    for name, several in tables.items():
        for number, own in enumerate(several, 1):
            file = f"tables/{name}.csv" if number == 1 else f"tables/{name}_{number}.csv"
            files.setdefault(name, []).append(text(report / file))
            yield from _in_csv(own, files[name][-1], file)
    parsed = _Page(page)
    for name, title, cells in parsed.tables:
        yield from _in_html(name, title, cells, tables.get(name, []))
    for name, attached in parsed.attached:
        if attached not in files.get(name, []):
            yield f"report.html holds another {name}.csv than tables has"
    yield from _around(entries, markdown, page, parsed)


def _is(short: str, whole: str) -> bool:
    """Whether a text is another one, or what is left of it where it was cut."""
    return short == whole or ("…" in short and re.fullmatch(".*".join(map(re.escape, short.split("…"))), whole) is not None)


def _in_markdown(entries: Sequence[Printed], markdown: str) -> Iterator[str]:
    on_page = [entry for entry in entries if not entry.table.startswith(BESIDE)]
    cells = list(_cells(markdown))
    if len(cells) != len(on_page):
        yield f"report.md has {len(cells)} cells in its tables, numbers.csv has {len(on_page)}"
        return
    for entry, cell in zip(on_page, cells, strict=True):
        if not _is(without_mark(cell), entry.printed):
            yield f"{entry.where}: report.md prints {cell!r}, numbers.csv {entry.printed!r}"


def _cells(markdown: str) -> Iterator[str]:
    """Every cell of every table, row by row, as it was before it was escaped."""
    lines = markdown.splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("| ") and before.startswith("|") and not line.startswith("| ---"):  # neither heading nor rule
            for cell in re.split(r"(?<!\\)\|", line)[1:-1]:
                yield _unescaped(re.sub(r"^\*\*(.*)\*\*$", r"\1", cell.strip()))


def _unescaped(text: str) -> str:
    return html.unescape(re.sub(r"\\(.)", r"\1", text))


def _in_html(name: str, title: str, cells: list[_Cell], tables: list[list[Printed]]) -> Iterator[str]:
    """tables: of this name, one for each chapter, whose titles say which where there are several."""
    found = [group for group in tables if len(group) == len(cells) and _titled(title, group[0].title)]
    if not found:
        yield f"report.html has a table {title!r} of {len(cells)} cells, numbers.csv has none"
        return
    wrong = min(([(e, c) for e, c in zip(group, cells, strict=True) if not _agrees(e, c)] for group in found), key=len)
    for entry, cell in wrong:
        shown = " ".join(filter(None, cell.said.values()))
        more = f" for {cell.value}" if cell.value else ""
        yield f"{entry.where}: report.html prints {shown!r}{more}, numbers.csv {entry.printed!r}"


def _agrees(entry: Printed, cell: _Cell) -> bool:
    """Whether a cell of the page prints an entry: the number, its interval and its verdict, and what stands in small print."""
    if not entry.digits:
        return _is(without_mark(cell.said.get("", "")), entry.printed)
    shown = " ".join(filter(None, (cell.said.get(kind, "") for kind in ("", "ci", "word"))))
    small = "; ".join(filter(None, (cell.said.get(kind, "") for kind in ("aside", "flag"))))
    whole = f"{shown} ({small})" if small else shown
    return _is(whole, entry.printed) and _equal(_number(cell.value), entry.value)


def _equal(one: float, other: float) -> bool:
    """Up to the ten digits that CSV has."""
    return math.isclose(one, other, rel_tol=1e-12, abs_tol=1e-10) or (math.isnan(one) and math.isnan(other))


def _in_csv(entries: list[Printed], table: str, file: str) -> Iterator[str]:
    heading, *rows = [*csv.reader(io.StringIO(table, newline=""))] or [[]]
    places: list[dict[str, int]] = []  # of each entry of a row: where its value and its parts are
    for number, name in enumerate(heading):
        main = heading[places[-1][""]] if places else ""
        part = name.removeprefix(f"{main} ")
        if places and part in PARTS and name != part:
            places[-1][part] = number
        else:
            places.append({"": number})
    cells = [{part: without_mark(row[at]) for part, at in place.items() if at < len(row)} for row in rows for place in places]
    if len(cells) != len(entries):
        yield f"{file} has {len(cells)} entries, numbers.csv has {len(entries)}"
        return
    for entry, cell in zip(entries, cells, strict=True):
        if entry.digits:
            numbers = {"": entry.value, "low": entry.low, "high": entry.high}
            same = all(_equal(_number(cell.get(part, "")), value) for part, value in numbers.items())
            same = same and (cell.get("verdict", ""), cell.get("note", "")) == (entry.word, entry.note)
        else:
            same = (cell.get("", "") or "–") == (entry.printed or "–")
        if not same:
            yield f"{entry.where}: {file} has {' '.join(filter(None, cell.values()))!r}, numbers.csv {entry.printed!r}"


def _number(text: str) -> float:
    """nan of an empty cell; of what is no number, infinity, which no entry is."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.inf


def _titled(title: str, whole: str) -> bool:
    """Whether a title of the page is that of a table, which may say in brackets of which chapter it is."""
    return any(_is(title, whole[:end]) for end in (len(whole), *(found.start() for found in re.finditer(r" \(", whole))))


def _around(entries: Sequence[Printed], markdown: str, page: str, parsed: _Page) -> Iterator[str]:
    """What stands around the tables is the same in Markdown and on the page; estimates and headings are those of entries."""
    lines = [line for line in markdown.splitlines() if line and line[0] != "|"]
    titles = {entry.title for entry in entries}
    for title in (_unescaped(line[4:]) for line in lines if line.startswith("### ")):
        if any(mark.isdigit() for mark in title) and not any(_is(title, whole) for whole in titles):
            yield f"report.md has a table {title!r}, numbers.csv has none"

    known = {found for entry in entries for found in ESTIMATE.findall(entry.printed)}
    shown = " ".join(html.unescape(page).split())
    for said in (_unescaped(line) for line in lines if line[0] not in "#!*"):
        apart = re.sub(r"^\S+: (?=.)", "", said)  # the name of a caveat stands by itself on the page
        if not any(one in shown for one in (said.removesuffix("…"), apart, *(f"{apart[: most - 1].rstrip()}…" for most in CUT))):
            yield f"report.md says {said[:200]!r}, report.html does not"
        yield from (f"report.md says {one!r}, numbers.csv does not" for one in ESTIMATE.findall(said) if one not in known)

    notes = {_unescaped(line[1:-1]) for line in lines if line[0] == "*"}
    for note in dict.fromkeys(" ".join(note.split()) for note in parsed.notes):
        if note not in notes:
            yield f"report.html says {note[:200]!r}, report.md does not"
    drawn = [_unescaped(re.sub(r"^!\[(.*)\]\([^)]*\)$", r"\1", line)) for line in lines if line[0] == "!"]
    for description in dict.fromkeys(parsed.drawn):
        if not any(_is(one, description) for one in drawn):
            yield f"report.html describes a figure as {description[:200]!r}, report.md does not"


def _decoded(address: str) -> str:
    try:
        return base64.b64decode(address.partition("base64,")[2], validate=True).decode()
    except ValueError:
        return ""
