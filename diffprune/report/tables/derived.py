"""Tables of derived figures: relative accuracy and its companions, changed answers, the image's share, verdicts per benchmark."""

from __future__ import annotations

import math

from diffprune.report.analysis.comparison import BLIND, FULL, Comparison
from diffprune.report.analysis.derived import Derived
from diffprune.report.analysis.verdicts import rivals
from diffprune.report.render.table import Entry, Number, Table
from diffprune.report.tables.accuracy import judged_entry, kept_entry, shown, words
from diffprune.statistics import LEAST_GROUPS

FAULTS = (
    "Relative accuracy as papers print it: mean over benchmarks of pruned / unpruned. It averages unlike units (MME points, F1, "
    "soft accuracy); benchmarks that hardly need the image lift it; it does not correct for chance or for what the question alone "
    "gives away; gains hide losses unless each benchmark is capped at 100 %; correlated pairs (MMBench and MMBench-CN, VQAv2 and "
    "GQA) count twice; and it depends on whose unpruned run it is divided by (here: our own, same questions and protocol). So it "
    "stands beside the worst benchmark, the capped mean and the blind-corrected retention."
)


def _arms(chapter: Comparison) -> list[tuple[str, str]]:
    """(method, budget) in the order of tables, of those that were asked everything."""
    every = [(label, b.spelling) for b in chapter.budgets for label in chapter.methods]
    return [key for key in every if key in chapter.arms and not chapter.missing(*key)]


def _keys(arms: list[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(f"{label} | {budget}" for label, budget in arms)


def _breaks(arms: list[tuple[str, str]]) -> frozenset[int]:
    return frozenset(i for i in range(1, len(arms)) if arms[i][1] != arms[i - 1][1])


def relative(chapter: Comparison, derived: Derived) -> Table | None:
    """Relative accuracy with interval, capped, worst benchmark, and blind-corrected where the image was left out once."""
    arms = _arms(chapter) if (FULL, "") in chapter.arms else []
    rows: list[tuple[Entry, ...]] = []
    blind = bool(derived.visual)
    for label, budget in arms:
        worst = derived.worst(label, budget)
        row: list[Entry] = [label, kept_entry(chapter, label, budget), shown(derived.relative(label, budget))]
        row += [shown(derived.relative(label, budget, capped=True))]
        row += [shown(worst[1], note=chapter.heading(worst[0])) if worst else None]
        rows.append((*row, *([shown(derived.retention(label, budget))] if blind else [])))
    columns = (
        "Method",
        "kept",
        "relative accuracy %",
        "each capped at 100 %",
        "worst benchmark %",
        *(["blind-corrected %"] * blind),
    )
    notes = [FAULTS]
    if blind:
        notes.append(
            "Blind-corrected: (pruned − no image) / (unpruned − no image), mean over the benchmarks on which the image helps by "
            "more than 3 standard errors; below 0 means worse than without any image."
        )
    title = "Relative accuracy, as papers print it, and what belongs beside it"
    return Table("relative", title, columns, tuple(rows), tuple(notes), _breaks(arms), _keys(arms)) if rows else None


def changed(chapter: Comparison, derived: Derived) -> Table | None:
    """Agreement with the unpruned model, answers lost and answers won."""
    arms = _arms(chapter) if (FULL, "") in chapter.arms else []
    rows: list[tuple[Entry, ...]] = []
    for label, budget in arms:
        parts = [Number(derived.changed(label, budget, c)) for c in ("whole", "harm", "gain")]
        rows.append((label, kept_entry(chapter, label, budget), shown(derived.agreement(label, budget)), *parts))
    columns = ("Method", "kept", "agreement %", "whole groups %", "harm %", "gain %")
    notes = (
        "Agreement: answers that are, as the benchmark reads them, the unpruned model's; it sees changes that cancel in accuracy. "
        "Whole groups: pairs and rotations (MME, MMBench) all of whose answers agree. Harm: unpruned right, pruned wrong; gain: "
        "the reverse (full credit counts as right). Unweighted over benchmarks.",
    )
    title = "Answers that pruning changes"
    return Table("changed", title, columns, tuple(rows), notes, _breaks(arms), _keys(arms)) if rows else None


def blind(chapter: Comparison, derived: Derived) -> Table | None:
    """Per benchmark: what the image contributes, and how much of that the subject keeps at each budget."""
    rows: list[tuple[Entry, ...]] = []
    budgets = [b for b in chapter.budgets if (chapter.about, b.spelling) in chapter.arms]
    for benchmark, (full, without, gap) in derived.visual.items():
        digits = 0 if full > 200 else 1
        kept: list[Entry] = []
        for b in budgets:
            found = derived.retained(chapter.about, b.spelling, benchmark)
            kept.append(shown(found.interval()) if found else None)
        unknown = "no interval" if gap.num_groups >= LEAST_GROUPS else ""  # else `shown` says why
        says = "" if gap.image_bound else "not image-bound" if math.isfinite(gap.low) else unknown
        rows.append((
            chapter.heading(benchmark), Number(full, digits=digits), Number(without, digits=digits),
            shown(gap, digits, signed=True, note=says), *kept,
        ))  # fmt: skip
    columns = ("Benchmark", FULL, BLIND, "the image's part", *(f"{chapter.about}, {b.short}: % kept" for b in budgets))
    notes = (
        "Native units. No image: the same questions with the image's place and all its tokens left out. Not image-bound: "
        "unpruned − no image does not exceed 3 standard errors, so there is no visual contribution to keep.",
    )
    column_keys = ("Benchmark", FULL, BLIND, "the image's part", *(b.spelling for b in budgets))
    title, keys = "What the image contributes", tuple(derived.visual)
    return Table("blind", title, columns, tuple(rows), notes, keys=keys, column_keys=column_keys) if rows else None


def tested(chapter: Comparison, derived: Derived) -> list[Table]:
    """The subject minus the unpruned model and minus each rival, benchmark by benchmark, in native units."""
    found = []
    for against in (FULL, *rivals(chapter)):
        by_budget = {b.spelling: derived.tested(chapter.about, against, b.spelling) for b in chapter.budgets}
        rows: list[tuple[Entry, ...]] = []
        keys: list[str] = []
        for benchmark in chapter.benchmarks:
            cells = [t.get(benchmark) for t in by_budget.values()]
            if not any(cells):
                continue
            figure = chapter.native_of(FULL, "", benchmark)[0].replace("_", " ")
            entries = [judged_entry(t, 0 if figure.startswith("mme") else 1) for t in cells]
            rows.append((chapter.heading(benchmark), figure, *entries))
            keys.append(f"{against} | {benchmark}")
        if rows:
            columns = ("Benchmark", "figure", *(b.short for b in chapter.budgets))
            name = "benchmarks_" + "".join(c if c.isalnum() else "_" for c in against.lower())
            notes = ("Native units. " + words("the benchmarks of one column", "1 % of the figure's largest value"),)
            title, at = f"{chapter.about} − {against}, benchmark by benchmark", ("Benchmark", "figure", *by_budget)
            found.append(Table(name, title, columns, tuple(rows), notes, keys=tuple(keys), column_keys=at))
    return found
