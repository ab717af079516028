"""Cells over workers: the same table whatever dies on the way, and nothing done twice."""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from diffprune.core.budget import Keep
from diffprune.core.cell import Cell
from diffprune.core.records import Outcome, Prediction
from diffprune.core.spec import Spec
from diffprune.distributed import cluster, sweep
from diffprune.distributed import measure as measuring
from diffprune.distributed.exclusive import exclusive
from diffprune.distributed.worker import Worker
from diffprune.evaluate import progress
from diffprune.evaluate.cells import Evaluation, cells
from diffprune.evaluate.evaluator import Evaluator, evaluated
from diffprune.evaluate.progress import SweepProgress
from diffprune.evaluate.schedule import Batch, ListBatches, Work, weight
from diffprune.evaluate.transformers_backend import TransformersBackend
from diffprune.io.shared_storage import Proof
from diffprune.measure.measure import Measured
from diffprune.store import Store
from diffprune.store.writer import Writer
from diffprune.timing.options import Measurement
from diffprune.vlm.load import load
from tests.blob_stores import MemoryBlobs
from tests.records import evaluate_cell, measure_cell, prediction, provenance
from tests.sockets import listening

METRICS_MS = "RAY_metrics_report_interval_ms"
PROVENANCE, EMBEDDED = provenance(), Spec("embedded")


@pytest.fixture(scope="module")
def asked() -> list[Cell]:
    options = Evaluation(benchmarks=("world('pope')", "world('gqa')"), limit=96, batch=16)
    return cells(load("embedded"), [Spec(name) for name in ("unpruned", "random", "attention")], [Keep(16)], options)


def about(name: str, **changed: Any) -> Cell:
    """A question about a benchmark nobody opens."""
    cell = evaluate_cell(**changed)
    return replace(cell, subject=replace(evaluated(cell), questions=replace(evaluated(cell).questions, benchmark=Spec(name))))


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    os.environ[METRICS_MS] = "500"
    here = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(here)  # workers cannot import a test
    with cluster.connect(workers=2):
        yield
    ray.cloudpickle.unregister_pickle_by_value(here)
    del os.environ[METRICS_MS]


def exported(run: str) -> dict[tuple[str, ...], float]:
    """What Prometheus would read of a run, and of the caches: {(name, label ...): sum over processes}."""
    (node,) = ray.nodes()
    assert node["NodeManagerAddress"] == "127.0.0.1"
    text = urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10).read().decode()
    found: Counter[tuple[str, ...]] = Counter()
    for name, labels, value in re.findall(r"^(ray_diffprune\w+){(.*)} (\S+)$", text, re.MULTILINE):
        told = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if told.get("run", run) == run:
            found[name, *(told[key] for key in ("stage", "status", "cache") if key in told)] += float(value)  # type: ignore[assignment]
    return dict(found)


def table(root: Path) -> list[tuple[object, ...]]:
    frame = Store(root).read("predictions")
    assert not frame.duplicated(["cell", "sample"]).any()
    return sorted(frame[["cell", "sample", "answer", "credit", "visual_kept", "error"]].itertuples(index=False, name=None))


@pytest.mark.slow
def test_a_killed_worker_costs_one_batch(session: None, asked: list[Cell], own_folder: Path, monkeypatch, capsys) -> None:
    alone, stormy = Store(own_folder / "alone"), Store(own_folder / "stormy")
    evaluator = Evaluator(TransformersBackend(load("embedded")))
    for cell in asked:
        alone.publish({"predictions": evaluator.run(cell)}, cell=cell, provenance=PROVENANCE)
    killed, calls = own_folder / "killed", own_folder / "calls"
    batches = {cell: evaluator.batches(cell) for cell in asked}
    victim = asked[1].key, batches[asked[1]][len(batches[asked[1]]) // 2][0]

    class Mortal(Worker):
        """Is killed once, when one batch's work is done and nobody knows of it yet."""

        def answer(self, cell: Cell, index: Sequence[int]) -> tuple[dict[int, Prediction], float]:
            with calls.open("a") as file:
                file.write(f"{cell.key} {min(index)}\n")
            found = super().answer(cell, index)
            if (cell.key, index[0]) == victim and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return found

    monkeypatch.setattr(sweep, "Worker", Mortal)
    found = sweep.sweep(asked, stormy.blobs, PROVENANCE, workers=2, model=EMBEDDED)
    assert killed.exists() and (found.done, found.skipped, found.deaths) == (6, 0, 1)
    assert table(stormy.blobs) == table(alone.blobs), "one process, two workers and a dead one give the same rows"
    assert {cell.key for cell in asked} == stormy.done()
    begun = Counter(calls.read_text().splitlines())
    assert set(begun) == {f"{cell.key} {min(index)}" for cell in asked for index in batches[cell]}
    repeated = Counter(begun) - Counter(dict.fromkeys(begun, 1))
    assert list(repeated.values()) == [1] and next(iter(repeated)).startswith(victim[0]), "one batch, once more"
    assert len(found.idle_s) == 2 and "6/6 cells" in capsys.readouterr().out
    until = time.monotonic() + 60
    told = exported(PROVENANCE.run)
    while told.get(("ray_diffprune_cells_total", "evaluate", "ok")) != 6 and time.monotonic() < until:
        time.sleep(0.2)
        told |= exported(PROVENANCE.run)  # a gauge that nobody sets again is exported once
    questions = sum(len(index) for cell in asked for index in batches[cell])
    assert told["ray_diffprune_cells_total", "evaluate", "ok"] == 6 and told["ray_diffprune_workers_lost_total", "evaluate"] == 1
    assert told["ray_diffprune_examples_total", "evaluate"] == questions
    assert told["ray_diffprune_kept_tokens", "evaluate"] in (16, 144) and 0 <= told["ray_diffprune_idle_share", "evaluate"] < 1
    assert told["ray_diffprune_cache_hits_total", "images"] > 0 < told["ray_diffprune_cache_misses_total", "images"]

    monkeypatch.setattr(sweep, "connect", lambda *_: pytest.fail("nothing is missing, Ray must not be asked for"))
    again = sweep.sweep(asked, stormy.blobs, PROVENANCE, workers=2, model=Spec("no model of this name"))
    assert (again.done, again.skipped) == (0, 6)


def row(number: int, error: str = "") -> Prediction:
    """A graded answer that nobody gave."""
    return prediction(number, error=error, generated_tokens=0 if error else 1)


class Sleepy:
    """No model: questions of very unequal length, known in advance."""

    def prepare(self, model: Spec, methods: Sequence[Spec], storage: Proof | None = None) -> int:
        return os.getpid()

    def batches(self, cell: Cell) -> tuple[list[list[int]], float]:
        return [[i] for i in range(30)], 0.0

    def answer(self, cell: Cell, index: Sequence[int]) -> tuple[dict[int, Prediction], float]:
        start = time.perf_counter()
        time.sleep(0.2 if index[0] % 10 == 9 else 0.07)
        return {i: row(i, "OSError: no such image" if i < 3 else "") for i in index}, time.perf_counter() - start


@pytest.mark.slow
def test_two_workers_share_one_cell_to_its_end(session: None, asked: list[Cell], own_folder: Path, monkeypatch) -> None:
    """The unit of work is a batch, so neither rests while the other has a queue. Rows that failed are counted in the outcome."""

    class Punctual(Sleepy):
        """Is ready when the other one is, however long processes take to start."""

        def prepare(self, model: Spec, methods: Sequence[Spec], storage: Proof | None = None) -> int:
            (own_folder / f"ready-{os.getpid()}").touch()
            while len(list(own_folder.glob("ready-*"))) < 2:
                time.sleep(0.01)
            return os.getpid()

    monkeypatch.setattr(sweep, "Worker", Punctual)
    found = sweep.sweep([asked[0]], own_folder / "store", PROVENANCE, workers=2, model=EMBEDDED)
    assert len(found.busy_s) == 2 and min(found.busy_s) > 0, "both took batches of the one cell"
    outcomes = Store(own_folder / "store").read("outcomes")
    assert outcomes[["status", "reason", "rows"]].values.tolist() == [["ok", "3 of 30 answers failed", 30]]


@pytest.mark.trial(2)
def test_a_place_where_every_process_dies_while_loading_is_left_out(
    session: None, asked: list[Cell], own_folder: Path, monkeypatch, capsys
) -> None:
    """The other one works on; where none is left, the run ends."""

    class Unlucky(Sleepy):
        """Dies while it loads, but for one process, which is ready last."""

        def prepare(self, model: Spec, methods: Sequence[Spec], storage: Proof | None = None) -> int:
            try:
                (own_folder / "lucky").touch(exist_ok=False)
            except FileExistsError:
                (own_folder / f"dead-{os.getpid()}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            while len(list(own_folder.glob("dead-*"))) < 3:
                time.sleep(0.01)
            return os.getpid()

    monkeypatch.setattr(sweep, "Worker", Unlucky)
    found = sweep.sweep([asked[0]], own_folder / "store", PROVENANCE, workers=2, model=EMBEDDED)
    assert (found.done, found.deaths, len(found.busy_s)) == (1, 3, 1)
    assert "a worker is left out, its process died 3 times while it loaded" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="workers die while they load embedded"):
        sweep.sweep([asked[1]], own_folder / "store", PROVENANCE, workers=1, model=EMBEDDED)


@pytest.mark.slow
def test_a_cell_that_kills_or_fails_does_not_stop_the_others(
    session: None, asked: list[Cell], own_folder: Path, monkeypatch
) -> None:
    class Deadly(Sleepy):
        """Dies of one batch of one cell, raises on another cell, cannot read a benchmark, answers nothing of a fourth cell."""

        def batches(self, cell: Cell) -> tuple[list[list[int]], float]:
            if cell.benchmark_label == "GQA":
                raise ValueError("the data have changed")
            return [[0, 1], [2]], 0.0

        def answer(self, cell: Cell, index: Sequence[int]) -> tuple[dict[int, Prediction], float]:
            if cell.method.label == "Random" and list(index) == [2]:
                os.kill(os.getpid(), signal.SIGKILL)
            if cell.method.label == "Attention":
                raise ValueError("not today")
            return {i: row(i, "OSError: no such image" if cell.method.label == "No image" else "") for i in index}, 0.0

    monkeypatch.setattr(sweep, "Worker", Deadly)
    blind = evaluate_cell(benchmark="world('pope')", blind=True)
    with pytest.raises(sweep.SweepFailed, match="6 of 7 cells failed"):
        sweep.sweep([*asked, blind], own_folder, PROVENANCE, workers=1, model=EMBEDDED)
    outcomes = Store(own_folder).read("outcomes")
    pope = outcomes[outcomes["benchmark_label"] == "POPE"].set_index("method")
    assert pope["status"].to_dict() == {"Unpruned": "ok", "Random": "failed", "Attention": "failed", "No image": "failed"}
    assert pope["reason"]["Attention"] == "ValueError: not today"
    assert pope["reason"]["Random"].startswith("the worker died 3 times")
    assert pope["reason"]["No image"].startswith("RuntimeError: all 3 questions")
    gqa = outcomes[outcomes["benchmark_label"] == "GQA"]
    assert set(gqa["reason"]) == {"ValueError: the data have changed"} and len(gqa) == 3
    assert Store(own_folder).done() == {asked[0].key}, "what failed is tried again by the next run"


def named(cell: Cell) -> str:
    """The benchmark a cell is about."""
    return evaluated(cell).questions.benchmark.name


@dataclass
class Simulated:
    """Workers in simulated time over `Work`: what each was given, in order, and how the time went."""

    work: Work
    sizes: dict[str, int]  # questions of a benchmark
    workers: int
    cost: Callable[[Cell, int], float]
    deaths: dict[int, int] = field(default_factory=dict)  # number of a piece of work -> worker dies of it
    given: list[tuple[int, Batch]] = field(default_factory=list)
    busy: Counter[int] = field(default_factory=Counter)
    most_held: int = 0

    def batches(self, cell: Cell) -> list[list[int]]:
        size, batch = self.sizes[named(cell)], evaluated(cell).batch
        return [list(range(i, min(i + batch, size))) for i in range(0, size, batch)]

    def run(self) -> dict[Cell, dict[int, Prediction]]:
        """Until all is answered. As the driver does: something for those who have nothing, then, if there is plenty, one ahead."""
        queues: dict[int, deque[ListBatches | Batch]] = {worker: deque() for worker in range(self.workers)}
        ends, now, found, pieces = dict[int, float](), 0.0, dict[Cell, dict[int, Prediction]](), 0
        while self.work.unfinished:
            for worker, queue in sorted(queues.items(), key=lambda item: len(item[1])):
                if not queue or (len(queue) == 1 and isinstance(queue[0], Batch) and self.work.plenty):
                    piece = self.work.next(worker)
                    if piece:
                        queue.append(piece)
                assert queue or not self.work.waiting, "a worker rests while there is a batch to answer"
                if queue and worker not in ends:
                    ends[worker] = now + self.begin(worker, queue[0])
            worker = min(ends, key=lambda one: ends[one])
            now, piece, pieces = ends.pop(worker), queues[worker].popleft(), pieces + 1
            if self.deaths.get(pieces):
                for lost in [*reversed(queues[worker]), piece]:
                    self.work.returned(worker, lost)
                queues[worker].clear()
            elif isinstance(piece, ListBatches):
                self.work.listed(piece, self.batches(piece.cell))
            elif complete := self.work.answered(piece, {i: row(i) for i in piece.index}):
                found[piece.cell] = complete
            self.most_held = max(self.most_held, self.work.held_rows)
        return found

    def begin(self, worker: int, piece: ListBatches | Batch) -> float:
        seconds = 0.5 if isinstance(piece, ListBatches) else self.cost(piece.cell, piece.number)
        self.busy[worker] += seconds
        if isinstance(piece, Batch):
            self.given.append((worker, piece))
        return seconds


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("deadly", [False, True])
def test_nobody_rests_while_a_batch_is_left(workers: int, deadly: bool) -> None:
    """Benchmarks of very unequal size, methods and batches of very unequal cost, workers that die now and then."""
    rng = random.Random(workers)
    sizes = {"a": 1, "b": 70, "c": 333, "d": 5}
    cells = [
        about(name, asked=f"random(seed={seed})", budget=f"Keep({keep})", batch=4)
        for name, seed, keep in product(sizes, range(3), (8, 64, 500))
    ]
    deaths = {piece: 1 for piece in range(3, 900, 41)} if deadly else {}
    cost = {(cell, number): rng.choice([0.1, 1.0, 9.0]) for cell in cells for number in range(90)}
    held = 2000
    simulated = Simulated(Work(cells, workers, held), sizes, workers, lambda cell, number: cost[cell, number], deaths)
    found = simulated.run()
    assert {cell: set(rows) for cell, rows in found.items()} == {cell: set(range(sizes[named(cell)])) for cell in cells}
    given = Counter((piece.cell.key, piece.number) for _, piece in simulated.given)
    assert given.total() - len(given) <= len(deaths), "only what died with a worker is handed out again"
    assert simulated.most_held <= max(held, workers * 333) + workers * 70
    if not deadly:
        assert max(simulated.busy.values()) - min(simulated.busy.values()) <= 2 * 9.0 + 0.5, "as even as the longest batches allow"


UNREACHED, DIED = ActorUnavailableError("no answer", None), ActorDiedError()


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ([UNREACHED] * 7 + [DIED] * sweep.TRIES, "the worker died 3 times"),
        ([UNREACHED] * 24, "the worker was out of reach again and again"),
    ],
)
def test_deaths_count_against_a_batch_and_calls_that_do_not_get_through_hardly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: list[RayError], words: str
) -> None:
    """A call that does not get through is hardly the fault of what it asks, three deaths are; nor is it asked for ever."""
    monkeypatch.setattr(sweep.ray, "kill", lambda _: None)
    made, calls = [about("a", asked=f"random(seed={seed})", batch=1) for seed in range(2)], list[Any]()
    with SweepProgress(made, 0) as shown, Writer(Store(tmp_path), PROVENANCE) as writer:
        going = sweep._Run(EMBEDDED, made, 1, shown, writer)
        going.work = Work(made, 1)
        for error in lost:
            slot, answer = sweep._Slot(0, actor="made up"), Future[Any]()
            piece = going.work.next(0)
            answer.set_exception(error)
            slot.asked.append((answer, piece))
            going.running[answer] = slot
            assert not going.failed
            calls.append(piece)
            going._collect(slot)
    assert len({piece.name for piece in calls}) == 1 and going.deaths == len(lost)
    assert [reason.partition(",")[0] for reason in going.failed.values()] == [words] * 2, "both need its list"


def test_an_image_stays_with_the_worker_that_encoded_it() -> None:
    """Equal batches: each batch is answered by one worker for all cells, except at the end of a benchmark; then by two."""
    cells = [about(name, asked=f"random(seed={seed})", batch=10) for name, seed in product("ab", range(6))]
    simulated = Simulated(Work(cells, 2), {"a": 200, "b": 400}, 2, lambda cell, number: 1.0)
    simulated.run()
    seen = {(worker, named(piece.cell), piece.number) for worker, piece in simulated.given}
    assert len(seen) - len({entry[1:] for entry in seen}) <= 2
    assert len({worker for worker, name, _ in seen if name == "a"}) == 1 or len({w for w, name, _ in seen if name == "b"}) == 1


def test_a_user_s_mistake_comes_back_as_itself(session: None, asked: list[Cell], own_folder: Path, monkeypatch) -> None:
    class Picky:
        def prepare(self, model: Spec, methods: Sequence[Spec], storage: Proof | None = None) -> int:
            raise ValueError(f"no model {str(model)!r}")

    monkeypatch.setattr(sweep, "Worker", Picky)
    with pytest.raises(ValueError, match=r"^no model '\./nowhere'$"):
        sweep.sweep(asked, own_folder, PROVENANCE, workers=1, model=Spec("./nowhere"))
    with pytest.raises(ValueError, match="at least 1"):
        sweep.sweep(asked, own_folder, PROVENANCE, workers=0, model=EMBEDDED)
    with pytest.raises(ValueError, match="not to measure"):
        sweep.sweep([measure_cell()], own_folder, PROVENANCE, workers=1, model=EMBEDDED)


@pytest.mark.slow
def test_every_session_is_timed_by_a_process_of_its_own(session: None, own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [measure_cell(batch=size, session=number) for number in (0, 1) for size in (1, 2)]

    def told(model: Spec, left: list[Cell], options: Measurement, storage: None) -> Iterator[dict[Cell, Measured]]:
        yield {}
        for one in left:
            yield {one: Measured([], [], Outcome("ok", "", 0, float(os.getpid())))}

    monkeypatch.setattr(measuring, "timed", told)
    store = Store(own_folder / "store")
    measuring.measure(cells, Measurement(sessions=2), store, PROVENANCE, model=EMBEDDED)
    spent = store.read("outcomes").set_index("cell")["seconds"]
    first, second = ({spent[cell.key] for cell in cells if cell.subject.seed == number} for number in (0, 1))  # type: ignore[union-attr]
    assert len(first) == len(second) == 1 and first != second


@pytest.mark.slow
def test_exclusive_has_the_host_to_itself(session: None) -> None:
    def alone(word: str, *, twice: bool) -> Iterator[tuple[float, int, str]]:
        yield ray.get_runtime_context().get_assigned_resources()["CPU"], os.getpid(), word * (1 + twice)

    ((cores, pid, word),) = exclusive(alone, "so", twice=True)
    assert cores == ray.cluster_resources()["CPU"] and pid != os.getpid() and word == "soso"

    def broken() -> Iterator[int]:
        yield 1
        yield 1 // 0

    found = exclusive(broken)
    assert next(found) == 1
    with pytest.raises(ZeroDivisionError):
        next(found)


@pytest.mark.trial(10)
def test_measuring_goes_on_where_its_process_died(
    session: None, own_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was timed before is in the store, and is not timed again; cells of which every process dies are given up, and not those
    after them. Where every process dies before it can time anything, the run ends."""
    cells = [measure_cell(batch=size) for size in (1, 2, 3)]
    marks = own_folder / "marks"
    marks.mkdir()

    def dying(model: Spec, left: list[Cell], options: Measurement, storage: None) -> Iterator[dict[Cell, Measured]]:
        if model.name != "none":
            yield {}
        for one in left:
            if one.columns().batch == 2 and len(list(marks.iterdir())) < dict(model.options).get("deaths", 99):
                (marks / f"{time.time_ns()}").touch()
                time.sleep(1)  # for the driver to have what was measured before, which dies with who holds it
                os.kill(os.getpid(), signal.SIGKILL)
            yield {one: Measured([], [], Outcome("ok", "", 0, float(os.getpid())))}

    monkeypatch.setattr(measuring, "timed", dying)
    store = Store(own_folder / "store")
    measuring.measure(cells, Measurement(), store, PROVENANCE, model=Spec("mortal", (("deaths", 2),)))
    assert store.done() == {one.key for one in cells} and len(list(marks.iterdir())) == 2
    spent = store.read("outcomes")["seconds"].tolist()
    assert len(spent) == 3 and len(set(spent)) == 2, "the first by the first process, the rest by the last"
    said = capsys.readouterr().out
    assert said.count("another measures the") == 2
    assert [line.split(",")[0] for line in said.splitlines() if "cells, " in line] == [f"measure: {n}/3 cells" for n in (1, 2, 3)]
    other = Store(own_folder / "other")
    with pytest.raises(sweep.SweepFailed, match=r"1 of 3 cells could not be measured; first .* died 3 times in a row"):
        measuring.measure(cells, Measurement(), other, PROVENANCE, model=Spec("mortal"))
    assert other.done() == {cells[0].key, cells[2].key}
    with pytest.raises(RuntimeError, match="died 3 times in a row"):
        measuring.measure(cells[1:], Measurement(), store, PROVENANCE, model=Spec("none"))


def test_what_a_raylet_says_of_a_lost_worker_is_one_line(session: None, capsys: pytest.CaptureFixture[str]) -> None:
    dead = (
        "A worker died or was killed while executing a task by an unexpected system error. To troubleshoot the problem, check the "
        "logs for the dead worker. Lease ID: 07 Worker ID: 9e Node ID: 32 Worker IP address: 127.0.0.1 Worker port: 43441 Worker "
        "PID: 31301 Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits. End of file. Some causes: "
    )
    full = "2 Workers (tasks / actors) killed due to memory pressure (OOM) at node (ID: 32, IP: 10.0.0.1). To see more, use logs."
    ray._private.worker.print_to_stdstream({"lines": [dead, full], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    assert capsys.readouterr().out.splitlines() == [
        "ray: A worker died or was killed while executing a task by an unexpected system error (process 31301 of 127.0.0.1)",
        "ray: 2 Workers (tasks / actors) killed due to memory pressure (OOM) at node (ID: 32, IP: 10.0.0.1)",
    ]


def test_every_port_listens_on_loopback_only(session: None) -> None:
    assert {address for address, _ in listening(psutil.Process())} == {"127.0.0.1"}


def test_a_store_that_is_open_is_not_read_again(capsys: pytest.CaptureFixture[str]) -> None:
    """Who has asked what is done hands the store on: nothing is read twice, and what was published since is read alone."""

    class Counting(MemoryBlobs):
        reads = 0

        def read(self, key: str) -> bytes:
            self.reads += 1
            return super().read(key)

    blobs = Counting()
    cells = [about("one", asked=f"random(seed={seed})") for seed in range(4)]
    other, mine = Store(blobs), Store(blobs)
    for cell in cells[:3]:
        other.publish({"outcomes": [Outcome("ok", "", 1, 0.0)]}, cell=cell, provenance=PROVENANCE)
    blobs.reads = 0
    assert len(mine.done()) == 3 and blobs.reads == 6, "three manifests and their parts"
    assert sweep.sweep(cells[:3], mine, PROVENANCE, workers=1, model=EMBEDDED).skipped == 3 and blobs.reads == 6
    other.publish({"outcomes": [Outcome("ok", "", 1, 0.0)]}, cell=cells[3], provenance=PROVENANCE)
    assert sweep.sweep(cells, mine, PROVENANCE, workers=1, model=EMBEDDED).skipped == 4 and blobs.reads == 8


def test_the_longest_cells_come_first(asked: list[Cell]) -> None:
    assert max(asked, key=weight).method.label == "Unpruned"
    work = Work([about("short", limit=10), *asked], workers=1)
    order = []
    while work.unfinished:
        piece = work.next(0)
        if isinstance(piece, ListBatches):
            work.listed(piece, [[0], [1]])
        elif piece:
            order.append((named(piece.cell), piece.number, piece.cell.method.label))
            work.answered(piece, {i: row(i) for i in piece.index})
    assert order[0][1:] == (1, "Unpruned"), "the unpruned model and the longest questions first"
    assert [number for _, number, _ in order[:6]] == [1, 1, 1, 0, 0, 0], "a batch goes through all methods before the next"
    assert [name for name, _, _ in order[-2:]] == ["short", "short"]


def test_the_time_left_follows_questions_and_weights(capsys) -> None:
    cells = [about("one"), about("other")]
    told: list[str] = []
    shown = progress.SweepProgress(cells, skipped=3, tell=told.append)
    assert shown.share() == 0
    shown.listed(cells[0], 3000)
    shown.batch(cells[0], 1500)
    assert shown.share() == pytest.approx(1500 / 4000), "a benchmark nobody has opened counts 1000 questions"
    assert shown.first and shown.left(shown.first[0] + 10) == "", "one batch tells no pace: the model was loaded before it"
    shown.batch(cells[0], 500)
    assert shown.left(shown.first[0] + 10) == ", about 40 s left", "500 of 4000 took 10 s, 2000 are left"
    for cell in cells:
        shown.cell(cell)
    assert shown.share() == 1 and "5/5 cells, 2 batches" in capsys.readouterr().out
    assert told[-1].startswith("5/5 cells, 2 batches"), "who watches hears the same"


def test_the_token_is_made_once_and_closed_to_others(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = own_folder / "secret" / "token"
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    with pytest.raises(ValueError, match="no token"):
        cluster.secure(create=False)
    cluster.secure()
    token = path.read_text()
    assert len(token) == 64 and path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    cluster.secure()
    assert path.read_text() == token and path.stat().st_mode & 0o777 == 0o600


def test_an_address_in_the_shell_is_not_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cluster.INSIDE_A_JOB, raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster.joined(None) == "local"
    assert cluster.joined("10.0.0.2:6379") == "10.0.0.2:6379"
    monkeypatch.setenv(cluster.INSIDE_A_JOB, "{}")
    assert cluster.joined(None) == "10.0.0.1:6379"
