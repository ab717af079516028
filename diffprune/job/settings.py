"""Settings a run was last asked under, kept as `job.json` in its folder: what has changed since is said in a sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffprune.io.blob_store import open_blobs
from diffprune.io.json_object import parsed
from diffprune.job.job import SECTIONS, Job
from diffprune.train.recipe import SHAPE_NOTHING

FILE = "job.json"
SILENT = (  # which change no result
    "workers", "gpus", "accelerator", "config", "assumed", "tiny", "report", "trackers",
)  # fmt: skip
OF_THE_PAGE = ("name ", "title ", "subject ")  # how a change begins that is none of results
CHAPTER = ("protocol", "split", "batch", "limit", "answer_tokens")  # of an evaluation, beside the model

TIMED = ("rounds", "warmup", "slow_rounds", "decode_tokens", "spans", "inputs", "threads")  # how long and how often, in no key
UNKEYED = {
    *(f"measure.{name}" for name in TIMED), "tune.threads",
    *(f"{recipe}.{name}" for recipe in ("train", "search.recipe") for name in {*SHAPE_NOTHING} - {"pruners", "methods", "seeds"}),
}  # fmt: skip


def keep(job: Job, folder: Path, stages: Sequence[str]) -> None:
    """Note the settings of a run; print what differs from those that were noted before, of the stages that are run now.

    Raises:
        OSError: the folder cannot be written.
    """
    new, old = noted(job), read(folder)
    for sentence in told(old, new, stages) if old else ():
        print(sentence, flush=True)
    idle = {section for section in SECTIONS if section not in stages}  # what they ask was not asked now
    new |= {section: old[section] for section in idle & old.keys()}
    if old != new:
        open_blobs(folder).replace(FILE, (json.dumps(new, indent=1, sort_keys=True) + "\n").encode())


def noted(job: Job) -> dict[str, Any]:
    """Every setting that can change a result, and the report's title and subject, as JSON values; the protocol of `tune` and
    `measure` as it is asked by."""
    found = job.model_dump(mode="json", exclude=set(SILENT))
    for section in ("tune", "measure"):
        if own := getattr(job, section):
            found[section]["protocol"] = job.protocol(own)
    return found


def read(folder: Path | str) -> dict[str, Any]:
    """What was noted in the folder of a run; {} where nothing was, or the note is damaged."""
    try:
        return parsed(open_blobs(folder).read(FILE))
    except (OSError, ValueError):
        return {}


def chapter(found: Mapping[str, Any]) -> dict[str, str]:
    """What of the evaluation in settings, as they are noted, tells its chapter of the report from others: columns of cells."""
    own = found.get("evaluate")
    if not isinstance(own, dict):
        return {}
    told = {"model": found.get("model", ""), **{name: own[name] for name in CHAPTER if name in own}}
    return {name: "all" if value is None else str(value) for name, value in told.items()}


def title(found: Mapping[str, Any]) -> str:
    """Of the report of a run with these settings; "" where they were noted without one, as they once were."""
    return str(found["title"] or found.get("name", "")) if "title" in found else ""


def told(old: Mapping[str, Any], new: Mapping[str, Any], stages: Sequence[str]) -> Iterator[str]:
    """Sentences on what another run of this folder was asked differently."""
    if old.get("name") != new["name"]:
        yield f"this folder was made by the run {old.get('name')!r}, not by {new['name']!r}: what it holds is taken over"
    other = {section for section in SECTIONS if section not in stages}
    changed = [line for line in changes(old, new, "") if line.partition(".")[0] not in other and not line.startswith(OF_THE_PAGE)]
    later = [line for line in changed if line.partition(" ")[0] in UNKEYED]
    apart = [line for line in changed if line not in later]
    since = f"settings changed since the last run of {new['name']!r}"
    if apart:
        yield f"{since}: {_listed(apart)}; the old results stay, apart"
    if later:
        yield f"{since}: {_listed(later)}; that holds for what is still to be done, and what is done stays as it is"


def _listed(changed: Sequence[str]) -> str:
    return ", ".join(changed[:6]) + (f" and {len(changed) - 6} more" if len(changed) > 6 else "")


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
