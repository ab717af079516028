"""Manifest of a downloaded data set: its repository and commit, and the hash of every split's rows."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffprune.io.blob_store import LocalBlobs
from diffprune.io.json_object import parsed

MANIFEST = "diffprune.json"
FIXTURE = "fixture"  # the commit of rows that we made ourselves for tests; never the real data


@dataclass
class Manifest:
    """repository: full name on the hub; commit: full hash (or `fixture`); pinned: whether the benchmark names this commit;
    splits: "config/split" -> {"rows", "hash", "bytes"} as found when the split was verified."""

    repository: str
    commit: str
    pinned: bool = False
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)

    @staticmethod
    def read(folder: Path) -> Manifest | None:
        """The manifest of a folder; None where there is none (rows from somewhere else).

        Raises:
            ValueError: there is one, but not of our making.
        """
        path = folder / MANIFEST
        if not path.is_file():
            return None
        try:
            made = Manifest(**parsed(path.read_bytes()))
            if not (isinstance(made.repository, str) and isinstance(made.commit, str) and isinstance(made.splits, dict)):
                raise TypeError("its values are of other types")
            if not all(isinstance(one, dict) and isinstance(one.get("hash"), str) for one in made.splits.values()):
                raise TypeError("a split has no hash")
            return made
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no manifest of ours ({error}): remove it, or fetch the data again") from None

    def write(self, folder: Path) -> None:
        """Publish beside the files it speaks of."""
        LocalBlobs(folder).replace(MANIFEST, (json.dumps(asdict(self), indent=2, sort_keys=True) + "\n").encode())
