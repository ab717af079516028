"""How long a training takes to begin, and to go on after a worker was killed; what Ray, a report and a second worker cost.

    python jobs/studies/recovery.py --out reports/recovery       seven minutes on two cores that have nothing else to do

Each round trains the same scorer five times, with as many images and questions a step as a training has by itself: `one`, the
command with one worker; `plain`, the same recipe in a process without Ray; `apart`, two of those at once, which know nothing of
each other: what the machine's second core is worth; `two`, the command with two workers, of which one is killed. All is seen from
outside, by when lines of the step log come; a time from one step to the next holds all that lies between: drawing pictures, the
step, its report, the question whether to end. Steps are compared with the same step of the other training. `blocks` is the
slowest of 99 % of reports of a step, on this disk. Processor time to the first step is that of the driver, of Ray's processes and
of the workers: divided by the machine's cores it is the least that the time to the first step could be, and most of it goes into
importing torch, transformers and Ray, in each process anew.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from diffprune.statistics import median_ratio
from diffprune.store.provenance import collect
from diffprune.train import step_log
from diffprune.train.checkpoints import as_step, read_steps, verified
from diffprune.train.context import LocalContext
from diffprune.train.loop import train
from diffprune.train.recipe import Recipe
from diffprune.vlm.load import load

STEPS, KILLED_AT, REPORTS = 70, 10, 1000
SETTINGS = {
    "seeds": [0], "calibration_images": 2, "validation_images": 2, "checkpoint_every": 5, "validate_every": 0,
    "grad_cosine_every": 0,
}  # fmt: skip
SETTLED = 5  # steps of a process that do not count: caches fill, memory grows
PATIENCE_S = 300.0
LOOK_S = 0.02
GOALS: dict[str, tuple[float, bool]] = {  # (goal, whether it is a least)
    "begins_s": (15.0, False), "goes_on_s": (12.0, False), "blocks_ms": (20.0, False), "ray_ratio": (1.05, False),
    "speed_of_two": (1.7, True),
}  # fmt: skip
SECONDS = ("begins_1_cpu_s", "begins_2_cpu_s", "goes_on_s", "noticed_s", "loaded_s", "blocks_ms")
WORDS = {
    "begins_s": "from the command to the first step",
    "begins_1_cpu_s": "processor time until then, one worker", "begins_2_cpu_s": "processor time until then, two workers",
    "goes_on_s": "from a worker's death to the next step",
    "noticed_s": "until another group runs", "loaded_s": "until that has loaded model and state",
    "blocks_ms": "a report of a step blocks training", "ray_ratio": "a step with Ray's one worker over one without Ray",
    "speed_of_two": "steps of two workers over those of one, in the same time",
    "speed_apart": "steps of two processes without Ray, each with all the work, over those of one, in the same time",
}  # fmt: skip


@dataclass
class Seen:
    """When lines of a step log came, in seconds on one clock.

    groups: (when, its workers) of every group of workers; begins: of every (re)start of the scorer; steps: (when, step).
    """

    groups: list[tuple[float, int]] = field(default_factory=list)
    begins: list[float] = field(default_factory=list)
    steps: list[tuple[float, int]] = field(default_factory=list)

    def hear(self, line: dict[str, Any], now: float) -> None:
        """Sort a line in."""
        if "group" in line:
            self.groups.append((now, line["group"]))
        elif "begin" in line:
            self.begins.append(now)
        elif row := as_step(line):
            self.steps.append((now, row[1].step))


def after(times: Sequence[float], moment: float) -> float:
    """The first of some times after a moment."""
    return min(time for time in times if time > moment)


def phases(seen: Seen, killed: float) -> dict[str, float]:
    """Seconds from a worker's death until others run, have loaded the model, have done a step."""
    group = after([when for when, _ in seen.groups], killed)
    begin = after(seen.begins, group)
    step = after([when for when, _ in seen.steps], begin)
    return {"noticed_s": group - killed, "loaded_s": begin - group, "goes_on_s": step - killed}


def step_ms(seen: Seen) -> dict[int, float]:
    """Milliseconds from the step before to each step of the last (re)start, without its first ones."""
    began = max(seen.begins)
    steps = [(when, step) for when, step in seen.steps if when > began]
    return {step: 1e3 * (when - before) for (before, _), (when, step) in list(pairwise(steps))[SETTLED:]}


def ratio(above: Sequence[dict[int, float]], below: Sequence[dict[int, float]]) -> tuple[float, float, float]:
    """(estimate, low, high) of the times of steps over those of the same steps of the same rounds."""
    rounds = zip(above, below, strict=True)
    pairs = [(one[step], other[step]) for one, other in rounds for step in sorted(one.keys() & other.keys())]
    found = median_ratio(*zip(*pairs, strict=True))
    return found.estimate, found.low, found.high


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, smallest, largest)."""
    return statistics.median(values), min(values), max(values)


class Watched:
    """A training in a process of its own, whose step log is read as it grows."""

    def __init__(self, folder: Path, command: Sequence[str]) -> None:
        self.folder, self.seen, self.begun = folder, Seen(), time.monotonic()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (output := folder.parent / f"{folder.name}.txt").open("wb") as stream:
            self.process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        self.output = output
        self.spent_s = 0.0  # processor time until the first step
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        log, place, running = step_log.opened(self.folder), None, True
        while running:
            running = self.process.poll() is None
            whole, place = log.newer(place)
            now = time.monotonic()
            for line in filter(None, map(verified, whole.splitlines())):
                self.seen.hear(line, now)
            if self.seen.steps and not self.spent_s:
                self.spent_s = processor_s(self.process.pid)
            time.sleep(LOOK_S)

    def until(self, what: Callable[[], bool]) -> None:
        """Wait for something.

        Raises:
            RuntimeError: the training ended before, or it took too long.
        """
        end = time.monotonic() + PATIENCE_S
        while not what():
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise RuntimeError(f"the training ended or hung: {self.output.read_text(errors='replace')[-2000:]}")
            time.sleep(0.01)

    def end(self) -> Seen:
        """Wait for the end of a training that is to succeed."""
        if code := self.process.wait():
            raise RuntimeError(f"the training ended with {code}: {self.output.read_text(errors='replace')[-2000:]}")
        self.reader.join()
        return self.seen


def processor_s(pid: int) -> float:
    """Processor time of a process and all below it, in seconds."""
    total = 0.0
    with suppress(psutil.NoSuchProcess):
        for one in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                total += sum(one.cpu_times()[:2])
    return total


def command(out: Path, name: str, workers: int, steps: int) -> list[str]:
    """What one would type."""
    pairs = [text for key, value in {**SETTINGS, "workers": workers}.items() for text in ("--set", f"train.{key}={value}")]
    head = [sys.executable, "-m", "diffprune", "train", "--name", name, "--out", str(out), "--scorer", "diffprune"]
    return [*head, "--steps", str(steps), *pairs]


def alone(out: Path, name: str) -> list[str]:
    """The recipe of `one` without Ray."""
    return [sys.executable, __file__, "--plain", str(out / name), "--out", str(out / "one")]


def kill_one(training: Watched) -> float:
    """Kill a worker; when."""
    family = psutil.Process(training.process.pid).children(recursive=True)
    victim = [one for one in family if "RayTrainWorker" in " ".join(one.cmdline())][-1]
    victim.send_signal(signal.SIGKILL)
    return time.monotonic()


def recipe_of(folder: Path) -> Recipe:
    """The recipe of a run's scorer."""
    (card,) = folder.glob("scorers/*/config.json")
    return Recipe.model_validate(json.loads(card.read_text())["facts"]["recipe"])


def blocks_ms(folder: Path, source: Path) -> list[float]:
    """Milliseconds that reports of a step take, of a row as a run has them."""
    context, row = LocalContext(folder), next(iter(read_steps(source).values()))[0]
    taken = []
    for _ in range(REPORTS):
        began = time.perf_counter()
        context.report("diffprune-0", row)
        taken.append(1e3 * (time.perf_counter() - began))
    return taken


def once(out: Path, steps: int) -> dict[str, Any]:
    """One round."""
    one = Watched(out / "one", command(out, "one", 1, steps))
    first = one.end()
    plain = Watched(out / "plain", alone(out, "plain")).end()
    apart = [one.end() for one in [Watched(out / name, alone(out, name)) for name in ("apart-0", "apart-1")]]
    two = Watched(out / "two", command(out, "two", 2, steps))
    two.until(lambda: any(step >= KILLED_AT for _, step in two.seen.steps))
    killed = kill_one(two)
    second = two.end()
    reports = sorted(blocks_ms(out / "reports", out / "one"))
    return {
        "begins_s": [watched.seen.steps[0][0] - watched.begun for watched in (one, two)],
        "begins_1_cpu_s": one.spent_s, "begins_2_cpu_s": two.spent_s, **phases(second, killed),
        "blocks_ms": reports[int(0.99 * len(reports))], "one": step_ms(first), "plain": step_ms(plain), "two": step_ms(second),
        "apart": step_ms(apart[0]),
    }  # fmt: skip


def table(rounds: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The figures of all rounds: median and ends, or ratio and interval."""
    found = {"begins_s": spread([value for one in rounds for value in one["begins_s"]])}
    found |= {name: spread([one[name] for one in rounds]) for name in SECONDS}
    times = {arm: [one[arm] for one in rounds] for arm in ("one", "plain", "two", "apart")}
    found |= {"ray_ratio": ratio(times["one"], times["plain"]), "speed_of_two": ratio(times["one"], times["two"])}
    value, low, high = (2 * found for found in ratio(times["plain"], times["apart"]))
    found["speed_apart"] = value, low, high
    rows = []
    for name, (value, low, high) in found.items():
        goal, least = GOALS.get(name, (float("nan"), False))
        met = "" if name not in GOALS else "yes" if (value >= goal if least else value <= goal) else "no"
        rows.append({"figure": name, "value": value, "low": low, "high": high, "goal": goal, "met": met})
    return pd.DataFrame(rows)


def page(rows: pd.DataFrame, origin: str) -> str:
    """The table as Markdown."""
    lines = ["# How fast training begins and goes on", "", (__doc__ or "").split("\n\n", 2)[2].strip(), "", origin, "",
             "| figure | value | from | to | goal | met |", "|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows.itertuples():
        unit = str(row.figure).rpartition("_")[2]
        unit = f" {unit}" if unit in ("s", "ms") else ""
        least = "at least " if row.figure in GOALS and GOALS[str(row.figure)][1] else "at most "
        goal = f"{least}{row.goal:g}{unit}" if row.met else ""
        lines.append(f"| {WORDS[str(row.figure)]} | {row.value:.2f}{unit} | {row.low:.2f} | {row.high:.2f} | {goal} | {row.met} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Time some rounds, write table.csv and README.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.plain:
        import torch

        torch.set_num_threads(1)
        train(recipe_of(given.out), LocalContext(given.plain), load)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    before, made = os.getloadavg()[0], collect("recovery", 1, 0)
    with tempfile.TemporaryDirectory(prefix="recovery-") as place:
        rounds = []
        for number in range(given.rounds):
            rounds.append(once(Path(place) / str(number), given.steps))
            print(json.dumps({name: value for name, value in rounds[-1].items() if not isinstance(value, dict)}), flush=True)
    rows = table(rounds)
    given.out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(given.out / "table.csv", index=False, float_format="%.4f")
    origin = (
        f"Commit {made.commit[:12]}{' (changed)' if made.dirty else ''}, {made.started}, {os.cpu_count()} cores, "
        f"load before {before:.1f}, {given.rounds} rounds of {given.steps} steps."
    )
    (given.out / "README.md").write_text(page(rows, origin), encoding="utf-8")


if __name__ == "__main__":
    main()
