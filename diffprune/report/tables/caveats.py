"""Caveats of a comparison: flags of model, data and answers, with the benchmarks they hold for."""

from __future__ import annotations

import pandas as pd

from diffprune.io.dataset_manifest import FIXTURE
from diffprune.report.analysis.comparison import FULL, Comparison

FEW = 10  # answers from which on a share of them says something
SAYS = {
    "tiny": "The model is a tiny random instance that has learnt nothing: the figures show that the code runs, and nothing else.",
    FIXTURE: "A few rows of our own in the published schema, not the published data: {}.",
    "incomplete": "Not all rows of the published split, so no full run: {}.",
    "limit": "No full run: at most {} questions per benchmark, rounded up to whole groups.",
    "cut": "No full run: answers are cut at {} tokens, where the benchmarks allow more.",
    "other_model": "Scorers that were trained on another model than the one they prune here, as was asked: {}.",
    "other_pictures": "Not all timings of this store stand here: {} are left out.",
    "unread": "The rule reads almost none of the unpruned model's answers: the figure is about their form, not about pruning: {}.",
    "none_right": "The unpruned model has no credit here, as where a suffix or a grading rule does not fit; what is divided by its "
    "accuracy (avg %, relative accuracy) leaves these benchmarks out: {}.",
    "embedded": "Benchmarks of the embedded world: answer format and grading rule of the namesakes, not their pictures: {}.",
    "substitute": "Other data or another rule than the numbers papers print rest on, for want of published answers: {}.",
}


def caveats(chapter: Comparison) -> list[tuple[str, str]]:
    """(flag, sentence), the gravest first; [] for a full run of a trained model on the published data."""
    setting = chapter.setting
    found: dict[str, str] = {"tiny": ""} if str(setting["model"]).startswith("tiny(") else {}
    by_flag: dict[str, list[str]] = {}
    for benchmark in chapter.benchmarks:
        for flag in benchmark_flags(chapter, benchmark):
            by_flag.setdefault(flag, []).append(chapter.heading(benchmark))
    if str(setting.get("limit", "all")) != "all":
        found["limit"] = str(setting["limit"])
    if str(setting.get("answer_tokens", "all")) != "all":
        found["cut"] = str(setting["answer_tokens"])
    others = {str(x) for cells in (chapter.evaluated, chapter.measured) for x in _of_another_model(cells)}
    if others:
        found["other_model"] = ", ".join(sorted(others))
    if chapter.other_pictures:
        found["other_pictures"] = chapter.other_pictures
    if unread := [chapter.heading(b) for b in chapter.benchmarks if _unread(chapter, b)]:
        found["unread"] = ", ".join(unread)
    if none := [chapter.heading(b) for b in chapter.benchmarks if chapter.native_of(FULL, "", b)[1] == 0]:
        found["none_right"] = ", ".join(none)
    found |= {flag: ", ".join(there) for flag, there in by_flag.items()}
    order = list(SAYS)
    return [
        (flag, SAYS.get(flag, "{}.").format(about))
        for flag, about in sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))
    ]


def _of_another_model(cells: pd.DataFrame) -> pd.Series:
    """Labels of methods whose scorer was trained on another model."""
    return cells.loc[cells["pruner"].astype(str).str.contains("other_model=True", regex=False), "label"]


def _unread(chapter: Comparison, benchmark: str) -> bool:
    """Whether the grading rule found nothing to read in nine of ten of the unpruned model's answers, as where a model that has no
    letters is asked for one."""
    cells = chapter.arms.get((FULL, ""), {}).get("", {})
    rows = chapter.rows.loc[chapter.rows["cell"] == cells.get(benchmark, ""), "parsed"].astype(str)
    return len(rows) >= FEW and float((rows == "").mean()) > 0.9


def benchmark_flags(chapter: Comparison, benchmark: str) -> tuple[str, ...]:
    """What the benchmark says of itself under the chapter's protocol, and what the revision of the rows that were asked says."""
    revisions = {str(r) for r in chapter.evaluated.loc[chapter.evaluated["benchmark"] == benchmark, "revision"]}
    told = {
        FIXTURE: any(f"@{FIXTURE}-" in revision for revision in revisions),
        "incomplete": any(revision.endswith(" incomplete") for revision in revisions),
    }
    return (*(flag for flag, holds in told.items() if holds), *chapter.benchmark_flags(benchmark))
