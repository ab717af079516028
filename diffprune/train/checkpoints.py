"""A run's folder: training states and the step log, published so that a crash at any point leaves an intact one."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from diffprune.core.records import Step
from diffprune.io.checkpoint import replace_text, sha256

STEPS = "steps.jsonl"


class Superseded(RuntimeError):
    """A newer run works on this folder: whatever an older one left running must stop writing."""


def claim(folder: Path) -> int:
    """Take a folder over: a new attempt number, larger than every earlier one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "attempt"
    attempt = (int(path.read_text()) if path.is_file() else 0) + 1
    replace_text(path, str(attempt))
    return attempt


@dataclass(frozen=True)
class Files:
    """State and step records in a folder, for one attempt."""

    folder: Path
    attempt: int

    def check(self) -> None:
        """Raises Superseded when a newer attempt has claimed the folder."""
        newest = int((self.folder / "attempt").read_text())
        if newest != self.attempt:
            raise Superseded(f"{self.folder}: attempt {newest} has taken over from attempt {self.attempt}, which stops here")

    def save(self, name: str, state: Mapping[str, Any]) -> Path:
        """Publish a state under a name; the one before it is kept. Returns the folder that holds both.

        A crash at any point leaves the new state, or the old one as `previous.json`.
        """
        self.check()
        folder = self.folder / "states" / name
        folder.mkdir(parents=True, exist_ok=True)
        path, temporary = folder / f"{state['step']:08d}-{self.attempt}.pt", folder / f".{os.getpid()}.pt"
        with temporary.open("wb") as stream:
            torch.save(dict(state), stream)
            stream.flush()
            os.fsync(stream.fileno())
        entry = json.dumps({"file": path.name, "sha256": sha256(temporary)})
        temporary.replace(path)
        latest, previous = folder / "latest.json", folder / "previous.json"
        if latest.is_file():
            latest.replace(previous)
        replace_text(latest, entry)
        wanted = {json.loads(p.read_text())["file"] for p in (latest, previous) if p.is_file()}
        for old in folder.glob("*.pt"):
            if old.name not in wanted:
                old.unlink()
        return folder

    def load(self, name: str, device: torch.device) -> dict[str, Any] | None:
        """The newest intact state of that name, or None."""
        return load_state(self.folder / "states" / name, device)

    def discard(self, name: str) -> None:
        """Remove the states of a loop that has finished."""
        self.check()
        shutil.rmtree(self.folder / "states" / name, ignore_errors=True)

    def append(self, line: Mapping[str, Any], durable: bool = False) -> None:
        """Add a line to the step log; `durable` waits until it and all before it are on the disk."""
        with (self.folder / STEPS).open("ab+") as stream:
            whole = stream.tell() == 0 or (stream.seek(-1, os.SEEK_END) and stream.read(1) == b"\n")
            stream.write(("" if whole else "\n").encode() + json.dumps(line, allow_nan=False).encode() + b"\n")
            stream.flush()
            if durable:
                os.fsync(stream.fileno())


def load_state(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The newest intact state in a folder written by `Files.save`: damaged or half-written ones are passed over.

    Tensors only (`weights_only`): no code in a state file ever runs.
    """
    for pointer in (folder / "latest.json", folder / "previous.json"):
        try:
            entry = json.loads(pointer.read_text())
            path = folder / entry["file"]
            if path.parent == folder and sha256(path) == entry["sha256"]:
                return torch.load(path, map_location=device, weights_only=True)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def as_step(line: Mapping[str, Any]) -> tuple[str, Step] | None:
    """A line of the step log as (name of the scorer, record), None where it says something else."""
    if line.keys() != {"scorer", *(f.name for f in fields(Step))}:
        return None
    values: dict[str, Any] = {name: math.nan if value is None else value for name, value in line.items()}
    return values.pop("scorer"), Step(**values)


def read_steps(folder: Path) -> dict[str, list[Step]]:
    """The step records in a folder by scorer: each step once, as it was last run; a torn last line is left out."""
    path = folder / STEPS
    found: dict[str, dict[int, Step]] = {}
    for text in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if "begin" in line:  # a scorer's training (re)starts here: what an earlier one did from this step on does not count
            scorer, step = line["begin"]
            found[scorer] = {number: row for number, row in found.get(scorer, {}).items() if number < step}
        elif row := as_step(line):
            found.setdefault(row[0], {})[row[1].step] = row[1]
    return {scorer: list(rows.values()) for scorer, rows in found.items()}
