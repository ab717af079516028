"""Send a job to a cluster through the Ray Jobs API, follow its log, and end with its status.

The folder of the job is uploaded (without what .gitignore names) and runs there with the head's own Ray session; the token
travels in a header and is never written to a log. Kubernetes and Slurm start clusters; the way in stays this one.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from diffprune.core.errors import first_line
from diffprune.distributed.cluster import secure, token_path
from diffprune.io.names import checked_name

LEFT_HERE = [".git", ".venv", "runs"]  # whatever .gitignore says
POLL_S = 0.5
AGENT_S = 30.0  # a head answers before it can start jobs
STOPPED = 130  # exit code of a job that was stopped, as of a program after Ctrl-C


def submit(job: str, folder: Path, address: str, arguments: Sequence[str] = (), *, name: str | None = None) -> int:
    """Run `diffprune run JOB ARGUMENTS` on the cluster behind `address`; returns the job's exit code.

    folder: what is uploaded, with the job in it (`diffprune.io.job_files.placed`). address: of the head's dashboard, as in
    http://127.0.0.1:8265. name: submission id. Ctrl-C stops following, not the job: 130.

    Raises:
        ValueError: no token, a wrong one, nobody at the address, or no place for results that outlives the job.
    """
    here = _loopback(address)
    python = sys.executable if here else "python"  # a job gets the PATH that `ray start` had, so on this machine it is spelt out
    options = [*arguments, *_out(arguments, here)]
    return run([python, "-m", "diffprune", "run", job, *options], address, folder, name=name)


def run(command: Sequence[str], address: str, folder: Path, *, name: str | None = None) -> int:
    """Upload `folder`, run `command` in it on the head, follow; see `submit`."""
    name = checked_name(name or f"diffprune-{uuid.uuid4().hex[:10]}", "submission id")  # Ray lets `../` out of its log folder
    client = connect(address)
    environment = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    runtime = {"working_dir": str(folder), "excludes": LEFT_HERE, "env_vars": environment}
    _start(client, shlex.join(command), name, runtime)
    print(f"submitted {name} to {address}", flush=True)
    try:
        asyncio.run(_follow(client, name))
    except KeyboardInterrupt:
        stop = f"RAY_AUTH_MODE=token {Path(sys.executable).parent / 'ray'} job stop {name} --address {address}"
        print(f"\nno longer following {name}; it goes on. To stop it: {stop}", file=sys.stderr)
        return STOPPED
    except OSError as error:
        raise RuntimeError(
            f"the head at {address} went away while {name} ran; submit again to go on from what is stored"
        ) from error
    return _verdict(client, name)


def connect(address: str) -> JobSubmissionClient:
    """A client that the head has let in.

    Raises:
        ValueError: a sentence for each way in which that fails.
    """
    if urlsplit(address).scheme not in {"http", "https"}:
        raise ValueError(f"the address {address!r} is not of a dashboard: write http://HOST:8265")
    secure(create=False)
    path = token_path()
    token = os.environ.get("RAY_AUTH_TOKEN") or path.read_text().strip()
    try:
        return JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"})
    except ConnectionError:
        raise ValueError(f"nobody answers at {address}: start a head node (cluster/README.md) or correct --address") from None
    except AuthenticationError:
        origin = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else str(path)
        raise ValueError(f"{address} refuses the token in {origin}: it must equal the one its head was started with") from None
    except RuntimeError as error:
        raise ValueError(f"{address} is no Ray {ray.__version__} head: {first_line(error)}") from None


def _loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"


def _out(arguments: Sequence[str], here: bool) -> list[str]:
    """`--out`, absolute: a job runs in a copy of the folder, which is deleted with the cluster."""
    if any(a == "--out" or a.startswith("--out=") for a in arguments):
        return []
    if not here:
        raise ValueError("add --out FOLDER, one that every host of the cluster can reach: results in the job's own folder are lost")
    return ["--out", str(Path.cwd() / "runs")]


def _start(client: JobSubmissionClient, entrypoint: str, name: str, runtime: dict[str, Any]) -> None:
    until = time.monotonic() + AGENT_S
    while True:
        try:
            client.submit_job(entrypoint=entrypoint, submission_id=name, runtime_env=runtime)
            return
        except RuntimeError as error:
            if "No available agent" in str(error) and time.monotonic() < until:
                time.sleep(POLL_S)
                continue
            last = str(error).strip().splitlines()[-1]
            raise ValueError(f"the head does not take the job {name}: {last:.300}") from None


async def _follow(client: JobSubmissionClient, name: str) -> None:
    """Print the log as it grows; taken up again where it broke off. Ends with the job, not with Ray's stream seconds later."""
    shown = 0

    async def tail() -> None:
        nonlocal shown
        position = 0
        async for chunk in client.tail_job_logs(name):
            fresh = chunk[max(0, shown - position) :]
            position += len(chunk)
            shown = max(shown, position)
            print(fresh, end="", flush=True)

    reader = asyncio.create_task(tail())
    while not (await asyncio.to_thread(client.get_job_status, name)).is_terminal():
        if reader.done():
            reader = asyncio.create_task(tail()) if reader.exception() else reader
        await asyncio.sleep(POLL_S)
    reader.cancel()
    with suppress(asyncio.CancelledError, RuntimeError, aiohttp.ClientError):
        await reader
    whole = await asyncio.to_thread(client.get_job_logs, name)
    print(whole[shown:], end="", flush=True)


def _verdict(client: JobSubmissionClient, name: str) -> int:
    info = client.get_job_info(name)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        print(f"{name} was stopped", file=sys.stderr)
        return STOPPED
    reason = (info.message or "no reason given").partition(", last available logs")[0]
    print(f"{name} failed: {reason:.300}", file=sys.stderr)
    return info.driver_exit_code or 1
