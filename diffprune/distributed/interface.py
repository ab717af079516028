"""The network interface that workers speak to each other on: that of the address by which their node joined the cluster.

Left alone, gloo takes the address of the host's name, which on many hosts is a loopback, and NCCL the first interface it likes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

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


class _Backend(_TorchBackend):  # type: ignore[misc]
    """That of Ray, with the interface set before processes meet."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(use_own)
        super().on_start(worker_group, backend_config)


@dataclass
class OwnInterface(TorchConfig):  # type: ignore[misc]
    """Ray's configuration of torch.distributed, by `_Backend`."""

    @property
    def backend_cls(self) -> type[_Backend]:
        """Who sets the workers up."""
        return _Backend
