"""Cells over workers: the same table whatever dies on the way, and nothing done twice."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray

from diffprune.core.record import Cell, Prediction, Provenance
from diffprune.distributed import start, sweep
from diffprune.distributed.worker import Worker
from diffprune.evaluate import Evaluation, Evaluator, cells
from diffprune.models._load import load
from diffprune.store import Store

PROVENANCE = Provenance("test", 1, "", False, "{}", "{}", 0, "2026-01-01T00:00:00Z")


@pytest.fixture(scope="module")
def asked() -> list[Cell]:
    options = Evaluation(benchmarks=("world('pope')", "world('gqa')"), batch=16)
    return cells(load("embedded"), ["none", "random", "attention"], ["Keep(16)"], options)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with start.connect(workers=2):
        yield


def table(root: Path) -> list[tuple[object, ...]]:
    frame = Store(root).read("predictions")
    assert not frame.duplicated(["cell", "sample"]).any()
    return sorted(frame[["cell", "sample", "answer", "credit", "visual_kept", "error"]].itertuples(index=False, name=None))


def test_a_killed_worker_changes_nothing(cluster: None, asked: list[Cell], own_folder: Path, monkeypatch, capsys) -> None:
    alone, stormy = Store(own_folder / "alone"), Store(own_folder / "stormy")
    evaluator = Evaluator(load("embedded"))
    for cell in asked:
        alone.publish({"predictions": evaluator.run(cell)}, cell=cell, provenance=PROVENANCE)
    victim, killed = asked[1].key, own_folder / "killed"

    class Mortal(Worker):
        """Is killed once, when one cell's work is done and nobody knows of it yet."""

        def run(self, cell: Cell) -> tuple[list[Prediction], float]:
            found = super().run(cell)
            if cell.key == victim and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return found

    monkeypatch.setattr(sweep, "Worker", Mortal)
    found = sweep.sweep(asked, stormy.root, PROVENANCE, workers=2, model="embedded")
    assert killed.exists() and (found.done, found.skipped, found.deaths) == (6, 0, 1)
    assert table(stormy.root) == table(alone.root), "one process, two workers and a dead one give the same rows"
    assert {cell.key for cell in asked} == stormy.done()
    assert len(found.idle_s) == 2 and "6/6 cells" in capsys.readouterr().out

    monkeypatch.setattr(sweep, "connect", lambda *_: pytest.fail("nothing is missing, Ray must not be asked for"))
    again = sweep.sweep(asked, stormy.root, PROVENANCE, workers=2, model="no model of this name")
    assert (again.done, again.skipped) == (0, 6)


def test_a_cell_that_kills_or_fails_does_not_stop_the_others(
    cluster: None, asked: list[Cell], own_folder: Path, monkeypatch
) -> None:
    class Deadly:
        """Dies of one cell, raises on another."""

        def prepare(self, model: str) -> int:
            return os.getpid()

        def run(self, cell: Cell) -> tuple[list[Prediction], float]:
            if cell.pruner == "random":
                os.kill(os.getpid(), signal.SIGKILL)
            if cell.pruner == "attention":
                raise ValueError("not today")
            return [], 0.0

    monkeypatch.setattr(sweep, "Worker", Deadly)
    some = [cell for cell in asked if "pope" in cell.benchmark]
    with pytest.raises(sweep.SweepFailed, match="2 of 3 cells failed"):
        sweep.sweep(some, own_folder, PROVENANCE, workers=1, model="tiny")
    outcomes = Store(own_folder).read("outcomes").set_index("pruner")
    assert outcomes["status"].to_dict() == {"none": "ok", "random": "failed", "attention": "failed"}
    assert outcomes["reason"]["attention"] == "ValueError: not today"
    assert outcomes["reason"]["random"].startswith("the worker died 3 times")
    assert Store(own_folder).done() == {c.key for c in some if c.pruner == "none"}, "what failed is tried again by the next run"


def test_a_user_s_mistake_comes_back_as_itself(cluster: None, asked: list[Cell], own_folder: Path, monkeypatch) -> None:
    class Picky:
        def prepare(self, model: str) -> int:
            raise ValueError(f"no model {model!r}")

    monkeypatch.setattr(sweep, "Worker", Picky)
    with pytest.raises(ValueError, match=r"^no model '\./nowhere'$"):
        sweep.sweep(asked, own_folder, PROVENANCE, workers=1, model="./nowhere")
    with pytest.raises(ValueError, match="at least 1"):
        sweep.sweep(asked, own_folder, PROVENANCE, workers=0, model="embedded")
    with pytest.raises(ValueError, match="not to measure"):
        sweep.sweep([replace(asked[0], verb="measure")], own_folder, PROVENANCE, workers=1, model="embedded")


def test_exclusive_has_the_host_to_itself(cluster: None) -> None:
    def alone(word: str, *, twice: bool) -> tuple[float, int, str]:
        return ray.get_runtime_context().get_assigned_resources()["CPU"], os.getpid(), word * (1 + twice)

    cores, pid, word = sweep.exclusive(alone, "so", twice=True)
    assert cores == ray.cluster_resources()["CPU"] and pid != os.getpid() and word == "soso"
    with pytest.raises(ZeroDivisionError):
        sweep.exclusive(lambda: 1 / 0)


def test_every_port_listens_on_loopback_only(cluster: None) -> None:
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = {c.laddr.ip.removeprefix("::ffff:") for p in family for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert found == {"127.0.0.1"}


def test_the_longest_cells_come_first(asked: list[Cell]) -> None:
    assert max(asked, key=sweep.weight).pruner == "none"


def test_the_token_is_made_once_and_closed_to_others(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = own_folder / "secret" / "token"
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    with pytest.raises(ValueError, match="no token"):
        start.secure(create=False)
    start.secure()
    token = path.read_text()
    assert len(token) == 64 and path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    start.secure()
    assert path.read_text() == token and path.stat().st_mode & 0o777 == 0o600


def test_an_address_in_the_shell_is_not_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(start.INSIDE_A_JOB, raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert start.joined(None) == "local"
    assert start.joined("10.0.0.2:6379") == "10.0.0.2:6379"
    monkeypatch.setenv(start.INSIDE_A_JOB, "{}")
    assert start.joined(None) == "10.0.0.1:6379"
