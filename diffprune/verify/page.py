"""What a report prints, as data: the entries of its `numbers.csv`, and the cells of the tables on its page."""

from __future__ import annotations

import csv
import html
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

BESIDE = ("latency_spans", "benchmarks_", "pictures")  # tables beside the page or under its pictures, not among its tables
NUMBER = r"[+−-]?\d{1,3}(?:[\u202f ]\d{3})+(?:\.\d+)?|[+−-]?\d+(?:\.\d+)?"
AGAIN = "write the report again with `diffprune report`"


@dataclass(frozen=True)
class Printed:
    """One entry of a table. row, column: what it is about; value, low, high: nan where there is none; digits: "" of text."""

    chapter: str
    table: str
    title: str
    row: str
    column: str
    value: float
    low: float
    high: float
    digits: str
    printed: str
    word: str
    note: str

    @property
    def family(self) -> str:
        """The table's name, without the budget or the rival of which there is one table each."""
        return (
            "budget" if self.table.startswith("budget_") else "benchmarks" if self.table.startswith("benchmarks_") else self.table
        )

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.table}, {self.row}, {self.column}"

    @property
    def rounding(self) -> float:
        """Half of the last printed digit."""
        return 0.5 * 10.0 ** -int(self.digits)

    @property
    def main(self) -> float:
        """The number that is printed first."""
        return numbers_in(self.printed)[0]

    @property
    def interval(self) -> tuple[float, float] | None:
        """The printed bounds."""
        found = re.search(r"\[([^\]]*)\]", self.printed)
        ends = numbers_in(found[1].replace(", ", " ; ")) if found and math.isfinite(self.low) else []
        return (ends[0], ends[1]) if len(ends) == 2 else None


def numbers_in(text: str) -> list[float]:
    """Every number of a text, with the typographic minus and thin spaces of the page."""
    return [float(re.sub(r"[\u202f ]", "", one).replace("−", "-")) for one in re.findall(NUMBER, text)]


def read(path: Path) -> list[Printed]:
    """The entries of a `numbers.csv`.

    Raises:
        ValueError: there is none, or it is damaged; says what would make it.
    """
    names = [field.name for field in fields(Printed)]
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            found = [_entry(row) for row in reader] if reader.fieldnames == names else None
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {AGAIN}") from None
    except (ValueError, TypeError, csv.Error):  # TypeError: a row that is too short
        raise ValueError(f"{path} is damaged: {AGAIN}") from None
    if found is None:
        raise ValueError(f"{path} has other columns than {', '.join(names)}: {AGAIN}")
    return found


def text(path: Path) -> str:
    """A page as it was written.

    Raises:
        ValueError: there is none, or it is damaged; says what would make it.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {AGAIN}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is damaged: {AGAIN}") from None


def _entry(row: dict[str, str]) -> Printed:
    """Texts come without the apostrophe that keeps a spreadsheet from reading a formula."""
    row = {name: re.sub(r"^'(?=[=+\-@|%])", "", text) for name, text in row.items()}
    value, low, high = (float(row[name] or "nan") for name in ("value", "low", "high"))
    if row["digits"]:
        int(row["digits"])
    return Printed(**{**row, "value": value, "low": low, "high": high})  # type: ignore[arg-type]


def disagreements(entries: list[Printed], markdown: str, page: str) -> Iterator[str]:
    """Cells of the tables of `report.md` that do not print what the entries say, and numbers that `report.html` lacks."""
    text = html.unescape(re.sub(r"<[^>]*>", "", page)).replace("\u202f", " ")
    on_page = [entry for entry in entries if not entry.table.startswith(BESIDE)]
    cells = list(_cells(markdown))
    if len(cells) != len(on_page):
        yield f"report.md has {len(cells)} cells in its tables, numbers.csv has {len(on_page)}"
        return
    for entry, cell in zip(on_page, cells, strict=True):
        if entry.digits and cell != entry.printed[: max(1, len(cell))]:
            yield f"{entry.where}: report.md prints {cell!r}, numbers.csv {entry.printed!r}"
        elif entry.digits and entry.title in text and entry.printed.split(" ")[0] not in text:
            yield f"{entry.where}: report.html does not print {entry.printed!r}"


def _cells(markdown: str) -> Iterator[str]:
    """Every cell of every table, row by row, as it was before it was escaped."""
    lines = markdown.splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("| ") and before.startswith("|") and not line.startswith("| ---"):  # neither heading nor rule
            for cell in re.split(r"(?<!\\)\|", line)[1:-1]:
                yield html.unescape(re.sub(r"\\(.)", r"\1", re.sub(r"^\*\*(.*)\*\*$", r"\1", cell.strip())))
