"""A host alone: one process of Ray's that has all of it, for measuring time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from diffprune.distributed import resources
from diffprune.distributed.cluster import connect
from diffprune.distributed.liveness import watched

T = TypeVar("T")


def exclusive(
    fn: Callable[..., Iterator[T]], *args: Any, address: str | None = None, gpus: float = 0.0, accelerator: str = "", **kwargs: Any
) -> Iterator[T]:
    """What the generator `fn(*args, **kwargs)` yields, as it comes, in a process of Ray's that has every CPU of one host to itself,
    and every GPU where it asks for any: for measuring time. accelerator: the host's kind of GPU.

    Raises whatever `fn` raises; RayError where its process dies, or hangs. It waits until the host is free, so no sweep may be
    running in the same session.
    """
    with connect(address):
        resources.awaited(1, 1, resources.whole(gpus))
        host = resources.whole_host(gpus, accelerator)
        with resources.reserved(host) as place:
            alone = ray.remote(num_cpus=host["CPU"], num_gpus=host.get("GPU", 0), scheduling_strategy=place)(_Alone).remote()
            try:
                with watched(lambda: [alone]):
                    for found in alone.run.options(num_returns="streaming").remote(fn, args, kwargs):
                        yield ray.get(found)
            except RayTaskError as error:
                raise error.cause from error
            finally:
                ray.kill(alone)


class _Alone:
    """The process of `exclusive`: an actor, so that it can be told where it runs."""

    def run(self, fn: Callable[..., Iterator[T]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[T]:
        """Of `fn`."""
        yield from fn(*args, **kwargs)
