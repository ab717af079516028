"""Tables of accuracy: the headline, one per budget in the field's format, paired differences, what removal costs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

from diffprune.report.analysis import labels, verdicts
from diffprune.report.analysis.comparison import FULL, Budget, Comparison, same_count
from diffprune.report.analysis.seeds import FAR, failed
from diffprune.report.analysis.speed import Speed, common_flags, own_flags
from diffprune.report.render.table import Entry, Number, Table
from diffprune.report.tables.caveats import caveats
from diffprune.statistics import LEAST_GROUPS, Difference, Interval, Range, Verdict, judged
from diffprune.statistics.verdict import ALPHA, BETTER, CANNOT_TELL, WORSE

PAIRED = (
    "Differences are paired: the same pictures ({draws:,} bootstrap draws of them){seeds}. Intervals are 95 % intervals for one "
    "comparison."
)
SEEDS = (
    ", and scorer seeds as replicates: what another seed would have given is in the interval, if seeds scatter about their mean; "
    "of trainings that fail now and then few seeds say too little, and it is too short"
)
ONE_SEED = ". A trained method stands here with one scorer seed: where it does, the difference is one of these scorers only"
SCORERS = "these scorers only"
TIMED = "timed with"


def words(family: str, margin: str = "1 point") -> str:
    """What the verdicts of a table mean. family: what is corrected together."""
    return (
        f"better, worse: two-sided test at 5 %; equivalent: two one-sided tests at 5 % within ±{margin}; both corrected after Holm "
        f"for {family}. cannot tell: neither, with the difference that one such comparison shows with 80 % power. No verdict "
        "between methods whose mean counts of kept tokens are more than 2 % apart."
    )


def other_count(kept: float) -> str:
    """Tokens that a method keeps, where it keeps others than the budget asks."""
    return f"{round(kept, 1):g} kept"


def kept_entry(chapter: Comparison, label: str, budget: str, kept: float | None = None) -> Number:
    """Tokens that a method itself kept, and what was asked where that is another count. kept: of the questions that are shown,
    where these are not all of the chapter's."""
    kept = chapter.kept_by(label, budget) if kept is None else kept
    shared = next((b for b in chapter.budgets if b.spelling == budget), None)
    off = chapter.off(label, budget)
    asked = shared.over or shared.kept if shared else kept
    return Number(kept, digits=1 if off else 0, note=f"asked {round(asked, 1):g}" if off or (shared and shared.over) else "")


def shown(found: Interval | None, digits: int = 1, unit: str = "", **more: object) -> Number | None:
    """An interval as a table entry; a range of few rounds says that it is one, and what has none for want of pictures says so."""
    if found is None:
        return None
    told = range_note(found)
    if not told and found.num_groups < LEAST_GROUPS and math.isfinite(found.estimate) and not math.isfinite(found.low):
        told = f"no interval: {found.num_groups} picture{'s' * (found.num_groups != 1)}"
    if told:
        more["note"] = "; ".join(filter(None, (str(more.get("note", "")), told)))
    return Number(found.estimate, found.low, found.high, digits, unit, **more)  # type: ignore[arg-type]


def net_speedup(chapter: Comparison, speed: Speed, common: set[str]) -> Number | None:
    """A net speedup as it stands beside an accuracy, with the tokens that were kept while it was timed where that mean is another:
    timed are few pictures, and one scorer seed where a budget is a count, which not every method keeps to.

    common: flags that are said elsewhere."""
    same = same_count(chapter.kept_by(speed.label, speed.budget), speed.kept)
    note = "" if same else f"{TIMED} {other_count(speed.kept)}"
    return shown(speed.net, 2, "×", note=note, flags=own_flags(speed.flags, common))


def range_note(found: Interval) -> str:
    """That low and high are the ends of a range of few rounds, as a reader takes them for an interval; "" where they are one."""
    return f"range of {found.num_rows} rounds" if isinstance(found, Range) else ""


def judged_entry(found: Verdict | None, digits: int = 1, note: str = "") -> Number | None:
    """A paired difference with its verdict; what could have been seen where it cannot tell."""
    if found is None:
        return None
    parts = (note, open_note(found, digits), withheld(found.found))
    return shown(found.found, digits, word=found.word, signed=True, note="; ".join(part for part in parts if part))


def withheld(found: Difference) -> str:
    """Why nothing is said of the methods, where that is so."""
    if found.counts:
        return f"other counts: {' against '.join(f'{round(kept, 1):g}' for kept in found.counts)}"
    return SCORERS if found.scorers_only else ""


def open_note(found: Verdict, digits: int = 1) -> str:
    """Why it cannot tell: the p corrected for the family where the interval alone excludes 0, else what would have shown."""
    if found.word != CANNOT_TELL:
        return ""
    if found.found.p < ALPHA:
        told = f"{found.p:.{2 if found.p >= 0.1 else 3}f}"
        return f"p {told if float(told) > ALPHA else f'just above {ALPHA:g}'} after Holm"
    return f"{Number(found.found.detectable, digits=digits).main} would show"


def _best(chapter: Comparison, labels: list[str], budget: str) -> str | None:
    """The label with the highest mean credit, if the page's verdicts say so (`_verdicts_agree`) and it is better than every other
    of the column (these comparisons are one family); else None."""
    values = {x: chapter.estimate(x, budget) for x in labels}
    there = sorted((x for x in labels if math.isfinite(values[x])), key=lambda x: -values[x])
    if not there or not _verdicts_agree(chapter, there[0], budget):
        return None
    family: dict[str, Difference] = {}
    for other in there[1:]:  # the nearest first: mostly it decides
        found = chapter.difference(there[0], other, budget)
        if found is None or found.counts or found.scorers_only or not found.p < ALPHA:
            return None
        family[other] = found
    best = bool(family) and all(verdict.word == BETTER for verdict in judged(family).values())
    return there[0] if best else None


def _verdicts_agree(chapter: Comparison, best: str, budget: str) -> bool:
    """Whether the verdicts of this page, in their own family, let a method be called the best of a budget.

    The subject: better than every rival and the best rule, but those of other counts. Another: the subject is worse than it.
    """
    if (chapter.about, budget) not in chapter.arms:
        return True
    asked = {key[0]: one for key, one in verdicts.of(chapter).items() if key[1] == budget and key[0] != FULL}
    if best == chapter.about:
        return all(one.verdict.word == BETTER for one in asked.values() if not one.verdict.found.counts)
    return any(one.verdict.word == WORSE for one in asked.values() if one.other == best)


def per_budget(chapter: Comparison, budget: Budget) -> Table:
    """Columns: the benchmarks in native units, mean credit, average relative accuracy; the unpruned bound first."""
    there = [x for x in chapter.methods if (x, budget.spelling) in chapter.arms]
    columns = [chapter.heading(b) for b in chapter.benchmarks]
    fair = [x for x in there if not chapter.part(x)]
    rivals = [x for x in verdicts.rivals(chapter) if x in there and x not in fair]
    winner = _best(chapter, [x for x in (*fair, *rivals) if not chapter.off(x, budget.spelling)], budget.spelling)
    rows = [_row(chapter, FULL, "", None)] if (FULL, "") in chapter.arms else []
    rows += [_row(chapter, x, budget.spelling, winner) for x in there]
    breaks = {i + 1 for i, (a, b) in enumerate(pairwise(there)) if (a in fair) != (b in fair)}
    return Table(
        f"budget_{_file(budget.spelling)}", f"Accuracy with {budget.label}", ("Method", "seeds", *columns, "mean credit", "avg %"),
        tuple(rows), tuple(_notes(chapter)), frozenset({1} | {b + 1 for b in breaks}),
        tuple(f"{row[0]} | {budget.spelling if row[0] != FULL else ''}" for row in rows),
        ("Method", "seeds", *chapter.benchmarks, "mean credit", "avg %"),
    )  # fmt: skip


def _file(spelling: str) -> str:
    kind, number = labels.budget(spelling)
    return f"{kind.lower()}_{number:g}".replace(".", "_").replace("-", "minus_")


def _row(chapter: Comparison, label: str, budget: str, winner: str | None) -> tuple[Entry, ...]:
    cells: list[Entry] = []
    for b in chapter.benchmarks:
        figure, value = chapter.native_of(label, budget, b)
        digits = 0 if figure.startswith("mme") or abs(value) > 200 else 1
        cells.append(Number(value, digits=digits))
    seeds = len(chapter.arms[label, budget])
    off = other_count(chapter.kept_by(label, budget)) if budget and chapter.off(label, budget) else ""
    note = "; ".join(filter(None, (off, seeds_failed(chapter, label, budget))))
    flags = chapter.flags(label, budget)
    accuracy = _mean_credit(chapter, label, budget, best=winner == label, note=note, flags=flags)
    relative = Number(chapter.relative(label, budget), best=winner == label)
    return (label, Number(seeds, digits=0) if label != FULL else "", *cells, accuracy, relative)


def _mean_credit(chapter: Comparison, label: str, budget: str, **more: Any) -> Number | None:
    """The mean over all benchmarks, or which of them are missing to it."""
    if without := chapter.without(label, budget):
        return Number(math.nan, note=without)
    return shown(chapter.accuracy(label, budget), **more)


def seeds_failed(chapter: Comparison, label: str, budget: str) -> str:
    """How many seeds of a method lie far below the others; "" where none does."""
    num, seeds = failed(chapter, label, budget)
    return f"{num} of {seeds} seeds failed" if num else ""


def _notes(chapter: Comparison) -> Iterable[str]:
    fair, below = "image-only method", "methods that also read the question, and variants"
    if chapter.subject.reads_question:
        fair, below = "method above the line", "variants"
    figures = {chapter.heading(b): chapter.native_of(FULL, "", b)[0] for b in chapter.benchmarks}
    units = "; ".join(f"{b}: {figure.replace('_', ' ')}" for b, figure in figures.items() if figure and figure != "accuracy")
    yield "Native units, other than plain accuracy in percent: " + units + "." if units else "Accuracy in percent."
    yield (
        "Mean credit: percent, unweighted over the benchmarks, with its 95 % interval. avg %: mean over benchmarks of pruned "
        "/ unpruned, "
        "the field's figure; it averages unlike units. Bold: the highest mean credit where this page's verdicts, in their family, "
        f"say that it is better than what {chapter.about} was compared with ({chapter.about} worse, where another is the highest), "
        f"and the same test, corrected after Holm for the column, that it is better than every other {fair}; single benchmarks "
        f"have no bold. Below the line: {below}."
    )
    yield (
        f"Seeds failed: they lie more than {FAR:g} points below the median of their method's seeds. N kept: a method whose mean "
        "count is more than 2 % from what the budget asks; it is compared with no other."
    )
    yield from (f"{flag}: {says}" for flag, says in caveats(chapter))
    if chapter.unknown:
        yield f"Not installed here, shown as mean credit: {', '.join(sorted(map(chapter.heading, chapter.unknown)))}."


def headline(chapter: Comparison, fast: dict[tuple[str, str], Speed]) -> Table:
    """Method x budget: accuracy, relative accuracy, measured net prefill speedup, overhead."""
    rows: list[tuple[Entry, ...]] = []
    keys: list[str] = []
    breaks, common = {1}, common_flags(list(fast.values()))
    if (FULL, "") in chapter.arms:
        relative, speedup = Number(chapter.relative(FULL, "")), Number(1.0, digits=2, unit="×")
        rows.append((FULL, Number(chapter.total, digits=0), _mean_credit(chapter, FULL, ""), relative, speedup, None))
        keys.append(f"{FULL} | ")
    for budget in chapter.budgets:
        breaks.add(len(rows))
        for label in chapter.methods:
            accuracy, speed = chapter.accuracy(label, budget.spelling), fast.get((label, budget.spelling))
            if accuracy is None and speed is None and not chapter.missing(label, budget.spelling):
                continue
            overhead = speed.spans.get(("pruned", "overhead")) if speed else None
            keys.append(f"{label} | {budget.spelling}")
            evaluated = (label, budget.spelling) in chapter.arms
            kept = kept_entry(chapter, label, budget.spelling) if evaluated or not speed else Number(speed.kept, digits=0)
            note, flags = seeds_failed(chapter, label, budget.spelling), chapter.flags(label, budget.spelling)
            rows.append((
                label, kept, _mean_credit(chapter, label, budget.spelling, note=note, flags=flags),
                Number(chapter.relative(label, budget.spelling)),
                net_speedup(chapter, speed, common) if speed else None,
                Number(overhead.median, digits=2) if overhead else None,
            ))  # fmt: skip
    columns = ("Method", "kept tokens", "accuracy %", "avg %", "net prefill speedup", "overhead ms")
    notes: tuple[str, ...] = (
        "accuracy: mean credit over the benchmarks. avg %: mean over the benchmarks of pruned / unpruned, each by the figure it is "
        "known for. Net prefill speedup: unpruned prefill / (pruned prefill + overhead), as measured. kept tokens: each method's "
        "own mean, with what was asked where that is another count.",
    )
    if any(isinstance(row[4], Number) and TIMED in row[4].note for row in rows):
        notes += (
            f"{TIMED} N kept: the mean count while it was timed, of few pictures and perhaps one scorer seed, where it is more "
            "than 2 % from that of the answers.",
        )
    return Table("headline", "Accuracy and measured speedup", columns, tuple(rows), notes, frozenset(breaks), tuple(keys))


def differences(chapter: Comparison, draws: int) -> Table:
    """The subject minus each other trained method, the best training-free rule and the unpruned model; one column per budget.

    Below a line: minus those that also read the question, corrected by themselves.
    """
    rows: list[tuple[Entry, ...]] = []
    peers, aware = verdicts.of(chapter), verdicts.with_question(chapter)
    every = {**peers, **aware}
    for against in dict.fromkeys(key[0] for key in every):
        cells: list[Entry] = []
        pictures, seeds = 0, set()
        for budget in chapter.budgets:
            one = every.get((against, budget.spelling))
            cells.append(judged_entry(one.verdict, note=one.other if against in verdicts.CHOSEN else "") if one else None)
            if one:
                pictures = max(pictures, one.verdict.found.num_groups)
                arms = ((chapter.about, budget.spelling), (one.other, "" if one.other == FULL else budget.spelling))
                seeds.add("/".join(str(len(chapter.arms[arm])) for arm in arms))
        rows.append((against, *cells, Number(pictures, digits=0), ", ".join(sorted(seeds))))
    columns = (f"{chapter.about} minus", *(b.short for b in chapter.budgets), "pictures", "seeds")
    family = "all cells of this table"
    if peers and aware:
        family = "all cells above the line, and for all below it: methods that also read the question"
    notes = (_paired([one.verdict for one in every.values()], draws), words(family), *_chosen(chapter))
    return Table(
        "differences", "Paired differences in mean credit, points", columns, tuple(rows), notes,
        frozenset({len({key[0] for key in peers})} if peers and aware else ()),
        keys=tuple(str(row[0]) for row in rows), column_keys=_by_budget(chapter, columns),
    )  # fmt: skip


def _by_budget(chapter: Comparison, columns: tuple[str, ...]) -> tuple[str, ...]:
    """Keys of columns of which each budget has one: its spelling for its short name."""
    spellings = iter(b.spelling for b in chapter.budgets)
    shorts = iter([*(b.short for b in chapter.budgets), ""])
    wanted, keys = next(shorts), []
    for column in columns:
        if column == wanted:
            keys.append(next(spellings))
            wanted = next(shorts)
        else:
            keys.append(column)
    return tuple(keys)


def _paired(found: Iterable[Verdict], draws: int) -> str:
    """What the intervals of these differences hold: seeds only where there are several."""
    differences = [verdict.found for verdict in found]
    several = any(d.num_seeds > 1 for d in differences)
    alone = any(d.scorers_only for d in differences)
    return PAIRED.format(draws=draws, seeds=SEEDS * several + ONE_SEED * alone)


def _chosen(chapter: Comparison) -> Iterable[str]:
    """On what the best rule of each budget was chosen."""
    for reads_question, which in enumerate(("rule", "rule that reads the question")):
        by: dict[str, list[str]] = {}
        for budget in chapter.budgets:
            if rule := verdicts.best_rule(chapter, budget.spelling, bool(reads_question)):
                by.setdefault(rule.chosen, []).append(budget.short)
        if by:
            said = [chosen + (f" ({', '.join(at)})" if len(by) > 1 else "") for chosen, at in by.items()]
            yield f"The best {which} of a budget is chosen {'; '.join(said)}."


def variants(chapter: Comparison) -> Table | None:
    """Every variant of a method minus the plain one (question-aware, without denoiser, ...); one column per budget."""
    found = verdicts.variants(chapter)
    rows: list[tuple[Entry, ...]] = []
    for label, plain in {label: one.other for (label, _), one in found.items()}.items():
        at = [one.verdict if (one := found.get((label, b.spelling))) else None for b in chapter.budgets]
        seeds = max(verdict.found.num_seeds for verdict in at if verdict)
        rows.append((label, plain, *map(judged_entry, at), Number(seeds, digits=0)))
    columns = ("variant", "minus", *(b.short for b in chapter.budgets), "seeds")
    notes = (words("all cells of this table"),)
    title = "What each variant changes, points"
    return Table("variants", title, columns, tuple(rows), notes, column_keys=_by_budget(chapter, columns)) if rows else None


def removal(chapter: Comparison) -> Table | None:
    """Accuracy with tokens removed beside tokens replaced by their mean: what removal itself costs."""
    keys = sorted(chapter.replaced_arms, key=lambda k: (chapter.order(k[0]), -labels.budget(k[1])[1]))
    both = (chapter.arms, chapter.replaced_arms)
    keys = [key for key in keys if key in chapter.arms and not any(chapter.lacking(arms[key]) for arms in both)]
    family = {}
    for key in keys:
        difference = chapter.panel.difference(chapter.arms[key], chapter.replaced_arms[key])
        family[key] = replace(difference, scorers_only=chapter.one_scorer(*key))
    found = judged(family)
    rows: list[tuple[Entry, ...]] = []
    for label, budget in keys:
        means = [shown(chapter.panel.mean(arms[label, budget])) for arms in both]
        rows.append((label, kept_entry(chapter, label, budget), *means, judged_entry(found[label, budget])))
    columns = ("Method", "kept", "removed, %", "replaced by mean, %", "removed − replaced, points")
    notes = (
        "Replaced tokens stay in the sequence as the mean of their picture: no speedup. A negative difference is the price "
        "of removal itself.",
        words("all rows of this table"),
    )
    about = tuple(f"{label} | {budget}" for label, budget in keys)
    return Table("replaced", "Removed against replaced by their mean", columns, tuple(rows), notes, keys=about) if rows else None


def kinds(chapter: Comparison) -> Table:
    """Accuracy per kind of question; the figures of the retention curves."""
    rows: list[tuple[Entry, ...]] = []
    keys: list[str] = []
    for (kind, label), points in kind_curves(chapter).items():
        for kept, found, budget in points:
            size = Number(found.num_rows, digits=0), Number(found.num_groups, digits=0)
            own = kept_entry(chapter, label, budget) if label != FULL else Number(kept, digits=0)
            rows.append((kind, label, own, shown(found), *size))
            keys.append(f"{kind} | {label} | {budget}")
    columns = ("kind", "Method", "kept tokens", "accuracy %", "questions", "pictures")
    return Table("kinds", "Accuracy per kind of question", columns, tuple(rows), keys=tuple(keys))


@lru_cache(maxsize=8)
def kind_curves(chapter: Comparison) -> dict[tuple[str, str], list[tuple[float, Interval, str]]]:
    """(kind, method) -> [(kept tokens, accuracy, budget)], the unpruned model under its own label."""
    arms: dict[tuple[str, str], set[str]] = {}
    for (label, at), arm in chapter.arms.items():
        arms[label, at] = {f"{label}\t{at}\t{replicate}" for replicate in arm}
    found: dict[tuple[str, str], list[tuple[float, Interval, str]]] = {}
    for kind, stratum in sorted(chapter.kinds.strata.items()):
        for label in [FULL, *chapter.methods]:
            for spelling in [b.spelling for b in chapter.budgets] if label != FULL else [""]:
                there = [c for c in sorted(arms.get((label, spelling), ())) if c in stratum.columns]
                if there:
                    mean = chapter.kinds.mean({c: {kind: c} for c in there})
                    kept = chapter.kept_by(label, spelling) if label != FULL else chapter.total
                    found.setdefault((kind, label), []).append((kept, mean, spelling))
    return found
