"""Ray Train with its controller in the driver's own process.

Ray gives it a process of its own, which imports Ray and torch once more before the first worker may begin, and dies without its
driver anyway; and it makes actors of which nothing is asked here, for all of which workers wait. Without them a training begins a
quarter sooner on two cores, and three processes less can fail.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup

ABORT_S = 3.0  # for the workers of a run that is interrupted to be gone
# Actors before whose start no worker begins. The first hands out Ray datasets, of which there are none; the second clears up after
# a controller that has died: what a driver has reserved Ray gives free by itself.
UNUSED = (DatasetsCallback, PlacementGroupCleanerCallback)


class _Group(WorkerGroup):  # type: ignore[misc]
    """Workers that are told of no controller, which is no actor here: they would ask it for checkpoints, of which Ray has none."""

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
        controller = _Controller(**arguments)
        try:
            _to_the_end(controller.run)
        except KeyboardInterrupt:
            if group := controller.get_worker_group():
                _abort(group)
            raise
        return controller.get_result()


def _to_the_end(run: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine in this thread; in one of its own where an event loop runs in this one, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(run())
        return
    loop, done = asyncio.new_event_loop(), Future[None]()
    task = loop.create_task(run())

    def work() -> None:
        try:
            done.set_result(loop.run_until_complete(task))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        done.result()
    except KeyboardInterrupt:
        loop.call_soon_threadsafe(task.cancel)
        raise


def _abort(group: WorkerGroup) -> None:
    """End the workers, in the time that one who pressed Ctrl-C has: the cluster may not answer."""

    def end() -> None:
        with suppress(Exception):
            group.abort()

    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    thread.join(ABORT_S)
