"""The network interface that workers speak to each other on: that of the address by which their node joined the cluster.

Left alone, gloo takes the address of the host's name, which on many hosts is a loopback, and NCCL the first interface it likes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.backend import Backend, BackendConfig

SETTINGS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # which a user may set otherwise


def interface(address: str) -> str | None:
    """The name of the interface that has an address; None where none has, as in a container whose address is translated."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            return name
    return None


def use_own() -> None:
    """Set what gloo and NCCL read, for this process, where nobody has."""
    if name := interface(ray.util.get_node_ip_address()):
        for setting in SETTINGS:
            os.environ.setdefault(setting, name)


def _torch(backend: str | None) -> Any:
    """Ray's configuration of torch.distributed. Its file imports torch."""
    from ray.train.torch import TorchConfig

    return TorchConfig(backend=backend)


class _Backend(Backend):  # type: ignore[misc]
    """Ray's own of torch.distributed, with the interface set before processes meet."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: OwnInterface) -> None:
        worker_group.execute(use_own)
        config = _torch(backend_config.backend)
        config.backend_cls().on_start(worker_group, config)

    def on_training_start(self, worker_group: Any, backend_config: OwnInterface) -> None:
        config = _torch(backend_config.backend)
        config.backend_cls().on_training_start(worker_group, config)

    def on_shutdown(self, worker_group: Any, backend_config: OwnInterface) -> None:
        config = _torch(backend_config.backend)
        config.backend_cls().on_shutdown(worker_group, config)


@dataclass
class OwnInterface(BackendConfig):  # type: ignore[misc]
    """Ray's configuration of torch.distributed, by `_Backend`; training's controller imports torch once its workers are there, and
    does not let them wait for that.

    backend: gloo or nccl; None is set by Ray's trainer.
    """

    backend: str | None = None

    @property
    def backend_cls(self) -> type[_Backend]:
        """Who sets the workers up."""
        return _Backend

    @property
    def train_func_context(self) -> Any:
        """What a worker's training runs in."""
        return _torch(self.backend).train_func_context

    @property
    def framework(self) -> Any:
        """For Ray's own notes of a run."""
        return _torch(self.backend).framework
