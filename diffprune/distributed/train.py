"""Training over the workers of a cluster: one worker group for all scorers, the frozen VLM loaded once per worker.

The loop is `diffprune.train`; this file gives it a context made of Ray Train and torch.distributed. What survives failures:
a killed worker (the group restarts and goes on from the last state), a killed driver (the same command goes on). States and step
log lie in the run's folder, which all workers must see, or in its bucket; Ray starts the workers and keeps nothing: what it notes
while at work is removed with the driver.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as group
from torch.nn.parallel import DistributedDataParallel

from diffprune import data as training
from diffprune.core import registry, termination
from diffprune.core.cell import Cell, TrainSpec, describe
from diffprune.core.errors import first_line
from diffprune.core.records import Outcome, Provenance, Step
from diffprune.core.spec import Spec
from diffprune.core.vlm import VLM
from diffprune.distributed import metrics, resources, watchdog
from diffprune.distributed.cluster import private_folder
from diffprune.distributed.interface import OwnInterface
from diffprune.distributed.parcel import opened, packed
from diffprune.io.blob_store import absolute
from diffprune.io.checkpoint import is_complete, read_config
from diffprune.io.shared_storage import proof, unseen
from diffprune.store import Store
from diffprune.train import step_log
from diffprune.train.checkpoints import STATES, Files, as_step, attempts_at, claim, damaged_lines, read_steps, verified
from diffprune.train.context import Context, Ended
from diffprune.train.loop import line, missing, scorers
from diffprune.train.loop import train as train_here
from diffprune.train.recipe import Recipe
from diffprune.train.scorer_trainer import BadData, Diverged
from diffprune.vlm.load import load

START_S = 180  # for a group to start: a busy machine needs long
ELASTIC_START_S = 45  # for one that may be smaller: what a lost host had is still on offer for a while, and waited for in vain
ABORT_S = 3.0  # for the workers of a run that is interrupted to be gone
LEAVE_S = 10.0  # for the last look at storage that does not answer, whose own limits are minutes
RESIZE_S = 30.0  # between looks whether there are hosts for more workers


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

    def wrap(self, module: nn.Module) -> nn.Module:
        return DistributedDataParallel(module) if self.world > 1 else module

    def sum(self, values: Tensor) -> Tensor:
        if self.world == 1:
            return values
        total = values.clone()
        group.all_reduce(total)
        return total

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
            raise Refused(reason or f"{name}: the model cannot be loaded on another worker")
        if not shard or self.world == 1:
            return vlm
        from diffprune.distributed.fsdp import spread  # whose imports take a second of every worker's start

        return spread(vlm, self.device)


def _work(config: dict[str, Any]) -> str:
    """What each worker runs. Returns why training cannot succeed, or ""; anything raised is worth a restart."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    recipe = config["recipe"]
    try:
        context = RayContext(Path(config["folder"]), config["attempt"])
    except Refused as error:
        return str(error)
    if context.rank == 0:
        context.files.append({"group": context.world})  # the driver counts how often they begin
    try:
        train_here(recipe, context, partial(context.load_model, shard=recipe.shard))
    except (BadData, Diverged, Refused) as error:
        context.stop(str(error))
    except Ended:
        pass  # saved; the driver knows
    return context.files.stopped()


def train(
    recipe: Recipe, folder: Path | str, store: Store | None = None, provenance: Provenance | None = None, *, gpus: float = 0.0
) -> list[Path]:
    """Train what `folder` does not hold yet on the connected Ray; returns the scorers' folders in recipe order.

    The same call goes on where an earlier one stopped, and does nothing when all is there. Step records go to the step log
    in the folder while training and to the store whenever a scorer is finished. gpus: of each worker, which shares none.

    Raises:
        ValueError: the folder holds another recipe's scorer, or the data cannot be read.
        RuntimeError: training failed; the sentence says why.
    """
    folder = absolute(folder)
    if missing(recipe, folder):
        files = Files(folder, claim(folder))
        config = {"recipe": recipe, "folder": str(folder), "attempt": files.attempt, "gpus": resources.whole(gpus)}
        print(f"train: the first example is {training.first_example(recipe.data)}", flush=True)
        try:
            with Follower(recipe, folder, store, provenance, files), termination.saving(files.ask_to_end):
                reason = _until_stuck(recipe, files, config)
        finally:
            files.tidy()
        if reason:
            publish(recipe, folder, store, provenance)
            raise RuntimeError(reason)
    else:  # a driver whose workers were done may have been killed before it could do this
        Files(folder, attempts_at(folder).newest()).tidy()
    publish(recipe, folder, store, provenance)
    return list(scorers(recipe, folder).values())


def _until_stuck(recipe: Recipe, files: Files, config: dict[str, Any]) -> str:
    """`_fit`, again as long as a group that failed had come further than the one before: hosts that come and go, over days, wear
    out none of its tries, and what fails at the same place again and again ends it."""
    workers = recipe.workers if recipe.fewest == recipe.workers else (recipe.fewest, recipe.workers)
    while True:
        before = missing(recipe, files.folder), files.blobs.list(STATES)
        try:
            return _fit(config, workers)
        except RuntimeError as error:
            files.check()
            if (missing(recipe, files.folder), files.blobs.list(STATES)) == before:
                raise
            print(f"train: {first_line(error)}: it had come further, so it goes on by itself", flush=True)


def _fit(config: dict[str, Any], workers: int | tuple[int, int]) -> str:
    """Run the worker group; returns why training cannot succeed, or "".

    workers: two numbers for a group that shrinks to the first where hosts are lost, and grows to the second as they come. Each
             time it starts again from the last state; every example has noise and place of its own, whoever works on it, so that
             the curve is that of a group of fixed size but for the order of sums.

    Raises:
        RuntimeError: the group failed more often than it may, or its controller died.
    """
    # The controller inherits these. It hears of an end, or a death, when it polls, every two seconds unless told otherwise.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process more, for `ray.train.report`, unused here
    elastic, gpus = isinstance(workers, tuple), config.get("gpus", 0.0)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(ELASTIC_START_S if elastic else START_S)
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

    fewest, most = workers if isinstance(workers, tuple) else (workers, workers)
    if most:  # 0 is Ray's local mode
        resources.awaited(most, fewest, gpus)
    with private_folder() as own:
        trainer = _trainer()(
            opened,
            train_loop_config=packed(_work, config),
            torch_config=OwnInterface(),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=gpus > 0,
                resources_per_worker=resources.bundle(gpus),
                elastic_resize_monitor_interval_s=RESIZE_S,
            ),
            run_config=RunConfig(
                name="train",
                storage_path=own,
                failure_config=FailureConfig(max_failures=2, controller_failure_limit=2),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        # Ctrl-C stays ours: Ray's handler ends the process with exit code 0, and is left in place for whatever runs afterwards.
        controllers: list[Any] = []
        trainer._register_sigint_handler = controllers.append
        return _fitted(trainer, controllers)


def _trainer() -> Any:
    """`TorchTrainer` without the process that hands out Ray datasets, of which there are none: before it runs, no worker begins."""
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks import DatasetsCallback

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [one for one in super()._create_default_callbacks() if not isinstance(one, DatasetsCallback)]

    return Trainer


def _fitted(trainer: Any, controllers: list[Any]) -> str:
    """See `_fit`. controllers: the one of the run, once it has begun."""
    import ray

    try:
        return trainer.fit().return_value or ""
    except KeyboardInterrupt:
        for controller in controllers:
            with suppress(ray.exceptions.RayError):
                ray.get(controller.abort.remote(), timeout=ABORT_S)
        raise
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        failures = getattr(error, "worker_failures", {})
        first = next((f"worker {rank}: {failure}" for rank, failure in failures.items()), str(error)).strip()
        said = [text for text in first.splitlines() if text.strip()]
        raise RuntimeError(f"training stopped ({said[0]} ... {said[-1]}); run the same command again to go on") from error


def publish(recipe: Recipe, folder: Path, store: Store | None, provenance: Provenance | None) -> None:
    """Put the step records of finished scorers into the store, each once."""
    if store is None or provenance is None:
        return
    finished = {key: place for key, place in scorers(recipe, folder).items() if is_complete(place)}
    done, steps = store.done() if finished else set(), read_steps(folder)
    if damaged := damaged_lines(folder):
        print(f"train: {damaged} damaged lines of {step_log.opened(folder)} are left out of the records", flush=True)
    for (spec, seed), place in finished.items():
        facts = read_config(place)["facts"]
        made = registry.make("pruners", spec)
        method = replace(describe(made), recipe=facts["recipe_key"], scorer_seed=seed)
        model = replace(recipe.model, weights_sha256=facts["model_hash"])
        cell = Cell(model, facts["dtype"], TrainSpec(spec, facts["recipe_key"], seed), method)
        rows = steps.get(place.name, [])
        if rows and cell.key not in done:
            store.publish({"steps": rows, "outcomes": [Outcome("ok", "", len(rows), 0.0)]}, cell=cell, provenance=provenance)


class Follower(threading.Thread):
    """Reads the step log while workers write it: shows progress, publishes finished scorers, and looks after workers that hang.

    Storage that fails costs one look, never the thread: what was not seen is seen at the next, and that it failed is said once
    for as long as it does.
    """

    every_s = 2.0

    def __init__(
        self, recipe: Recipe, folder: Path, store: Store | None, provenance: Provenance | None, files: Files | None = None
    ) -> None:
        super().__init__(daemon=True, name="step log")
        self.watchdog = watchdog.Watchdog(files.blobs, files.attempt) if files else None
        self.recipe, self.folder, self.store, self.provenance = recipe, folder, store, provenance
        recipes = {place.name: recipe.of(spec) for (spec, _), place in scorers(recipe, folder).items()}
        self.steps = {scorer: own.steps for scorer, own in recipes.items()}
        self.images = {scorer: own.images for scorer, own in recipes.items()}
        self.run_name, self.groups = provenance.run if provenance else "", 0
        self.ended, self.failing, self.finished = threading.Event(), False, 0
        self.log = step_log.opened(folder)
        self.place = self.log.newer(None)[1]

    def __enter__(self) -> Follower:
        left = len(missing(self.recipe, self.folder))
        few, most = self.recipe.fewest, self.recipe.workers
        workers = f"{few} to {most} workers" if few < most else f"{most} workers"
        print(f"train: starting {workers}, {left} scorers to train", flush=True)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join(LEAVE_S)
        if not (self.is_alive() or self.failing):
            with suppress(OSError):  # how the training ended is what counts, and is raised by others
                self._show()

    def run(self) -> None:
        while not self.ended.wait(self.every_s):
            failures = [error for look in (self._show, self._look_after, self._publish) if (error := _failure(look))]
            if failures and not self.failing:
                told = f"train: {first_line(failures[0])}: progress is not seen, training goes on, and it is looked again"
                print(f"{told} every {self.every_s:.0f} s", flush=True)
            self.failing = bool(failures)

    def _show(self) -> None:
        """Progress on the terminal."""
        for scorer, step in self._newest():
            print(line(scorer, step, self.steps[scorer]), flush=True)

    def _look_after(self) -> None:
        """Workers that hang are killed, and named."""
        for told in self.watchdog.look() if self.watchdog else ():
            metrics.worker_lost(self.run_name, "train", told)
            print(told, flush=True)

    def _publish(self) -> None:
        """Records of what was finished since the last time."""
        finished = sum(is_complete(place) for place in scorers(self.recipe, self.folder).values())
        if finished > self.finished:
            self.finished = finished
            with suppress(OSError, ValueError, RuntimeError):  # the driver publishes again at the end, and raises then
                publish(self.recipe, self.folder, self.store, self.provenance)

    def _newest(self) -> list[tuple[str, Step]]:
        """(scorer, its last whole step) of what was written since the last look: the newest of the scorer that is trained now, and
        the last of each that was finished meanwhile."""
        whole, self.place = self.log.newer(self.place)
        lines = [found for piece in whole.splitlines() if (found := verified(piece))]
        rows = [row for found in lines if (row := as_step(found))]
        self._count(rows, [found["group"] for found in lines if "group" in found])
        return list(dict(rows).items())

    def _count(self, rows: Sequence[tuple[str, Step]], began: Sequence[int]) -> None:
        """Metrics of what was read. began: numbers of workers of each group that began."""
        for scorer, step in rows:
            metrics.EXAMPLES.add(self.images[scorer], self.run_name, "train")
            metrics.KEPT_TOKENS.set(step.kept, self.run_name, "train")
        for workers in began:
            self.groups += 1
            if self.groups > 1:
                metrics.restarted(self.run_name, "train", workers)


def _failure(look: Callable[[], None]) -> OSError | None:
    """What storage said, where one look failed on it."""
    try:
        look()
    except OSError as error:
        return error
    return None
