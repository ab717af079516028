"""One-line error messages, for users and for records."""

from __future__ import annotations

MOST = 300  # letters


def first_line(error: BaseException) -> str:
    """The first line of the message, at most 300 letters, no full stop at its end; the class of an error that says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:MOST] if lines else type(error).__name__


def with_class(error: BaseException) -> str:
    """`ValueError: the first line`; the class alone of an error that says nothing."""
    name, said = type(error).__name__, first_line(error)
    return name if said == name else f"{name}: {said}"
