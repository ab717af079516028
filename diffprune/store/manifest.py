"""The manifest of one commit: which parts it published, of which cell, with their sizes and checksums.

A commit exists when its manifest does. The text is canonical and carries its own checksum, so any flipped bit is seen.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from diffprune.core.records import TABLES
from diffprune.io.names import checked_name
from diffprune.store.columns import VERSION

MANIFESTS = "manifests"  # what the keys of all manifests begin with
COMPACTED = "compacted"  # what the names of a compacted store's parts and of its manifest begin with


class Damaged(Exception):
    """A blob of the store that cannot be used; the text says why, in words that follow its key."""


class OtherVersion(Exception):
    """An intact manifest of another version of this program; the text says which, in words that follow the store's name."""


@dataclass(frozen=True)
class Part:
    """One Parquet file: table, name, rows, size in bytes, sha256 of its bytes."""

    table: str
    name: str
    rows: int
    bytes: int
    sha256: str

    @property
    def key(self) -> str:
        """Of its blob."""
        return f"parts/{self.table}/{self.name}"


@dataclass(frozen=True)
class Commit:
    """What became visible at once.

    cell: key, "" of a compacted store's one commit, whose parts hold many cells;
    status: "ok" or "failed" where the commit holds the cell's outcome, else "";
    published: nanoseconds since 1970 on the writer's clock, or more where it had seen later commits.
    grader: digest of the code that gave the grades in this commit; "" where it holds none.
    answers: name of the commit whose answers were graded here again; "" where they are its own, or there are none.
    """

    name: str
    cell: str
    run: str
    attempt: int
    status: str
    published: int
    parts: tuple[Part, ...]
    grader: str = ""
    answers: str = ""

    @property
    def key(self) -> str:
        """Of its manifest's blob."""
        return f"{MANIFESTS}/{self.name}.json"

    def part(self, table: str) -> Part | None:
        """The part of a table, if this commit holds one."""
        return next((part for part in self.parts if part.table == table), None)


def sha256(data: bytes) -> str:
    """64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def render(commit: Commit) -> bytes:
    """The manifest's bytes; equal commits give equal bytes."""
    body = json.dumps(asdict(commit), sort_keys=True, allow_nan=False)
    document = {"format": VERSION, "sha256": _checksum(VERSION, body), "commit": json.loads(body)}
    return json.dumps(document, indent=1, sort_keys=True).encode()


def _checksum(version: int, body: str) -> str:
    """Of the version, too, since version 2: a damaged number is no other version."""
    return sha256((body if version == 1 else f"{version} {body}").encode())


def _typed(kind: type, value: dict[str, Any]) -> Any:
    """A dataclass from JSON, refusing other fields and other types (annotations are text here)."""
    for field in fields(kind):
        if field.type in ("str", "int") and type(value[field.name]).__name__ != field.type:
            raise ValueError(field.name)
    return kind(**value)


def parse(raw: bytes, name: str) -> Commit:
    """The commit a manifest called `name` (without .json) describes.

    Raises:
        OtherVersion: written by an older or a newer version of this program.
        Damaged: not a manifest, a changed bit, another name, an unknown table or an unsafe part name.
    """
    try:
        document = json.loads(raw)
        version, body = document["format"], document["commit"]
        intact = document["sha256"] == _checksum(version, json.dumps(body, sort_keys=True, allow_nan=False))
        if not intact or version == VERSION:
            commit = _typed(Commit, {**body, "parts": tuple(_typed(Part, part) for part in body["parts"])})
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Damaged("is not a manifest (truncated, changed or foreign)") from None
    if intact and version != VERSION:
        raise OtherVersion(f"holds records of version {version}, this program reads version {VERSION}")
    if render(commit) != raw:
        raise Damaged("does not match its own checksum")
    if commit.name != name:
        raise Damaged(f"describes another commit, {commit.name!r:.100}")
    for part in commit.parts:
        if part.table not in TABLES:
            raise Damaged(f"names the table {part.table!r:.100}, which this version does not know")
        try:
            checked_name(part.name, "part")
        except ValueError as error:
            raise Damaged(f"is refused: {error}") from None
    return commit
