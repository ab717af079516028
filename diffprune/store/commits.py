"""The commits of a store: written manifest last, listed through manifests, quarantined whole when any blob of one is damaged."""

from __future__ import annotations

import time
from collections.abc import Callable

from diffprune.core.records import GRADED
from diffprune.io.blob_store import Blobs
from diffprune.io.names import NAME
from diffprune.store.manifest import MANIFESTS, Commit, Damaged, OtherVersion, Part, parse, render, sha256


class Commits:
    """Published commits among the blobs of a store.

    check(table, bytes) gives the rows of a part; it raises `Damaged` for one this program cannot read, although it is what was
    written.
    """

    def __init__(self, blobs: Blobs, check: Callable[[str, bytes], int]) -> None:
        self.blobs = blobs
        self.check = check
        self.problems: list[str] = []
        self._latest = 0  # `published` of the last commit seen
        self._refused: set[Commit] = set()  # damaged ones, also where nothing can be moved and they stay in place
        self._parsed: dict[str, tuple[str, Commit]] = {}  # by key, as long as the version of the blob stays the same
        self._intact: set[Commit] = set()  # parts hashed once per store object; the table that is read is hashed at every read

    def add(self, commit: Commit, parts: dict[str, bytes], fence: Callable[[], None]) -> None:
        """Publish the parts (bytes by table), then look at the fence once more, then publish the manifest."""
        for part in commit.parts:
            self.blobs.replace(part.key, parts[part.table])
        fence()
        self.blobs.replace(commit.key, render(commit))
        self._latest = max(self._latest, commit.published)

    def moment(self) -> int:
        """Nanoseconds since 1970, but later than every commit seen so far: a clock that was set back puts nothing before them."""
        return max(time.time_ns(), self._latest + 1)

    def holds(self, name: str) -> bool:
        """Whether an intact commit of this name is published."""
        key = f"{MANIFESTS}/{name}.json"
        version = self.blobs.version(key)
        return version is not None and self._load(key, version) is not None

    def all(self) -> list[Commit]:
        """Every intact commit, in order of publication. Damaged ones are moved to quarantine and named in `problems`.

        Raises:
            ValueError: the store is one of another version of this program; says how it is made anew.
        """
        listed = self.blobs.list(MANIFESTS)
        found = [commit for key, version in listed.items() if (commit := self._load(key, version))]
        return sorted(found, key=lambda commit: (commit.published, commit.name))

    def data(self, part: Part) -> bytes:
        """The bytes of a part as they were written.

        Raises:
            Damaged: missing, truncated or changed since.
        """
        try:
            data = self.blobs.read(part.key)
        except FileNotFoundError:
            raise Damaged("is missing") from None
        if len(data) != part.bytes:
            raise Damaged(f"has {len(data)} bytes, {part.bytes} were written")
        if sha256(data) != part.sha256:
            raise Damaged("was changed after it was written (sha256 differs)")
        return data

    def _load(self, key: str, version: str) -> Commit | None:
        commit = self._manifest(key, version)
        if commit is None or commit in self._refused:
            return None
        return commit if commit in self._intact or self._verify(commit) else None

    def _manifest(self, key: str, version: str) -> Commit | None:
        """What a manifest says, read again only when it has changed: manifests are written once, listed often."""
        if key in self._parsed and self._parsed[key][0] == version:
            return self._parsed[key][1]
        try:
            raw = self.blobs.read(key)
        except FileNotFoundError:
            return None  # another reader has just moved it
        name = key.removeprefix(f"{MANIFESTS}/").removesuffix(".json")
        try:
            if not key.endswith(".json") or not NAME.match(name):
                raise Damaged("is not a manifest (foreign name)")
            commit = parse(raw, name)
        except OtherVersion as other:
            raise ValueError(
                f"{self.blobs} {other}: remove it or choose another folder, and the same command makes it anew"
            ) from None
        except Damaged as damage:
            self._report(f"{key} {damage}; {self._move(key)}; what it published counts as not done")
            return None
        self._parsed[key] = (version, commit)
        self._latest = max(self._latest, commit.published)
        return commit

    def _verify(self, commit: Commit) -> bool:
        for part in commit.parts:
            try:
                rows = self.check(part.table, self.data(part))
                if rows != part.rows:
                    raise Damaged(f"has {rows} rows, its manifest says {part.rows}")
            except Damaged as damage:
                self.quarantine(commit, part, damage)
                return False
        self._intact.add(commit)
        return True

    def quarantine(self, commit: Commit, part: Part, damage: Damaged) -> None:
        """Move a damaged part and the manifest that names it out of the way; its other parts become invisible with it."""
        moved = self._move(part.key)
        self._move(commit.key)
        self._intact.discard(commit)
        self._refused.add(commit)
        self._report(f"{part.key} {damage}; {moved}; cell {commit.cell} counts as not done")

    def _move(self, key: str) -> str:
        """Move a blob into quarantine, never over another one; says what became of it."""
        target, number = f"quarantine/{key}", 0
        try:
            data = self.blobs.read(key)
            while True:
                try:
                    self.blobs.create(target, data)
                    break
                except FileExistsError:
                    number += 1
                    target = f"quarantine/{key}.{number}"
            self.blobs.delete(key)
        except FileNotFoundError:
            return "nothing to move"
        except OSError as error:
            return f"left in place: {error.strerror}"
        return f"moved to {target}"

    def _report(self, sentence: str) -> None:
        if sentence not in self.problems:
            self.problems.append(sentence)


def chosen(commits: list[Commit], table: str) -> list[Commit]:
    """The commits whose part of `table` counts, by cell: of several of one cell the newest attempt's first, and where all failed
    its last, so that no clock decides between two attempts; of what hangs on a grader, the one with the grades that count. A
    compacted store has one commit, of many cells."""
    if table in GRADED:
        return [commit for commit in gradings(commits).values() if commit.part(table)]
    holding = [commit for commit in commits if commit.part(table)]
    failed = [commit for commit in reversed(holding) if commit.status == "failed"]
    first: dict[str, Commit] = {}
    for some in ([commit for commit in holding if commit.status != "failed"], failed):
        for commit in sorted(some, key=lambda one: -one.attempt):  # which keeps the order within an attempt
            first.setdefault(commit.cell, commit)
    return [first[cell] for cell in sorted(first)]


def gradings(commits: list[Commit]) -> dict[Commit, Commit]:
    """The commit whose grades count, by the commit whose answers count, in the order of cells: of several gradings of the same
    answers the last. Grades of answers that do not count never do."""
    answers = {commit.name: commit for commit in chosen(commits, "answers")}
    last: dict[str, Commit] = {}
    for commit in commits:
        if commit.part("grades"):
            last[commit.answers or commit.name] = commit
    return {commit: last[name] for name, commit in answers.items() if name in last}
