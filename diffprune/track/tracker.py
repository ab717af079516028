"""What a tracker is told: named numbers along a series, each once, also where a killed run goes on."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from diffprune.io.blob_store import open_blobs
from diffprune.io.json_object import parsed

FOLDER = "trackers"  # of a run: how much each tracker has been told


@dataclass(frozen=True)
class Scalars:
    """Numbers of one series at one step. series: two names, "train/diffprune-0"; step: of training, or visual tokens kept."""

    series: str
    step: int
    values: Mapping[str, float]

    @property
    def finite(self) -> dict[str, float]:
        """The values there are: gaps are nan."""
        return {name: value for name, value in self.values.items() if math.isfinite(value)}


class Tracker(Protocol):
    """One tracker of one run. A method that raises ends the tracker, never the run."""

    name: str

    def log(self, rows: Iterable[Scalars]) -> None:
        """Take rows up and send them on."""

    def close(self, failed: bool) -> None:
        """The run has ended."""


def clean(name: str) -> str:
    """A name that every tracker and every file system takes; two that differ stay apart."""
    text = re.sub(r"[^A-Za-z0-9_.=-]+", "-", name).strip("-.")[:80]
    plain = re.sub(r"[ ,()'\"]+", "-", name).strip("-.")
    return text if text and text == plain else f"{text or 'x'}-{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:6]}"


class Told:
    """What a tracker that cannot be told twice has heard, kept as `trackers/<name>.json` in the run's folder: its own id of the
    run, and per series the last step, or where steps come in no order (`evaluate/...`) every row."""

    def __init__(self, folder: Path, name: str) -> None:
        self.blobs, self.key = open_blobs(folder, private=True), f"{FOLDER}/{name}.json"
        try:
            found = parsed(self.blobs.read(self.key))
        except (OSError, ValueError):  # a note: a damaged one begins anew
            found = {}
        self.run = str(found.get("run", ""))
        last, each = found.get("last"), found.get("each")
        self.last = {k: v for k, v in last.items() if type(v) is int} if isinstance(last, dict) else {}
        self.each = set(map(str, each)) if isinstance(each, list) else set()

    def new(self, rows: Iterable[Scalars]) -> list[Scalars]:
        """The rows that were not told yet; from here on they count as told."""
        found = []
        for row in rows:
            if row.series.startswith("train/"):
                if row.step > self.last.get(row.series, -1):
                    self.last[row.series] = row.step
                    found.append(row)
            elif (key := f"{row.series} {row.step} {json.dumps(row.finite, sort_keys=True)}") not in self.each:
                self.each.add(key)
                found.append(row)
        return found

    def save(self) -> None:
        """After the tracker has taken the rows: a crash between the two tells them twice, never loses them."""
        text = json.dumps({"run": self.run, "last": self.last, "each": sorted(self.each)})
        self.blobs.replace(self.key, text.encode())


def flat(settings: Mapping[str, Any], path: str = "") -> dict[str, str]:
    """Nested settings as dotted names: {"train.steps": "50"}."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{path}.{key}".lstrip(".")
        found |= flat(value, name) if isinstance(value, Mapping) else {name: json.dumps(value)}
    return found
