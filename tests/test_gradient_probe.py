"""The study of gradients: coherence is the mean of all pairs, the direction filter-normalised, a small run writes its page."""

from __future__ import annotations

import importlib.util
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

pytestmark = pytest.mark.slow

STUDY = Path(__file__).parents[1] / "jobs" / "studies" / "gradient_probe.py"


@pytest.fixture(scope="module")
def study() -> Any:
    spec = importlib.util.spec_from_file_location("gradient_probe", STUDY)
    assert spec and spec.loader
    module = sys.modules["gradient_probe"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_coherence_is_the_mean_cosine_of_all_pairs(study: Any) -> None:
    torch.manual_seed(0)
    units = torch.nn.functional.normalize(torch.randn(5, 40) + 0.5, dim=1)
    assert study.coherence(list(units)) == pytest.approx(sum(float(a @ b) for a, b in combinations(units, 2)) / 10, abs=1e-5)


def test_rows_of_the_direction_are_as_long_as_the_scorers_own(study: Any) -> None:
    weight, bias = torch.randn(7, 5), torch.randn(7)
    step, none = study.direction([weight, bias], 3)
    torch.testing.assert_close(step.norm(dim=1), weight.norm(dim=1))
    assert not none.any() and not torch.equal(step, study.direction([weight, bias], 4)[0])


def test_a_small_run_writes_table_and_figures_and_moves_no_parameter(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "IMAGES", 1)
    monkeypatch.setattr(study, "SETS", 2)
    monkeypatch.setattr(study, "POINTS", study.POINTS[::12])
    along, moved = study.along, []

    def watched(trainer: Any, batch: Any) -> list[float]:
        before = [p.clone() for p in study.scorer(trainer)]
        found: list[float] = along(trainer, batch)
        moved.append(any(not torch.equal(p, q) for p, q in zip(study.scorer(trainer), before, strict=True)))
        assert found[1] == pytest.approx(float(study.loss(trainer, batch, 0).detach()), rel=1e-5), "the middle is the scorer itself"
        return found

    monkeypatch.setattr(study, "along", watched)
    study.main(["--out", str(tmp_path), "--seeds", "1", "--steps", "2"])
    told = pd.read_csv(tmp_path / "table.csv")
    assert moved == [False] * 9 and told["step"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert told[["coherence_draws", "coherence_images"]].abs().le(1).all(axis=None)
    assert (told.loc[told["method"] == "DiffPrune", "roughness"] > 0).all()  # of hard choices it may be 0: nothing changes
    assert (tmp_path / "README.md").read_text().count("| DiffPrune |") == 3
    assert all("<svg" in (tmp_path / name).read_text() for name in ("coherence.svg", "roughness.svg"))
