"""What runs in a worker of a training: the loop, with a context made of Ray Train and torch.distributed.

A file of its own, so that a worker starts without the store and the terminal.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as group

from diffprune.core.errors import first_line
from diffprune.core.records import Step
from diffprune.core.spec import Spec
from diffprune.core.vlm import VLM
from diffprune.distributed import watchdog
from diffprune.distributed.fsdp import spread
from diffprune.io.shared_storage import proof, unseen
from diffprune.train.ahead import BadData
from diffprune.train.checkpoints import ELSEWHERE, Files, attempts_at
from diffprune.train.context import Context, Ended
from diffprune.train.loop import Unfitted, train
from diffprune.vlm.load import load


class Refused(RuntimeError):
    """A worker cannot load the model, or does not see the run's folder; trying again gives the same."""


class RayContext(Context):
    """One worker of a Ray Train group."""

    def __init__(self, folder: Path, attempt: int) -> None:
        import ray.train
        import ray.train.torch

        here = ray.train.get_context()
        self.rank, self.world = here.get_world_rank(), here.get_world_size()
        self.device = ray.train.torch.get_device()
        self.files = Files(folder, attempt)
        self.prove_shared()
        self.speaker = watchdog.Speaker(self.files.blobs, attempt, self.rank)

    def begin_sum(self, values: Tensor) -> Callable[[], Tensor]:
        if self.world == 1:
            return lambda: values
        total = values.clone()
        try:
            begun = group.all_reduce(total, async_op=True)
        except ValueError as error:  # of torch, once Ray has taken the group down since another worker died: no fault of the method
            raise ConnectionError(f"the other workers are gone ({first_line(error)})") from error

        def wait_for_all() -> Tensor:
            begun.wait()
            return total

        return wait_for_all

    def report(self, scorer: str, step: Step) -> None:
        super().report(scorer, step)
        self.speaker.steps += 1

    def progress(self, text: str) -> None:
        """Nothing: the driver reads the step log, which needs no channel of its own."""

    def prove_shared(self) -> None:
        """Raises Refused, on every worker: some host does not see the note of this attempt, which the driver has written."""
        told = proof(attempts_at(self.files.blobs), self.files.attempt)
        blind: list[str | None] = [None] * self.world
        mine = None if told is None or told.seen() else socket.gethostname()
        if self.world > 1:
            group.all_gather_object(blind, mine)
        else:
            blind = [mine]
        if hosts := sorted({host for host in blind if host}):
            raise Refused(unseen(hosts, self.files.blobs))

    def load_model(self, name: Spec, shard: bool = False, **options: Any) -> VLM:
        """The VLM on this worker's device; shard: its decoder spread over all workers. options: of `load`.

        Raises:
            Refused: on every worker, when it cannot be loaded on one of them; nobody is left waiting for the others.
        """
        reason, vlm = "", None
        try:
            vlm = load(name, device="cpu" if shard else self.device, **options)
        except ValueError as error:
            reason = str(error)
        failed = self.sum(torch.tensor(float(vlm is None), device=self.device))
        if vlm is None or failed > 0:
            raise Refused(reason or f"{name}: the model cannot be loaded {ELSEWHERE}")
        return spread(vlm, self.device) if shard and self.world > 1 else vlm


def work(config: dict[str, Any]) -> str:
    """What each worker runs. Returns why training cannot succeed, or ""; anything raised is worth a restart."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    recipe = config["recipe"]
    try:
        context = RayContext(Path(config["folder"]), config["attempt"])
    except Refused as error:
        return str(error)
    if reason := context.files.stopped():  # of the group before this one
        return reason
    if context.rank == 0:
        context.files.append({"group": context.world})  # the driver counts how often they begin
    try:
        train(recipe, context, partial(context.load_model, shard=recipe.shard))
    except (BadData, Refused) as error:
        context.stop(str(error))
    except Ended:
        pass  # saved; the driver knows
    except Unfitted as error:
        return str(error)
    return context.files.stopped()
