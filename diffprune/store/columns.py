"""Which columns a table has, in plain Python: one dataclass is one table, plus whose cell it is and who made the row."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from types import NoneType

from diffprune.core.cell import CellColumns
from diffprune.core.records import TABLES, VIEWS, Provenance
from diffprune.core.registry import nearest

VERSION = 4  # of the columns of all tables; written into every part and every manifest


@dataclass(frozen=True)
class Column:
    """One column. owner: where its value is found; optional: None is allowed in it."""

    name: str
    owner: str  # "record", "key", "cell" or "provenance"
    type: type  # str, int, float or bool
    optional: bool


def _of(kind: type, owner: str) -> Iterator[Column]:
    hints = typing.get_type_hints(kind)
    for field in fields(kind):
        choices = set(typing.get_args(hints[field.name])) or {hints[field.name]}
        (plain,) = choices - {NoneType}
        yield Column(field.name, owner, plain, NoneType in choices)


ORIGIN = ("cell", *(field.name for field in fields(CellColumns)), *(field.name for field in fields(Provenance)))


@cache
def columns(table: str) -> tuple[Column, ...]:
    """The columns of a table or view, in order: the record's, then `cell` (the key) and the cell's, then those of the provenance.

    Raises:
        ValueError: no such table; names the nearest one.
    """
    every = TABLES | VIEWS
    if table not in every:
        raise ValueError(f"no table named {table!r:.100}: {nearest(str(table), every)}")
    found = (
        *_of(every[table], "record"), Column("cell", "key", str, False), *_of(CellColumns, "cell"),
        *_of(Provenance, "provenance"),
    )  # fmt: skip
    assert len({column.name for column in found}) == len(found), f"two columns of {table} have one name"
    return found
