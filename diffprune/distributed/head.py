"""The Jobs API of a head node: let in with a token, and never waited for without an end.

The token travels in a header. Over plain HTTP to another machine everybody on the way could read it, so that is refused unless
asked for. No log, record or message holds it.
"""

from __future__ import annotations

import logging
import os
import re
from typing import Any
from urllib.parse import urlsplit

import psutil
import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from diffprune.core.errors import first_line
from diffprune.distributed import cluster
from diffprune.distributed.cluster import secure, token_path

CONNECT_S, VERSION_S = 5.0, 8.0  # together below the fifteen seconds in which a user hears of a host that is mute
ANSWER_S = 120.0  # a busy head takes its time to start a job
VERSION = "/api/version"  # what is asked first
DASHBOARD = "ray/dashboard/dashboard.py"  # the program of Ray that answers at a head's address
OF_RAY = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+\t(INFO|WARNING) [\w.]+\.py:\d+ -- .*\n|Running entrypoint for job .*\n")


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """A login of requests that leaves the token's header; without one a .netrc's takes its place."""
    return request


class Away(RuntimeError):
    """A head that had let us in does not answer any more."""


class Head(JobSubmissionClient):
    """Ray's own client, whose requests end and follow nobody elsewhere, and go by no proxy where the token is in clear."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        patience = VERSION_S if endpoint == VERSION else ANSWER_S
        own: dict[str, Any] = {"timeout": (CONNECT_S, patience), "allow_redirects": False, "auth": _as_it_is}
        if self.get_address().startswith("http://"):
            own["proxies"] = {"http": ""}
        try:
            return super()._do_request(method, endpoint, **own | options)
        except requests.RequestException as error:
            if endpoint == VERSION:  # the first of all, of which `connect` tells
                raise
            raise Away(f"{self.get_address()} no longer answers: is the head still there, and the tunnel to it?") from error


def connect(address: str, insecure: bool = False) -> Head:
    """A client that the head has let in.

    address: of its dashboard, as in http://127.0.0.1:8265. insecure: http:// to another machine, the token in clear.

    Raises:
        ValueError: a sentence for each way in which that fails.
    """
    check(address, insecure)
    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(name).setLevel(logging.WARNING)  # what it sends, and that a head went away, is said in our words
    secure(create=False)
    path = token_path()
    token = (os.environ.get("RAY_AUTH_TOKEN") or path.read_text(errors="replace")).strip()
    origin = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else str(path)
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ValueError(f"the token in {origin} has spaces or letters that are not ASCII: put the one of the head into it")
    try:
        return Head(address, headers={"Authorization": f"Bearer {token}"})
    except AuthenticationError:
        raise ValueError(f"{address} refuses the token in {origin}: it must equal the one its head was started with") from None
    except requests.Timeout:
        raise ValueError(
            f"{address} does not answer within {CONNECT_S + VERSION_S:.0f} s: is it the dashboard of a head?"
        ) from None
    except ConnectionError:
        raise ValueError(f"nobody answers at {address}: start a head node (cluster/README.md) or correct --address") from None
    except (RuntimeError, requests.RequestException, KeyError, ValueError) as error:
        raise ValueError(f"{address} is no Ray {ray.__version__} head: {first_line(error)}") from None


def without_rays_lines(log: str) -> str:
    """The whole lines of a job's log without those that Ray itself has put there."""
    return "".join(line for line in log.splitlines(keepends=True) if not OF_RAY.fullmatch(line))


def check(address: str, insecure: bool) -> None:
    """Raises ValueError: no address of a dashboard, or one to which the token would go in clear."""
    try:
        parts = urlsplit(address)
        known = parts.scheme in {"http", "https"} and parts.hostname and (parts.port or True)
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"the address {address!r:.100} is not of a dashboard: write http://HOST:8265")
    if parts.username or parts.password:
        raise ValueError("the address holds a name or password, which would end up in logs: the token is all that is needed")
    if parts.scheme == "http" and not loopback(address) and not insecure:
        raise ValueError(
            f"http://{parts.hostname} is another machine, and the token would travel there in clear: tunnel to it (ssh -L "
            f"8265:127.0.0.1:8265 {parts.hostname}), use https://, or say --insecure"
        )


def loopback(address: str) -> bool:
    """Whether the address of a dashboard is a loopback one: the head's own on this machine, or the near end of a tunnel."""
    return cluster.loopback(urlsplit(address).hostname or "")


def on_this_machine(address: str) -> bool:
    """Whether the head at an address runs here, among the files that this process sees: told by the process that listens there,
    since `ssh -L`, `kubectl port-forward` and `ray attach -p` listen on 127.0.0.1 as well. False where that cannot be told."""
    parts = urlsplit(address)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    if not loopback(address):
        return False
    listeners: dict[str, list[int]] = {}  # processes by the address on which they listen: some may share a socket
    try:
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr.port == port:
                listeners.setdefault(one.laddr.ip, []).append(one.pid or 0)
    except psutil.Error:  # a system that shows nobody's
        return False
    return bool(listeners) and all(any(map(_is_dashboard, processes)) for processes in listeners.values())


def _is_dashboard(pid: int) -> bool:
    """Whether a process is Ray's dashboard, in no container: one with files of its own knows nothing of our folders."""
    try:
        line = psutil.Process(pid).cmdline() if pid else []
        ours = not os.path.isdir("/proc/self/root") or os.path.samefile(f"/proc/{pid}/root", "/")
    except (psutil.Error, OSError):
        return False
    return ours and any(part.endswith(DASHBOARD) for part in line)
