"""A table as a value, as Markdown and as CSV; its other forms are the page's template and `latex`."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from diffprune.report.render import escape


@dataclass(frozen=True)
class Number:
    """A number, its 95 % interval where there is one, and how it is printed.

    digits: after the point; unit: printed after it; word: a verdict printed beside it ("better"); best: set in bold type;
    note: small print, as in whom it was compared with; flags: warnings about how it was measured.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    digits: int = 1
    unit: str = ""
    word: str = ""
    best: bool = False
    signed: bool = False
    note: str = ""
    flags: str = ""

    @property
    def aside(self) -> str:
        """Note and flags, as printed in brackets where there is no small print."""
        return "; ".join(part for part in (self.note, self.flags) if part)

    def form(self, value: float) -> str:
        """One of the three numbers with this one's digits; a dash for what does not exist."""
        if not math.isfinite(value):
            return "–"
        value = round(value, self.digits) or 0.0  # which has no sign
        shown = f"{value:{'+' if self.signed and value else ''},.{self.digits}f}"
        return shown.replace("-", "−").replace(",", "\u202f")

    @property
    def main(self) -> str:
        return self.form(self.value) + (self.unit if math.isfinite(self.value) else "")

    @property
    def interval(self) -> str:
        return f"[{self.form(self.low)}, {self.form(self.high)}]" if math.isfinite(self.low) else ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.main, self.interval, self.word, f"({self.aside})" if self.aside else "") if part)


Entry = Number | str | None


@dataclass(frozen=True)
class Table:
    """`rows` of entries under `columns`; `name` is the file's, `notes` stand below. `rule_before`: rows after a thin line.

    keys, column_keys: what each row and column is about, in words of the store, for whoever computes the numbers again; where none
    are given the texts of the row, and the columns. longest: characters of a cell, of which what is more is cut.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    notes: tuple[str, ...] = ()
    rule_before: frozenset[int] = field(default_factory=frozenset)
    keys: tuple[str, ...] = ()
    column_keys: tuple[str, ...] = ()
    longest: int = 160

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), f"{self.name}: rows do not fit the columns"
        assert len(self.keys) in (0, len(self.rows)) and len(self.column_keys) in (0, len(self.columns)), (
            f"{self.name}: keys do not fit"
        )

    def key(self, row: int) -> str:
        """What a row is about."""
        return self.keys[row].strip() if self.keys else " | ".join(entry for entry in self.rows[row] if isinstance(entry, str))

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers, which are set to the right."""
        return any(isinstance(row[column], Number) for row in self.rows)


def _show(entry: Entry) -> str:
    return "–" if entry is None else str(entry)


def markdown(table: Table) -> str:
    """GitHub's table dialect; the best value in bold."""
    lines = [f"### {escape.markdown(table.title)}", ""]
    lines.append("| " + " | ".join(map(escape.markdown, table.columns)) + " |")
    lines.append("|" + "|".join(" ---: " if table.numeric(i) else " --- " for i in range(len(table.columns))) + "|")
    for row in table.rows:
        cells = [escape.markdown(_show(e), table.longest) for e in row]
        cells = [f"**{c}**" if isinstance(e, Number) and e.best else c for c, e in zip(cells, row, strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"\n*{escape.markdown(note, 900)}*" for note in table.notes]
    return "\n".join([*lines, *notes, ""])


_PARTS = {
    "low": lambda n: _raw(n.low),
    "high": lambda n: _raw(n.high),
    "verdict": lambda n: n.word,
    "note": lambda n: n.note,
    "flags": lambda n: n.flags,
}


def to_csv(table: Table) -> str:
    """Full precision, one column per number: `x`, then `x low`, `x high`, `x verdict`, `x note`, `x flags` where a row has one."""
    more: list[list[str]] = []
    for i in range(len(table.columns)):
        numbers = [row[i] for row in table.rows if isinstance(row[i], Number)]
        more.append([part for part, take in _PARTS.items() if any(take(n) for n in numbers)])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [escape.csv(h) for name, parts in zip(table.columns, more, strict=True) for h in (name, *(f"{name} {p}" for p in parts))]
    )
    for row in table.rows:
        cells: list[str] = []
        for entry, parts in zip(row, more, strict=True):
            if isinstance(entry, Number):
                cells += [
                    _raw(entry.value),
                    *(_PARTS[p](entry) if p in ("low", "high") else escape.csv(_PARTS[p](entry)) for p in parts),
                ]
            else:
                cells += [escape.csv(entry or ""), *([""] * len(parts))]
        writer.writerow(cells)
    return out.getvalue()


def _raw(value: float) -> str:
    return repr(round(float(value), 10)) if math.isfinite(value) else ""


NUMBERS = ("chapter", "table", "title", "row", "column", "value", "low", "high", "digits", "printed", "word", "note")


def numbers(tables: Sequence[tuple[str, Table]]) -> str:
    """CSV of every entry of (chapter, table) with what it is about, in full precision and as printed: what `verify` reads.

    `digits` is empty for text.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(NUMBERS)
    for chapter, one in tables:
        columns = one.column_keys or one.columns
        for i, row in enumerate(one.rows):
            for column, entry in zip(columns, row, strict=True):
                about = (chapter, one.name, one.title, one.key(i), column)
                told = ["", "", "", "", _show(entry), "", ""]
                if isinstance(entry, Number):
                    told[:4] = _raw(entry.value), _raw(entry.low), _raw(entry.high), str(entry.digits)
                    told[5:] = entry.word, entry.note
                writer.writerow([*map(escape.csv, about), *told[:4], *map(escape.csv, told[4:])])
    return out.getvalue()
