"""What a sweep of a million cells over a thousand workers costs its driver: processor time and files, without Ray and a model.

    python jobs/studies/sweep_scale.py --cells 1000000 --workers 1000 --out runs/sweep_scale

Everything of the driver is the real thing: the loop that hands out batches and takes answers, the scheduler, progress, figures, and
the thread that publishes and merges. Workers are simulated: each says in simulated time when it has answered, and all rows of a
question are the same record. The share is processor time, of the loop and the thread that publishes together, over simulated time.

What is assumed: every worker answers `--rate` questions a second. 20 is a 7B model that encodes a picture, prefills it and says a
word in 50 ms; a sweep with batches, pruned prompts and shared prefixes is faster, one with long answers slower, and the share
follows in proportion. What is not in it: what Ray itself costs the driver's process for each batch (a call, an answer unpickled);
`--ray` runs as many cells on a Ray on this machine, with workers that answer at once, to show that the whole holds.
"""

from __future__ import annotations

import argparse
import heapq
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from diffprune.core import registry
from diffprune.core.budget import Keep
from diffprune.core.cell import Cell, EvaluateSpec, Method, Questions
from diffprune.core.records import Prediction
from diffprune.core.spec import Spec
from diffprune.distributed import sweep
from diffprune.distributed.liveness import Watch
from diffprune.evaluate.progress import SweepProgress
from diffprune.store import Store
from diffprune.store.provenance import collect
from diffprune.store.writer import Writer

NAMES = ("pope", "gqa", "mme", "vqav2", "textvqa", "seed", "vizwiz", "scienceqa", "mmbench", "mmbench_cn")
BUDGETS = tuple(Keep(number) for number in (8, 16, 32, 64, 128))


def cells(number: int, limit: int, batch: int) -> list[Cell]:
    """So many cells: seeds of a random rule at five budgets on ten benchmarks."""
    method = Method(label="Random", base="Random", kind="control")
    asked = [Questions(registry.spec("benchmarks", f"world('{name}')"), "r", limit=limit) for name in NAMES]
    found = []
    for i in range(number):
        seed, place = divmod(i, len(NAMES) * len(BUDGETS))
        pruner = Spec("random", (("seed", seed),))
        subject = EvaluateSpec(pruner, BUDGETS[place % len(BUDGETS)], asked[place // len(BUDGETS)], batch)
        found.append(Cell(Spec("embedded"), "float32", subject, replace(method, label="Random"), NAMES[place // len(BUDGETS)]))
    return found


def answers(number: int) -> dict[int, Prediction]:
    """A row for each question, with texts as long as those of a benchmark."""
    return {
        i: Prediction(
            f"sample-{i}", f"picture-{i // 4}", "color", "open", f"What colour has the thing on the left of picture {i}?",
            "A red one", "red", "red", float(i % 2), 576, 64, 40, 4, "",
        )
        for i in range(number)
    }  # fmt: skip


@dataclass
class Fleet:
    """Workers in simulated time, in place of the queue of what has ended. now: seconds; rate: answers per second and worker."""

    questions: int
    batch: int
    rate: float
    now: float = 0.0
    pending: list[tuple[float, int, Future[Any], Any]] = field(default_factory=list)
    number: count[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        self.rows = answers(self.questions)

    def put(self, ended: Future[Any]) -> None:
        """What the loop asks to be called when something ends: it is told by `get`."""

    def get(self, timeout: float) -> Future[Any]:
        """The next that ends; then it is that late."""
        self.now, _, future, value = heapq.heappop(self.pending)
        future.set_result(value)
        return future

    def asked(self, begin: float, seconds: float, value: Any) -> float:
        """Something that takes so long from `begin` on; when it ends."""
        self.last: Future[Any] = Future()
        heapq.heappush(self.pending, (begin + seconds, next(self.number), self.last, value))
        return begin + seconds


class Simulated:
    """One worker of a fleet, with the calls of an actor."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.free = fleet, 0.0
        self.prepare, self.batches, self.answer = (Call(self, made) for made in (self._prepare, self._batches, self._answer))

    def take(self, seconds: float, value: Any) -> Future[Any]:
        """After everything it was asked before."""
        self.free = self.fleet.asked(max(self.fleet.now, self.free), seconds, value)
        return self.fleet.last

    def _prepare(self, model: Spec, methods: Sequence[Spec], storage: None) -> Future[Any]:
        return self.take(10.0, 1)

    def _batches(self, cell: Cell) -> Future[Any]:
        size, batch = self.fleet.questions, self.fleet.batch
        return self.take(0.1, ([list(range(i, min(i + batch, size))) for i in range(0, size, batch)], 0.1))

    def _answer(self, cell: Cell, index: Sequence[int]) -> Future[Any]:
        seconds = len(index) / self.fleet.rate
        return self.take(seconds, ({i: self.fleet.rows[i] for i in index}, seconds))


class Awake(Watch):
    """Nobody hangs."""

    def look(self, *asked: object) -> list[tuple[Any, str]]:
        """No process to look at."""
        return []


@dataclass
class Call:
    """A method of an actor: `remote` gives what has a future."""

    actor: Simulated
    made: Callable[..., Future[Any]]

    def remote(self, *arguments: Any) -> Call:
        """Ask it."""
        self.answer = self.made(*arguments)
        return self

    def future(self) -> Future[Any]:
        """Of what was asked last."""
        return self.answer


def simulated(number: int, workers: int, questions: int, batch: int, rate: float, place: Path) -> dict[str, float]:
    """Sweep once; the figures of the table."""
    begin = time.process_time()
    todo = cells(number, questions, batch)
    for cell in todo:
        assert cell.key
    listed, store, made = time.process_time(), Store(place), collect("sweep_scale", 1, 0)
    fleet = Fleet(questions, batch, rate)
    with SweepProgress(todo, 0) as progress, Writer(store, made) as writer:
        run = sweep._Run(Spec("embedded"), todo, workers, progress, writer)
        run.ended = fleet  # type: ignore[assignment]
        run.over(workers, lambda: Simulated(fleet), lambda actor: None, Awake())
    swept = time.process_time()
    assert len(store.done()) == number == run.done
    known, reader = time.process_time(), Store(place)
    assert len(reader.done()) == number
    cold = time.process_time()
    assert len(reader.done()) == number
    files = [path for path in place.rglob("*") if path.is_file()]
    return {
        "cells": number, "workers": workers, "answers": number * questions, "answers_per_s": number * questions / fleet.now,
        "simulated_s": fleet.now, "driver_cpu_s": swept - listed, "driver_percent": 100 * (swept - listed) / fleet.now,
        "cpu_us_per_answer": 1e6 * (swept - listed) / (number * questions), "cpu_ms_per_cell": 1e3 * (swept - listed) / number,
        "cells_listed_s": listed - begin, "done_cold_s": cold - known, "done_again_s": time.process_time() - cold,
        "files": len(files), "mib": sum(path.stat().st_size for path in files) / 2**20,
        "memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }  # fmt: skip


class Instant:
    """No model: answers at once, what a worker on a Ray of this machine says."""

    def prepare(self, model: Spec, methods: Sequence[Spec], storage: None) -> int:
        """Nothing to load."""
        return 0

    def batches(self, cell: Cell) -> tuple[list[list[int]], float]:
        """As long as the cell's limit says."""
        asked = cell.subject
        assert isinstance(asked, EvaluateSpec) and asked.questions.limit
        size = asked.questions.limit
        return [list(range(i, min(i + asked.batch, size))) for i in range(0, size, asked.batch)], 0.0

    def answer(self, cell: Cell, index: Sequence[int]) -> tuple[dict[int, Prediction], float]:
        """Rows of these questions."""
        rows = answers(max(index) + 1)
        return {i: rows[i] for i in index}, 0.0


def on_ray(number: int, workers: int, questions: int, batch: int, place: Path) -> dict[str, float]:
    """A real sweep over processes of a Ray on this machine."""
    sweep.Worker = Instant  # type: ignore[misc,assignment]
    todo, begin = cells(number, questions, batch), time.process_time()
    found = sweep.sweep(todo, place, collect("sweep_scale", 1, 0), workers=workers, model=Spec("embedded"))
    cpu = time.process_time() - begin
    assert Store(place).done() == {cell.key for cell in todo}
    return {
        "cells": number, "workers": workers, "wall_s": found.wall_s, "driver_cpu_s": cpu, "cpu_ms_per_cell": 1e3 * cpu / number,
        "files": sum(path.is_file() for path in place.rglob("*")),
    }  # fmt: skip


def main() -> None:
    """Sweep, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder that holds no store yet")
    parser.add_argument("--cells", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=64, help="of a cell")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=20.0, help="answers per second and worker")
    parser.add_argument("--ray", action="store_true", help="on a Ray of this machine, with workers that answer at once")
    given = parser.parse_args()
    if given.rate <= 0 or min(*given.cells, given.workers, given.questions, given.batch) < 1:
        parser.error("cells, workers, questions, batch and rate are numbers above 0")
    rows = []
    for number in given.cells:
        place = given.out / f"store-{number}"
        if place.exists():
            parser.error(f"{place} is there already: remove it, or name another folder")
        sizes = given.workers, given.questions, given.batch
        rows.append(on_ray(number, *sizes, place) if given.ray else simulated(number, *sizes, given.rate, place))
        line = ", ".join(f"{name} {value:,.3g}" if value < 1000 else f"{name} {value:,.0f}" for name, value in rows[-1].items())
        print(line, flush=True)
    table = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    table += ["| " + " | ".join(f"{v:,.0f}" if v >= 1000 else f"{v:.3g}" for v in row.values()) + " |" for row in rows]
    (given.out / "README.md").write_text("# " + (__doc__ or "").strip() + "\n\n" + "\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
