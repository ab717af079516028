"""How methods are ordered and drawn, from what their rows say of them: one place in the order, one colour, marker and dash each.

No plug-in is known by name: label, kind and what a method reads are columns of every row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from diffprune.core import budget as budgets

SUBJECT = "DiffPrune"  # whom a report is about, unless another is chosen
KINDS = ("bound", "trained", "calibrated", "rule", "control", "diagnostic")

# Okabe and Ito's palette and three more: told apart with every common colour blindness, and in grey by marker and dash.
COLORS = ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#8C564B", "#7B4FA3", "#B8860B", "#3B6E6E", "#A03030")
MARKERS = ("o", "s", "^", "v", "P", "D", "<", ">", "h", "*", "p", "X", "d")  # as many as no multiple of the colours
DASHES = {"trained": "-", "calibrated": "--", "rule": ":", "control": ":", "diagnostic": "-."}
BOUND = ("#1a1a1a", "none", "-")
Style = tuple[str, str, str]  # colour, marker, dash


@dataclass(frozen=True)
class Method:
    """A method as the rows tell of it. base: its label without options; plugin: its name, as in `fastv(after=2)`."""

    label: str
    base: str
    kind: str
    reads_question: bool
    plugin: str = ""

    @property
    def variant(self) -> bool:
        """A trained method with options, to be held against the plain one."""
        return self.kind == "trained" and self.label != self.base

    @property
    def free(self) -> bool:
        """Whether it needs no training, be it that some settings of it are fitted to a few pictures."""
        return self.kind in ("rule", "control", "calibrated")

    def told_more(self, subject: Method) -> bool:
        """Whether it reads the question, and the subject does not."""
        return self.reads_question and not subject.reads_question

    def part(self, subject: Method) -> int:
        """Part of a table: 0 for the subject and methods that are told no more than it, 1 for those that also read the question,
        2 for other variants."""
        if self.label == subject.label or not (self.variant or self.told_more(subject)):
            return 0
        return 1 if self.reads_question and self.label.count(",") < 2 else 2

    def order(self, subject: Method) -> tuple[int, int, bool, bool, str]:
        """By part; in each by kind, the subject first."""
        place = KINDS.index(self.kind) if self.kind in KINDS else len(KINDS)
        return self.part(subject), place, self.label != subject.label, self.base != subject.base, self.label


def of_row(row: Mapping[str, Any], label: str = "") -> Method:
    """The method of a row that has the columns of a cell. label: in place of the row's own."""
    return Method(
        label or str(row["method"]), str(row["base_method"]), str(row["method_kind"]), bool(row["reads_question"]),
        str(row["pruner"]).partition("(")[0],
    )  # fmt: skip


def ordered(methods: Iterable[Method], subject: Method) -> list[Method]:
    """Each once, in the order of tables."""
    return sorted(set(methods), key=lambda method: method.order(subject))


def chosen(methods: Iterable[Method], asked: str) -> Method:
    """Whom a report on these methods is about, be it there or not: the one that was asked for by its label; without one DiffPrune,
    or, where that is not there, the only trained one.

    Raises:
        ValueError: the one that was asked for prunes nothing.
    """
    methods = list(methods)
    if any(method.label == asked and method.kind == "bound" for method in methods):
        raise ValueError(f"a report is about a method that prunes: choose another subject than {asked!r}")
    there = {method.label: method for method in methods if method.kind not in ("bound", "diagnostic")}
    if asked:
        told_apart = (method for label, method in there.items() if re.fullmatch(re.escape(asked) + r"( \([^()]*\))+", label))
        return there.get(asked) or next(told_apart, Method(asked, asked, "trained", reads_question=False))
    trained = [method for method in there.values() if method.kind == "trained" and not method.variant]
    if SUBJECT not in there and len(trained) == 1:
        return trained[0]
    return there.get(SUBJECT, Method(SUBJECT, SUBJECT, "trained", reads_question=False))


def styles(methods: Iterable[Method]) -> dict[str, Style]:
    """Colour, marker and dash by label, no two alike; the same in every figure of a report. methods: in the order of tables."""
    found: dict[str, Style] = {}
    methods = list(methods)
    for method in methods:
        if method.kind == "bound":
            found.setdefault(method.label, BOUND)
    number = 0
    for method in methods:
        if method.label not in found:
            dash = DASHES.get(method.kind, "-.")
            found[method.label] = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)], dash
            number += 1
    return found


@lru_cache(maxsize=4096)
def budget(spelling: str) -> tuple[str, float]:
    """(kind, number): ("Keep", 16), ("Share", 0.11), ("Above", 0.5), or ("", nan) for what is no budget."""
    try:
        value = budgets.parse(spelling)
    except ValueError:
        return "", float("nan")
    return type(value).__name__, float(vars(value)[_FIELDS[type(value)]])


_FIELDS = {budgets.Keep: "num", budgets.Share: "share", budgets.Above: "threshold"}
