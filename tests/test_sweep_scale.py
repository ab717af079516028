"""The study of a sweep's driver: workers in simulated time leave the store that one process would."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from diffprune.core.records import Outcome
from diffprune.store import Store
from tests.records import provenance

STUDY = Path(__file__).parents[1] / "jobs" / "studies" / "sweep_scale.py"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sweep_scale", STUDY)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep_scale"] = module
    spec.loader.exec_module(module)
    return module


def test_the_simulated_sweep_is_a_sweep(study: ModuleType, tmp_path: Path) -> None:
    found = study.simulated(60, 7, 6, 2, 20.0, tmp_path / "many")
    single = Store(tmp_path / "single")
    rows = list(study.answers(6).values())
    for cell in study.cells(60, 6, 2)[:5]:
        single.publish({"predictions": rows, "outcomes": [Outcome("ok", "", 6, 0.3)]}, cell=cell, provenance=provenance())
    columns = ["cell", "sample", "answer", "credit", "pruner", "budget", "benchmark"]
    many = Store(tmp_path / "many").read("predictions", columns)
    assert len(many) == 360 == found["answers"] and many.groupby("cell").size().eq(6).all() and many["cell"].nunique() == 60
    alone = single.read("predictions", columns)
    pd.testing.assert_frame_equal(many[many["cell"].isin(set(alone["cell"]))].reset_index(drop=True), alone)
    assert found["files"] == 5, "one bundle of four tables"
    least = 60 * 6 / 20.0 / 7  # seconds of answers on each worker
    assert least < found["simulated_s"] < 10 + 10 * 0.1 + 2 * least, "loading, listing and answering, in simulated time"
