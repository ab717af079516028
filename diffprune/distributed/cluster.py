"""Starting Ray safely: a token always, loopback only, never somebody else's cluster by accident, no telemetry.

A cluster is joined only where its address is given, or where the Jobs API started this process inside one. A `RAY_ADDRESS`
that merely stands in a shell is not obeyed.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._raylet import Config  # type: ignore[attr-defined]

from diffprune.core.errors import first_line
from diffprune.core.registry import FOLDER

INSIDE_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by the Jobs API for the process it starts, together with RAY_ADDRESS
ONE_HOST = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": every port of the node listens on 127.0.0.1, on every system
MOST_TMPDIR = 27  # bytes: a socket's path has 107, of which Ray's folders below take 80
STORE_BYTES = 256 * 2**20  # of a local object store: rows and small tensors pass through it, never a model


def token_path() -> Path:
    """Where Ray looks for the token when it is not in the environment."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def secure(create: bool = True) -> None:
    """Switch token authentication on for this process and its children; call it before anything speaks to Ray.

    The token file is made where it is missing and closed to other users where it is open (Ray itself leaves it 0644).

    create: False where a new token would be of no use, as it must equal that of a running cluster.

    Raises:
        ValueError: no token, and none may be made.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # else `uv run` is repeated on workers, without the environment
    os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")  # a busy machine needs more than Ray's 30 s
    os.environ.setdefault(FOLDER, str(Path.cwd()))  # workers may run elsewhere, and find the plug-ins of this folder
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray runs workers at 15 otherwise, so any other process slows a measurement
    Config.initialize("")  # Ray has read its environment when it was imported; read it again
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = token_path()
    if path.is_file():
        if not path.stat().st_size:
            raise ValueError(f"the token file {path} is empty: remove it, or put a token of your own into it")
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
        return
    if not create:
        raise ValueError(f"no token for this cluster: put the one its head was started with into {path}, or into RAY_AUTH_TOKEN")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return  # another process was faster
    except OSError as error:
        hint = "put a secret of your own into RAY_AUTH_TOKEN, which needs no file"
        raise ValueError(f"the token file {path} cannot be written ({error.strerror}): {hint}") from None
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))


def joined(address: str | None) -> str:
    """The cluster to use: the one given, the one this job runs in, else "local", which starts one."""
    if address:
        return address
    return os.environ.get("RAY_ADDRESS", "local") if INSIDE_A_JOB in os.environ else "local"


@contextmanager
def connect(address: str | None = None, workers: int = 1) -> Iterator[None]:
    """Ray for the length of a `with` block; what was started here is shut down and leaves no file behind.

    address: of a running cluster ("auto" or host:port); None starts one on this machine, unless inside a submitted job.
    workers: processes wanted. A local cluster offers at least that many CPUs, so that two workers run on one core too.

    Raises:
        ValueError: the cluster cannot be reached, or not with this token.
    """
    if ray.is_initialized():  # an outer block holds it, and closes it
        yield
        return
    where = joined(address)
    secure(create=where == "local")
    with ExitStack() as undo:
        folder = undo.enter_context(_one_host()) if where == "local" else None
        undo.callback(ray.shutdown)
        try:
            ray.init(where, **_options(folder, workers))
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ValueError(f"Ray does not start or answer at {where}: {first_line(error)}") from error
        yield


@contextmanager
def _one_host() -> Iterator[str]:
    """A private folder (0700) for a cluster of this machine alone, whose ports all listen on 127.0.0.1.

    Without the switch Ray replaces 127.0.0.1 by the host's own address and listens on every interface.
    """
    before = os.environ.get(ONE_HOST), ray_constants.ENABLE_RAY_CLUSTER
    folder = tempfile.mkdtemp(prefix="dp-ray-", dir=_short_folder())
    os.environ[ONE_HOST], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        os.environ.pop(ONE_HOST)
        if before[0] is not None:
            os.environ[ONE_HOST] = before[0]


def _short_folder() -> str:
    """Where temporary files go, or the first of the usual folders whose name is short enough for the sockets below it.

    Raises:
        ValueError: there is none that can be written.
    """
    for place in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):
        if len(os.fsencode(place)) <= MOST_TMPDIR and os.access(place, os.W_OK | os.X_OK):
            return place
    raise ValueError(f"no folder for Ray's sockets: set TMPDIR to one of at most {MOST_TMPDIR} characters that can be written")


def _options(folder: str | None, workers: int) -> dict[str, Any]:
    """Arguments of `ray.init`; folder: of a local cluster, None where one is joined."""
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if folder is None:
        return quiet
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    local = {"include_dashboard": False, "num_cpus": max(cores, workers), "object_store_memory": STORE_BYTES, "_temp_dir": folder}
    return quiet | local
