"""Ray Train with its controller in the driver's own process.

Ray gives it a process of its own, which imports Ray and torch once more before the first worker may begin, and dies without its
driver anyway; and it makes actors of which nothing is asked here, for all of which workers wait. Without them a training begins a
third sooner on two cores, and three processes less can fail. It works in the thread that calls `fit`, and needs no event loop:
one may run there already, as in a notebook.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.state_manager import StateManagerCallback
from ray.train.v2._internal.constants import ENABLE_CONTROLLER_STRUCTURED_LOGGING_ENV_VAR
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupPollStatus
from ray.train.v2._internal.logging import LoggingManager

from diffprune.distributed.reaper import DRIVERS

ABORT_S = 3.0  # for what a run has reserved to be given back where it is interrupted
# Actors before whose start no worker begins. The first hands out Ray datasets, of which there are none; the second clears up after
# a controller that has died: what a driver has reserved Ray gives free by itself. The third is made where the environment asks for
# it, shows a controller to the dashboard, and wants it to be an actor.
UNUSED = (DatasetsCallback, PlacementGroupCleanerCallback, StateManagerCallback)


class _Group(WorkerGroup):  # type: ignore[misc]
    """Workers that are told of no controller, which is no actor here: they would ask it for checkpoints, of which Ray has none.

    Their place is given back however they fail to begin. Ray's own keeps it where it is interrupted, and where a worker dies once
    it knows of the others; nobody else would find room before this process ends.
    """

    _place: Any = None

    def _start(self) -> None:
        try:
            super()._start()
        except BaseException:
            if self._place:
                _in_time(self._place.shutdown)
            raise

    def _create_placement_group(self, *arguments: Any) -> Any:
        self._place = super()._create_placement_group(*arguments)
        return self._place

    def abort(self) -> None:
        """End the workers by one call. Ray's own asks them first: this process might have left Ray meanwhile, whose next call would
        end it."""
        self._place.shutdown()

    def _init_train_context_on_workers(self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]) -> None:
        begun = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,
                **{name: values[rank] for name, values in train_context_args.items()},
            )
            for rank, worker in enumerate(workers)
        ]
        ray.get(begun)
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):  # type: ignore[misc]
    worker_group_cls = _Group
    _latest_poll_time: float  # of `time.monotonic`

    async def _poll_workers(self) -> WorkerGroupPollStatus:
        """As Ray's, but it waits for its turn by itself, and not for an event loop."""
        time.sleep(max(0.0, self._latest_poll_time + self._health_check_interval_s - time.monotonic()))
        status = self._worker_group.poll_status(timeout=self._health_check_interval_s)
        self._latest_poll_time = time.monotonic()
        return status


class _Fixed(FixedScalingPolicy):  # type: ignore[misc]
    """A group of fixed size, for whose nodes `resources.awaited` has asked: Ray would do so by an actor of its own."""

    def _send_resource_request(self) -> None:
        """Nothing."""

    def _maybe_send_resource_request(self) -> None:
        """Nothing."""

    def _cancel_resource_request(self) -> None:
        """Nothing."""


class Trainer(TorchTrainer):  # type: ignore[misc]
    """`TorchTrainer` whose `fit` works in the calling thread, and ends its workers where it is interrupted."""

    def _create_default_callbacks(self) -> list[Any]:
        return [one for one in super()._create_default_callbacks() if not isinstance(one, UNUSED)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if not self.scaling_config.elasticity_enabled:
            arguments["scaling_policy"] = _Fixed(self.scaling_config)
        controller = None
        with _noted():
            try:
                controller = _Controller(**arguments)
                with suppress(StopIteration):  # which is how a coroutine returns
                    controller.run().send(None)
                return controller.get_result()
            except KeyboardInterrupt:
                group = controller and controller.get_worker_group()
                _in_time(*([group.abort] if group else []), arguments["scaling_policy"].before_controller_abort)
                raise


@contextmanager
def _noted() -> Iterator[None]:
    """What Ray Train tells in this process goes into a file among the logs of its cluster, and not to the terminal.

    Ray's own way to see to that, `logging.config.dictConfig`, closes whatever log files this process has open.
    """
    os.environ[ENABLE_CONTROLLER_STRUCTURED_LOGGING_ENV_VAR] = "0"
    logger = logging.getLogger("ray.train")
    before, notes = (logger.level, logger.propagate), _notes()
    logger.addHandler(notes)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield
    finally:
        logger.setLevel(before[0])
        logger.propagate = before[1]
        logger.removeHandler(notes)
        notes.close()


class _Notes(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: a disk that is full is no matter of the training's."""


def _notes() -> logging.Handler:
    folder = LoggingManager.get_log_directory() or ""
    try:
        os.makedirs(folder, exist_ok=True)
        notes = _Notes(os.path.join(folder, f"{DRIVERS}train-{os.getpid()}.log"))
    except OSError:  # as where the cluster is another user's
        return logging.NullHandler()
    notes.setFormatter(logging.Formatter("%(asctime)s\t%(levelname)s %(filename)s:%(lineno)s -- %(message)s"))
    return notes


def _in_time(*ends: Callable[[], object]) -> None:
    """Call these, in the time that one who pressed Ctrl-C has: the cluster may not answer."""

    def quietly(end: Callable[[], object]) -> None:
        with suppress(Exception):
            end()

    threads = [threading.Thread(target=quietly, args=(end,), daemon=True) for end in ends]
    until = time.monotonic() + ABORT_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
