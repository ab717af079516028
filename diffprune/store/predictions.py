"""The view `predictions`: split into `answers` and `grades` where it is published, joined where it is read; nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from diffprune.core import registry
from diffprune.core.cell import Cell
from diffprune.core.records import TABLES, VIEWS, Answered, Credited, Prediction
from diffprune.store.columns import columns
from diffprune.store.manifest import Damaged
from diffprune.store.parts import Columns, read_schema, record_columns

VIEW = "predictions"
OF_VIEW = tuple(f.name for f in fields(Prediction))
OF_GRADES = tuple({f.name for f in fields(Prediction)} - {f.name for f in fields(Answered)})


def grader(cell: Cell) -> str:
    """Digest of the grader of the one benchmark a cell asks, as it is here; "" where it is not installed."""
    try:
        return registry.grader(cell.questions[0].benchmark)
    except (IndexError, ValueError):
        return ""


def split(records: Mapping[str, Sequence[Any]], graded_by: str) -> dict[str, Columns]:
    """Columns of records by table, those of the view as columns of its two tables.

    Raises:
        ValueError: no such table, or a record of another.
    """
    found: dict[str, Columns] = {}
    for table, rows in records.items():
        columns(table)
        kind = (TABLES | VIEWS)[table]
        if wrong := set(map(type, rows)) - {kind}:
            raise ValueError(f"table {table!r} takes {kind.__name__} records, got {wrong.pop().__name__}")
        if table == VIEW:
            found["answers"], found["grades"] = _halves(rows, graded_by)
        else:
            found[table] = record_columns(table, rows)
    return found


def _halves(rows: Sequence[Prediction], graded_by: str) -> tuple[Columns, Columns]:
    """Columns of answers and of their grades. An error where tokens were generated is the grader's: see `Prediction.answered` and
    `Prediction.credited`, which say the same row by row."""
    known = dict(zip(OF_VIEW, record_columns(VIEW, rows), strict=True))
    pairs = list(zip(known["error"], known["generated_tokens"], strict=True))
    answers = known | {"error": ["" if tokens else error for error, tokens in pairs]}
    grades = known | {"grade_error": [error if tokens else "" for error, tokens in pairs], "grader": [graded_by] * len(rows)}
    return [answers[f.name] for f in fields(Answered)], [grades[f.name] for f in fields(Credited)]


def needed(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(columns of `answers`, columns of `grades`) that columns of the view are made of; `sample` is what the rows are paired by."""
    answers = [name for name in names if name not in OF_GRADES]
    grades = [name for name in names if name in OF_GRADES] + (["grade_error"] if "error" in names else [])
    return list(dict.fromkeys([*answers, "sample"])), list(dict.fromkeys([*grades, "sample"]))


def joined(names: Sequence[str], answers: pa.Table, grades: pa.Table, coded: bool) -> pa.Table:
    """Columns `names` of the view, row by row.

    Raises:
        Damaged: the grades are not those of these answers, one by one.
    """
    ours, theirs = (table["sample"].cast(pa.string()).combine_chunks() for table in (answers, grades))
    if not ours.equals(theirs):
        raise Damaged("does not hold one grade for each answer of its cell, in their order")
    schema = read_schema(VIEW, coded)
    columns = [_error(answers, grades) if name == "error" else (grades if name in OF_GRADES else answers)[name] for name in names]
    return pa.Table.from_arrays(
        [column.dictionary_encode() if coded and name == "error" else column for name, column in zip(names, columns, strict=True)],
        schema=pa.schema([schema.field(name) for name in names]),
    )


def _error(answers: pa.Table, grades: pa.Table) -> pa.ChunkedArray:
    """What kept a question from its answer, else the answer from its grade."""
    asking, grading = (table[name].cast(pa.string()) for table, name in ((answers, "error"), (grades, "grade_error")))
    return pc.if_else(pc.equal(asking, ""), grading, asking)


assert set(OF_GRADES) <= {f.name for f in fields(Credited)}
