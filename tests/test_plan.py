"""What a job would cost: hours from measured rates by an obvious sum, and every figure says whether it was measured."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffprune.benchmarks.world import World
from diffprune.cli import commands
from diffprune.core.benchmark import Sample
from diffprune.core.cell import Cell
from diffprune.core.records import Outcome
from diffprune.core.spec import Spec
from diffprune.evaluate import cells as evaluation
from diffprune.job import cost
from diffprune.job.files import load_job
from diffprune.job.plan import Plan
from diffprune.measure import measure as measuring
from diffprune.store import Store
from diffprune.vlm.load import load
from tests.records import evaluate_cell, measure_cell, prediction, provenance

H100, A100 = (json.dumps({"cpu": "x", "gpus": [f"NVIDIA {kind}"]}) for kind in ("H100 80GB", "A100"))


def asked(pruner: str, keep: int) -> Cell:
    return evaluate_cell(pruner, budget=f"Keep({keep})", limit=50)


def timed(root: Path, hardware: str, seconds: dict[tuple[str, int], tuple[int, float]]) -> None:
    """A store in which cells of these methods and budgets had so many answers in so many seconds."""
    for (pruner, keep), (rows, took) in seconds.items():
        found = {"predictions": [prediction(i) for i in range(rows)], "outcomes": [Outcome("ok", "", rows, took)]}
        Store(root).publish(found, cell=asked(pruner, keep), provenance=provenance(hardware=hardware))


def plan(root: Path, cells: list[Cell], workers: int = 4, timings: int = 0) -> Any:
    job = SimpleNamespace(name="look", workers=workers, train=None, search=None)
    stages = {"evaluate": cells, "measure": [measure_cell(batch=1 + i) for i in range(timings)], "tune": []}
    return SimpleNamespace(job=job, store=Store(root), cells=lambda stage: stages[stage])


@pytest.fixture(autouse=True)
def fifty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "made_ready", lambda questions: SimpleNamespace(samples=range(questions.limit)))


def test_hours_are_the_sum_over_cells(tmp_path: Path) -> None:
    timed(tmp_path, H100, {("random", 8): (10, 2.0), ("random", 16): (20, 6.0), ("grid", 8): (10, 7.0)})
    cells = [asked("random", 8), *(asked(name, keep) for name in ("random(seed=1)", "attention") for keep in (8, 16))]
    rates = cost.read(tmp_path, None)
    told = "\n".join(cost.lines(plan(tmp_path, cells, timings=2), ("evaluate", "measure"), rates))
    rate = {"random 8": 2.0 / 10, "random 16": 6.0 / 20}
    total = 50 * (rate["random 8"] + rate["random 16"] + 2 * 15.0 / 40)  # one is done; attention was never timed: the mean
    assert "evaluate: 5 cells, 1 done, 4 to do" in told and "200 answers, counted" in told
    assert f"{total:,.3g} s of NVIDIA H100 80GB: 50% of the answers at the measured rate" in told
    assert f"{total / 4:,.3g} s on the clock: assumed that work is shared evenly" in told
    assert "bytes an answer (measured)" in told and "20 files at most" in told
    assert "measure: 2 cells, 0 done, 2 to do" in told and "has no cell to measure" in told


def test_without_rates_hours_are_not_told() -> None:
    told = "\n".join(cost.lines(plan(Path("nothing"), [asked("grid", 8)]), ("evaluate",), None))
    assert "no rates" in told and "(assumed)" in told and " s of " not in told and " h of " not in told


def test_rates_of_another_model_are_none(tmp_path: Path) -> None:
    timed(tmp_path, H100, {("random", 8): (10, 2.0)})
    other = evaluate_cell("random", budget="Keep(16)", limit=50, on=Spec("owner/other"))
    told = "\n".join(cost.lines(plan(tmp_path, [other]), ("evaluate",), cost.read(tmp_path, "h100")))
    assert "hours unknown" in told and str(other.model) in told


def test_rates_are_of_one_machine_and_say_which(tmp_path: Path) -> None:
    assert cost.own(tmp_path) is None
    timed(tmp_path, H100, {("random", 8): (10, 2.0)})
    with pytest.raises(ValueError, match=r"was measured on NVIDIA H100 80GB, not on 'B200'"):
        cost.read(tmp_path, "B200")
    timed(tmp_path, A100, {("random", 16): (10, 4.0)})
    with pytest.raises(ValueError, match="on NVIDIA A100 and NVIDIA H100 80GB: say with --gpu"):
        cost.read(tmp_path, None)
    assert cost.read(tmp_path, "a100").seconds["seconds"].tolist() == [4.0]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["plan"], "plan needs a job"),
        (["plan", "demo", "--rates", "nowhere"], "nowhere holds no cell that was timed: name the folder of a run"),
        (["plan", "demo", "--workers", "0"], "not in the range"),
    ],
)
def test_mistakes_are_one_sentence(line: list[str], says: str) -> None:
    code, text = commands.call(line)
    assert code == 2 and says in text and "Traceback" not in text


def test_data_are_looked_at_once_however_many_methods_are_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan asks for the cells of every method and seed that is still to be trained; opening data for each took minutes."""
    looked: Counter[str] = Counter()
    samples = World.samples

    def counted(world: World, split: str, limit: int | None = None, protocol: str = "llava") -> list[Sample]:
        looked[world.like] += 1
        return samples(world, split, limit, protocol)

    monkeypatch.setattr(World, "samples", counted)
    monkeypatch.setattr(Plan, "untrained", lambda plan: [(spec, seed) for (spec, seed), _ in plan.job.scorers(plan.folder).items()])
    evaluation._check_split.cache_clear()
    measuring._check.cache_clear()
    job = load_job("zoo")
    plan = Plan(job, tmp_path / "zoo", load(job.model))
    assert job.evaluate and len(plan.cells("evaluate")) > 1000 and len(plan.cells("measure")) > 50
    assert looked.total() <= 2 and len(plan.untrained()) > 20
