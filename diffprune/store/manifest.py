"""The manifest of one commit, or of a bundle of many: which parts were published, of which cells, with sizes and checksums.

A commit exists when its manifest does. The text is canonical and carries its own checksum, so any flipped bit is seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from typing import Any, TypeVar

from diffprune.core.records import TABLES
from diffprune.io.names import checked_name
from diffprune.store.columns import VERSION

MANIFESTS = "manifests"  # what the keys of all manifests begin with
BUNDLES = "bundles"  # and those of bundles, whose names and whose parts' names begin with
BUNDLE = "bundle"
COMPACTED = "compacted"  # what the names of a compacted store's parts and of its manifest begin with
T = TypeVar("T")


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
    bundle, spans: of a commit that was published with others, the name of their bundle, whose parts it shares, and which rows of
    each part are its own: (first, number).
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
    bundle: str = ""
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def key(self) -> str:
        """Of its manifest's blob."""
        return f"{BUNDLES}/{self.bundle}.json" if self.bundle else f"{MANIFESTS}/{self.name}.json"

    def part(self, table: str) -> Part | None:
        """The part of a table, if this commit holds one."""
        return next((part for part in self.parts if part.table == table), None)

    def span(self, table: str) -> tuple[int, int]:
        """(first, number) of its rows in its part of a table; (0, 0) where it has none."""
        for number, part in enumerate(self.parts):
            if part.table == table:
                return self.spans[number] if self.bundle else (0, part.rows)
        return 0, 0


def sha256(data: bytes) -> str:
    """64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def render(commit: Commit) -> bytes:
    """The manifest's bytes; equal commits give equal bytes."""
    told = asdict(commit)
    del told["bundle"], told["spans"]
    return _document("commit", told)


def render_bundle(commits: Sequence[Commit], parts: Sequence[Part]) -> bytes:
    """The bytes of a manifest of many cells, each once. parts: all parts, whose rows are the commits' in their order."""
    first = commits[0]
    told = [
        {**{name: getattr(one, name) for name in OWN}, "rows": {p.table: one.span(p.table)[1] for p in one.parts}}
        for one in commits
    ]
    body = {"name": first.bundle, "run": first.run, "parts": [asdict(part) for part in parts], "commits": told}
    return _document("bundle", body)


KINDS = {"name": str, "cell": str, "attempt": int, "status": str, "published": int, "grader": str, "answers": str}
OWN = tuple(KINDS)  # what each commit of a bundle has of its own


def _document(kind: str, told: dict[str, Any]) -> bytes:
    body = json.dumps(told, sort_keys=True, allow_nan=False)
    document = {"format": VERSION, "sha256": _checksum(VERSION, body), kind: json.loads(body)}
    return json.dumps(document, indent=1 if kind == "commit" else None, sort_keys=True).encode()


def _checksum(version: int, body: str) -> str:
    """Of the version, too, since version 2: a damaged number is no other version."""
    return sha256((body if version == 1 else f"{version} {body}").encode())


def _typed(kind: type, value: dict[str, Any]) -> Any:
    """A dataclass from JSON, refusing other fields and other types (annotations are text here)."""
    for field in fields(kind):
        if field.type in ("str", "int") and type(value.get(field.name, field.default)).__name__ != field.type:
            raise ValueError(field.name)
    return kind(**value)


def parse(raw: bytes, name: str) -> Commit:
    """The commit a manifest called `name` (without .json) describes.

    Raises:
        OtherVersion: written by an older or a newer version of this program.
        Damaged: not a manifest, a changed bit, another name, an unknown table or an unsafe part name.
    """

    def made(body: dict[str, Any]) -> Commit:
        commit: Commit = _typed(Commit, {**body, "parts": tuple(_typed(Part, part) for part in body["parts"])})
        if commit.bundle or commit.spans:
            raise ValueError("bundle")
        return commit

    commit = _intact("commit", raw, made)
    if render(commit) != raw:
        raise Damaged("does not match its own checksum")
    _check(commit.name, name, commit.parts)
    return commit


def parse_bundle(raw: bytes, name: str) -> list[Commit]:
    """The commits a manifest of many cells called `name` describes.

    Raises:
        OtherVersion, Damaged: as `parse`.
    """
    commits, parts = _intact("bundle", raw, _bundled)
    if render_bundle(commits, parts) != raw:
        raise Damaged("does not match its own checksum")
    _check(commits[0].bundle, name, parts)
    if len({commit.cell for commit in commits}) != len(commits):
        raise Damaged("names a cell twice")
    return commits


def _bundled(body: dict[str, Any]) -> tuple[list[Commit], list[Part]]:
    parts = {part["table"]: _typed(Part, part) for part in body["parts"]}
    commits = bundled(
        body["name"], list(parts.values()),
        [(Commit(run=body["run"], parts=(), **{name: one[name] for name in OWN}), one["rows"]) for one in body["commits"]],
    )  # fmt: skip
    if not commits or any(type(one[name]) is not KINDS[name] for one in body["commits"] for name in OWN):
        raise ValueError("commits")
    if any(part.rows != sum(one.span(table)[1] for one in commits) for table, part in parts.items()):
        raise ValueError("rows")
    return commits, list(parts.values())


def bundled(name: str, parts: Sequence[Part], commits: Sequence[tuple[Commit, dict[str, int]]]) -> list[Commit]:
    """Commits that share `parts`, one after the other; each comes with its number of rows by table."""
    ends = {part.table: [0, *accumulate(rows.get(part.table, 0) for _, rows in commits)] for part in parts}
    shared: dict[tuple[str, ...], tuple[Part, ...]] = {}  # most commits have the same tables: one tuple for all
    found = []
    for number, (one, rows) in enumerate(commits):
        tables = tuple(part.table for part in parts if part.table in rows)
        own = shared.setdefault(tables, tuple(part for part in parts if part.table in rows))
        spans = tuple((ends[table][number], rows[table]) for table in tables)
        about = {field: getattr(one, field) for field in OWN}
        found.append(Commit(run=one.run, parts=own, bundle=name, spans=spans, **about))
    return found


def _intact(kind: str, raw: bytes, made: Callable[[dict[str, Any]], T]) -> T:
    """What `made` makes of the body of a document, if that is what was written."""
    try:
        document = json.loads(raw)
        version, body = document["format"], document[kind]
        intact = document["sha256"] == _checksum(version, json.dumps(body, sort_keys=True, allow_nan=False))
        if not intact or version == VERSION:
            found = made(body)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise Damaged("is not a manifest (truncated, changed or foreign)") from None
    if intact and version != VERSION:
        raise OtherVersion(f"holds records of version {version}, this program reads version {VERSION}")
    return found


def _check(found: str, name: str, parts: Sequence[Part]) -> None:
    if found != name:
        raise Damaged(f"describes another commit, {found!r:.100}")
    for part in parts:
        if part.table not in TABLES:
            raise Damaged(f"names the table {part.table!r:.100}, which this version does not know")
        try:
            checked_name(part.name, "part")
        except ValueError as error:
            raise Damaged(f"is refused: {error}") from None
