"""Longer training: where DiffPrune, keep/drop and LearnPruner cross.

    python jobs/studies/training_length.py --out reports/training_length

Each length is a job of its own below `--runs`, which goes on where it was stopped: the settings that jobs/tune_training.py found
for each method, with the steps of 400, 1,200 and 4,000 training images (100, 300 and 1,000 steps of four), over all of which
learning rate, temperatures and easing are stretched. Differences are of the same questions and seeds; all of the table are
one family under the one verdict rule. About half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diffprune.core.spec import Spec
from diffprune.job import Evaluation, Job, Recipe
from diffprune.job.files import load_job
from diffprune.job.pipeline import run
from diffprune.report import read
from diffprune.report.analysis.comparison import Comparison, chapters
from diffprune.report.render.lines import Line, lines
from diffprune.statistics.verdict import judged
from diffprune.store.provenance import collect
from diffprune.train.recipe import MethodSettings

OURS, RIVALS = Spec("diffprune"), (Spec("gumbel_keepdrop"), Spec("learnpruner", (("diversity", 0.2),)))
BUDGETS = ("Share(1/9)", "Share(1/20)")
WINNERS, SEARCHED = Path(__file__).parents[2] / "reports" / "tune_training" / "winners.json", 400  # and its training images


def job(length: int, seeds: int, limit: int) -> Job:
    """The methods as the search at 400 images would have them, with the steps of `length` training images."""
    recipe = load_job("zoo").train
    assert recipe, "the zoo trains"
    found = {own["pruner"]: own for own in json.loads(WINNERS.read_text())["methods"]}
    methods = [
        MethodSettings(**own | {"steps": own["steps"] * length // SEARCHED}) for own in (found[str(s)] for s in (OURS, *RIVALS))
    ]
    budgets = load_job("demo").budgets  # those of the search
    changed = {"pruners": (OURS, *RIVALS), "budgets": budgets, "seeds": tuple(range(seeds)), "methods": tuple(methods)}
    return Job(
        name=f"training_length_{length}",
        title=f"{length:,} training images",
        train=Recipe(**{name: getattr(recipe, name) for name in Recipe.model_fields} | changed),
        evaluate=Evaluation(limit=limit),
        baselines=("unpruned",),
        budgets=BUDGETS,
        workers=2,
    )


def images(asked: Job) -> int:
    """Training images of DiffPrune, which the others see as many of, up to a step."""
    assert asked.train, "every length trains"
    own = asked.train.of(OURS)
    return own.steps * own.images


def table(found: Mapping[int, Comparison]) -> pd.DataFrame:
    """One row for each length (training images), budget and method: accuracy, its spread over seeds, DiffPrune against it."""
    asked = [
        (length, budget, label)
        for length, chapter in found.items()
        for budget in chapter.budgets
        for label, method in chapter.methods.items()
        if method.kind == "trained"
    ]
    against = {(n, b.spelling, label): found[n].difference("DiffPrune", label, b.spelling) for n, b, label in asked}
    verdicts = judged({key: told for key, told in against.items() if told is not None and key[2] != "DiffPrune"})
    rows: list[dict[str, Any]] = []
    for length, budget, label in asked:
        row = {"images": length, "tokens": round(budget.kept), "method": label, **reached(found[length], label, budget.spelling)}
        if verdict := verdicts.get((length, budget.spelling, label)):
            told = verdict.found
            row |= {"ahead": told.estimate, "ahead_low": told.low, "ahead_high": told.high, "verdict": verdict.word}
        rows.append(row)
    return pd.DataFrame(rows)


def reached(chapter: Comparison, label: str, budget: str) -> dict[str, float]:
    """Accuracy of one method with its interval, and its standard deviation over seeds, in percent."""
    accuracy, arm = chapter.accuracy(label, budget), chapter.arms[label, budget]
    assert accuracy is not None, "every method of the job was asked"
    seeds = [chapter.panel.value({seed: cells}) for seed, cells in arm.items()]
    spread = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else float("nan")
    return {"accuracy": accuracy.estimate, "low": accuracy.low, "high": accuracy.high, "seeds": len(seeds), "seed_sd": spread}


def crossings(told: pd.DataFrame) -> list[str]:
    """A sentence for each rival and budget: how far DiffPrune is ahead at every length."""
    said = []
    rivals = told[told["method"] != "DiffPrune"]
    for (method, tokens), part in rivals.groupby(["method", "tokens"], sort=False):
        steps = [f"{row.ahead:+.1f} ({row.verdict or 'withheld'}) after {row.images:,}" for row in part.itertuples()]
        said.append(f"* DiffPrune minus {method} at {tokens} tokens, points: {', '.join(steps)} training images.")
    return said


def figure(told: pd.DataFrame) -> str:
    """Accuracy against training images, one panel per budget, as SVG text."""
    panels = {}
    for tokens, part in sorted(told.groupby("tokens"), reverse=True):
        panels[f"{tokens} tokens"] = [
            Line(str(method), own["images"].tolist(), own["accuracy"].tolist(), own["low"].tolist(), own["high"].tolist())
            for method, own in part.groupby("method", sort=False)
        ]
    return lines(panels, "training images", "accuracy, %", log_x=True)


def page(told: pd.DataFrame, origin: str) -> str:
    """The table as Markdown."""
    out = [
        "# Longer training", "", (__doc__ or "").split("\n\n", 2)[2].strip(), "", origin, "",
        "![accuracy by length](figure.svg)", "", *crossings(told), "",
        "| training images | tokens | method | accuracy, % | SD over seeds | DiffPrune ahead by | verdict |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in told.itertuples():
        rival = row.method != "DiffPrune"
        ahead = f"{row.ahead:+.1f} [{row.ahead_low:+.1f}, {row.ahead_high:+.1f}]" if rival else ""
        head = f"| {row.images:,} | {row.tokens} | {row.method} | {row.accuracy:.1f} [{row.low:.1f}, {row.high:.1f}] |"
        out.append(f"{head} {row.seed_sd:.1f} | {ahead} | {row.verdict if rival else ''} |")
    return "\n".join(out) + "\n"


def write(found: Mapping[int, Comparison], out: Path) -> None:
    """table.csv, figure.svg and README.md."""
    told, made = table(found), collect("training_length", 1, 0)
    out.mkdir(parents=True, exist_ok=True)
    told.to_csv(out / "table.csv", index=False, float_format="%.4f")
    (out / "figure.svg").write_text(figure(told), encoding="utf-8")
    origin = f"Commit {made.commit[:12]}{' (changed)' if made.dirty else ''}, {made.started}."
    (out / "README.md").write_text(page(told, origin), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every length and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--images", type=int, nargs="+", default=[400, 1200, 4000])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--limit", type=int, default=80)
    given = parser.parse_args(arguments)
    found = {}
    for length in given.images:
        asked = job(length, given.seeds, given.limit)
        run(asked, given.runs)
        found[images(asked)] = next(chapters(read(given.runs / asked.name / "store")))
    write(found, given.out)


if __name__ == "__main__":
    main()
