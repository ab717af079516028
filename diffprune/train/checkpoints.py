"""Training checkpoints: the states that a run resumes from, and its step log. A crash at any point leaves an intact state.

A state is a blob `states/<arm>/<attempt>-<step>-<sha256>`: its name orders it and says whether it is whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from diffprune.core.records import Step
from diffprune.io.attempts import Attempt, Attempts, Fenced
from diffprune.io.blob_store import Blobs, open_blobs, remote
from diffprune.io.json_object import parsed
from diffprune.train import step_log

STATES = "states"
STOPPED = "stopped"
ENDING = "ending"
WORKERS = "workers"
FAILED = "failed"
NOTES = (STOPPED, ENDING, WORKERS, FAILED)  # for the length of a run
ELSEWHERE = "on another worker"  # ends the reason of a worker that stops because of another's


def attempts_at(folder: Blobs | Path | str) -> Attempts:
    """The attempts at training in a run's folder."""
    return Attempts(open_blobs(folder), "attempts", "training")


def claim(folder: Blobs | Path | str) -> Attempt:
    """Take a run's folder over: a new attempt, its number larger than every earlier one."""
    return attempts_at(folder).begin()


@dataclass(frozen=True)
class Files:
    """States and step log of one attempt.

    folder: of this machine or shared by all, or of a bucket; the step log lies in it.
    attempt: from `claim`.
    storage: where states and attempts are; the folder itself if not given.
    """

    folder: Path
    attempt: int
    storage: Blobs | None = None

    @cached_property
    def blobs(self) -> Blobs:
        """Where states and attempts are."""
        return self.storage or open_blobs(self.folder)

    @property
    def remote(self) -> bool:
        """Whether the folder is a bucket's."""
        return remote(self.folder) is not None

    @cached_property
    def log(self) -> step_log.StepLog:
        """The step log, to be appended to."""
        return step_log.opened(self.folder, self.attempt)

    def check(self) -> None:
        """Raises Fenced when a newer attempt has claimed the folder."""
        attempts_at(self.blobs).check(self.attempt)

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        """Publish a state under a name; the one before it is kept, so that a crash at any point leaves at least one."""
        self.check()
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        data = buffer.getbuffer()
        mine = f"{STATES}/{name}/{self.attempt:08d}-"
        key = f"{mine}{state['step']:08d}-{hashlib.sha256(data).hexdigest()}.pt"
        self.blobs.replace(key, data)
        others = [other for other in self.blobs.list(f"{STATES}/{name}") if other != key]
        earlier = [other for other in others if other < key]
        passed_over = [other for other in others if other > key and other.startswith(mine)]  # damaged: this one follows another
        for other in earlier[:-1] + passed_over:
            self.blobs.delete(other)

    def load(self, name: str, device: torch.device) -> dict[str, Any] | None:
        """The newest intact state of that name, or None."""
        return load_state(self.blobs, f"{STATES}/{name}", device)

    def discard(self, name: str) -> None:
        """Remove the states of a loop that has finished."""
        self.check()
        for key in self.blobs.list(f"{STATES}/{name}"):
            self.blobs.delete(key)

    def stop(self, rank: int, reason: str) -> None:
        """Note why a worker cannot go on."""
        self.blobs.replace(f"{STOPPED}/{self.attempt:08d}-{rank}", reason.encode())

    def stopped(self) -> str:
        """Why a worker of this attempt cannot go on: the first reason of its own, if one has noted it yet; empty while all can."""
        noted = [key for key in self.blobs.list(STOPPED) if key.startswith(f"{STOPPED}/{self.attempt:08d}-")]
        return min((self.blobs.read(key).decode() for key in noted), key=lambda reason: reason.endswith(ELSEWHERE), default="")

    def fail(self, scorer: str, reason: str) -> None:
        """Note why a scorer cannot be trained; the others may be."""
        self.blobs.replace(f"{FAILED}/{self.attempt:08d}-{scorer}", reason.encode())

    def failures(self) -> dict[str, str]:
        """Scorers that this attempt cannot train, each with its reason."""
        mine = f"{FAILED}/{self.attempt:08d}-"
        noted = [key for key in self.blobs.list(FAILED) if key.startswith(mine)]
        return {key.removeprefix(mine): self.blobs.read(key).decode() for key in noted}

    def ask_to_end(self) -> None:
        """Ask all workers to save and end."""
        self.blobs.replace(f"{ENDING}/{int(self.attempt)}", b"")

    def ending(self) -> bool:
        """Whether the workers were asked to."""
        return self.blobs.version(f"{ENDING}/{int(self.attempt)}") is not None

    def tidy(self) -> None:
        """Remove what this attempt's workers noted for the driver and each other, and empty folders, now that none is at work;
        nothing where a newer attempt is."""
        with suppress(OSError, Fenced):
            self.check()
            for key in [key for prefix in NOTES for key in self.blobs.list(prefix)]:
                self.blobs.delete(key)
            for prefix in () if self.remote else (*NOTES, STATES):
                for folder in sorted((self.folder / prefix).glob("**/"), reverse=True):
                    with suppress(OSError):  # it is not empty
                        folder.rmdir()

    def append(self, line: Mapping[str, Any], durable: bool = False) -> None:
        """Add a line to the step log; `durable` waits until it and all before it are on the disk."""
        self.log.append(signed(line) + b"\n", durable)


def load_state(blobs: Blobs, prefix: str, device: torch.device) -> dict[str, Any] | None:
    """The newest intact state that `Files.save` wrote below a prefix: damaged ones are passed over.

    Tensors only (`weights_only`): no code in a state ever runs.
    """
    for key in reversed(blobs.list(prefix)):
        with suppress(OSError):  # a disk that cannot read it, or another worker has just removed it
            data = blobs.read(key)
            if key.endswith(f"-{hashlib.sha256(data).hexdigest()}.pt"):
                return torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    return None


def signed(line: Mapping[str, Any]) -> bytes:
    """A line of the step log: JSON that ends with its own checksum."""
    text = json.dumps(line, allow_nan=False)
    return f'{text[:-1]}, "crc": {zlib.crc32(text.encode())}}}'.encode()


def verified(text: bytes) -> dict[str, Any] | None:
    """What a line of the step log says; None where it is torn, or any bit of it was changed."""
    body, mark, checksum = text.rpartition(b', "crc": ')
    with suppress(ValueError):
        if mark and checksum == f"{zlib.crc32(body + b'}')}}}".encode():
            return parsed(body + b"}")
    return None


def as_step(line: Mapping[str, Any]) -> tuple[str, Step] | None:
    """A line of the step log as (name of the scorer, record), None where it says something else."""
    if line.keys() != {"scorer", *(f.name for f in fields(Step))}:
        return None
    values: dict[str, Any] = {name: math.nan if value is None else value for name, value in line.items()}
    return values.pop("scorer"), Step(**values)


def read_steps(folder: Path | str) -> dict[str, list[Step]]:
    """The step records in a folder by scorer: each step once, as it was last run; what is torn or damaged is left out
    (`damaged_lines` counts it)."""
    found: dict[str, dict[int, Step]] = {}
    for text in step_log.opened(folder).read().split(b"\n"):
        line = verified(text)
        if line is None:
            continue
        if "begin" in line:  # a scorer's training (re)starts here: what an earlier one did from this step on does not count
            scorer, step = line["begin"]
            found[scorer] = {number: row for number, row in found.get(scorer, {}).items() if number < step}
        elif row := as_step(line):
            found.setdefault(row[0], {})[row[1].step] = row[1]
    return {scorer: list(rows.values()) for scorer, rows in found.items()}


def damaged_lines(folder: Path | str) -> int:
    """Lines of the step log that are torn or damaged, which a killed run may leave one of."""
    return sum(bool(text) and verified(text) is None for text in step_log.opened(folder).read().split(b"\n"))
