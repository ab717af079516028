"""The commits of a store: written manifest last, listed through manifests, quarantined whole when any blob of one is damaged.

What is listed again is read only as far as it is new: a manifest is parsed, and its parts are hashed, once per store object.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from diffprune.core.records import GRADED
from diffprune.io.blob_store import Blobs
from diffprune.io.names import NAME
from diffprune.store.manifest import (
    BUNDLES,
    MANIFESTS,
    Commit,
    Damaged,
    OtherVersion,
    Part,
    parse,
    parse_bundle,
    render,
    render_bundle,
    sha256,
)  # fmt: skip


class Commits:
    """Published commits among the blobs of a store, each under a manifest of its own or in a bundle.

    check(table, bytes) gives the rows of a part; it raises `Damaged` for one this program cannot read, although it is what was
    written.
    """

    def __init__(self, blobs: Blobs, check: Callable[[str, bytes], int]) -> None:
        self.blobs = blobs
        self.check = check
        self.problems: list[str] = []
        self._latest = 0  # `published` of the last commit seen
        self._refused: dict[str, str] = {}  # versions of damaged manifests, also where nothing can be moved and they stay in place
        self._parsed: dict[str, tuple[str, list[Commit]]] = {}  # by key, as long as the version of the blob stays the same
        self._intact: set[str] = set()  # whose parts were hashed, once per store object; the table that is read always is
        self._seen: tuple[dict[str, str], list[Commit]] = ({}, [])  # what was listed last, and the commits it meant

    def add(self, commits: Sequence[Commit], parts: Mapping[Part, bytes], fence: Callable[[], None]) -> None:
        """Publish the parts, then look at the fence once more, then publish the manifest: of one commit, or of a bundle."""
        for part, data in parts.items():
            self.blobs.replace(part.key, data)
        fence()
        manifest = render_bundle(commits, list(parts)) if commits[0].bundle else render(commits[0])
        key = commits[0].key
        self.blobs.replace(key, manifest)
        self._parsed[key] = self.blobs.version(key) or "", list(commits)
        self._intact.add(key)

    def remove(self, commits: Sequence[Commit]) -> None:
        """Forget a bundle, all of whose commits stand in another one by now: its manifest first, so that nobody misses a part."""
        self.blobs.delete(commits[0].key)
        for part in {part for commit in commits for part in commit.parts}:
            self.blobs.delete(part.key)

    def moment(self) -> int:
        """Nanoseconds since 1970, but later than every commit seen so far: a clock that was set back puts nothing before them."""
        self._latest = max(time.time_ns(), self._latest + 1)
        return self._latest

    def holds(self, name: str) -> bool:
        """Whether an intact commit of this name has a manifest of its own."""
        key = f"{MANIFESTS}/{name}.json"
        version = self.blobs.version(key)
        return version is not None and bool(self._load(key, version))

    def all(self) -> list[Commit]:
        """Every intact commit once, in order of publication. Damaged ones are moved to quarantine and named in `problems`.

        Raises:
            ValueError: the store is one of another version of this program; says how it is made anew.
        """
        while True:
            listed = self.blobs.list(MANIFESTS) | self.blobs.list(BUNDLES)
            if listed == self._seen[0]:
                return self._seen[1]
            loaded = [self._load(key, version) for key, version in listed.items()]
            if None not in loaded:  # else a bundle has just become part of another one: it is in the next list
                break
        every = sorted((one for some in loaded for one in some or ()), key=lambda commit: (commit.published, commit.name))
        found = list({commit.name: commit for commit in reversed(every)}.values())[::-1]  # once what came twice, or is being merged
        self._parsed = {key: known for key, known in self._parsed.items() if key in listed}
        self._seen = listed, found
        return found

    def bundles(self) -> list[list[Commit]]:
        """The commits of each intact bundle, in the order of keys."""
        return [found for key, version in self.blobs.list(BUNDLES).items() if (found := self._load(key, version))]

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

    def _load(self, key: str, version: str) -> list[Commit] | None:
        """What a manifest publishes, if it and its parts are intact, else nothing; None: it is not there any more."""
        if self._refused.get(key) == version:
            return []
        known = self._parsed.get(key)
        if known is None or known[0] != version:  # manifests are written once, listed often
            self._intact.discard(key)
            if not (found := self._manifest(key, version)):
                return found
            known = self._parsed[key] = version, found
            self._latest = max(self._latest, *(commit.published for commit in found))
        return known[1] if key in self._intact else self._verified(key, version, known[1])

    def _manifest(self, key: str, version: str) -> list[Commit] | None:
        try:
            raw = self.blobs.read(key)
        except FileNotFoundError:
            return None
        folder, _, file = key.partition("/")
        name = file.removesuffix(".json")
        try:
            if not key.endswith(".json") or not NAME.match(name):
                raise Damaged("is not a manifest (foreign name)")
            return parse_bundle(raw, name) if folder == BUNDLES else [parse(raw, name)]
        except OtherVersion as other:
            raise ValueError(
                f"{self.blobs} {other}: remove it or choose another folder, and the same command makes it anew"
            ) from None
        except Damaged as damage:
            self._refused[key] = version
            self._report(f"{key} {damage}; {self._move(key)}; what it published counts as not done")
            return []

    def _verified(self, key: str, version: str, commits: list[Commit]) -> list[Commit] | None:
        for part in dict.fromkeys(part for commit in commits for part in commit.parts):
            try:
                found = self.check(part.table, self.data(part))
                if found != part.rows:
                    raise Damaged(f"has {found} rows, its manifest says {part.rows}")
            except Damaged as damage:
                return [] if self.quarantine(commits[0], part, damage) else None
        self._intact.add(key)
        return commits

    def quarantine(self, commit: Commit, part: Part, damage: Damaged) -> bool:
        """Move a damaged part and the manifest that names it out of the way; its other parts, and other commits of the same
        bundle, become invisible with it. False: it is no damage, as the manifest was removed meanwhile."""
        version = self.blobs.version(commit.key)
        if version is None and commit.bundle:
            return False
        moved = self._move(part.key)
        self._move(commit.key)
        self._intact.discard(commit.key)
        self._refused[commit.key] = version or ""
        self._seen = {}, []
        cells = [one.cell for one in self._parsed.get(commit.key, ("", [commit]))[1]]
        lost = f"cell {commit.cell} counts" if len(cells) == 1 else f"{len(cells)} cells ({cells[0]} and others) count"
        self._report(f"{part.key} {damage}; {moved}; {lost} as not done")
        return True

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
