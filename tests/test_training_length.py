"""The study of longer training: its jobs are the comparison's with other steps, its table says what stores say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from records import evaluate_cell, outcome, prediction, provenance

from diffprune.report import read
from diffprune.report.analysis.comparison import chapters
from diffprune.store import Store

STUDY = Path(__file__).parents[1] / "jobs" / "studies" / "training_length.py"
RIGHT = {"diffprune": (0.4, 0.9), "gumbel_keepdrop": (0.7, 0.7)}  # share of right answers, short and long


@pytest.fixture(scope="module")
def study() -> Any:
    spec = importlib.util.spec_from_file_location("training_length", STUDY)
    assert spec and spec.loader
    module = sys.modules["training_length"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_length_is_the_comparison_with_other_steps(study: Any) -> None:
    short, long = (study.job(images, 5, 80) for images in (400, 4000))
    assert short.name != long.name and [study.images(one) for one in (short, long)] == [400, 4000]
    for spec in short.train.pruners:
        own, more = short.train.of(spec), long.train.of(spec)
        assert abs(own.steps * own.images - 400) < own.images and more.steps == 10 * own.steps
        assert more.model_copy(update={"steps": own.steps}) == own, "nothing else differs"
    assert str(short.train.pruners[0]) == "diffprune" and len(short.train.pruners) == 3 and len(short.train.seeds) == 5


def test_the_table_and_figure_show_where_methods_cross(study: Any, tmp_path: Path) -> None:
    found, wanted = {}, {}
    for at, images in enumerate((400, 4000)):
        store = Store(tmp_path / str(images))
        for asked, shares in RIGHT.items():
            for seed in range(3):
                random = np.random.default_rng([at, seed, len(asked)])
                cell = evaluate_cell(asked, "Share(1/9)", weights=f"{asked:.9} {seed}", recipe=asked, seed=seed)
                rows = [prediction(i, credit=float(random.random() < shares[at])) for i in range(120)]
                wanted.setdefault((images, asked), []).append(100 * np.mean([row.credit for row in rows]))
                store.publish({"predictions": rows, "outcomes": [outcome(len(rows))]}, cell=cell, provenance=provenance())
        found[images] = next(chapters(read(tmp_path / str(images))))
    study.write(found, tmp_path / "out")
    told = pd.read_csv(tmp_path / "out" / "table.csv")
    assert told["images"].tolist() == [400, 400, 4000, 4000] and (told["tokens"] == 16).all() and (told["seeds"] == 3).all()
    for row, seeds in zip(told.itertuples(), wanted.values(), strict=True):
        assert row.accuracy == pytest.approx(np.mean(seeds), abs=1e-3) and row.seed_sd == pytest.approx(
            np.std(seeds, ddof=1), abs=1e-3
        )
    rival = told[told["method"] != "DiffPrune"]
    assert rival["verdict"].tolist() == ["worse", "better"]
    assert rival["ahead"].to_numpy() == pytest.approx(told["accuracy"][::2].to_numpy() - rival["accuracy"].to_numpy(), abs=1e-3)
    page = (tmp_path / "out" / "README.md").read_text()
    assert "(worse) after 400" in page and "(better) after 4,000" in page
    assert (tmp_path / "out" / "figure.svg").read_text().count("DiffPrune") == 1
