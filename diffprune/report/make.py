"""`report`: read a store once, make every table and figure, write the page and the files beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffprune.report import files
from diffprune.report.analysis import records, speed, verdicts
from diffprune.report.analysis.comparison import FULL, Comparison, chapters
from diffprune.report.analysis.derived import Derived
from diffprune.report.analysis.scenes import scenes
from diffprune.report.analysis.speed import Speed
from diffprune.report.render import curves, figures, html, sensitivity
from diffprune.report.render.forest import forest, of_variants
from diffprune.report.render.scenes import strips
from diffprune.report.render.svg import HALF, WIDTH
from diffprune.report.render.table import Table
from diffprune.report.tables import accuracy as accuracy_tables
from diffprune.report.tables import catalogue, caveats, errors, provenance, published, verdict
from diffprune.report.tables import derived as derived_tables
from diffprune.report.tables import search as search_tables
from diffprune.report.tables import speed as speed_tables
from diffprune.statistics import DRAWS, Range
from diffprune.statistics.speedup import LEAST_ROUNDS

FLAGS = {
    "above_flop_ratio": "A speedup lies above the ratio of FLOPs: not plausible without a second look.",
    "clock_drift": "The machine got slower or faster by more than 2 % while it was timed.",
    "cpu_only": "Timed on a CPU: ratios carry over to other machines only roughly, milliseconds do not.",
    "error_rows": "Some answers failed; they are left out of the accuracies and counted under Failures.",
    "few_repeats": f"Some spans were timed fewer than {speed.FEW} times; their intervals are wide, or ranges.",
    "no_warmup": "Timed without warm-up.",
    "outlier": "Single repetitions took many times the median; none was removed.",
    "overhead_excluded": "The pruner's overhead could not be timed in full, so no net speedup is printed.",
    "parts_differ": "Score, select and gather timed apart do not add up to the overhead timed as a whole.",
    "shared_device": "Other processes kept the machine busy while it was timed.",
}
RIVALS = 5  # whose answers stand among the examples
METHOD = (
    "Accuracy: mean credit per benchmark, averaged over benchmarks. Intervals: {draws:,} bootstrap draws of whole groups "
    "(pictures), the same draws for every method, two unseen changes added (Bonett and Price 2012; each like "
    "those that were seen; where few were, of one answer, in differences of as many as a picture has), and, where a trained method "
    "has several scorer seeds, their variance as replicates (generalized confidence interval, Weerahandi 1993); with one seed an "
    "interval is about these scorers only. p values are of the same distribution. Speedups: median of the rounds' own ratios. "
    "Timed in several sessions (processes), the geometric mean of theirs, with Student's interval of the logarithms; in one, with "
    "the interval of that median, which is that session's alone; from fewer than {rounds} rounds of it, the least and the largest "
    "ratio, a range. Results that failed are listed, never counted as wrong. Seeds of the bootstrap are fixed, so the same "
    "records give the same page."
)


def report(
    store_root: Path | str | records.Records,
    out: Path | str,
    *,
    title: str = "DiffPrune report",
    command: str | None = None,
    asked: Mapping[str, str] | None = None,
    subject: str = "",
) -> dict[str, Path]:
    """Write `report.html`, `report.md`, `report.tex`, `numbers.csv`, `tables/*.csv` and `figures/*.svg` into the folder `out`.

    store_root: a store, or what `records.read` gave of it.
    command: how the run was started, printed under Provenance.
    asked: the setting whose chapter comes first: values of columns of cells (`analysis.records.SETTING`).
    subject: label of the method that the page is about, where the store has not been read yet (`analysis.records.read`).

    Returns the paths by name ("html", "markdown", "latex", "csv/<table>", "svg/<figure>").

    Raises:
        ValueError: a picture in the store whose tokens are no square. OSError: names the file that could not be written.
    """
    found = records.read(store_root, subject)
    there = list(chapters(found, asked))
    parts = [_chapter(chapter, number) for number, chapter in enumerate(there, 1)]
    drawn = {
        "tuning": curves.tuning(found),
        "training": curves.training(found),
        "sensitivity": sensitivity.sensitivity(found),
    }
    used = {method.plugin for method in found.methods.values()}
    methods = catalogue.catalogue(used, catalogue.Measured.of(there[0]) if there else None)
    shared = {
        "searched": search_tables.searched(found), "tuned": speed_tables.tuned(found),
        "training": speed_tables.training(found), "failures": provenance.failures(found),
        "provenance": provenance.facts(found), "weights": provenance.weights(found),
        "apart": catalogue.apart(found.methods.values()),
    }  # fmt: skip
    page = html.render(
        "page.html.j2",
        title=title,
        chapters=parts,
        figures=html.drawn(drawn),
        pictures=strips(scenes(found, there)),
        method=METHOD.format(draws=DRAWS, rounds=LEAST_ROUNDS),
        command=command or "diffprune report STORE --out FOLDER",
        thresholds=[t for c in parts for t in [c["thresholds"]] if t],
        methods=methods,
        **shared,
    )
    every = [*((c["key"], t) for c in parts for t in _titled(_tables(c), c, parts)), *(("", t) for t in shared.values() if t)]
    every += [(parts[0]["key"] if methods.keys else "", methods)]
    every += [("", kept)] if (kept := provenance.pictures(found)) else []
    plots = [*((name, plot) for c in parts for name, plot in c["plots"].items()), *drawn.items()]
    return files.write(Path(out), "report", title, page, every, plots, [s for c in parts for s in _said(c)])


def _titled(tables: Sequence[Table], part: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> list[Table]:
    """A chapter's tables, with what sets the chapter apart in their titles where there are several."""
    others = [{name: str(value) for name, value in one["asked"].items()} for one in parts]
    own = {name: str(value) for name, value in part["asked"].items()}
    apart = "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in own.items() if any(o[name] != value for o in others))
    return [replace(t, title=f"{t.title} ({apart})") for t in tables] if apart else list(tables)


def _said(part: Mapping[str, Any]) -> list[str]:
    """What the Markdown says of a chapter before its tables: whose numbers these are, what they are not, and the verdict."""
    return [
        f"{part['name']}: {part['setting']}",
        *(f"{flag}: {says}" for flag, says in part["caveats"]),
        *dict.fromkeys([*part["lead"], *part["sentences"]]),  # the page has the lead apart, and says the rest in its details
    ]  # fmt: skip


def _chapter(chapter: Comparison, number: int) -> dict[str, Any]:
    """Everything the page shows of one chapter, the `number`-th."""
    found, fast, timed = speed.of(chapter)
    pareto = figures.pareto(chapter, fast, timed)
    plots = {
        "forest": forest(chapter),
        "variants": of_variants(chapter),
        "pareto": pareto,
        "accuracy": figures.accuracy(chapter, WIDTH if pareto else HALF),  # without speeds it stands in the place of `pareto`
        "retention": figures.retention(chapter),
        "breakdown": figures.breakdown(chapter, found, timed),
    }
    flags = {f for s in found for f in s.flags} | ({"error_rows"} if chapter.errors else set())
    headline = accuracy_tables.headline(chapter, fast)
    derived = Derived(chapter)
    return {
        "asked": chapter.setting, "name": chapter.setting["model"], "about": chapter.about,
        "key": " | ".join(map(str, chapter.setting.values())),
        "setting": "; ".join(f"{k.replace('_', ' ')} {v}" for k, v in chapter.setting.items() if k != "model"),
        "lead": verdict.lead(chapter, fast, timed), "sentences": verdict.headline(chapter, fast, timed),
        "caveats": caveats.caveats(chapter),
        "flags": [(f, FLAGS.get(f, "")) for f in sorted(flags) if not f.startswith("threads_")],
        "headline": headline if headline.rows else None,
        "differences": accuracy_tables.differences(chapter, DRAWS), "variants": accuracy_tables.variants(chapter),
        "budgets": [accuracy_tables.per_budget(chapter, b) for b in chapter.budgets],
        "relative": derived_tables.relative(chapter, derived), "changed": derived_tables.changed(chapter, derived),
        "blind": derived_tables.blind(chapter, derived), "tested": derived_tables.tested(chapter, derived),
        "published": published.beside(chapter), "errors": errors.by_class(chapter),
        "replaced": accuracy_tables.removal(chapter), "kinds": accuracy_tables.kinds(chapter),
        "latency": speed_tables.latency(chapter, found), "answer_times": speed_tables.answer_times(chapter, found),
        "spans": speed_tables.spans(found), "cost": speed_tables.cost(chapter),
        "thresholds": speed_tables.thresholds(chapter, fast), "examples": _examples(chapter),
        "bars": _bars(fast.values()),
        "figures": html.drawn(plots, number), "plots": plots,
    }  # fmt: skip


def _bars(fast: Iterable[Speed]) -> str:
    """What the bars of the figure of accuracy and speed are: speedups from few rounds have ranges, and no intervals."""
    nets = [one.net for one in fast if one.net]
    few = sorted({net.num_rows for net in nets if isinstance(net, Range)})
    if not few:
        return "95 % intervals"
    rounds = f"{few[0]} to {few[-1]}" if len(few) > 1 else str(few[0])
    which = "those" if all(isinstance(net, Range) for net in nets) else "some"
    return f"95 % intervals, {which} of speedups the range of {rounds} rounds"


def _examples(chapter: Comparison) -> Table | None:
    """At the middle budget: the unpruned model, the subject and the first other trained methods, first scorer seed each."""
    if not chapter.budgets:
        return None
    middle = chapter.budgets[len(chapter.budgets) // 2]
    budget, arms = middle.spelling, {}
    for label in (FULL, chapter.about, *verdicts.rivals(chapter)[:RIVALS]):
        arm = chapter.arms.get((label, "" if label == FULL else budget))
        if arm:
            arms[label] = list(arm[min(arm)].values())
    return provenance.examples(chapter.rows, chapter.records, arms, f"With {middle.short}") if FULL in arms else None


def _tables(part: Mapping[str, Any]) -> list[Table]:
    """The tables of a chapter that have rows, in the order of the page."""
    order = (
        "headline",
        "differences",
        "variants",
        "budgets",
        "relative",
        "changed",
        "blind",
        "tested",
        "published",
        "replaced",
        "kinds",
        "latency",
        "answer_times",
        "spans",
        "cost",
        "thresholds",
        "examples",
        "errors",
    )
    found = [t for name in order for t in (part[name] if isinstance(part[name], list) else [part[name]])]
    return [t for t in found if t is not None and t.rows]
