"""Which comparisons a chapter makes of the method it is about, and their verdicts, corrected together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from diffprune.report.analysis.comparison import FULL, Comparison
from diffprune.statistics import Verdict, judged

RULE = "best training-free rule"
QUESTION_RULE = "best rule that reads the question"
CHOSEN = (RULE, QUESTION_RULE)  # another method at each budget
NEAR = 0.1  # share by which the tokens a rule kept on the calibration split may miss a budget
ON_CALIBRATION = "on the calibration split, by the trials of tuning"
ON_OTHERS = "by its mean accuracy at the other budgets"
ON_THESE = "on these same questions, which favours the rule"
THE_ONLY = "as the only one asked"


def rivals(chapter: Comparison, told_more: bool = False) -> list[str]:
    """Other trained methods that are told no more than the subject, their variants too: one of them may be the strongest.

    told_more: those that see the question, where the subject does not, in their stead.
    """
    trained = (x for x, m in chapter.methods.items() if m.kind == "trained" and m.base != chapter.subject.base)
    return [x for x in trained if chapter.methods[x].told_more(chapter.subject) == told_more]


@dataclass(frozen=True)
class BestRule:
    """The training-free rule that stands for all of its sort at a budget, and on what it was chosen."""

    label: str
    chosen: str


def best_rule(chapter: Comparison, budget: str, reads_question: bool = False) -> BestRule | None:
    """The most accurate rule, chosen without looking at the answers it is compared by, as far as the store allows.

    reads_question: of those that read the question; else of those that see the picture alone.
    """
    sort = (x for x, m in chapter.methods.items() if m.free and m.reads_question == reads_question and x != chapter.about)
    rules = [label for label in sort if (label, budget) in chapter.arms and not chapter.missing(label, budget)]
    rules = [label for label in rules if not chapter.off(label, budget)] or rules
    if not rules:
        return None
    if len(rules) == 1:
        return BestRule(rules[0], THE_ONLY)
    for chosen, scores in (
        (ON_CALIBRATION, _calibrated(chapter, budget)),
        (ON_OTHERS, _elsewhere(chapter, rules, budget)),
        (ON_THESE, {x: chapter.estimate(x, budget) for x in rules}),
    ):
        if all(np.isfinite(scores.get(x, np.nan)) for x in rules):
            return BestRule(max(rules, key=lambda x: (scores[x], x)), chosen)
    return BestRule(rules[0], ON_THESE)


def _calibrated(chapter: Comparison, budget: str) -> dict[str, float]:
    """Accuracy of each method that tuning tried at about this budget: its trial nearest to it, of several the newest."""
    kept = next(b.kept for b in chapter.budgets if b.spelling == budget)
    trials = chapter.records.told("trials", "label", "model", "dtype", "tuned_kind", "started")
    mine = (trials["model"] == chapter.setting["model"]) & (trials["dtype"] == chapter.setting["dtype"])
    near = (trials["kept"] / kept - 1).abs()
    trials = trials[mine & (trials["tuned_kind"] == "count") & trials["accuracy"].notna() & (near <= NEAR)]
    ordered = trials.assign(near=near).sort_values("started", ascending=False, kind="stable").sort_values("near", kind="stable")
    nearest = ordered.drop_duplicates("label")
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
    """(a rival, the best rule of a sort that is told no more, or the unpruned model; budget) -> the subject minus it. All of them
    are one family."""
    rules = CHOSEN if chapter.subject.reads_question else (RULE,)
    return _judged(chapter, (*rivals(chapter), *rules, FULL))


@lru_cache(maxsize=8)
def with_question(chapter: Comparison) -> Mapping[tuple[str, str], Judged]:
    """(a trained method that also reads the question, or `QUESTION_RULE`; budget) -> the subject minus it. A family of its own:
    they are told more than the subject, and are no reason to correct what is said of its peers. None where the subject reads it."""
    if chapter.subject.reads_question:
        return {}
    return _judged(chapter, (*rivals(chapter, told_more=True), QUESTION_RULE))


def _judged(chapter: Comparison, against: Sequence[str]) -> dict[tuple[str, str], Judged]:
    """The subject minus each of some others at every budget, as one family."""
    family, who = {}, {}
    for name in against:
        for budget in chapter.budgets:
            other = name
            if name in CHOSEN:
                chosen = best_rule(chapter, budget.spelling, name == QUESTION_RULE)
                other = chosen.label if chosen else ""
            found = chapter.difference(chapter.about, other, budget.spelling) if other else None
            if found:
                family[name, budget.spelling], who[name, budget.spelling] = found, other
    return {key: Judged(who[key], verdict) for key, verdict in judged(family).items()}


@lru_cache(maxsize=8)
def variants(chapter: Comparison) -> Mapping[tuple[str, str], Judged]:
    """(a method with options, budget) -> it minus the plain one. All of them are one family."""
    plain = {x: m.base for x, m in chapter.methods.items() if x != m.base and m.base in chapter.methods}
    asked = {(x, b.spelling): chapter.difference(x, base, b.spelling) for x, base in plain.items() for b in chapter.budgets}
    family = {key: found for key, found in asked.items() if found}
    return {key: Judged(plain[key[0]], verdict) for key, verdict in judged(family).items()}
