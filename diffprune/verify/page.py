"""What a report prints, as data: the entries of its `numbers.csv`."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path

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


def without_mark(text: str) -> str:
    """A text of CSV without the apostrophe that keeps a spreadsheet from reading a formula."""
    return re.sub(r"^'(?=[=+\-@|%])", "", text)


def _entry(row: dict[str, str]) -> Printed:
    row = {name: without_mark(text) for name, text in row.items()}
    value, low, high = (float(row[name] or "nan") for name in ("value", "low", "high"))
    if row["digits"]:
        int(row["digits"])
    return Printed(**{**row, "value": value, "low": low, "high": high})  # type: ignore[arg-type]
