"""Trials of training: workers and a helper of Ray's are killed, a worker is frozen, the run is asked to end; losses are those of a
run left alone."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest
from scenario import Curve, Run, Scene, losses, train

pytestmark = pytest.mark.trial
RUN = Path("runs/tried")


def training(scene: Scene, *, workers: int = 1, checkpoint_every: int = 1000) -> Run:
    """A training that has done three steps."""
    run = scene.diffprune("runs", *train(workers=workers, checkpoint_every=checkpoint_every))
    run.until(lambda: len(losses(RUN)) >= 3, 120)
    return run


def ends_as(curve: Curve, scene: Scene, workers: int = 1) -> None:
    """The same command goes on to the end, and leaves the undisturbed curve and nothing else."""
    run = scene.diffprune("runs", *train(workers=workers))
    assert run.wait(120) == 0, run.text
    assert losses(RUN) == pytest.approx(curve, rel=1e-6)
    scene.assert_clean(RUN)


@pytest.mark.trial(2)
def test_a_worker_that_dies_at_every_attempt_ends_the_run(scene: Scene, curve: Curve) -> None:
    run, killed = training(scene, checkpoint_every=2), set[int]()
    while run.process.poll() is None and len(killed) < 9:
        for one in scene.processes("RayTrainWorker"):
            if one.pid not in killed:  # the first has trained; the others come to nothing
                killed.add(one.pid)
                one.kill()
        time.sleep(0.2)
    assert run.wait(60) == 1, run.text
    assert 2 <= len(killed) < 9
    assert "Traceback" not in run.text and "training stopped" in run.text.splitlines()[-1]
    assert "ray: A worker died" in run.text and "(raylet)" not in run.text
    assert list(RUN.glob("states/*/*.pt"))
    ends_as(curve, scene)


@pytest.mark.trial(4)
def test_a_killed_helper_of_rays_costs_nothing(scene: Scene, curve: Curve) -> None:
    """Training's controller is the driver; what Ray runs beside it and the workers may go."""
    run = training(scene)
    (one,) = scene.processes("SynchronizationActor")
    one.kill()
    assert not any(scene.processes(name) for name in ("TrainController", "PlacementGroupCleaner", "AutoscalingCoordinator"))
    assert run.wait(60) == 0, run.text
    assert "Traceback" not in run.text
    ends_as(curve, scene)


@pytest.mark.trial(11)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_training_that_is_asked_to_end_saves_and_goes_on(scene: Scene, request: pytest.FixtureRequest, workers: int) -> None:
    curve: Curve = request.getfixturevalue("curve" if workers == 1 else "curve_of_two")
    run = training(scene, workers=workers)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(12) == 143, run.text
    done = len(losses(RUN))
    assert "diffprune: terminated; what was finished is kept" in run.text and "Traceback" not in run.text
    (state,) = (path.name for path in RUN.glob("states/*/*.pt"))
    assert 3 <= int(state.split("-")[1]) >= done - 1, "saved where it was, though no state was due"
    ends_as(curve, scene, workers)


@pytest.mark.trial(11)
def test_an_interrupted_training_leaves_nothing_at_work(scene: Scene, curve_of_two: Curve) -> None:
    run = training(scene, workers=2)
    run.process.send_signal(signal.SIGINT)
    assert run.wait(10) == 130, run.text
    assert "Traceback" not in run.text
    scene.assert_clean(RUN)
    ends_as(curve_of_two, scene, 2)


@pytest.mark.trial(12)
def test_a_frozen_worker_is_named_and_the_group_starts_again(scene: Scene, curve_of_two: Curve) -> None:
    run = training(scene, workers=2)
    frozen: psutil.Process = scene.processes("RayTrainWorker")[-1]
    frozen.suspend()
    run.until(lambda: "hangs: no sign of life" in run.text, 60)
    assert f"process {frozen.pid} on" in run.text
    ends = run.wait(120)
    assert ends == 0, run.text
    assert run.text.count("train: 2 workers begin again, from the last state") == 1 and "(raylet)" not in run.text
    assert losses(RUN) == pytest.approx(curve_of_two, rel=1e-6)
    scene.assert_clean(RUN)
