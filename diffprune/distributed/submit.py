"""Send a job to a cluster through the Ray Jobs API, follow its log, and end with its status.

Submissions of one run are its attempts: `demo-1`, `demo-2`. Everything needed to send the next one is in the metadata of the last.
Kubernetes and Slurm start clusters; the way in stays this one.
"""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from ray.job_submission import JobDetails, JobStatus

from diffprune.core import termination
from diffprune.core.registry import nearest
from diffprune.distributed.head import Away, Head, on_this_machine, without_rays_lines
from diffprune.io.blob_store import open_blobs, remote
from diffprune.io.names import checked_name
from diffprune.io.project import Project
from diffprune.store.provenance import SENT, repository

T = TypeVar("T")

POLL_S = 0.5
AGENT_S = 30.0  # a head answers before it can start jobs
GRACE_S = 30  # between SIGTERM and SIGKILL; Ray's own three seconds are less than a large state takes to be written
SAVE_S = 20  # of them, until a step that is under way is given up
STOP_S = 60.0
GONE = "does not exist"  # what a head says of a job that another head was sent
UNREADABLE = "UnicodeDecodeError"  # in what it says of a log that is not UTF-8
STOPPED = 130  # exit code of a job that was stopped, as of a program after Ctrl-C
OURS = {"run", "job", "arguments"}  # of what is told of a job, by which `diffprune submit` has sent it
MOST_ASKED = 100  # characters of what a job was asked, in a list
MOST_RUN = 56  # characters of a run's name in an id, which has at most 64
SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|CONNECTION_?STRING|AUTHORIZATION|BEARER|COOKIE|API_?KEY"
    r"|WEBHOOK|KEY(_|$)|(^|_)(PASS|PWD|SAS|AUTH|PAT|JWT|LOGIN)$"
)
SECRET_VALUE = re.compile(
    r"://[^/\s:@]*:[^/\s@]+@|https?://[^/\s@]+@"  # a password or token in an address
    r"|\b(AccountKey|SharedAccessKey|SharedAccessSignature|sig|X-Amz-Signature|X-Goog-Signature)="  # what signs one
    r"|private_?key|-----BEGIN |\bBearer\s"
    r"|hooks\.slack\.com|\beyJ[\w-]{8,}\.[\w-]{8,}\.|\bxox[abeoprs]-[\w-]{8}|\bAIza[\w-]{16}"  # how some tokens begin
    r"|\bglpat-[\w-]{8}|\bnpm_\w{16}|\bpypi-[\w-]{16}|\bdckr_\w{3}_|\bwandb_v1_"
    r"|\bhf_\w{16}|\bgh[pousr]_\w{16}|\bgithub_pat_|\b(AKIA|ASIA)[0-9A-Z]{16}\b|\bsk-[\w-]{16}",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Request:
    """A job to send: the verb `run` with its arguments, as typed, and where it runs.

    run: its name, of the folder below `--out`. env: variables of its processes. image: of a container, whose own files it runs.
    timeout_s: after which it is interrupted, exit code 124; what was finished is kept.
    """

    run: str
    job: str
    arguments: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    image: str | None = None
    timeout_s: int | None = None
    working_dir: str | None = None

    def entrypoint(self, job: str, address: str) -> list[str]:
        """The command on the head. job: as it is called there.

        Raises:
            ValueError: see `_out`.
        """
        here = not self.image and on_this_machine(address)  # where a job gets the PATH of `ray start`, so python is spelt out
        python = sys.executable if here else "python"
        limit = ["timeout", "--signal=TERM", "--kill-after=120", str(self.timeout_s)] if self.timeout_s else []
        return [*limit, python, "-m", "diffprune", "run", job, *self.arguments, *_out(self.arguments, here)]

    def metadata(self, attempt: int, job: str, address: str) -> dict[str, str]:
        """What `resume` and `results` need; texts, as Ray wants them. Values of variables are not in it."""
        out = option(self.entrypoint(job, address), "--out") or ""
        told = {"run": self.run, "attempt": str(attempt), "job": self.job, "arguments": json.dumps(self.arguments), "out": out}
        told["folder"] = str(Path.cwd())
        also = {"image": self.image, "timeout_s": self.timeout_s, "working_dir": self.working_dir}
        return told | {key: str(value) for key, value in also.items() if value}


def option(arguments: Sequence[str], name: str) -> str | None:
    """The last value of an option on a command line."""
    found = None
    for index, text in enumerate(arguments):
        if text.startswith(f"{name}="):
            found = text.partition("=")[2]
        elif text == name and index + 1 < len(arguments):
            found = arguments[index + 1]
    return found


def _out(arguments: Sequence[str], here: bool) -> list[str]:
    """`--out`, where it is not given or not absolute: a job runs in a copy of the folder, which is deleted with the cluster.

    here: the job runs on this machine, outside a container, so that a folder of ours is one of the job's, too.

    Raises:
        ValueError: no place for results that outlives the job, or one that is no address of storage.
    """
    given = option(arguments, "--out")
    if given is not None and remote(given):
        open_blobs(given)
        return []
    if given is None and not here:
        raise ValueError(
            "add --out, a folder or bucket that every host of the cluster can reach: results in the job's own folder are lost"
        )
    if given is not None and not here and not Path(given).is_absolute():
        raise ValueError(f"--out {given} would lie in the job's own folder, which goes with the cluster: give an absolute path")
    return [] if given and Path(given).is_absolute() else ["--out", str(Path.cwd() / (given or "runs"))]


def variables(pairs: Sequence[str]) -> dict[str, str]:
    """`["A=1"]` -> `{"A": "1"}`.

    Raises:
        ValueError: no assignment, or something that looks like a secret.
    """
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not (name.isidentifier() and name.isascii()):
            raise ValueError(f"--env {name:.40}: write NAME=VALUE")
        if SECRET_NAME.search(name.upper()) or SECRET_VALUE.search(value):
            raise ValueError(
                f"--env {name}: Ray writes variables into its logs; give secrets to the nodes themselves (cluster/README.md)"
            )
        found[name] = value
    return found


def submit(head: Head, address: str, request: Request, project: Project | None) -> str:
    """Send a job; returns its id, `<run>-<attempt>`.

    project: what travels; None with an image, which has everything.

    Raises:
        ValueError: the head does not take it.
    """
    job = project.job if project else request.job
    command = shlex.join(request.entrypoint(job, address))
    prefix = request.run[:MOST_RUN]
    grace = {"RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_S), termination.GRACE: str(SAVE_S)}
    environment = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", **grace, **request.env}
    environment.pop(SENT, None)  # of a job that is sent again, as it was then
    commit, dirty = repository(project.root / "diffprune") if project else ("", False)
    if commit:
        environment[SENT] = commit + "+" * dirty
    runtime: dict[str, Any] = {"env_vars": environment}
    with tempfile.TemporaryDirectory(prefix="diffprune-") as folder:
        if project:
            runtime["working_dir"] = str(Path(folder) / "project.zip")
            project.write(Path(folder) / "project.zip")
        else:
            runtime["image_uri"] = request.image
        while True:
            attempt = _newest(head, prefix) + 1
            name = checked_name(f"{prefix}-{attempt}", "submission id")  # Ray lets `../` out of its log folder
            try:
                if start(head, command, name, runtime, request.metadata(attempt, job, address)):
                    return name
            except (KeyboardInterrupt, Away):
                print(f"\n{name} may have begun all the same: diffprune jobs --address {address}", file=sys.stderr)
                raise


def _newest(head: Head, prefix: str) -> int:
    """The highest attempt in the ids of a head's jobs, 0 where there is none."""
    ids = [job.submission_id or "" for job in head.list_jobs()]
    numbers = [number for run, _, number in (one.rpartition("-") for one in ids) if run == prefix]
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def start(head: Head, entrypoint: str, name: str, runtime: dict[str, Any], metadata: dict[str, str]) -> bool:
    """Hand a job to a head, which may not be ready yet; False where the name is taken.

    Raises:
        ValueError: it does not take it. Away: it does not answer any more.
    """
    until = time.monotonic() + AGENT_S
    while True:
        try:
            head.submit_job(entrypoint=entrypoint, submission_id=name, runtime_env=runtime, metadata=metadata)
            return True
        except Away:
            raise
        except RuntimeError as error:
            if "already exists" in str(error):
                return False
            if "No available agent" in str(error) and time.monotonic() < until:
                time.sleep(POLL_S)
                continue
            last = str(error).strip().splitlines()[-1]
            raise ValueError(f"the head does not take the job {name}: {last:.300}") from None


def found(head: Head, name: str) -> JobDetails:
    """A job by its id.

    Raises:
        ValueError: there is none; the nearest is named.
    """
    jobs = {job.submission_id: job for job in head.list_jobs() if job.submission_id}
    if name not in jobs:
        hint = nearest(name, jobs) if jobs else "there are none"
        raise ValueError(f"no job {name!r:.80} on {head.get_address()}: {hint}")
    return jobs[name]


def request_of(job: JobDetails) -> Request:
    """The request that a job was made from, to send it again: into the same folder, from wherever that is done.

    Raises:
        ValueError: it runs still, or was not sent by `diffprune submit`.
    """
    told = job.metadata or {}
    if not job.status.is_terminal():
        raise ValueError(f"{job.submission_id} is not over ({job.status.value.lower()}): diffprune logs {job.submission_id} -f")
    if (arguments := _arguments(told)) is None:
        raise ValueError(f"{job.submission_id} was not sent by diffprune submit, so nothing tells how to resume it")
    seconds = told.get("timeout_s")
    variables = (job.runtime_env or {}).get("env_vars") or {}
    if "out" in told and option(arguments, "--out") != told["out"]:
        arguments += ("--out", told["out"])
    return Request(
        told["run"], told["job"], arguments, variables, told.get("image"),
        int(seconds) if seconds else None, told.get("working_dir"),
    )  # fmt: skip


def _arguments(told: Mapping[str, str]) -> tuple[str, ...] | None:
    """What a job was given, as `diffprune submit` notes it; None of one that was not sent by it, whatever is told of that."""
    try:
        found = json.loads(told["arguments"]) if set(told) >= OURS else None
    except (ValueError, RecursionError):
        return None
    return tuple(found) if isinstance(found, list) and all(isinstance(one, str) for one in found) else None


def log_of(head: Head, name: str) -> str:
    """The log of a job; nothing, and a sentence on the terminal, where the head cannot read it, as one that is not UTF-8."""
    try:
        return str(head.get_job_logs(name))
    except RuntimeError as error:
        if UNREADABLE not in str(error):
            raise
        where = f"it is job-driver-{name}.log in the head's folder of logs"
        print(f"the log of {name} is no UTF-8 text, which the head does not show: {where}", file=sys.stderr)
        return ""


def follow(head: Head, name: str) -> int:
    """Show the log of a job until it ends; returns its exit code. Ctrl-C stops following, not the job: 130.

    Raises:
        RuntimeError: the head went away, or another has taken its place.
    """
    address = head.get_address()
    try:
        asyncio.run(_follow(head, name))
    except KeyboardInterrupt:
        stop = f"diffprune stop {name} --address {address}"
        print(f"\nno longer following {name}; it goes on. To stop it: {stop}", file=sys.stderr)
        return STOPPED
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not (isinstance(error, Away) or GONE in str(error)):
            raise
        hint = "once a head is there again, send the same submit again: it goes on from what is stored"
        raise RuntimeError(f"the head at {address} went away while {name} ran; {hint}") from error
    return _verdict(head, name)


async def _follow(head: Head, name: str) -> None:
    """Print the log as it grows; taken up again where it broke off. Ends with the job, not with Ray's stream seconds later."""
    log = _Shown()

    async def tail() -> None:
        position = 0
        async for chunk in head.tail_job_logs(name):
            fresh = chunk[max(0, log.length - position) :]
            position += len(chunk)
            log.show(fresh)

    reader = asyncio.create_task(tail())
    try:
        while not (await _apart(head.get_job_status, name)).is_terminal():
            if reader.done():
                reader = asyncio.create_task(tail()) if reader.exception() else reader
            await asyncio.sleep(POLL_S)
    finally:
        reader.cancel()
        with suppress(asyncio.CancelledError, RuntimeError, aiohttp.ClientError):
            await reader
    whole = await _apart(log_of, head, name)
    log.show(whole[log.length :])
    print(log.rest, end="", flush=True)


async def _apart(ask: Callable[..., T], *args: Any) -> T:
    """What `ask(*args)` returns, in a thread of its own that nobody waits for: asyncio's threads are waited for in the end, so that
    Ctrl-C would do nothing for as long as a mute head is given."""
    answer = Future[T]()
    answer.set_running_or_notify_cancel()  # so that an answer that nobody wants any more is taken nevertheless

    def run() -> None:
        try:
            answer.set_result(ask(*args))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True, name="head").start()
    return await asyncio.wrap_future(answer)


@dataclass
class _Shown:
    """What was printed of a log: whole lines, without those of Ray itself. length: read so far; rest: of a line that goes on."""

    length: int = 0
    rest: str = ""

    def show(self, fresh: str) -> None:
        self.length += len(fresh)
        whole, end, self.rest = (self.rest + fresh).rpartition("\n")
        print(without_rays_lines(whole + end), end="", flush=True)


def _verdict(head: Head, name: str) -> int:
    info = head.get_job_info(name)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        print(f"{name} was stopped", file=sys.stderr)
        return STOPPED
    reason = (info.message or "no reason given").partition(", last available logs")[0].splitlines()[0]
    print(f"{name} failed: {reason:.300}", file=sys.stderr)
    return info.driver_exit_code or 1


def stop(head: Head, name: str) -> str:
    """Stop a job and wait until it has ended; returns what is to be said.

    Raises:
        ValueError: no such job. RuntimeError: it does not end.
    """
    if found(head, name).status.is_terminal():
        return f"{name} had ended already"
    head.stop_job(name)
    until = time.monotonic() + STOP_S
    while not head.get_job_status(name).is_terminal():
        if time.monotonic() > until:
            raise RuntimeError(f"{name} was told to stop and has not ended after {STOP_S:.0f} s")
        time.sleep(POLL_S)
    return f"{name} was stopped; what was finished is kept: diffprune resume {name}"


def listed(head: Head) -> list[tuple[str, ...]]:
    """(id, status, started, job and what it was given) of every job of a head, oldest first."""
    jobs = sorted((job for job in head.list_jobs() if job.submission_id), key=lambda job: job.start_time or 0)
    rows: list[tuple[str, ...]] = []
    for job in jobs:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.start_time / 1000)) if job.start_time else ""
        rows.append((str(job.submission_id), job.status.value, began, _asked(job)))
    return rows


def _asked(job: JobDetails) -> str:
    told = job.metadata or {}
    if (arguments := _arguments(told)) is None:
        return " ".join(job.entrypoint.split())[:MOST_ASKED]
    text = shlex.join([told["job"], *arguments])
    return text if len(text) <= MOST_ASKED else f"{text[: MOST_ASKED - 3]}..."
