"""Trials over several hosts, of a sweep and of a training: one is lost, one is frozen and wakes, the head goes, workers are killed
while calls fail."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest
from hosts import Hosts
from scenario import EVALUATE, Curve, Run, Scene, Tables, answered, answers, losses, train

from diffprune.train.checkpoints import read_steps

pytestmark = pytest.mark.trial
RUN = Path("runs/tried")


def sweeping(scene: Scene, hosts: Hosts) -> Run:
    """A sweep over two hosts, of which each has given answers."""
    run = scene.diffprune(
        "runs", *EVALUATE, "--workers", "2", "--address", hosts.address, through=hosts.through(0), **hosts.environment
    )
    run.until(lambda: answered(run) and len(scene.processes("ray::Worker")) >= 2, 120)
    return run


@pytest.mark.trial(5)
def test_a_lost_host_costs_its_batch(scene: Scene, undisturbed: Tables) -> None:
    with Hosts(scene, 2) as hosts:
        run = sweeping(scene, hosts)
        hosts.process(2, "raylet").kill()
        assert run.wait(120) == 0, run.text
    assert answers(RUN) == undisturbed
    scene.assert_clean(RUN)


@pytest.mark.trial(6)
def test_a_frozen_host_is_done_without_and_may_wake(scene: Scene, undisturbed: Tables) -> None:
    with Hosts(scene, 2) as hosts:
        run = sweeping(scene, hosts)
        frozen = hosts.process(2, "raylet")
        family = [frozen, *frozen.children(recursive=True)]
        for one in family:
            one.suspend()
        assert run.wait(240) == 0, run.text
        for one in family:
            if one.is_running():
                one.resume()
        time.sleep(5)
    assert answers(RUN) == undisturbed
    scene.assert_clean(RUN)


@pytest.mark.trial(7)
def test_a_lost_head_ends_the_run_and_another_cluster_goes_on(scene: Scene, undisturbed: Tables) -> None:
    with Hosts(scene, 2) as hosts:
        run = sweeping(scene, hosts)
        hosts.process(0, "gcs_server").kill()
        code = run.wait(90)
        assert code != 0 or answers(RUN) == undisturbed, run.text
        print(f"exit code {code}")
    again = scene.diffprune("runs", *EVALUATE, "--workers", "1")
    assert again.wait(120) == 0, again.text
    assert answers(RUN) == undisturbed
    scene.assert_clean(RUN)


def training(scene: Scene, hosts: Hosts) -> Run:
    """A training over two hosts, which together have done three steps. It may go on with one of them."""
    asked = train(workers="1-2", checkpoint_every=2)
    run = scene.diffprune("runs", *asked, "--address", hosts.address, through=hosts.through(0), **hosts.environment)
    run.until(lambda: len(losses(RUN)) >= 3, 120)
    assert {row.workers for rows in read_steps(RUN).values() for row in rows} == {2}
    return run


@pytest.mark.trial(5)
def test_a_training_goes_on_without_a_lost_host(scene: Scene, curve: Curve) -> None:
    with Hosts(scene, 2) as hosts:
        run = training(scene, hosts)
        hosts.process(2, "raylet").kill()
        assert run.wait(180) == 0, run.text
    assert losses(RUN) == pytest.approx(curve, rel=1e-3)
    scene.assert_clean(RUN)


@pytest.mark.trial(6)
def test_a_training_goes_on_without_a_frozen_host_that_wakes(scene: Scene, curve: Curve) -> None:
    with Hosts(scene, 2) as hosts:
        run = training(scene, hosts)
        frozen = hosts.process(2, "raylet")
        family = [frozen, *frozen.children(recursive=True)]
        for one in family:
            one.suspend()
        assert run.wait(300) == 0, run.text
        for one in family:
            if one.is_running():
                one.resume()
        time.sleep(5)
    assert losses(RUN) == pytest.approx(curve, rel=1e-3)
    scene.assert_clean(RUN)


@pytest.mark.trial(7)
def test_a_training_whose_head_is_lost_ends_and_goes_on_elsewhere(scene: Scene, curve: Curve) -> None:
    with Hosts(scene, 2) as hosts:
        run = training(scene, hosts)
        hosts.process(0, "gcs_server").kill()
        assert run.wait(90) != 0, run.text
        assert "Traceback" not in run.text
    again = scene.diffprune("runs", *train())
    assert again.wait(120) == 0, again.text
    assert losses(RUN) == pytest.approx(curve, rel=1e-3)
    scene.assert_clean(RUN)


@pytest.mark.trial(10)
def test_workers_killed_every_few_seconds_while_calls_fail(scene: Scene, undisturbed: Tables) -> None:
    rarely = {"num_failures": 4, "req_failure_prob": 25, "resp_failure_prob": 25, "in_flight_failure_prob": 0}
    faults = json.dumps({"CoreWorkerService.grpc_client.PushTask": rarely})
    with Hosts(scene, 2, RAY_testing_rpc_failure=faults) as hosts:
        run, killed, last = sweeping(scene, hosts), 0, 0.0
        while run.process.poll() is None:
            answering = scene.processes("ray::Worker.answer") if killed < 5 and time.monotonic() - last > 3 else []
            for one in answering[:1]:
                try:
                    one.kill()
                except psutil.Error:
                    continue
                killed, last = killed + 1, time.monotonic()
            time.sleep(0.2)
        assert run.wait(1) == 0, run.text
    assert killed >= 2, "it was over too soon to say anything"
    assert answers(RUN) == undisturbed
    scene.assert_clean(RUN)
