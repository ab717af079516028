"""Execution context of a training loop: rank and device, reductions over workers, storage of states and step records.

The training loop knows a `Context` and nothing else, so it runs the same alone (`LocalContext`) and on a cluster
(`diffprune/distributed/train_worker.py`). Everything is written under one folder, or address of a bucket, that all workers
can read:

    attempts/<number>                            the newest run on this folder; an older one may not write any more
    steps.jsonl                                  one line per training step, redone steps later; in a bucket pieces of it
    stopped/<attempt>-<rank>                     why a worker cannot go on
    failed/<attempt>-<name>                      why that scorer cannot be trained, though others can
    ending/<attempt>                             all workers are to save and end
    workers/<attempt>-<rank>                     where a worker is (on a cluster)
    states/<name>/<attempt>-<step>-<sha256>.pt   what a loop needs to go on: the newest state and the one before
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffprune.core.records import Step
from diffprune.train.checkpoints import Files, claim

LOOK_S = 1.0  # between looks whether all are to end: each is a request where states lie in a bucket


class Ended(Exception):
    """Training was asked to end before it was done; what is needed to go on is saved."""


class Context(ABC):
    """One worker of a training run: reductions, state and step records.

    rank, world: this worker and how many there are; device: where its model lives.
    """

    rank: int
    world: int
    device: torch.device
    files: Files
    _looked, _asked = -math.inf, False

    @abstractmethod
    def begin_sum(self, values: Tensor) -> Callable[[], Tensor]:
        """Begin to add up elementwise over the workers; what this returns waits for the sum. All workers must ask, in one order."""

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over the workers; every worker must ask."""
        return self.begin_sum(values)()

    @abstractmethod
    def progress(self, text: str) -> None:
        """Show a line of progress, unless another worker or process does."""

    def begin(self, scorer: str, step: int) -> None:
        """Log that a loop starts, or resumes, at this step."""
        if self.rank == 0:
            self.files.append({"begin": [scorer, step]})

    def report(self, scorer: str, step: Step) -> None:
        """Log one step. Not on the disk before the next `save`, and then redone if the machine fails."""
        if self.rank == 0:
            values = {"scorer": scorer, **asdict(step)}
            self.files.append({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()})

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        """Publish what `load` gives back after a failure; every worker must call it. `state["step"]`: steps done."""
        if self.rank == 0:
            self.files.append({"saved": name, "step": state["step"]}, durable=True)
            self.files.save(name, state)

    def begin_ending(self) -> Callable[[], bool]:
        """Ask whether all workers are to save and end, on all or on none; what this returns waits for all to ask."""
        if (now := time.monotonic()) - self._looked >= (LOOK_S if self.files.remote else 0):
            self._looked, self._asked = now, self.files.ending()
        asked = self.begin_sum(torch.tensor(float(self._asked), device=self.device))
        return lambda: bool(asked() > 0)

    def load(self, name: str) -> dict[str, Any] | None:
        """The newest state saved under a name by this or an earlier run."""
        return self.files.load(name, self.device)

    def discard(self, name: str) -> None:
        """Remove the states of that name."""
        if self.rank == 0:
            self.files.discard(name)

    def apart(self) -> Context:
        """This worker alone, for a scorer that it trains by itself while the others train theirs."""
        return Apart(self)

    def stop(self, reason: str) -> None:
        """Tell the other workers, and the driver, that this one cannot go on."""
        self.files.stop(self.rank, reason)


class Apart(Context):
    """One worker of a group that trains a scorer by itself: the only one of its world, in the folder of the group."""

    rank, world = 0, 1

    def __init__(self, group: Context) -> None:
        self.device, self.files, self._group = group.device, group.files, group

    def begin_sum(self, values: Tensor) -> Callable[[], Tensor]:
        return lambda: values

    def progress(self, text: str) -> None:
        self._group.progress(text)

    def stop(self, reason: str) -> None:
        self._group.stop(reason)


class LocalContext(Context):
    """One process, no cluster. Claims `folder` on creation."""

    rank, world = 0, 1

    def __init__(self, folder: Path | str, device: torch.device | str = "cpu", every_s: float = 2.0) -> None:
        self.device, self.every_s, self.told = torch.device(device), every_s, -math.inf
        self.files = Files(Path(folder), claim(Path(folder)))

    def begin_sum(self, values: Tensor) -> Callable[[], Tensor]:
        return lambda: values

    def progress(self, text: str) -> None:
        if time.monotonic() - self.told > self.every_s:
            self.told = time.monotonic()
            print(text, flush=True)
