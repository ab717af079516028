"""Tables of accuracy: the headline, one per budget in the field's format, paired differences, what removal costs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

from diffprune.report.analysis import labels
from diffprune.report.analysis.comparison import FULL, Budget, Comparison
from diffprune.report.analysis.labels import SUBJECT
from diffprune.report.analysis.speed import Speed, common_flags, own_flags
from diffprune.report.render.table import Entry, Number, Table
from diffprune.report.tables.caveats import caveats
from diffprune.statistics import Difference, Interval

PAIRED = (
    "Differences are paired: the same questions, {draws:,} bootstrap draws of whole groups (pictures), scorer seeds drawn as well. "
    "Every interval is a 95 % interval for one comparison; none is corrected for the number of comparisons. "
    "Where all draws agree the rule of three bounds it."
)


def shown(found: Interval | None, digits: int = 1, unit: str = "", **more: object) -> Number | None:
    """An interval as a table entry."""
    return None if found is None else Number(found.estimate, found.low, found.high, digits, unit, **more)  # type: ignore[arg-type]


def difference_entry(found: Difference | None) -> Number | None:
    """A paired difference in points, with its verdict."""
    return shown(found, word=found.verdict, signed=True) if found else None


def rivals(chapter: Comparison) -> list[str]:
    """Other trained methods that see what the subject sees."""
    return [label for label, m in chapter.methods.items() if m.kind == "trained" and m.image_only and m.base != SUBJECT]


def best_rule(chapter: Comparison, budget: str) -> str | None:
    """The training-free image-only rule with the highest accuracy at a budget."""
    scored = [(a.estimate, label) for label, m in chapter.methods.items() if m.rule and (a := chapter.accuracy(label, budget))]
    return max(scored)[1] if scored else None


def _best(
    chapter: Comparison, labels: list[str], budget: str, values: dict[str, float], benchmark: str | None = None
) -> str | None:
    """The label with the highest value, if its paired difference to every other excludes 0; else None: a tie has no winner."""
    there = [x for x in labels if math.isfinite(values.get(x, math.nan))]
    if len(there) < 2:
        return None
    top = max(there, key=lambda x: values[x])
    for other in there:
        found = None if other == top else chapter.difference(top, other, budget, benchmark)
        if other != top and (found is None or found.verdict != "better"):
            return None
    return top


def per_budget(chapter: Comparison, budget: Budget) -> Table:
    """Columns: the benchmarks in native units, mean credit, average relative accuracy; the unpruned bound first."""
    there = [x for x in chapter.methods if (x, budget.spelling) in chapter.arms]
    columns = [chapter.heading(b) for b in chapter.benchmarks]
    fair = [x for x in there if chapter.methods[x].image_only]
    winners = {}
    for b in chapter.benchmarks:
        values = {x: chapter.native_of(x, budget.spelling, b)[1] for x in fair}
        winners[b] = _best(chapter, fair, budget.spelling, values, b)
    accuracy = {x: a for x in there if (a := chapter.accuracy(x, budget.spelling))}
    winner = _best(chapter, fair, budget.spelling, {x: a.estimate for x, a in accuracy.items()})
    rows = [_row(chapter, FULL, "", {}, None)] if (FULL, "") in chapter.arms else []
    rows += [_row(chapter, x, budget.spelling, winners, winner) for x in there]
    breaks = {i + 1 for i, (a, b) in enumerate(pairwise(there)) if (a in fair) != (b in fair)}
    return Table(
        f"budget_{_file(budget.spelling)}", f"Accuracy with {budget.label}", ("Method", "seeds", *columns, "mean credit", "avg %"),
        tuple(rows), tuple(_notes(chapter)), frozenset({1} | {b + 1 for b in breaks}),
    )  # fmt: skip


def _file(spelling: str) -> str:
    kind, number = labels.budget(spelling)
    return f"{kind.lower()}_{number:g}".replace(".", "_").replace("-", "minus_")


def _row(chapter: Comparison, label: str, budget: str, winners: dict[str, str | None], winner: str | None) -> tuple[Entry, ...]:
    cells: list[Entry] = []
    for b in chapter.benchmarks:
        figure, value = chapter.native_of(label, budget, b)
        digits = 0 if figure.startswith("mme") or abs(value) > 200 else 1
        cells.append(Number(value, digits=digits, best=winners.get(b) == label))
    seeds = len(chapter.arms[label, budget])
    complete = all(any(b in r for r in chapter.arms[label, budget].values()) for b in chapter.benchmarks)
    accuracy = (
        shown(chapter.accuracy(label, budget), best=winner == label, flags=chapter.flags(label, budget)) if complete else None
    )
    relative = Number(chapter.relative(label, budget) if label != FULL else 100.0, best=winner == label)
    return (label, str(seeds) if label != FULL else "", *cells, accuracy, relative)


def _notes(chapter: Comparison) -> Iterable[str]:
    figures = {chapter.heading(b): chapter.native_of(FULL, "", b)[0] for b in chapter.benchmarks}
    units = "; ".join(f"{b}: {figure.replace('_', ' ')}" for b, figure in figures.items() if figure and figure != "accuracy")
    yield "Native units, other than plain accuracy in percent: " + units + "." if units else "Accuracy in percent."
    yield (
        "Mean credit: percent, unweighted over the benchmarks, with its 95 % interval. avg %: mean over benchmarks of pruned "
        "/ unpruned, "
        "the field's figure; it averages unlike units. Bold: best image-only method, and only where its paired difference "
        "(in credit) to every "
        "other excludes 0; no bold means a tie. Below the line: methods that also read the question, and variants."
    )
    yield from (f"{flag}: {says}" for flag, says in caveats(chapter))
    if chapter.unknown:
        yield f"Not installed here, shown as mean credit: {', '.join(sorted(map(chapter.heading, chapter.unknown)))}."


def headline(chapter: Comparison, fast: dict[tuple[str, str], Speed]) -> Table:
    """Method x budget: accuracy, relative accuracy, measured net prefill speedup, overhead."""
    rows: list[tuple[Entry, ...]] = []
    breaks, common = {1}, common_flags(list(fast.values()))
    full = chapter.accuracy(FULL, "")
    if full:
        rows.append(
            (FULL, Number(chapter.total, digits=0), shown(full), Number(100.0, digits=1), Number(1.0, digits=2, unit="×"), None)
        )
    for budget in chapter.budgets:
        breaks.add(len(rows))
        for label in chapter.methods:
            accuracy, speed = chapter.accuracy(label, budget.spelling), fast.get((label, budget.spelling))
            if accuracy is None and speed is None:
                continue
            overhead = speed.spans.get(("pruned", "overhead")) if speed else None
            rows.append((
                label, Number(budget.kept, digits=0), shown(accuracy, flags=chapter.flags(label, budget.spelling)),
                Number(chapter.relative(label, budget.spelling)),
                shown(speed.net, 2, "×", flags=own_flags(speed.flags, common)) if speed else None,
                Number(overhead.median, digits=2) if overhead else None,
            ))  # fmt: skip
    columns = ("Method", "kept tokens", "accuracy %", "avg %", "net prefill speedup", "overhead ms")
    notes = (
        "accuracy: mean credit over the benchmarks. Net prefill speedup: unpruned prefill / (pruned prefill + overhead), as "
        "measured.",
    )
    return Table("headline", "Accuracy and measured speedup", columns, tuple(rows), notes, frozenset(breaks))


def differences(chapter: Comparison, draws: int) -> Table:
    """DiffPrune minus each other trained method, the best training-free rule and the unpruned model; one column per budget."""
    rows: list[tuple[Entry, ...]] = []
    for against in [*rivals(chapter), None, FULL]:
        cells: list[Entry] = []
        questions, seeds = 0, set()
        for budget in chapter.budgets:
            other = against or best_rule(chapter, budget.spelling)
            found = chapter.difference(SUBJECT, other, budget.spelling) if other else None
            entry = difference_entry(found)
            cells.append(replace(entry, note=other) if entry and other and not against else entry)
            if found and other:
                questions = max(questions, found.num_rows)
                seeds.add("/".join(str(len(chapter.arms[x, "" if x == FULL else budget.spelling])) for x in (SUBJECT, other)))
        if seeds:
            rows.append((against or "best training-free rule", *cells, Number(questions, digits=0), ", ".join(sorted(seeds))))
    columns = ("DiffPrune minus", *(b.short for b in chapter.budgets), "questions", "seeds")
    notes = (
        PAIRED.format(draws=draws),
        "tie: the interval contains 0. The best rule is chosen on these same questions, which favours the rule.",
    )
    return Table("differences", "Paired differences in mean credit, points", columns, tuple(rows), notes)


def variants(chapter: Comparison) -> Table | None:
    """Every variant of a method minus the plain one (question-aware, without denoiser, ...); one column per budget."""
    rows: list[tuple[Entry, ...]] = []
    for label, made in chapter.methods.items():
        plain = made.base
        if label != plain and plain in chapter.methods:
            found = [chapter.difference(label, plain, b.spelling) for b in chapter.budgets]
            if any(found):
                rows.append((label, plain, *map(difference_entry, found), str(max(f.num_seeds for f in found if f))))
    columns = ("variant", "minus", *(b.short for b in chapter.budgets), "seeds")
    return Table("variants", "What each variant changes, points", columns, tuple(rows)) if rows else None


def removal(chapter: Comparison) -> Table | None:
    """Accuracy with tokens removed beside tokens replaced by their mean: what removal itself costs."""
    rows: list[tuple[Entry, ...]] = []
    for label, budget in sorted(chapter.replaced_arms, key=lambda k: (chapter.order(k[0]), -labels.budget(k[1])[1])):
        arm = chapter.replaced_arms[label, budget]
        removed = chapter.arms.get((label, budget))
        if removed:
            found = chapter.panel.difference(removed, arm)
            rows.append(
                (label, budget, shown(chapter.panel.mean(removed)), shown(chapter.panel.mean(arm)), difference_entry(found))
            )
    columns = ("Method", "budget", "removed, %", "replaced by mean, %", "removed − replaced, points")
    notes = (
        "Replaced tokens stay in the sequence as the mean of their picture: no speedup. A negative difference is the price "
        "of removal itself.",
    )
    return Table("replaced", "Removed against replaced by their mean", columns, tuple(rows), notes) if rows else None


def kinds(chapter: Comparison) -> Table:
    """Accuracy per kind of question; the figures of the retention curves."""
    rows: list[tuple[Entry, ...]] = []
    for (kind, label), points in kind_curves(chapter).items():
        for kept, found in points:
            rows.append((kind, label, Number(kept, digits=0), shown(found), Number(found.num_rows, digits=0)))
    return Table(
        "kinds", "Accuracy per kind of question", ("kind", "Method", "kept tokens", "accuracy %", "questions"), tuple(rows)
    )


@lru_cache(maxsize=8)
def kind_curves(chapter: Comparison) -> dict[tuple[str, str], list[tuple[float, Interval]]]:
    """(kind, method) -> [(kept tokens, accuracy)], the unpruned model under its own label."""
    arms: dict[tuple[str, str], set[str]] = {}
    for (label, at), arm in chapter.arms.items():
        arms[label, at] = {f"{label}\t{at}\t{replicate}" for replicate in arm}
    found: dict[tuple[str, str], list[tuple[float, Interval]]] = {}
    for kind, stratum in sorted(chapter.kinds.strata.items()):
        for label in [FULL, *chapter.methods]:
            kept_by = {b.spelling: b.kept for b in chapter.budgets} if label != FULL else {"": chapter.total}
            for spelling, kept in kept_by.items():
                there = [c for c in sorted(arms.get((label, spelling), ())) if c in stratum.columns]
                if there:
                    found.setdefault((kind, label), []).append((kept, chapter.kinds.mean({c: {kind: c} for c in there})))
    return found
