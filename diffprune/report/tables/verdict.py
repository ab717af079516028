"""The verdict in words, computed from the same estimates as the tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from diffprune.report.analysis import labels, verdicts
from diffprune.report.analysis.comparison import FULL, Budget, Comparison
from diffprune.report.analysis.seeds import FAR
from diffprune.report.analysis.speed import Headline, Speed
from diffprune.report.analysis.speed import said as words
from diffprune.report.analysis.verdicts import CHOSEN, ON_OTHERS, QUESTION_RULE, RULE, Judged, best_rule, rivals
from diffprune.report.render.table import Number
from diffprune.report.tables.accuracy import open_note, range_note, seeds_failed, withheld
from diffprune.statistics import LEAST_GROUPS, Difference, Verdict, counted
from diffprune.statistics.verdict import BETTER, CANNOT_TELL, EQUIVALENT, WORSE

DOUBTS = frozenset(("above_flop_ratio", "clock_drift", "parts_differ", "shared_device"))  # flags that stand beside a speedup
BEST = "the best of the"
NAMED = {
    RULE: f"{BEST} training-free image-only rules asked here", FULL: "the unpruned model",
    QUESTION_RULE: f"{BEST} training-free rules asked here that also read the question",
}  # fmt: skip


def joined(parts: list[str]) -> str:
    """The parts with commas and an "and"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _signed(value: float) -> str:
    return Number(value, signed=True).main


def _points(found: Difference) -> str:
    return f"{_signed(found.estimate)} [{_signed(found.low)}, {_signed(found.high)}]"


SAYS = {
    BETTER: "is better with {}", EQUIVALENT: "is equivalent within ±1 point with {}", CANNOT_TELL: "cannot be told apart with {}",
    WORSE: "is worse with {}",
}  # fmt: skip


WITHHELD = {  # in the order in which they are told
    "counts": "gets no verdict, as the two keep other counts, with {}",
    "seeds": "gets no verdict as a method, for want of seeds; the difference of these scorers is, with {}",
    "pictures": "gets no verdict, for want of pictures, with {}",
    "benchmark": "gets no verdict, as a benchmark has too few pictures, with {}",
}


def _why(found: Difference) -> str:
    """Which of `WITHHELD` holds where nothing is said of the methods; "" where something is."""
    if found.counts:
        return "counts"
    if found.scorers_only or math.isfinite(found.p):
        return "seeds" if found.scorers_only else ""
    return "pictures" if found.num_groups < LEAST_GROUPS else "benchmark"


def verdict(about: str, against: str, found: Sequence[tuple[Budget, Judged]], split: str = "") -> str:
    """ "Against X, this one is better with ..., cannot be told apart with ..." and the differences in points.

    The rule compared is named where it is not `against`; where nothing may be said of methods, the scorers' differences are told.
    split: a sentence on seeds that failed, told after it.
    """
    clauses = []
    for word, says in SAYS.items():
        mine = [_told(budget, one, against) for budget, one in found if one.verdict.word == word]
        if mine:
            clauses.append(says.format(joined(mine)))
    judged = len(clauses)
    for why, says in WITHHELD.items():
        mine = [_told(budget, one, against) for budget, one in found if _why(one.verdict.found) == why]
        if mine:
            clauses.append(says.format(joined(mine)))
    if judged == len(clauses) == 1 and len(found) > 1:
        clauses[0] += ", that is at every budget"
    return f"Against {against}, {about} " + "; ".join(clauses) + "." + split


def _told(budget: Budget, one: Judged, against: str) -> str:
    """One comparison: tokens, difference, whom it is with where that changes, and what would have shown."""
    found = one.verdict.found
    rule = f", {one.other}" if against.startswith(BEST) else ""
    seen = open_note(one.verdict) or (withheld(found) if found.counts else "")
    return f"{budget.kept:.0f} tokens ({_points(found)}{rule}{', ' * bool(seen)}{seen})"


def headline(chapter: Comparison, fast: dict[tuple[str, str], Speed], timed: Headline | None) -> list[str]:
    """Sentences: what was asked, each comparison, what pruning costs and saves, and how it was timed."""
    about = chapter.about
    if not any(label == about for label, _ in chapter.arms):
        return [f"{about} was not asked here, so there is no verdict on it."]
    first = next((b.spelling for b in chapter.budgets if (about, b.spelling) in chapter.arms), "")
    base = chapter.accuracy(about, first)
    said = []
    every, aware = verdicts.of(chapter), verdicts.with_question(chapter)
    if base:
        apart = ", those with methods that also read the question by themselves" if aware else ""
        said.append(
            f"{about} was asked {base.num_rows:,} questions about {base.num_groups:,} pictures of {len(chapter.benchmarks)} "
            f"benchmark{'s' * (len(chapter.benchmarks) != 1)} at {_budgets(chapter)}{_seeds(chapter, first)}. Differences are "
            "in points of mean credit, with paired 95 % intervals; verdicts are corrected for all comparisons "
            f"made here{apart}."
        )
    for against in (*rivals(chapter), RULE, QUESTION_RULE, FULL):
        found = [(b, every[against, b.spelling]) for b in chapter.budgets if (against, b.spelling) in every]
        if found or against not in NAMED:
            split = "" if against in NAMED else _split(chapter, found)
            told = verdict(about, _chosen(chapter, against, found), found, split) if found else ""
            said.append(told or f"Against {against} nothing was compared{_uncompared(chapter, [against])}.")
    if not rivals(chapter):
        which = "" if chapter.subject.reads_question else " that sees the picture alone"
        said.append(f"No {_other(chapter)}trained method{which} was evaluated, so nothing is said about one.")
    for against in dict.fromkeys(key[0] for key in aware):
        found = [(b, aware[against, b.spelling]) for b in chapter.budgets if (against, b.spelling) in aware]
        named = _chosen(chapter, against, found) if against in NAMED else f"{against}, which also reads the question"
        said.append(verdict(about, named, found, "" if against in NAMED else _split(chapter, found)))
    return said + _speed(chapter, fast, timed)


def _chosen(chapter: Comparison, against: str, found: Sequence[tuple[Budget, Judged]]) -> str:
    """`_named`, and how a best rule was chosen where that is by the other budgets: at this one it may be none of the best."""
    named = _named(chapter, against)
    if against not in CHOSEN or not found:
        return named
    chosen = [best_rule(chapter, budget.spelling, against == QUESTION_RULE) for budget, _ in found]
    return f"{named}, chosen {ON_OTHERS}" if all(one and one.chosen == ON_OTHERS for one in chosen) else named


def _named(chapter: Comparison, against: str) -> str:
    """Whom a comparison is with, in a sentence: a rule that the subject is itself one of is the best of the others."""
    mine = chapter.subject.free and chapter.subject.reads_question == (against == QUESTION_RULE) and against in CHOSEN
    return NAMED.get(against, against).replace(BEST, f"{BEST} other" if mine else BEST)


def _other(chapter: Comparison) -> str:
    """ "other " where the subject is a trained method itself."""
    return "" if chapter.subject.free else "other "


def _seeds(chapter: Comparison, budget: str) -> str:
    """ ", with 5 scorer seeds", of a method that has some."""
    seeds = len(chapter.arms.get((chapter.about, budget), ()))
    return "" if chapter.subject.free or not seeds else f", with {seeds} scorer seed{'s' * (seeds != 1)}"


def _budgets(chapter: Comparison) -> str:
    """How many budgets the subject was asked at."""
    num = sum((chapter.about, b.spelling) in chapter.arms for b in chapter.budgets)
    return f"{num} budget{'s' * (num != 1)}"


def _split(chapter: Comparison, found: Sequence[tuple[Budget, Judged]]) -> str:
    """A sentence on the seeds of these comparisons that failed; "" where none did."""
    where: dict[str, list[str]] = {}
    for budget, one in found:
        for label in (chapter.about, one.other):
            if says := seeds_failed(chapter, label, budget.spelling):
                where.setdefault(f"{says.removesuffix(' failed')} of {label}", []).append(f"{budget.kept:.0f}")
    parts = [f"{who} with {joined(counts)} tokens" for who, counts in where.items()]
    if not parts:
        return ""
    return (
        f" But {joined(parts)} failed (more than {FAR:g} points below the median of their method's seeds): how often others would "
        "is hardly known from so few, and the interval may be too short."
    )


def _speed(chapter: Comparison, fast: dict[tuple[str, str], Speed], timed: Headline | None) -> list[str]:
    """What pruning saves: the subject at every budget; where it is not there, the range of the methods that are."""
    shared = {key: s for key, s in fast.items() if s.net and labels.budget(key[1])[0] in ("Keep", "Share")}
    mine = sorted((s for (label, _), s in shared.items() if label == chapter.about), key=lambda s: -s.kept)
    common = set.intersection(*(set(s.flags) & DOUBTS for s in shared.values())) if shared else set()
    parts = [f"{s.net.estimate:.2f}× [{s.net.low:.2f}, {s.net.high:.2f}] with {s.kept:.0f} tokens{_beside(s, common)}"
             for s in mine if s.net]  # fmt: skip
    nets = sorted(
        ((s.net, f"{s.label} with {s.kept:.0f} tokens{_beside(s, common)}") for s in shared.values() if s.net),
        key=lambda one: one[0].estimate,
    )
    counts = sorted({str(net.num_groups) for net, _ in nets}, key=int)
    over = "one timing session each" if counts == ["1"] else f"{' or '.join(counts)} timing sessions"
    said = f"Measured prefill speedup net of the pruner's own overhead, {timed}, {over}"
    flagged = f" All of these timings are flagged: {words(common)}." if common else ""
    if parts:
        return [f"{said}: {joined(parts)}.{flagged}"]
    if nets and not any(label == chapter.about for label, _ in chapter.arms):
        ends = [f"{net.estimate:.2f}× [{net.low:.2f}, {net.high:.2f}] ({who})" for net, who in (nets[0], nets[-1])][: len(nets)]
        return [f"{said}{', between' if len(ends) > 1 else ':'} {joined(ends)}.{flagged}"]
    who = f"The prefill of {chapter.about}" if any(label == chapter.about for label, _ in chapter.arms) else "Prefill"
    return [f"{who} was not timed, so there is no speedup to report."]


def _beside(one: Speed, common: set[str]) -> str:
    """What stands beside a speedup: that it has a range, that with the encoder included, what makes its timings doubtful."""
    parts = [range_note(one.net)] if one.net else []
    parts += [f"encoder included {one.encoded.estimate:.2f}×"] if one.encoded else []
    parts += [words(set(one.flags) & DOUBTS - common)]
    parts = [part for part in parts if part]
    return f" ({'; '.join(parts)})" if parts else ""


def lead(chapter: Comparison, fast: dict[tuple[str, str], Speed], timed: Headline | None) -> list[str]:
    """The top of the page: the verdict, that on methods that also read the question, what it rests on, what pruning saves."""
    budgets = [b.spelling for b in chapter.budgets if (chapter.about, b.spelling) in chapter.arms]
    base = chapter.accuracy(chapter.about, budgets[0]) if budgets else None
    said = [short(chapter), *_short_with_question(chapter), *_short_with_rules(chapter)]
    if base:
        num = (base.num_rows, base.num_groups, len(chapter.benchmarks), len(budgets))
        said.append(f"{_asked(*num)}{_seeds(chapter, budgets[0])}.")
    elif len(chapter.rows):
        num = (*chapter.asked, len(chapter.benchmarks), len(chapter.budgets))
        methods = sum(1 for label, _ in {(label, "") for label, _ in chapter.arms} if label in chapter.methods)
        said.append(f"{_asked(*num)}, of {methods} method{'s' * (methods != 1)}.")
    return said + _speed(chapter, fast, timed)


def _asked(questions: int, pictures: int, benchmarks: int, budgets: int) -> str:
    asked = f"Asked were {questions:,} questions about {pictures:,} pictures of {benchmarks} benchmark{'s' * (benchmarks != 1)}"
    return f"{asked} at {budgets} budget{'s' * (budgets != 1)}" if budgets else asked  # none is shared by thresholds


def short(chapter: Comparison) -> str:
    """One line: the sum of the verdicts against the other trained methods, for the top of the page."""
    num = len(_against_trained(chapter))
    if not num:
        return _no_comparison(chapter)
    return f"{chapter.about} against the {_other(chapter)}trained methods, {num} comparison{'s' * (num != 1)}: {tally(chapter)}."


def _short_with_question(chapter: Comparison) -> list[str]:
    """The same of trained methods that also read the question; [] where there are none."""
    others = verdicts.rivals(chapter, told_more=True)
    found = [one.verdict for (against, _), one in verdicts.with_question(chapter).items() if against in others]
    if not found:
        return []
    num = len(found)
    return [f"Against trained methods that also read the question, {num} comparison{'s' * (num != 1)}: {counts(found)}."]


def _short_with_rules(chapter: Comparison) -> list[str]:
    """The same of the best rules, where no other trained method could be compared; [] where there are none either."""
    found = [one.verdict for (against, _), one in verdicts.of(chapter).items() if against in CHOSEN]
    if not found or _against_trained(chapter):
        return []
    num = len(found)
    others = "other " * chapter.subject.free
    return [f"{chapter.about} against the best {others}training-free rules, {num} comparison{'s' * (num != 1)}: {counts(found)}."]


def _no_comparison(chapter: Comparison) -> str:
    """Why there is no verdict."""
    if not chapter.arms:
        return "Nothing was evaluated in this store, so there is no verdict."
    absent = f"{chapter.about} is not among the methods that were evaluated, so there is no verdict on it."
    missing = all(label != chapter.about for label, _ in chapter.arms)
    if missing and chapter.records.asked:
        return absent
    if found := [one.verdict for one in verdicts.variants(chapter).values()]:
        num = len(found)
        return f"Variants against the plain method, {num} comparison{'s' * (num != 1)}: {counts(found)}."
    if missing:
        return absent
    why = _uncompared(chapter, rivals(chapter)) if rivals(chapter) else ""
    return f"No comparison with {'another' if _other(chapter) else 'a'} trained method in this store{why}."


def _uncompared(chapter: Comparison, others: Sequence[str]) -> str:
    """Why the subject was compared with none of them: a mean without a benchmark is of other questions, or no budget is shared."""
    sides = (chapter.about, *others)
    asked = [(who, b) for who in sides for b in chapter.budgets if (who, b.spelling) in chapter.arms]
    lacking = [f"{who} with {b.kept:.0f} tokens {told}" for who, b in asked if (told := chapter.without(who, b.spelling))]
    return f", as answers are missing: {joined(lacking)}" if lacking else " at a shared budget"


def tally(chapter: Comparison) -> str:
    """The verdicts against the other trained methods, counted; "" where there are none."""
    return counts(_against_trained(chapter))


def counts(found: Sequence[Verdict]) -> str:
    """ "better in 3, equivalent in 2 and no verdict in 1, ...": how often each word was given."""
    parts = [f"{word} in {num}" for word, num in counted(found).items()]
    why = [_why(verdict.found) for verdict in found]
    if others := why.count("counts"):
        parts.append(f"no verdict in {others}, where the two keep other counts")
    if alone := why.count("seeds"):
        parts.append(f"no verdict in {alone}, which {'hold' if alone > 1 else 'holds'} for these scorers only (one seed)")
    if few := why.count("pictures"):
        parts.append(f"no verdict in {few}, for want of pictures")
    if unknown := why.count("benchmark"):
        parts.append(f"no verdict in {unknown}, as a benchmark has too few pictures")
    return joined(parts) if parts else ""


def _against_trained(chapter: Comparison) -> list[Verdict]:
    others = verdicts.rivals(chapter)
    return [one.verdict for (against, _), one in verdicts.of(chapter).items() if against in others]
