"""Exit codes: what the process ends with that an error ended, on the command line and in a run's event log alike."""

from __future__ import annotations

import traceback
from pathlib import Path

from diffprune.core import registry, termination

PACKAGE = Path(__file__).parents[1]
FAILED, MISTAKE, INTERRUPTED = 1, 2, 130  # after Ctrl-C


def exit_code(error: BaseException | None) -> int:
    """0 without an error, 2 for a user's mistake, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, else 1."""
    if isinstance(error, SystemExit):
        return int(error.code or 0)
    if isinstance(error, KeyboardInterrupt):  # Ray raises one of its own where SIGTERM comes while we wait for it
        return termination.exit_code() if termination.asked() else INTERRUPTED
    if isinstance(error, ValueError) and ours(error):
        return MISTAKE
    return FAILED if error else 0


def ours(error: BaseException) -> bool:
    """Whether the project, a job or a user's plug-in raised this on purpose: the innermost frame is there. Foreign ValueErrors
    deserve their traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    innermost = Path(frames[-1].filename) if frames else PACKAGE
    own = innermost.parent.name == "jobs" or innermost.parent in map(registry.own_folder, registry.KINDS)
    return own or PACKAGE in innermost.parents or type(error).__module__.startswith("pydantic")
