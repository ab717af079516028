"""Who made a row and on what: commit, versions and hardware. No user names, paths, addresses or environment variables."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

from diffprune.core.records import Provenance
from diffprune.io import git

SENT = "DIFFPRUNE_COMMIT"  # of the code that was sent to where it runs: the commit, with a + where it was changed
PACKAGES = ("diffprune", "numpy", "pandas", "pyarrow", "ray", "torch", "transformers")


def _answer(*command: str) -> str | None:
    """What a command prints; None where it is missing, fails or takes longer than 10 s."""
    environment = git.environment() | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


@cache
def repository(folder: Path) -> tuple[str, bool]:
    """Commit and dirty flag (changed or new files, ignored ones aside) of the repository that `folder`'s code is tracked in.

    ("", False) outside one, also where the package is merely installed inside somebody else's repository; of code that was sent to
    a cluster, what it had where it was sent from. Looked up once per process: code that is changed later is not the code that runs.
    """
    asked = ("git", "-C", str(folder))
    if not _answer(*asked, "ls-files", "--error-unmatch", "--", "__init__.py"):
        sent = os.environ.get(SENT, "")
        return sent.removesuffix("+"), sent.endswith("+")
    commit = _answer(*asked, "rev-parse", "--verify", "HEAD")
    changes = _answer(*asked, "status", "--porcelain")
    return (commit or "").strip(), changes is None or bool(changes.strip())


def versions() -> dict[str, str]:
    """Of Python and of the packages that can change a number; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return (_answer("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()).strip()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def hardware() -> dict[str, object]:
    """CPU model, cores this process may use, memory, GPU names, threads.

    GPUs and threads are asked of torch where the process has loaded it: a process that has not computes nothing with it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch = sys.modules.get("torch")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch and torch.cuda.is_available() else []
    return {
        "cpu": _processor(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": cores,
        "memory_gib": _memory_gib(),
        "gpus": gpus,
        "threads": torch.get_num_threads() if torch else None,
    }


def collect(run: str, attempt: int, seed: int) -> Provenance:
    """The provenance of what this process is about to publish; `started` is now.

    run: the job's name; attempt: from the run's lock; seed: of the job.
    """
    commit, dirty = repository(Path(__file__).resolve().parent)
    return Provenance(
        run=run,
        attempt=attempt,
        commit=commit,
        dirty=dirty,
        versions=json.dumps(versions(), sort_keys=True),
        hardware=json.dumps(hardware(), sort_keys=True, allow_nan=False),
        job_seed=seed,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )
