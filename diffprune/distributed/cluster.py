"""Starting Ray safely: a token always, loopback only, never somebody else's cluster by accident, no telemetry.

A cluster is joined only where its address is given, or where the Jobs API started this process inside one. A `RAY_ADDRESS`
that merely stands in a shell is not obeyed.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import ray
from ray._private import auto_init_hook, ray_constants
from ray._private import worker as ray_worker
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from diffprune.core import termination
from diffprune.core.errors import first_line
from diffprune.core.registry import FOLDER
from diffprune.distributed.reaper import clear, reaped
from diffprune.io.blob_store import named
from diffprune.io.run_lock import machine, start_ticks

INSIDE_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by the Jobs API for the process it starts, together with RAY_ADDRESS
ONE_HOST = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": every port of the node listens on 127.0.0.1, on every system
PREFIX = "dp-ray-"  # of a folder for one local cluster
OWNER = "owner"  # its file that says which process that is of
MOST_TMPDIR = 25  # bytes: a socket's path has 107, of which Ray's folders below take 82
MOST_TOKEN = 4096  # bytes that are looked at
STARTS = 4  # of a local cluster, on a busy machine
REACH_S = 10.0  # for a cluster to take a connection, and to answer on it
TLS = "RAY_USE_TLS"  # "1": Ray's own encryption, which a probe in clear text does not get through
STORE_BYTES = 256 * 2**20  # of a local object store: rows and small tensors pass through it, never a model


def loopback(host: str) -> bool:
    """Whether a host is this machine, by its loopback address."""
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"


def token_path() -> Path:
    """Where Ray looks for the token when it is not in the environment."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def secure(create: bool = True) -> None:
    """Switch token authentication on for this process and its children; call it before anything speaks to Ray.

    The token file is made where it is missing and closed to other users where it is open (Ray itself leaves it 0644).

    create: False where a new token would be of no use, as it must equal that of a running cluster.

    Raises:
        ValueError: no token, and none may be made; an empty one; a file that is a link or another user's.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # else `uv run` is repeated on workers, without the environment
    os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")  # a busy machine needs more than Ray's 30 s
    os.environ.setdefault(FOLDER, str(Path.cwd()))  # workers may run elsewhere, and find the plug-ins of this folder
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray runs workers at 15 otherwise, so any other process slows a measurement
    if given := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        os.environ["RAY_AUTH_TOKEN"] = given  # a secret often ends in a newline, which no header takes
    auto_init_hook.enable_auto_connect = False  # else any call starts a Ray of its own, in a folder that is open to every user
    Config.initialize("")  # Ray has read its environment when it was imported; read it again
    AuthenticationTokenLoader.instance().reset_cache()  # and keeps the first token it saw, which may be that of another cluster
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        if not token.strip():
            raise ValueError("RAY_AUTH_TOKEN is blank: put a token into it, or unset it")
        return
    path = token_path()
    try:
        _close(path)
    except FileNotFoundError:
        if not create:
            hint = f"put the one its head was started with into {path}, or into RAY_AUTH_TOKEN"
            raise ValueError(f"no token for this cluster: {hint}") from None
        _create(path)


def _close(path: Path) -> None:
    """Take a token file's permissions from other users. It is opened once and never through a link, so that nothing else can come
    to stand in its place between looking and changing.

    Raises:
        FileNotFoundError: there is none. ValueError: it is a link, another user's, no file, or empty.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        if path.is_symlink():
            raise ValueError(f"the token file {path} is a link: name what it points to in RAY_AUTH_TOKEN_PATH") from None
        raise ValueError(f"the token file {path} cannot be read ({error.strerror}): put the token into RAY_AUTH_TOKEN") from None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"the token file {path} is no file")
        if found.st_uid not in (os.geteuid(), 0):
            hint = "name one of your own in RAY_AUTH_TOKEN_PATH"
            raise ValueError(f"the token file {path} belongs to another user, who could change it: {hint}")
        if not os.read(handle, MOST_TOKEN).strip():
            raise ValueError(f"the token file {path} is empty: remove it, or put a token of your own into it")
        if found.st_mode & 0o077 and found.st_uid == os.geteuid():
            os.fchmod(handle, 0o600)
    finally:
        os.close(handle)


def _create(path: Path) -> None:
    """Write a new token, unless another process was faster.

    Raises:
        ValueError: the folder takes none.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
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
    with _started(where, workers):
        yield


def _started(where: str, workers: int, tries: int = STARTS) -> ExitStack:
    """Start or join a cluster; returns what undoes that.

    Raises:
        ValueError: see `connect`. RuntimeError: the machine is too busy to start one.
    """
    with ExitStack() as undo:
        folder = undo.enter_context(_one_host()) if where == "local" else None
        if folder is None:
            host = _reached(where)
            undo.enter_context(_on_loopback() if host and loopback(host) else nullcontext())
        undo.callback(ray.shutdown)
        undo.callback(setattr, ray_worker, "print_to_stdstream", ray_worker.print_to_stdstream)
        ray_worker.print_to_stdstream = _tell
        try:
            with termination.kept():
                ray.init(where, **_options(folder, workers))
            return undo.pop_all()
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ValueError(f"Ray does not start or answer at {where}: {first_line(error)}") from error
        except Exception as error:  # of just this class, where a node was not there after 30 s, which no setting changes
            if type(error) is not Exception:
                raise
            late = error
    if tries > 1:
        return _started(where, workers, tries - 1)
    raise RuntimeError(f"Ray did not start in {STARTS} tries of half a minute: is the machine too busy?") from late


def _tell(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    """What a raylet says of lost workers, a paragraph each, which Ray prints whatever `log_to_driver` is: the first sentence, and
    which process it was."""
    for text in data["lines"]:
        sentence = " ".join(text.split()).split(". ")[0].rstrip(".")
        who = re.search(r"Worker IP address: (\S+).*Worker PID: (\d+)", text)
        print(f"ray: {sentence}" + (f" (process {who[2]} of {who[1]})" if who else ""), flush=True)


def _reached(where: str) -> str:
    """The host of a cluster's address `host:port`, which answers: Ray would try for a quarter of an hour; "" where it is no such
    address.

    Raises:
        ValueError: nobody listens there, or who does is no Ray, or one that hangs.
    """
    place = where.removeprefix("ray://")
    host, _, port = place.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal():
        return ""
    end = time.monotonic() + REACH_S
    try:
        socket.create_connection((host, int(port)), REACH_S).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"no Ray answers at {where} ({first_line(error)}): correct --address, or start a head there") from None
    if os.environ.get(TLS) != "1" and not _speaks(place, max(1.0, end - time.monotonic())):
        hint = "give the port of a head's GCS (6379 if it was not set), or look whether the head hangs"
        raise ValueError(f"what listens at {where} does not answer as Ray does within {REACH_S:.0f} s: {hint}")
    return host


def _speaks(place: str, seconds: float) -> bool:
    """Whether gRPC, by which Ray is spoken to, gets through to `host:port`."""
    import grpc

    channel = grpc.insecure_channel(place, options=[("grpc.enable_http_proxy", 0)])  # Ray asks no proxy either
    try:
        grpc.channel_ready_future(channel).result(timeout=seconds)
    except grpc.FutureTimeoutError:
        return False
    finally:
        channel.close()
    return True


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray leaves 127.0.0.1 as it is, here and in its children: else it puts the host's own address in its place, where a cluster of
    this machine alone does not listen, and listens on every interface itself."""
    before = os.environ.get(ONE_HOST), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[ONE_HOST], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        os.environ.pop(ONE_HOST)
        if before[0] is not None:
            os.environ[ONE_HOST] = before[0]


@contextmanager
def private_folder() -> Iterator[str]:
    """A folder of this machine for what Ray notes while at work: below one that is ours and stays 0700, named by its owner, and
    removed in the end with the processes that still write there, be it that this process was killed.

    Raises:
        OSError: the disk is full; the text names the folder, of which nothing stays.
    """
    place = _short_folder()
    sweep_leftovers(Path(place))
    private = tempfile.mkdtemp(prefix=PREFIX, dir=place)
    note = Path(private) / OWNER
    try:
        note.write_text(f"{machine()} {os.getpid()} {start_ticks(os.getpid())}")
    except OSError as error:  # as on a full disk; without a note nobody would ever sweep the folder
        shutil.rmtree(private, ignore_errors=True)
        raise named(error, note) from error
    with reaped(private):
        (folder := Path(private) / "r").mkdir(mode=0o700)
        yield str(folder)


@contextmanager
def _one_host() -> Iterator[str]:
    """A folder for a cluster of this machine alone, whose ports all listen on 127.0.0.1.

    Ray opens its folder to every user of the machine, whatever it was (0777), with the packages it runs in it; hence a private one.
    """
    with private_folder() as folder, _on_loopback():
        yield folder


def sweep_leftovers(place: Path) -> None:
    """Remove what drivers of ours have left that were killed together with their reapers: folders whose owner is known to have
    ended on this machine, and processes that write there."""
    for left in place.glob(f"{PREFIX}*"):
        try:
            where, pid, ticks = (left / OWNER).read_text().split(" ")
            ended = where == machine() and str(start_ticks(int(pid))) != ticks
            if ended and not left.is_symlink() and left.stat().st_uid == os.geteuid():
                clear(str(left))
        except (OSError, ValueError):  # another's, or one that is being made
            continue


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
    if folder is None:  # who was started by the Jobs API has workers in a folder of its own, with the plug-ins that were sent
        outside = {"runtime_env": {"env_vars": {FOLDER: os.environ[FOLDER]}}}  # else they look where the head was started
        return quiet if INSIDE_A_JOB in os.environ else quiet | outside
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    local = {"include_dashboard": False, "num_cpus": max(cores, workers), "object_store_memory": STORE_BYTES, "_temp_dir": folder}
    return quiet | local
