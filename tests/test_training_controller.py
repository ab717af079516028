"""The controller of a training in the driver: in the thread that calls, beside an event loop, where it is interrupted, and what it
leaves in a process that goes on."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import TrainAutoscalingCoordinatorClient
from ray.util import placement_group_table

from diffprune.distributed import controller
from diffprune.distributed.cluster import connect


def test_a_group_whose_cluster_is_mute_is_left_after_some_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    def mute() -> None:
        time.sleep(5)

    ended: list[int] = []
    monkeypatch.setattr(controller, "ABORT_S", 0.1)
    begun = time.monotonic()
    controller._in_time(mute, lambda: 1 / 0, lambda: ended.append(1))
    assert time.monotonic() - begun < 2 and ended


def test_the_log_files_of_the_caller_stay_open_and_rays_logger_is_as_before(tmp_path: Path) -> None:
    mine, rays = logging.FileHandler(tmp_path / "mine.log", mode="w"), logging.getLogger("ray.train")
    before = rays.level, rays.propagate, list(rays.handlers)
    with controller._noted():
        assert rays.isEnabledFor(logging.DEBUG)
    mine.emit(logging.LogRecord("mine", logging.INFO, "", 0, "still told", None, None))
    mine.close()
    assert (rays.level, rays.propagate, rays.handlers) == before
    assert (tmp_path / "mine.log").read_text() == "still told\n"


def test_what_ray_tells_goes_into_a_file_or_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for folder in (str(tmp_path / "train"), str(tmp_path / "file" / "train"), None):
        monkeypatch.setattr(controller.LoggingManager, "get_log_directory", lambda folder=folder: folder)
        with controller._noted():
            logging.getLogger("ray.train.v2").error("a worker died")
    assert not any(capfd.readouterr())
    (notes,) = (tmp_path / "train").iterdir()
    assert "a worker died" in notes.read_text()


@pytest.fixture(scope="module")
def cluster() -> Iterator[int]:
    """A Ray of this machine for all tests below; its CPUs."""
    with connect():
        yield int(ray.cluster_resources()["CPU"])


@pytest.fixture
def trainer(cluster: int, tmp_path: Path) -> Callable[..., controller.Trainer]:
    """Of a group that needs all of the cluster."""

    def made(function: Callable[[], Any], torch_config: TorchConfig | None = None) -> controller.Trainer:
        return controller.Trainer(
            function,
            torch_config=torch_config,
            scaling_config=ScalingConfig(num_workers=cluster),
            run_config=RunConfig(
                name="train",
                storage_path=str(tmp_path),
                failure_config=FailureConfig(max_failures=1, controller_failure_limit=2),
                logging_config=LoggingConfig(log_level="CRITICAL"),
            ),
        )

    return made


def all_is_free(cluster: int) -> bool:
    """Whether nothing is reserved, after some seconds at most."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if ray.available_resources().get("CPU") == cluster:
            return not [one for one in placement_group_table().values() if one["state"] != "REMOVED"]
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_it_works_in_the_thread_that_calls_and_beside_an_event_loop(
    trainer: Callable[..., controller.Trainer], cluster: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # as Ray asks of those who want its dashboard to show trainings
    polled: list[threading.Thread] = []
    polling = controller._Group.poll_status

    def poll_status(group: Any, timeout: float) -> Any:
        polled.append(threading.current_thread())
        return polling(group, timeout)

    async def notebook() -> str:
        return str(trainer(lambda: "beside a loop").fit().return_value)

    monkeypatch.setattr(controller._Group, "poll_status", poll_status)
    asyncio.set_event_loop(loop := asyncio.new_event_loop())
    try:
        assert trainer(lambda: "alone").fit().return_value == "alone"
        assert asyncio.get_event_loop() is loop
        assert loop.run_until_complete(notebook()) == "beside a loop"
    finally:
        asyncio.set_event_loop(None)
        loop.close()
    assert {*polled} == {threading.current_thread()}
    assert all_is_free(cluster)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["_create_workers", "poll_status"])
def test_wherever_it_is_interrupted_its_place_is_given_back(
    trainer: Callable[..., controller.Trainer], cluster: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the process goes on, as a notebook does, and so does its Ray. Nor is room asked for by an actor that outlives it."""
    asked: list[str] = []

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(controller._Group, where, interrupted)
    for call in ("send_resource_request", "cancel_resource_request"):
        monkeypatch.setattr(TrainAutoscalingCoordinatorClient, call, lambda *_, call=call: asked.append(call))
    with pytest.raises(KeyboardInterrupt):
        trainer(lambda: None).fit()
    assert all_is_free(cluster)
    assert not asked


@pytest.mark.slow
def test_a_worker_that_dies_when_all_have_begun_keeps_no_place(
    trainer: Callable[..., controller.Trainer], cluster: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the group that takes its place finds no room."""
    monkeypatch.setenv(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, "20")
    note = tmp_path / "died"

    def die_once() -> None:
        if not note.exists():
            note.touch()
            os._exit(1)

    class Backend(_TorchBackend):  # type: ignore[misc]
        def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
            worker_group.execute_single(0, die_once)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):  # type: ignore[misc]
        @property
        def backend_cls(self) -> type[Backend]:
            return Backend

    assert trainer(lambda: "again", Config()).fit().return_value == "again"
    assert note.exists() and all_is_free(cluster)
