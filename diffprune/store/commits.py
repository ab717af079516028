"""The commits of a store: written manifest last, listed through manifests, quarantined whole when any file of one is damaged."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from diffprune.store.files import NAME, make_folder, write_durably
from diffprune.store.manifest import Commit, Damaged, Part, parse, render, sha256


class Commits:
    """check(table, bytes) raises `Damaged` for a part this program cannot read, although it is what was written."""

    def __init__(self, root: Path, check: Callable[[str, bytes], object]) -> None:
        self.root = root
        self.check = check
        self.problems: list[str] = []
        self._refused: set[Commit] = set()  # damaged ones, also where the folder is read-only and they stay in place
        self._parsed: dict[str, tuple[tuple[int, ...], Commit]] = {}  # by file name, as long as the file stays the same
        self._intact: set[Commit] = set()  # parts hashed once per store object; the table that is read is hashed at every read

    def add(self, commit: Commit, parts: dict[str, bytes], fence: Callable[[], None]) -> None:
        """Publish the parts (bytes by table), then look at the fence once more, then publish the manifest."""
        staging = self.root / "tmp" / commit.run
        for part in commit.parts:
            write_durably(self.root / part.place, parts[part.table], staging)
        fence()
        write_durably(self.root / commit.place, render(commit), staging)

    def holds(self, name: str) -> bool:
        """Whether an intact commit of this name is published."""
        return self._load(f"{name}.json") is not None

    def all(self) -> list[Commit]:
        """Every intact commit, in order of publication. Damaged ones are moved to quarantine and named in `problems`."""
        try:
            names = sorted(name for name in os.listdir(self.root / "manifests") if not name.startswith("."))
        except FileNotFoundError:
            return []
        found = [commit for name in names if (commit := self._load(name))]
        return sorted(found, key=lambda commit: (commit.published, commit.name))

    def data(self, part: Part) -> bytes:
        """The bytes of a part as they were written.

        Raises:
            Damaged: missing, truncated or changed since.
        """
        try:
            data = (self.root / part.place).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise Damaged("is missing") from None
        if len(data) != part.bytes:
            raise Damaged(f"has {len(data)} bytes, {part.bytes} were written")
        if sha256(data) != part.sha256:
            raise Damaged("was changed after it was written (sha256 differs)")
        return data

    def _load(self, name: str) -> Commit | None:
        commit = self._manifest(name)
        if commit is None or commit in self._refused:
            return None
        return commit if commit in self._intact or self._verify(commit) else None

    def _manifest(self, name: str) -> Commit | None:
        """What a manifest file says, read again only when the file has changed: manifests are written once, listed often."""
        path = self.root / "manifests" / name
        try:
            state = os.stat(path)
            same = (state.st_mtime_ns, state.st_ctime_ns, state.st_size, state.st_ino)
            if name in self._parsed and self._parsed[name][0] == same:
                return self._parsed[name][1]
            raw = path.read_bytes()
        except FileNotFoundError:
            return None  # never there, or another reader has just moved it
        except IsADirectoryError:
            self._report(f"manifests/{name} is a folder, not a manifest; ignored")
            return None
        try:
            if path.suffix != ".json" or not NAME.match(path.stem):
                raise Damaged("is not a manifest (foreign name)")
            commit = parse(raw, path.stem)
        except Damaged as damage:
            self._report(f"manifests/{name} {damage}; {self._move(f'manifests/{name}')}; what it published counts as not done")
            return None
        self._parsed[name] = (same, commit)
        return commit

    def _verify(self, commit: Commit) -> bool:
        for part in commit.parts:
            try:
                self.check(part.table, self.data(part))
            except Damaged as damage:
                self.quarantine(commit, part, damage)
                return False
        self._intact.add(commit)
        return True

    def quarantine(self, commit: Commit, part: Part, damage: Damaged) -> None:
        """Move a damaged part and the manifest that names it out of the way; its other parts become invisible with it."""
        moved = self._move(part.place)
        self._move(commit.place)
        self._intact.discard(commit)
        self._refused.add(commit)
        whose = f"cell {commit.cell}" if commit.cell else f"its rows of run {commit.run!r}"
        self._report(f"{part.place} {damage}; {moved}; {whose} count{'s' if commit.cell else ''} as not done")

    def _move(self, place: str) -> str:
        """Move a file into quarantine, never over another one; says what became of it."""
        target = self.root / "quarantine" / place
        number = 0
        while target.exists():
            number += 1
            target = target.with_name(f"{Path(place).name}.{number}")
        try:
            make_folder(target.parent)
            os.replace(self.root / place, target)
        except FileNotFoundError:
            return "nothing to move"
        except OSError as error:
            return f"left in place ({error.strerror})"
        return f"moved to {target.relative_to(self.root)}"

    def _report(self, sentence: str) -> None:
        if sentence not in self.problems:
            self.problems.append(sentence)


def chosen(commits: list[Commit], table: str) -> list[Commit]:
    """The commits whose part of `table` counts, by cell and then in order of publication.

    Of several commits of one cell the first wins, and where all failed the last. All commits without a cell count: their rows
    are compared one by one.
    """
    holding = [commit for commit in commits if commit.part(table)]
    failed = [commit for commit in reversed(holding) if commit.status == "failed"]
    first: dict[str, Commit] = {}
    for commit in [commit for commit in holding if commit.status != "failed"] + failed:
        if commit.cell:
            first.setdefault(commit.cell, commit)
    with_cell = [first[cell] for cell in sorted(first)]
    return [commit for commit in holding if not commit.cell] + with_cell
