"""Which columns a table has, in plain Python: one dataclass is one table, plus whose cell it is and who made the row.

Where names meet, the record keeps its name, then the cell; the other takes its owner as a prefix: `cell_budget` beside a
choice's own `budget`, `cell_seed` beside a step's own `seed`, `provenance_seed` always.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from types import NoneType

from diffprune.core.records import TABLES, Cell, Provenance
from diffprune.core.registry import nearest

VERSIONS: dict[str, int] = {}  # of a table's columns; 1 where they never changed

# What makes a row without a cell the same row when a resumed run writes it again; whole records where a table is not listed.
KEYS = {
    "steps": ("arm", "seed", "step"),
    "curve": ("batch", "sequence", "visual_kept"),
    "trials": ("method", "kind", "target_speedup", "value"),
    "choices": ("method", "kind", "target_speedup"),
}


@dataclass(frozen=True)
class Column:
    """One column. owner, field: where its value is found; optional: None is allowed in it."""

    name: str
    owner: str  # "record", "key", "cell" or "provenance"
    field: str
    type: type  # str, int, float or bool
    optional: bool


def _of(kind: type, owner: str, taken: set[str]) -> Iterator[Column]:
    hints = typing.get_type_hints(kind)
    for field in fields(kind):
        choices = set(typing.get_args(hints[field.name])) or {hints[field.name]}
        (plain,) = choices - {NoneType}
        name = f"{owner}_{field.name}" if field.name in taken else field.name
        yield Column(name, owner, field.name, plain, NoneType in choices)


# Whose row and who made it, as a row of no record would name it: the same for every table.
_OWN = ("cell", *(field.name for field in fields(Cell)))
ORIGIN = (*_OWN, *(f"provenance_{field.name}" if field.name in _OWN else field.name for field in fields(Provenance)))


@cache
def columns(table: str) -> tuple[Column, ...]:
    """The columns of a table, in order: the record's, then `cell` (the key) and the cell's, then those of the provenance.

    Raises:
        ValueError: no such table; names the nearest one.
    """
    if table not in TABLES:
        raise ValueError(f"no table named {table!r:.100}: {nearest(str(table), TABLES)}")
    found = [*_of(TABLES[table], "record", set()), Column("cell", "key", "key", str, False)]
    for owner, kind in (("cell", Cell), ("provenance", Provenance)):
        found.extend(_of(kind, owner, {column.name for column in found}))
    assert len({column.name for column in found}) == len(found), f"two columns of {table} have one name"
    return tuple(found)


def version(table: str) -> int:
    """Of the table's columns, written into every part."""
    return VERSIONS.get(table, 1)


def row_key(table: str) -> list[str]:
    """The columns that say whether two rows without a cell are the same row: the run's name and what the row is about."""
    return ["run", *(KEYS.get(table) or [c.name for c in columns(table) if c.owner == "record"])]
