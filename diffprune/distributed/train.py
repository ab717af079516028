"""Training over the workers of a cluster: one worker group for all scorers, the frozen VLM loaded once per worker.

The loop is `diffprune.train`, what a worker runs `train_worker.py`. What survives failures:
a killed worker (the group restarts and goes on from the last state), a killed driver (the same command goes on). States and step
log lie in the run's folder, which all workers must see, or in its bucket; Ray starts the workers and keeps nothing: what it notes
while at work is removed with the driver.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

from diffprune import data as training
from diffprune.core import termination
from diffprune.core.errors import first_line
from diffprune.core.records import Provenance
from diffprune.distributed import resources
from diffprune.distributed.cluster import private_folder
from diffprune.distributed.controller import Trainer
from diffprune.distributed.follower import Follower, publish
from diffprune.distributed.interface import OwnInterface
from diffprune.distributed.parcel import opened, packed
from diffprune.distributed.train_worker import work
from diffprune.io.blob_store import absolute, remote
from diffprune.store import Store
from diffprune.train.checkpoints import STATES, Files, attempts_at, claim
from diffprune.train.loop import missing, scorers, unfitted
from diffprune.train.recipe import Recipe

START_S = 180  # for a group to start: a busy machine needs long
ELASTIC_START_S = 45  # for one that may be smaller: what a lost host had is still on offer for a while, and waited for in vain
RESIZE_S = 30.0  # between looks whether there are hosts for more workers


def train(
    recipe: Recipe, folder: Path | str, store: Store | None = None, provenance: Provenance | None = None, *, gpus: float = 0.0
) -> list[Path]:
    """Train what `folder` does not hold yet on the connected Ray; returns the scorers' folders in recipe order.

    The same call goes on where an earlier one stopped, and does nothing when all is there. Step records go to the step log
    in the folder while training and to the store whenever a scorer is finished. gpus: of each worker, which shares none.

    Raises:
        ValueError: the folder holds another recipe's scorer, or the data cannot be read.
        RuntimeError: training failed; the sentence says why. Where methods fail by themselves, the others are trained before.
    """
    folder = absolute(folder)
    if missing(recipe, folder):
        files = Files(folder, claim(folder))
        config = {"recipe": recipe, "folder": str(folder), "attempt": files.attempt, "gpus": resources.whole(gpus)}
        print(f"train: the first example is {training.first_example(recipe.data)}", flush=True)
        try:
            with Follower(recipe, folder, store, provenance, files), termination.saving(files.ask_to_end):
                reason = _until_stuck(recipe, files, config)
                reason = files.stopped() or unfitted(recipe, files) or reason or _absent(recipe, files)
        finally:
            files.tidy()
        if reason and not remote(folder) and not folder.is_dir():
            raise RuntimeError(f"{folder} was moved or removed while it was trained into: move it back, and run the same again")
        if reason:
            publish(recipe, folder, store, provenance)
            raise RuntimeError(reason)
    else:  # a driver whose workers were done may have been killed before it could do this
        Files(folder, attempts_at(folder).newest()).tidy()
    publish(recipe, folder, store, provenance)
    return list(scorers(recipe, folder).values())


def _absent(recipe: Recipe, files: Files) -> str:
    """What is said of scorers that are not there though all workers came to their end, unless they were asked to."""
    left = [] if files.ending() else missing(recipe, files.folder)
    names = ", ".join(f"{spec}, seed {seed}" for spec, seed in left)
    return f"training ended without {names}: run the same command again to go on" if left else ""


def _until_stuck(recipe: Recipe, files: Files, config: dict[str, Any]) -> str:
    """`_fit`, again as long as a group that failed had come further than the one before: hosts that come and go, over days, wear
    out none of its tries, and what fails at the same place again and again ends it."""
    workers = recipe.workers if recipe.fewest == recipe.workers else (recipe.fewest, recipe.workers)
    while True:
        before = _progress(recipe, files)
        try:
            return _fit(config, workers)
        except RuntimeError as error:
            files.check()
            if _progress(recipe, files) == before:
                raise
            print(f"train: {first_line(error)}: it had come further, so it goes on by itself", flush=True)


def _progress(recipe: Recipe, files: Files) -> tuple[object, ...]:
    """How far a training has come: what is missing, the states it would go on from, what cannot be trained."""
    return missing(recipe, files.folder), files.blobs.list(STATES), files.failures()


def _fit(config: dict[str, Any], workers: int | tuple[int, int]) -> str:
    """Run the worker group; returns why training cannot succeed, or "".

    workers: two numbers for a group that shrinks to the first where hosts are lost, and grows to the second as they come. Each
             time it starts again from the last state; every example has noise and place of its own, whoever works on it, so that
             the curve is that of a group of fixed size but for the order of sums.

    Raises:
        RuntimeError: the group failed more often than it may, or could not begin.
    """
    # The controller hears of an end, or a death, when it polls, every two seconds unless told otherwise.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process more, for `ray.train.report`, unused here
    elastic, gpus = isinstance(workers, tuple), config.get("gpus", 0.0)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(ELASTIC_START_S if elastic else START_S)
    fewest, most = workers if isinstance(workers, tuple) else (workers, workers)
    if most:  # 0 is Ray's local mode
        resources.awaited(most, fewest, gpus)
    with private_folder() as own:
        trainer = Trainer(
            opened,
            train_loop_config=packed(work, config),
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
                logging_config=LoggingConfig(log_level="CRITICAL"),  # in its files all is told
            ),
        )
        return _fitted(trainer)


def _fitted(trainer: Trainer) -> str:
    """See `_fit`."""
    try:
        return trainer.fit().return_value or ""
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        failures = getattr(error, "worker_failures", {})
        first = next((f"worker {rank}: {failure}" for rank, failure in failures.items()), str(error)).strip()
        said = list(dict.fromkeys(text for text in first.splitlines() if text.strip()))
        told = " ... ".join((said[0], *said[1:][-1:]))
        raise RuntimeError(f"training stopped ({told}); run the same command again to go on") from error
