"""The verdict in words, computed from the same estimates as the tables."""

from __future__ import annotations

from diffprune.report.analysis.comparison import FULL, Budget, Comparison
from diffprune.report.analysis.speed import Speed
from diffprune.report.render.table import Number
from diffprune.report.tables.accuracy import SUBJECT, best_rule, rivals
from diffprune.statistics import Difference


def _list(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _signed(value: float) -> str:
    return Number(value, signed=True).main


def _points(found: Difference) -> str:
    return f"{_signed(found.estimate)} [{_signed(found.low)}, {_signed(found.high)}]"


def verdict(against: str, found: list[tuple[Budget, Difference, str]]) -> str:
    """ "Against X, DiffPrune is better at ..., ties at ..., is worse at ..." with the differences in points.

    found: budget, paired difference, and which rule it was compared with ("" if that is in `against`).
    """
    clauses = []
    for word, says in (("better", "is better with"), ("tie", "ties with"), ("worse", "is worse with")):
        mine = [f"{b.kept:.0f} tokens ({_points(d)}{', ' + rule if rule else ''})" for b, d, rule in found if d.verdict == word]
        if mine:
            clauses.append(f"{says} {_list(mine)}")
    if not clauses:
        return f"Against {against} nothing was compared at a shared budget."
    if len(clauses) == 1 and len(found) > 1:
        clauses[0] += ", that is at every budget"
    return f"Against {against}, DiffPrune " + "; ".join(clauses) + "."


def headline(chapter: Comparison, fast: dict[tuple[str, str], Speed], batch: int | None) -> list[str]:
    """Sentences: what was asked, each comparison, what pruning costs and saves, and how it was timed."""
    if not any(label == SUBJECT for label, _ in chapter.arms):
        return ["There are no answers of DiffPrune in this store yet, so there is no verdict."]
    first = next(b.spelling for b in chapter.budgets if (SUBJECT, b.spelling) in chapter.arms) if chapter.budgets else ""
    base = chapter.accuracy(SUBJECT, first)
    seeds = len(chapter.arms[SUBJECT, first]) if first else 0
    said = []
    if base:
        said.append(
            f"DiffPrune was asked {base.num_rows:,} questions of {len(chapter.benchmarks)} benchmarks at "
            f"{len(chapter.budgets)} budgets, "
            f"with {seeds} scorer seed{'s' * (seeds != 1)}. Differences are in points of mean credit, with paired 95 % intervals."
        )
    for rival in rivals(chapter):
        found = [(b, d, "") for b in chapter.budgets if (d := chapter.difference(SUBJECT, rival, b.spelling))]
        said.append(verdict(rival, found))
    if not rivals(chapter):
        said.append("No other trained method was evaluated, so nothing is said about one.")
    rules = [
        (b, d, rule)
        for b in chapter.budgets
        if (rule := best_rule(chapter, b.spelling)) and (d := chapter.difference(SUBJECT, rule, b.spelling))
    ]
    said.append(verdict("the best training-free image-only rule of each budget", rules))
    return said + _bargain(chapter, fast, batch)


def _bargain(chapter: Comparison, fast: dict[tuple[str, str], Speed], batch: int | None) -> list[str]:
    """What pruning costs and saves: at the budget with fewest tokens that is no worse than unpruned, and the fastest one."""
    said = []
    safe = [b for b in chapter.budgets if (d := chapter.difference(SUBJECT, FULL, b.spelling)) and d.verdict in ("better", "tie")]
    if safe:
        found = chapter.difference(SUBJECT, FULL, safe[-1].spelling)
        assert found is not None
        said.append(f"Down to {safe[-1].label} its accuracy is not measurably below the unpruned model ({_points(found)}).")
    elif chapter.budgets and chapter.difference(SUBJECT, FULL, chapter.budgets[0].spelling):
        said.append("At every budget its accuracy is measurably below the unpruned model.")
    timed = [(b, s) for b in chapter.budgets if (s := fast.get((SUBJECT, b.spelling))) and s.net]
    parts = [f"{s.net.estimate:.2f}× [{s.net.low:.2f}, {s.net.high:.2f}] with {b.kept:.0f} tokens" for b, s in timed if s.net]
    if parts:
        flags = sorted({f for _, s in timed for f in s.flags})
        said.append(
            f"Measured prefill speedup net of the pruner's own overhead, batch {batch}: {_list(parts)}"
            + (f" (flags: {', '.join(flags)})." if flags else ".")
        )
    else:
        said.append("Its prefill has not been timed yet, so there is no speedup to report.")
    return said


def short(chapter: Comparison) -> str:
    """One line: the sum of the verdicts against the other trained methods, for the top of the page."""
    found = [(b, r, d) for r in rivals(chapter) for b in chapter.budgets if (d := chapter.difference(SUBJECT, r, b.spelling))]
    if not found:
        return "No comparison with another trained method in this store."
    counts = {w: sum(d.verdict == w for _, _, d in found) for w in ("better", "tie", "worse")}
    names = {"better": "better in {}", "tie": "a tie in {}", "worse": "worse in {}"}
    parts = [names[w].format(n) for w, n in counts.items() if n]
    return f"DiffPrune against the other trained methods, {len(found)} comparisons: {_list(parts)}."
