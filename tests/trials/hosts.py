"""A cluster of several hosts on one machine: a head without CPUs and hosts with one each, in network namespaces of their own.

Each host has an address, a name and a folder for Ray of its own; what lies elsewhere is shared, as on a network file system.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from typing import Any

import psutil
import pytest
from scenario import Run, Scene

PORT = "6379"
WAIT = """
import ray, sys, time
ray.init(sys.argv[1], logging_level=40)
while ray.cluster_resources().get("CPU", 0) < int(sys.argv[2]):
    time.sleep(0.2)
"""


def network(*command: str) -> None:
    """`ip` with some arguments; the trial is skipped where that is not allowed."""
    done = subprocess.run(["ip", *command], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no hosts of their own here: ip {' '.join(command)}: {done.stderr.strip()}")


class Hosts:
    """A `with` block. count: hosts beside the head."""

    def __init__(self, scene: Scene, count: int, **environment: str) -> None:
        if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
            pytest.skip("hosts of their own need root and iproute2")
        self.scene, self.count = scene, count
        self.label, self.subnet = f"dpt{os.getpid() % 100000}", f"10.77.{os.getpid() % 250}"
        self.environment = environment | {
            "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "RAY_agent_register_timeout_ms": "300000",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
        }  # fmt: skip
        self.running: dict[int, Run] = {}

    @property
    def address(self) -> str:
        return f"{self.subnet}.2:{PORT}"

    def through(self, host: int) -> list[str]:
        """What is written before a command that is to run on a host; 0 is the head."""
        place = self.scene.temporary / f"{self.label}-{host}"
        place.mkdir(exist_ok=True)
        (self.scene.temporary / "ray").mkdir(exist_ok=True)
        inner = f'hostname host{host}; mount --bind {place} {self.scene.temporary}/ray; exec "$@"'
        return ["ip", "netns", "exec", f"{self.label}-{host}", "unshare", "--mount", "--uts", "bash", "-c", inner, "bash"]

    def __enter__(self) -> Hosts:
        try:
            self.begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def begin(self) -> None:
        """Wire the hosts, and start Ray on all of them."""
        network("link", "add", self.label, "type", "bridge")
        network("link", "set", self.label, "up")
        for host in range(self.count + 1):
            name = f"{self.label}-{host}"
            network("netns", "add", name)
            network("link", "add", f"{self.label}v{host}", "type", "veth", "peer", "name", "eth0", "netns", name)
            network("link", "set", f"{self.label}v{host}", "master", self.label, "up")
            network("-n", name, "addr", "add", f"{self.subnet}.{host + 2}/24", "dev", "eth0")
            network("-n", name, "link", "set", "eth0", "up")
            network("-n", name, "link", "set", "lo", "up")
        for host in range(self.count + 1):
            self.join(host)
        command = [*self.through(0), sys.executable, "-c", WAIT, self.address, str(self.count)]
        assert (waiting := self.scene.start("ready", command, **self.environment)).wait(60) == 0, waiting.text

    def join(self, host: int) -> None:
        """Start Ray on a host."""
        role = ["--head", f"--port={PORT}", "--include-dashboard=false"] if host == 0 else [f"--address={self.address}"]
        options = [f"--node-ip-address={self.subnet}.{host + 2}", f"--num-cpus={min(host, 1)}", "--object-store-memory=100000000"]
        place = [f"--temp-dir={self.scene.temporary}/ray"] if host == 0 else []
        command = [*self.through(host), sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *role, *options, *place]
        self.running[host] = run = self.scene.start(f"host{host}", command, **self.environment)
        run.until(lambda: "Ray runtime started" in run.text, 60)

    def process(self, host: int, name: str) -> psutil.Process:
        """A process of Ray's on a host: raylet, or gcs_server of the head."""
        family = psutil.Process(self.running[host].process.pid).children(recursive=True)
        (found,) = (one for one in family if one.name() == name)
        return found

    def __exit__(self, *_: Any) -> None:
        for one in self.running.values():
            one.process.terminate()
        for one in self.running.values():
            with suppress(subprocess.TimeoutExpired):
                one.process.wait(30)
        for one in self.scene.processes():
            with suppress(psutil.Error):
                one.resume()
                one.kill()
        for host in range(self.count + 1):
            subprocess.run(["ip", "netns", "del", f"{self.label}-{host}"], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", self.label], check=False, capture_output=True)
        for one in self.scene.temporary.iterdir():
            shutil.rmtree(one, ignore_errors=True)
