"""The Parquet store: records are published whole, found through manifests, and checked bit by bit when read.

Blobs: `parts/<table>/<cell>-<sha256>.parquet`, `manifests/<cell>-<content>.json`, `quarantine/` for what cannot be used,
`locks/<run>/<attempt>`, `events/<run>/<attempt>.jsonl`. Parts are written first, the manifest last; what has no manifest does not
exist.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from diffprune.core.cell import Cell
from diffprune.core.records import TABLES, Provenance
from diffprune.core.registry import nearest
from diffprune.io import event_log
from diffprune.io.blob_store import Blobs, open_blobs
from diffprune.io.run_lock import attempts_at
from diffprune.store.columns import columns
from diffprune.store.commits import Commits, chosen, gradings
from diffprune.store.manifest import COMPACTED, Commit, Damaged, Part, sha256
from diffprune.store.parts import check, compacted, decode, digest, encode, record_arrays
from diffprune.store.predictions import VIEW, grader, joined, needed, split
from diffprune.store.to_pandas import frame, origin_frame, origins

T = TypeVar("T")


class Store:
    """Records in a folder, which is created by the first write, or among other blobs.

    Raises:
        ValueError: the folder is a file.
    """

    def __init__(self, place: Blobs | Path | str) -> None:
        self.blobs = open_blobs(place)
        self._commits = Commits(self.blobs, check)
        self._origins: dict[str, list[dict[str, Any]]] = {}  # by name of a commit, of a compacted one and of the table

    @property
    def problems(self) -> list[str]:
        """The blobs put aside while reading, one sentence each: which, why, where it is now, what counts as not done."""
        return self._commits.problems

    def check_owner(self, provenance: Provenance) -> None:
        """Refuse what an attempt that does not hold the run's lock would write.

        Raises:
            Fenced: another attempt of the run has taken over, or the lock is gone, with the store or by hand.
            ValueError: a run name outside the allow-list.
        """
        attempts_at(self.blobs, provenance.run).check(provenance.attempt)

    def publish(self, records: Mapping[str, Sequence[Any]], *, cell: Cell, provenance: Provenance) -> None:
        """Make rows of several tables visible together or not at all. Publishing the same again changes nothing.

        A cell is published whole: of several commits of one cell one counts per table: an `ok` one before a failed one, a newer
        attempt's before an older's, an earlier one before a later.
        `predictions` become `answers` and `grades`, which name the grader of the cell's benchmark as it is here.

        Raises:
            ValueError: unknown table, wrong record or value, run name outside the allow-list.
            Fenced: as `check_owner`.
            OSError: names the blob that could not be written; nothing new is visible.
        """
        graded_by = grader(cell) if VIEW in records else ""
        self._publish(split(records, graded_by), cell, provenance, graded_by)

    def grade_again(self, grades: Mapping[str, Sequence[Any]], *, cell: Cell, provenance: Provenance) -> None:
        """Make new grades of a cell's answers, and what hangs on them, count instead of the old ones, together or not at all.

        grades: rows by table of `records.GRADED`, one grade for each answer in its order. Where grades by this grader count
        already, nothing changes.

        Raises:
            ValueError: the cell has no answers, or other than these grades are of; and as `publish`.
        """
        before = next((pair for pair in gradings(self._commits.all()).items() if pair[0].cell == cell.key), None)
        if before is None:
            raise ValueError(f"cell {cell.key} has no answers that could be graded")
        answers, old = before
        rows, (graded_by,) = grades["grades"], {row.grader for row in grades["grades"]}
        if len(rows) != _part("answers", answers).rows:
            raise ValueError(f"cell {cell.key} has {_part('answers', answers).rows} answers, and {len(rows)} grades were given")
        if old.grader != graded_by:
            self._publish(grades, cell, provenance, graded_by, (answers, old))

    def _publish(
        self, records: Mapping[str, Sequence[Any]], cell: Cell, provenance: Provenance, graded_by: str,
        before: tuple[Commit, Commit] | None = None,
    ) -> None:  # fmt: skip
        """before: the answers that are graded again, and the grading that counted."""
        fence = partial(self.check_owner, provenance)
        fence()
        arrays = {table: record_arrays(table, rows) for table, rows in records.items()}
        owner = cell.key
        name = f"{owner}-{digest(arrays, owner if before is None else f'{owner} {before[0].name} {before[1].name}')}"
        if not arrays or self._commits.holds(name):
            return
        data = {table: encode(table, arrays[table], cell, provenance) for table in arrays}
        sums = {table: sha256(raw) for table, raw in data.items()}
        parts = tuple(
            Part(table, f"{owner}-{sums[table][:16]}.parquet", len(records[table]), len(data[table]), sums[table]) for table in data
        )
        outcomes = {row.status for row in records.get("outcomes", ())}
        status = "" if not outcomes else "ok" if outcomes == {"ok"} else "failed"
        now = self._commits.moment()
        about = (graded_by if "grades" in records else "", before[0].name if before else "")
        commit = Commit(name, cell.key, provenance.run, provenance.attempt, status, now, parts, *about)
        self._commits.add(commit, data, fence)

    def read(
        self, table: str, names: Sequence[str] | None = None, *, cells: Collection[str] | None = None, coded: bool = False
    ) -> pd.DataFrame:
        """All rows of a table, each once, ordered by cell and then as written; `versions` and `hardware` are categories.

        Of a cell that was published twice one commit counts, see `publish`. A table nobody wrote is an empty frame.

        names, cells: only these columns, only rows of the cells with these keys; what is left out costs neither time nor memory.
        coded: all text as categories, in the order of the texts: a tenth of the memory where a million rows repeat themselves.

        Raises:
            ValueError: no such table or column.
        """
        wanted = _known(table, names)
        while True:
            if table == VIEW:
                if (pairs := self._joined(wanted, cells, coded)) is not None:
                    return frame(table, pairs, wanted, coded)[wanted]
                continue
            picked = [c for c in chosen(self._commits.all(), table) if cells is None or not c.cell or c.cell in cells]
            parts = self._each(picked, partial(_part, table), partial(_decoded, wanted, coded, cells))
            if parts is not None:
                return frame(table, parts, wanted, coded)[wanted]

    def _joined(self, names: Sequence[str], cells: Collection[str] | None, coded: bool) -> list[pa.Table] | None:
        """Answers with their grades by cell. None: one is damaged and put aside now."""
        of_answers, of_grades = needed(names)
        found = []
        for commit, graded in gradings(self._commits.all()).items():
            if cells is not None and commit.cell and commit.cell not in cells:
                continue
            one = self._each([commit], partial(_part, "answers"), partial(_decoded, of_answers, coded, cells))
            other = self._each([graded], partial(_part, "grades"), partial(_decoded, of_grades, coded, cells))
            if one is None or other is None:
                return None
            try:
                found.append(joined(names, one[0], other[0], coded))
            except Damaged as damage:
                self._commits.quarantine(graded, _part("grades", graded), damage)
                return None
        return found

    def graders(self) -> dict[str, str]:
        """Digest of the grader whose grades count, by cell; "" where it was not installed."""
        return {commit.cell: graded.grader for commit, graded in gradings(self._commits.all()).items() if commit.cell}

    def origins(self, table: str) -> pd.DataFrame:
        """Whose rows a table has and who made them: one row per part that counts, columns `columns.ORIGIN`, all of them objects.

        Cheap beside `read`: one row of each commit tells it, and the same commit is asked once, whatever the table.

        Raises:
            ValueError: no such table.
        """
        columns(table)
        while True:
            table = "answers" if table == VIEW else table
            picked = [c for c in chosen(self._commits.all(), table) if _part(table, c).rows]
            names = [commit.name if commit.cell else f"{commit.name} {table}" for commit in picked]
            new = [(name, commit) for name, commit in zip(names, picked, strict=True) if name not in self._origins]
            found = self._each([commit for _, commit in new], partial(_telling, table), origins)
            if found is not None:
                self._origins |= {name: rows for (name, _), rows in zip(new, found, strict=True)}
                return origin_frame([row for name in names for row in self._origins[name]])

    def _each(self, picked: list[Commit], which: Callable[[Commit], Part], look: Callable[[Part, bytes], T]) -> list[T] | None:
        """`look` at one part of each commit. None: one is damaged and put aside now, so another attempt's commit may count."""
        found = []
        for commit in picked:
            part = which(commit)
            try:
                found.append(look(part, self._commits.data(part)))
            except Damaged as damage:
                self._commits.quarantine(commit, part, damage)
                return None
        return found

    def done(self, table: str = "outcomes") -> set[str]:
        """Keys of the cells that need no more work: with an outcome `ok`, or, for another table, with rows that did not fail.

        Every part of a commit is checked, so a cell that lost any part is not done.
        """
        columns(table)
        table = "answers" if table == VIEW else table
        wanted = {"ok"} if table == "outcomes" else {"ok", ""}
        picked = chosen(self._commits.all(), table)
        found = {commit.cell for commit in picked if commit.cell and commit.status in wanted}
        if any(not commit.cell for commit in picked):
            outcomes = self.read("outcomes", ["cell", "status"])
            failed = set(outcomes.loc[outcomes["status"] != "ok", "cell"])
            found |= set(self.read(table, ["cell"])["cell"]) - failed
        return found

    def statuses(self) -> dict[str, str]:
        """ "ok" or "failed" by cell, from manifests alone. A compacted store, whose one commit holds all cells, has none."""
        return {commit.cell: commit.status for commit in chosen(self._commits.all(), "outcomes") if commit.cell}

    def compact(self, to: Blobs | Path | str) -> None:
        """Write what counts of every table as one part, under one manifest, into an empty place: small, to be kept beside a report.

        Raises:
            ValueError: there is nothing to write, or the place holds records already.
        """
        other = Store(to)
        if other._commits.all():
            raise ValueError(f"{other.blobs} holds records already: choose another folder")
        commits = [commit for commit in self._commits.all() if commit.parts]
        if not commits:
            raise ValueError(f"{self.blobs} holds no records: name a store that does")
        data: dict[str, bytes] = {}
        rows: dict[str, int] = {}
        for table in TABLES:
            picked = [commit for commit in chosen(commits, table) if _part(table, commit).rows]
            parts = self._each(picked, partial(_part, table), partial(_decoded, _known(table, None), False, None))
            if parts:
                data[table], rows[table] = compacted(table, parts), sum(map(len, parts))
        sums = {table: sha256(raw) for table, raw in data.items()}
        made = tuple(Part(t, f"{COMPACTED}-{sums[t][:16]}.parquet", rows[t], len(data[t]), sums[t]) for t in data)
        name = f"{COMPACTED}-{sha256(''.join(sums.values()).encode())[:16]}"
        event_log.copy(self.blobs, other.blobs)
        run = max(commits, key=lambda commit: commit.published)
        other._commits.add(Commit(name, "", run.run, run.attempt, "ok", run.published, made), data, lambda: None)


def _part(table: str, commit: Commit) -> Part:
    part = commit.part(table)
    assert part is not None
    return part


def _decoded(names: Sequence[str], coded: bool, cells: Collection[str] | None, part: Part, data: bytes) -> pa.Table:
    if cells is None or not part.name.startswith(f"{COMPACTED}-"):
        return decode(part.table, data, names, coded)
    rows = decode(part.table, data, list(dict.fromkeys([*names, "cell"])), coded)
    return rows.filter(pc.is_in(rows["cell"], pa.array(sorted(cells), pa.string()))).select(list(names))


def _telling(table: str, commit: Commit) -> Part:
    """The part that is asked whose rows they are: all parts of a cell's commit have one origin, so the smallest with rows."""
    if not commit.cell:
        return _part(table, commit)
    return min((part for part in commit.parts if part.rows), key=lambda part: part.bytes)


def _known(table: str, names: Sequence[str] | None) -> list[str]:
    every = [column.name for column in columns(table)]
    for name in names or ():
        if name not in every:
            raise ValueError(f"table {table!r} has no column {name!r:.100}: {nearest(str(name), every)}")
    return every if names is None else list(names)
