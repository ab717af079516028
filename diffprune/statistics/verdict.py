"""The one rule by which a comparison gets its word: better, worse, equivalent or cannot tell.

Comparisons that are shown, counted or set in bold together are a family; both their tests are corrected for it after Holm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from diffprune.statistics.interval import Difference

ALPHA = 0.05
BETTER, WORSE, EQUIVALENT, CANNOT_TELL, WITHHELD = "better", "worse", "equivalent", "cannot tell", ""
WORDS = (BETTER, EQUIVALENT, CANNOT_TELL, WORSE)
Key = TypeVar("Key")


@dataclass(frozen=True)
class Verdict:
    """A difference and what may be said of it.

    word: on a: `better` or `worse` (the difference is not 0), `equivalent` (within the margin, by two one-sided tests), `cannot
    tell`; "" where nothing may be said of the methods: no interval, a trained method with one scorer seed, other counts of tokens.
    p: of no difference, corrected for the family.
    """

    found: Difference
    word: str
    p: float


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given (Holm 1979)."""
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1) if len(p) else []
    return [float(value) for value in adjusted]


def judged(family: Mapping[Key, Difference]) -> dict[Key, Verdict]:
    """The verdict of every comparison of a family; those of which nothing may be said are no part of it."""
    tested = {key: one for key, one in family.items() if math.isfinite(one.p) and not one.scorers_only and not one.counts}
    differs = dict(zip(tested, holm([found.p for found in tested.values()]), strict=True))
    alike = dict(zip(tested, holm([found.p_outside for found in tested.values()]), strict=True))
    return {
        key: Verdict(found, _word(found.estimate, differs[key], alike[key]), differs[key])
        if key in tested
        else Verdict(found, WITHHELD, math.nan)
        for key, found in family.items()
    }


def _word(estimate: float, p: float, p_outside: float) -> str:
    if p < ALPHA:
        return BETTER if estimate > 0 else WORSE
    return EQUIVALENT if p_outside < ALPHA else CANNOT_TELL


def counted(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How often each word was given, those that were not left out."""
    given = [verdict.word for verdict in verdicts]
    return {word: given.count(word) for word in WORDS if word in given}
