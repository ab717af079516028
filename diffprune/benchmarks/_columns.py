"""Reading one cell of a published row: what is not as it must be is a ValueError, to which the reader adds the row's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffprune.io import dataset_rows

Row = Mapping[str, Any]
LONGEST_CELL = 100_000  # characters of a question or an annotator's answer


def text(row: Row, column: str) -> str:
    """A column that must hold text (which may be empty).

    Raises:
        ValueError: null, no text, or far too long.
    """
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} is {'empty' if dataset_rows.missing(value) else f'{value!r:.80}'}; it must hold text")
    if len(value) > LONGEST_CELL:
        raise ValueError(f"column {column!r} holds {len(value):,} characters; at most {LONGEST_CELL:,} can be right")
    return value


def gold(row: Row, column: str = "answer", among: Sequence[str] = ()) -> str:
    """The right answer; `among`: the only ones there are, in any case.

    Raises:
        ValueError: empty, or none of those.
    """
    value = text(row, column).strip()
    if not value or (among and value.lower() not in among and value not in among):
        wanted = f"one of {', '.join(among)}" if among else "the right answer"
        raise ValueError(f"column {column!r} is {value!r:.80}; it must hold {wanted}")
    return value


def ten(row: Row, column: str = "answers") -> list[str]:
    """The answers of the ten annotators, as texts in their order.

    Raises:
        ValueError: none, another number, or one that is no text.
    """
    found = [a["answer"] if isinstance(a, dict) else a for a in row[column] or ()]
    if len(found) != 10:
        raise ValueError(f"column {column!r} has {len(found)} answers where those of ten annotators belong")
    return [text({column: answer}, column) for answer in found]
