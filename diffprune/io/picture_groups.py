"""Rows that share a picture belong together: they are held out, drawn and resampled as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Name = TypeVar("Name", int, str)


def linked(rows: Sequence[Sequence[Name]]) -> list[Name]:
    """The names of each row's pictures, at least one -> the name of its group: the smallest of all pictures that rows tie together.

    A row of one picture that no row of several shows is in the group of that picture. Union-find with path halving (Tarjan and
    van Leeuwen 1984).
    """
    leader: dict[Name, Name] = {}

    def find(name: Name) -> Name:
        while (above := leader.setdefault(name, name)) != name:
            leader[name] = name = leader[above]
        return name

    for names in rows:
        for other in names[1:]:
            low, high = sorted((find(names[0]), find(other)))
            leader[high] = low
    return [find(names[0]) for names in rows]
