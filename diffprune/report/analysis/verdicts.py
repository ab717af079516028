"""Which comparisons a chapter makes of DiffPrune, and their verdicts, corrected together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from diffprune.report.analysis.comparison import FULL, Comparison
from diffprune.report.analysis.labels import SUBJECT
from diffprune.statistics import Verdict, judged

RULE = "best training-free rule"
NEAR = 0.1  # share by which the tokens a rule kept on the calibration split may miss a budget
ON_CALIBRATION = "on the calibration split, by the trials of tuning"
ON_OTHERS = "by its mean accuracy at the other budgets"
ON_THESE = "on these same questions, which favours the rule"


def rivals(chapter: Comparison) -> list[str]:
    """Other trained methods that see what the subject sees, their variants too: one of them may be the strongest."""
    return [x for x, m in chapter.methods.items() if m.kind == "trained" and not m.reads_question and m.base != SUBJECT]


@dataclass(frozen=True)
class BestRule:
    """The training-free image-only rule that stands for all of them at a budget, and on what it was chosen."""

    label: str
    chosen: str


def best_rule(chapter: Comparison, budget: str) -> BestRule | None:
    """The most accurate rule, chosen without looking at the answers it is compared by, as far as the store allows."""
    rules = [label for label, m in chapter.methods.items() if m.rule and (label, budget) in chapter.arms]
    rules = [label for label in rules if not chapter.off(label, budget)] or rules
    if not rules:
        return None
    for chosen, scores in (
        (ON_CALIBRATION, _calibrated(chapter, budget)),
        (ON_OTHERS, _elsewhere(chapter, rules, budget)),
        (ON_THESE, {x: chapter.estimate(x, budget) for x in rules}),
    ):
        if all(np.isfinite(scores.get(x, np.nan)) for x in rules):
            return BestRule(max(rules, key=lambda x: (scores[x], x)), chosen)
    return BestRule(rules[0], ON_THESE)


def _calibrated(chapter: Comparison, budget: str) -> dict[str, float]:
    """Accuracy of each method that tuning tried at about this budget: its trial nearest to it."""
    kept = next(b.kept for b in chapter.budgets if b.spelling == budget)
    trials = chapter.records.told("trials", "label", "model", "dtype", "tuned_kind")
    mine = (trials["model"] == chapter.setting["model"]) & (trials["dtype"] == chapter.setting["dtype"])
    near = (trials["kept"] / kept - 1).abs()
    trials = trials[mine & (trials["tuned_kind"] == "count") & trials["accuracy"].notna() & (near <= NEAR)]
    nearest = trials.assign(near=near).sort_values("near", kind="stable").drop_duplicates("label")
    return dict(zip(nearest["label"].astype(str), nearest["accuracy"].astype(float), strict=True))


def _elsewhere(chapter: Comparison, rules: list[str], budget: str) -> dict[str, float]:
    """Mean accuracy of each rule over the budgets beside this one."""
    others = [b.spelling for b in chapter.budgets if b.spelling != budget]
    return {x: float(np.mean([chapter.estimate(x, b) for b in others])) for x in rules} if others else {}


@dataclass(frozen=True)
class Judged:
    """A comparison of the subject: with whom, and its verdict."""

    other: str
    verdict: Verdict


@lru_cache(maxsize=8)
def of(chapter: Comparison) -> Mapping[tuple[str, str], Judged]:
    """(a rival, `RULE` or the unpruned model; budget) -> the subject minus it. All of them are one family."""
    family, who = {}, {}
    for against in (*rivals(chapter), RULE, FULL):
        for budget in chapter.budgets:
            chosen = best_rule(chapter, budget.spelling) if against == RULE else None
            other = (chosen.label if chosen else "") if against == RULE else against
            found = chapter.difference(SUBJECT, other, budget.spelling) if other else None
            if found:
                family[against, budget.spelling], who[against, budget.spelling] = found, other
    return {key: Judged(who[key], verdict) for key, verdict in judged(family).items()}


@lru_cache(maxsize=8)
def variants(chapter: Comparison) -> Mapping[tuple[str, str], Judged]:
    """(a method with options, budget) -> it minus the plain one. All of them are one family."""
    plain = {x: m.base for x, m in chapter.methods.items() if x != m.base and m.base in chapter.methods}
    asked = {(x, b.spelling): chapter.difference(x, base, b.spelling) for x, base in plain.items() for b in chapter.budgets}
    family = {key: found for key, found in asked.items() if found}
    return {key: Judged(plain[key[0]], verdict) for key, verdict in judged(family).items()}
