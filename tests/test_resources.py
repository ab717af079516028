"""What workers ask for: nodes that come later are waited for, what is missing is named, GPUs are said and never guessed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from diffprune.distributed import resources
from diffprune.distributed.cluster import connect
from diffprune.distributed.exclusive import exclusive

KINDS = {"H100": {"accelerator_type:H100": 1.0, "GPU": 8.0}, "L4": {"accelerator_type:L4": 1.0, "GPU": 1.0}, "": {}}


def nodes(monkeypatch: pytest.MonkeyPatch, *kinds: str) -> list[dict[str, Any]]:
    """A cluster of these nodes, each with four CPUs, as Ray tells of it; nodes may be added."""
    found: list[dict[str, Any]] = [{"Alive": True, "Resources": {"CPU": 4.0, **KINDS[kind]}} for kind in kinds]
    monkeypatch.setattr(ray, "nodes", lambda: found)
    total = sum(node["Resources"].get("GPU", 0) for node in found)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": total} if total else {})
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the autoscaler was told, request by request."""
    told: list[Any] = []
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: told.append(bundles))
    return told


def test_gpus_are_said_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, "", "H100")
    with pytest.raises(ValueError, match=r"has 8 GPUs, and the job does not say .*--gpus 1, or --gpus 0"):
        resources.each(None)
    assert resources.each(0.0) == 0 and resources.each(0.5) == 0.5 and resources.whole(0.5) == 1 and resources.whole(0) == 0
    nodes(monkeypatch, "")
    assert resources.each(None) == 0 and resources.each(1) == 1, "as from an autoscaler, it may come"


def test_nodes_are_asked_for_and_waited_for(monkeypatch: pytest.MonkeyPatch, asked: list[Any], capsys: Any) -> None:
    there, looks = nodes(monkeypatch), iter(range(9))

    def sleep(seconds: float) -> None:
        if next(looks) == 2:
            there.append({"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}})

    monkeypatch.setattr(resources.time, "sleep", sleep)
    resources.awaited(5, 1, 1.0)
    assert asked == [[{"CPU": 1.0, "GPU": 1.0}] * 5, []], "for all workers, and taken back when work begins"
    said = "waiting for nodes: 1 worker needs 1 CPU, and the cluster has 0 and 1 GPU, and the cluster has 0\n"
    assert capsys.readouterr().out == said, "once"
    resources.awaited(5, 1, 1.0)
    assert len(asked) == 2, "nothing to ask for"


@pytest.mark.parametrize(
    ("kinds", "fewest", "gpus", "said"),
    [
        ((), 2, 0.0, "2 workers need 2 CPU, and the cluster has 0"),
        (("", ""), 2, 1.0, "2 workers need 2 GPU, and the cluster has 0"),
        (("L4",), 2, 1.0, "2 workers need 2 GPU, and the cluster has 1"),
        (("L4", "L4"), 1, 2.0, "1 worker needs 1 CPU and 2 GPU on one node each, and too few nodes have them together"),
    ],
)
def test_what_never_comes_is_named(
    kinds: tuple[str, ...], fewest: int, gpus: float, said: str, monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    nodes(monkeypatch, *kinds)
    monkeypatch.setattr(resources, "START_S", 0.05)
    monkeypatch.setattr(resources, "LOOK_S", 0.02)
    with pytest.raises(RuntimeError, match=f"^{re.escape(said)}, and none came in 0 s"):
        resources.awaited(4, fewest, gpus)
    assert asked[-1] == []


def test_timing_takes_a_whole_host_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, "", "L4")
    assert resources.whole_host(1, "") == {"CPU": 4, "GPU": 1} and resources.whole_host(0, "") == {"CPU": 4}
    nodes(monkeypatch, "L4", "H100", "")
    with pytest.raises(ValueError, match=r"have H100 and L4: say on which to time, as in --set accelerator=H100"):
        resources.whole_host(1, "")
    assert resources.whole_host(1, "L4") == {"CPU": 4, "GPU": 1, "accelerator_type:L4": 0.001}
    with pytest.raises(ValueError, match=r"no host has 'A100': the hosts of this cluster have H100 and L4"):
        resources.whole_host(1, "A100")


@pytest.fixture(scope="module")
def cluster() -> Iterator[float]:
    """A local Ray; gives its CPUs."""
    with connect(workers=2):
        yield ray.cluster_resources()["CPU"]


@pytest.mark.slow
def test_a_host_is_reserved_while_it_times_and_free_afterwards(cluster: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def free() -> Iterator[float]:
        yield ray.available_resources().get("CPU", 0.0)

    assert list(exclusive(free)) == [0.0], "nothing else may run beside it"
    with resources.reserved({"CPU": cluster}) as place:
        assert isinstance(place, PlacementGroupSchedulingStrategy)
        monkeypatch.setattr(resources, "START_S", 0.5)
        with pytest.raises(RuntimeError, match=rf"no host gave {cluster:g} CPU at once in 0 s: others are at work on it"):
            list(exclusive(free))
