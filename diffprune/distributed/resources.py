"""What workers ask of a cluster, beside one CPU each, and the sentence that names what it lacks.

Nodes need not be there yet: what is asked for is told to Ray's autoscaler, and work begins with those that have come.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

START_S = 900.0  # an autoscaler needs minutes to bring a node
LOOK_S = 1.0
KIND = "accelerator_type:"  # how Ray names the resource that a node has of its kind of GPU
MARK = 0.001  # of that resource, which says where and takes nothing


def each(gpus: float | None) -> float:
    """GPUs of every worker, as the job says.

    Raises:
        ValueError: the cluster has some, and the job does not say.
    """
    there = ray.cluster_resources().get("GPU", 0)
    if gpus is None and there:
        asked = f"this cluster has {there:g} GPUs, and the job does not say how many of them a worker gets"
        raise ValueError(f"{asked}: add --gpus 1, or --gpus 0 to leave them alone")
    return gpus or 0.0


def bundle(gpus: float) -> dict[str, float]:
    """What one worker asks for, in Ray's words."""
    return {"CPU": 1.0, **({"GPU": gpus} if gpus else {})}


def _hosts() -> list[Mapping[str, float]]:
    """Resources of the nodes that are there."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def room(need: Mapping[str, float]) -> int:
    """How many such workers the nodes that are there have room for, whoever uses them now."""
    return sum(min(int(host.get(name, 0) / amount + 1e-9) for name, amount in need.items()) for host in _hosts())


def awaited(workers: int, fewest: int, gpus: float) -> None:
    """Ask for nodes for so many workers, and wait until the fewest have room.

    Raises:
        RuntimeError: they did not come in `START_S`; names what is missing.
    """
    need = bundle(gpus)
    if room(need) >= fewest:
        return
    from ray.autoscaler.sdk import request_resources  # brings half an autoscaler along

    began, told = time.monotonic(), False
    request_resources(bundles=[need] * workers)
    try:
        while room(need) < fewest:
            if time.monotonic() - began > START_S:
                raise RuntimeError(f"{lacking(need, fewest)}, and none came in {START_S:.0f} s: add nodes, or ask for less")
            if not told:
                print(f"waiting for nodes: {lacking(need, fewest)}", flush=True)
                told = True
            time.sleep(LOOK_S)
    finally:
        request_resources(bundles=[])  # from here on the workers themselves are the demand


def lacking(need: Mapping[str, float], workers: int) -> str:
    """What there is too little of: `2 workers need 2 GPU, and the cluster has 0`."""
    total = {name: sum(host.get(name, 0) for host in _hosts()) for name in need}
    short = [name for name, amount in need.items() if total[name] < amount * workers - 1e-9]
    who = f"{workers} worker{'s' if workers > 1 else ''} need{'' if workers > 1 else 's'}"
    if short:
        return f"{who} " + " and ".join(f"{need[name] * workers:g} {name}, and the cluster has {total[name]:g}" for name in short)
    whole = " and ".join(f"{amount:g} {name}" for name, amount in need.items())
    return f"{who} {whole} on one node each, and too few nodes have them together"


def whole_host(gpus: float, accelerator: str) -> dict[str, float]:
    """Everything that the largest host has, for timing; of hosts with this kind of GPU, where one is named.

    Raises:
        ValueError: no host has it, or hosts have several kinds and none is named: timings would be of no machine in particular.
    """
    hosts = [host for host in _hosts() if host.get("CPU")]
    kinds = sorted({name.removeprefix(KIND) for host in hosts for name in host if name.startswith(KIND)})
    there = f"the hosts of this cluster have {' and '.join(kinds) or 'no GPU'}"
    if accelerator and accelerator not in kinds:
        raise ValueError(f"no host has {accelerator!r}: {there}")
    if gpus and not accelerator and len(kinds) > 1:
        raise ValueError(f"{there}: say on which to time, as in --set accelerator={kinds[0]}")
    fit = [host for host in hosts if not accelerator or KIND + accelerator in host]
    if not fit:
        raise ValueError("no host of this cluster has a CPU to time on")
    largest = max(fit, key=lambda host: (host.get("GPU", 0), host["CPU"]))
    found = {name: largest[name] for name in ("CPU", *(["GPU"] if gpus else [])) if largest.get(name)}
    return found | ({KIND + accelerator: MARK} if accelerator else {})


@contextmanager
def reserved(bundle: Mapping[str, float]) -> Iterator[PlacementGroupSchedulingStrategy]:
    """One node's resources for as long as the block; gives the strategy by which tasks and actors come there.

    Raises:
        RuntimeError: others kept it busy for `START_S`.
    """
    group: Any = placement_group([dict(bundle)], strategy="STRICT_PACK")
    try:
        try:
            ray.get(group.ready(), timeout=START_S)
        except GetTimeoutError:
            whole = " and ".join(f"{amount:g} {name}" for name, amount in bundle.items() if not name.startswith(KIND))
            raise RuntimeError(f"no host gave {whole} at once in {START_S:.0f} s: others are at work on it") from None
        yield PlacementGroupSchedulingStrategy(group)
    finally:
        remove_placement_group(group)


def whole(gpus: float) -> float:
    """GPUs of a worker that shares none, as a rank of a training or what is timed."""
    return float(math.ceil(gpus))
