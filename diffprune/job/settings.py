"""Settings a run was last asked under, kept as `job.json` in its folder: what has changed since is said in a sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffprune.io.blob_store import open_blobs
from diffprune.io.json_object import parsed
from diffprune.job.job import SECTIONS, Job

FILE = "job.json"
SILENT = ("title", "workers", "gpus", "accelerator", "config", "assumed", "tiny", "report", "trackers")  # which change no result


def keep(job: Job, folder: Path, stages: Sequence[str]) -> None:
    """Note the settings of a run; print what differs from those that were noted before, of the stages that are run now.

    Raises:
        OSError: the folder cannot be written.
    """
    new = noted(job)
    try:
        old: dict[str, Any] = parsed(open_blobs(folder).read(FILE))
    except (OSError, ValueError):  # a note: a damaged one is written anew
        old = {}
    for sentence in told(old, new, stages) if old else ():
        print(sentence, flush=True)
    idle = {section for section in SECTIONS if section not in stages}  # what they ask was not asked now
    new |= {section: old[section] for section in idle & old.keys()}
    if old != new:
        open_blobs(folder).replace(FILE, (json.dumps(new, indent=1, sort_keys=True) + "\n").encode())


def noted(job: Job) -> dict[str, Any]:
    """Every setting that can change a result, as JSON values."""
    return job.model_dump(mode="json", exclude=set(SILENT))


def told(old: Mapping[str, Any], new: Mapping[str, Any], stages: Sequence[str]) -> Iterator[str]:
    """Sentences on what another run of this folder was asked differently."""
    if old.get("name") != new["name"]:
        yield f"this folder was made by the run {old.get('name')!r}, not by {new['name']!r}: what it holds is taken over"
    other = {section for section in SECTIONS if section not in stages}
    changed = [line for line in changes(old, new, "") if line.partition(".")[0] not in other and not line.startswith("name ")]
    if changed:
        more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
        yield (
            f"settings changed since the last run of {new['name']!r}: {', '.join(changed[:6])}{more}; the old results stay, apart"
        )


def changes(old: Any, new: Any, path: str) -> Iterator[str]:
    """`evaluate.limit 80 -> 60`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from changes(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    elif old != new:
        yield f"{path} {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
