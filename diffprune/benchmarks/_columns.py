"""Reading one cell of a published row: what is not as it must be is a ValueError, to which the reader adds the row's name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from diffprune.io import dataset_rows

Row = Mapping[str, Any]
LONGEST_CELL = 100_000  # characters of a question or an annotator's answer
_WHOLE = re.compile(r"-?\d+(\.0+)?", re.ASCII)  # pandas makes floats of whole numbers where one of a column is missing


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
    found = [a.get("answer") if isinstance(a, dict) else a for a in _list(row, column)]
    if len(found) != 10:
        raise ValueError(f"column {column!r} has {len(found)} answers where those of ten annotators belong")
    return [text({column: answer}, column) for answer in found]


def texts(row: Row, column: str) -> list[str]:
    """A list of texts; null is a list of none.

    Raises:
        ValueError: no list, or one of its parts is null or no text.
    """
    found = _list(row, column)
    for number, part in enumerate(found):
        if not isinstance(part, str):
            raise ValueError(f"column {column!r} holds {part!r:.80} at place {number}; each of the list must be a text")
    return found


def _list(row: Row, column: str) -> list[Any]:
    value = row[column]
    if dataset_rows.missing(value):
        return []
    if not isinstance(value, list):
        raise ValueError(f"column {column!r} is {value!r:.80}; it must hold a list")
    return value


def whole(row: Row, column: str) -> int:
    """A whole number, also one that is written as 7.0.

    Raises:
        ValueError: anything else.
    """
    value = row[column]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
        return int(value.strip().partition(".")[0])
    raise ValueError(f"column {column!r} is {value!r:.80}; it must be a whole number")


def identifier(row: Row, column: str) -> str:
    """What tells a row from others: a text or a whole number, of which 7.0 is 7.

    Raises:
        ValueError: empty, or anything else.
    """
    value = row[column]
    if isinstance(value, str) and value and not _WHOLE.fullmatch(value):
        return value
    if isinstance(value, str) and value:
        return value.partition(".")[0]
    try:
        return str(whole(row, column))
    except ValueError:
        raise ValueError(f"column {column!r} is {value!r:.80}; it must hold a text or a whole number") from None


def shown(row: Row, column: str) -> str:
    """An option as a question shows it: a text, or a number, of which 7.0 is 7.

    Raises:
        ValueError: empty, or anything else.
    """
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, int | float) or dataset_rows.missing(value):
        return text(row, column)
    return str(int(value)) if float(value).is_integer() else str(value)


def label(row: Row, column: str) -> str:
    """A category, or empty where there is no such column or it holds nothing.

    Raises:
        ValueError: no text.
    """
    return "" if dataset_rows.missing(row.get(column)) else text(row, column)
