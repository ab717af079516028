"""The Parquet store: records are published whole, found through manifests, and checked bit by bit when read.

Blobs: `parts/<table>/<cell>-<sha256>.parquet`, `manifests/<cell>-<content>.json`, `quarantine/` for what cannot be used,
`locks/<run>/<attempt>`, `events/<run>/<attempt>.jsonl`, `unfinished/<run>/` for answers that are no records yet. Parts are written
first, the manifest last; what has no manifest does not exist. The cells of a sweep are published many at a time:
`parts/<table>/<bundle>-<sha256>.parquet`, `bundles/<bundle>.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from diffprune.core.cell import Cell, Questions
from diffprune.core.records import TABLES, Provenance
from diffprune.core.registry import nearest
from diffprune.io import event_log
from diffprune.io.blob_store import Blobs, open_blobs
from diffprune.io.run_lock import attempts_at
from diffprune.store import bundles
from diffprune.store.bundles import Prepared
from diffprune.store.columns import columns
from diffprune.store.commits import Commits, chosen, gradings
from diffprune.store.manifest import COMPACTED, Commit, Damaged, Part, bundled, sha256
from diffprune.store.parts import Columns, check, compacted, decode, digest, record_batch
from diffprune.store.predictions import VIEW, grader, joined, needed, split
from diffprune.store.to_pandas import frame, listed, origin_frame, origins, told

T = TypeVar("T")
STATUS = [field.name for field in fields(TABLES["outcomes"])].index("status")


class Store:
    """Records in a folder, which is created by the first write, or among other blobs.

    Raises:
        ValueError: the folder is a file.
    """

    def __init__(self, place: Blobs | Path | str) -> None:
        self.blobs = open_blobs(place)
        self._commits = Commits(self.blobs, check)
        self._tidied = False  # whether what a stopped merge left was looked for
        self._done: dict[str, tuple[list[Commit], set[str]]] = {}  # by table: the commits it was counted from
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
        if len(rows) != answers.span("answers")[1]:
            raise ValueError(f"cell {cell.key} has {answers.span('answers')[1]} answers, and {len(rows)} grades were given")
        if old.grader != graded_by:
            self._publish(split(grades, graded_by), cell, provenance, graded_by, (answers, old))

    def publish_all(self, found: Sequence[tuple[Cell, Mapping[str, Sequence[Any]]]], provenance: Provenance) -> None:
        """Make the rows of many cells visible together or not at all, in a twentieth of the time and a hundredth of the files that
        as many calls of `publish` take; for readers there is no difference.

        Raises:
            as `publish`; ValueError: of one cell; those of the others are published before.
        """
        fence = partial(self.check_owner, provenance)
        fence()
        values, wrong, graders = dict[Cell, tuple[dict[str, Columns], str]](), list[ValueError](), dict[Questions, str]()
        for number, (cell, records) in enumerate(found):
            if cell in values:  # a bundle holds a cell once
                self.publish_all(found[:number], provenance)
                return self.publish_all(found[number:], provenance)
            graded_by = ""
            if VIEW in records and cell.questions:
                asked = cell.questions[0]
                graded_by = graders[asked] = graders[asked] if asked in graders else grader(cell)
            try:
                values[cell] = split(records, graded_by), graded_by
            except ValueError as error:
                wrong.append(error)
        each = zip(values.items(), bundles.batches([mine for mine, _ in values.values()], wrong), strict=True)
        prepared = [self._prepared(mine, batch, cell, provenance, by) for (cell, (mine, by)), batch in each if batch is not None]
        if new := [one for one in prepared if one.records]:
            name = bundles.name_of([one.commit for one in new])
            made = bundles.parts(name, new, provenance)
            self._commits.add(bundled(name, list(made), [(one.commit, one.rows) for one in new]), made, fence)
        if wrong:
            raise wrong[0]

    def merge(self, provenance: Provenance) -> None:
        """Make one bundle of several small ones where there are many: readers see the same rows before, meanwhile and after.

        Raises:
            Fenced, OSError: as `publish`.
        """
        fence = partial(self.check_owner, provenance)
        fence()
        if not self._tidied:
            self._tidied = True
            for left in bundles.contained(self._commits.bundles()):
                self._commits.remove(left)
        while several := bundles.due(self._commits.bundles()):
            every = [one for some in several for one in some]
            name, made = bundles.name_of(every), dict[Part, bytes]()
            for table in TABLES:
                mine = list({part.key: one for one in every for part in one.parts if part.table == table}.values())
                rows = self._each(mine, partial(_part, table), partial(_decoded, _known(table, None), False, None))
                if rows is None:
                    return  # one was damaged, and is put aside
                if rows:
                    raw = compacted(table, rows, level=None)
                    made[bundles.part(table, name, sum(map(len, rows)), raw)] = raw
            counted = [(one, {part.table: one.span(part.table)[1] for part in one.parts}) for one in every]
            self._commits.add(bundled(name, list(made), counted), made, fence)
            for some in several:
                self._commits.remove(some)

    def _publish(
        self, records: Mapping[str, Columns], cell: Cell, provenance: Provenance, graded_by: str,
        before: tuple[Commit, Commit] | None = None,
    ) -> None:  # fmt: skip
        """before: the answers that are graded again, and the grading that counted."""
        fence = partial(self.check_owner, provenance)
        fence()
        batches = {table: record_batch(table, values) for table, values in records.items()}
        one = self._prepared(records, batches, cell, provenance, graded_by, before)
        if one.records and not self._commits.holds(one.commit.name):
            made = bundles.parts(cell.key, [one], provenance)
            self._commits.add([replace(one.commit, parts=tuple(made))], made, fence)

    def _prepared(
        self, columns: Mapping[str, Columns], records: dict[str, pa.RecordBatch], cell: Cell, provenance: Provenance,
        graded_by: str, before: tuple[Commit, Commit] | None = None,
    ) -> Prepared:  # fmt: skip
        """The commit, without parts, of these rows of a cell. columns, records: the same, by table."""
        owner = cell.key
        name = f"{owner}-{digest(columns, owner if before is None else f'{owner} {before[0].name} {before[1].name}')}"
        outcomes = set(columns["outcomes"][STATUS]) if "outcomes" in columns else set()
        status = "" if not outcomes else "ok" if outcomes == {"ok"} else "failed"
        about = (graded_by if "grades" in records else "", before[0].name if before else "")
        commit = Commit(name, owner, provenance.run, provenance.attempt, status, self._commits.moment(), (), *about)
        return Prepared(commit, cell.columns(), records)

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
            parts = self._rows(picked, table, wanted, coded, cells)
            if parts is not None:
                return frame(table, parts, wanted, coded)[wanted]

    def _joined(self, names: Sequence[str], cells: Collection[str] | None, coded: bool) -> list[pa.Table] | None:
        """Answers with their grades by cell. None: one is damaged and put aside now."""
        every = gradings(self._commits.all()).items()
        pairs = [pair for pair in every if cells is None or not pair[0].cell or pair[0].cell in cells]
        together = [pairs] if any(commit.bundle for pair in pairs for commit in pair) else [[pair] for pair in pairs]
        found = []
        for some in together:
            if (one := self._paired(some, names, coded, cells)) is None:
                return None
            found.append(one)
        return found

    def _paired(
        self, pairs: Sequence[tuple[Commit, Commit]], names: Sequence[str], coded: bool, cells: Collection[str] | None
    ) -> pa.Table | None:
        of_answers, of_grades = needed(names)
        answers = self._rows([commit for commit, _ in pairs], "answers", of_answers, coded, cells)
        grades = self._rows([graded for _, graded in pairs], "grades", of_grades, coded, cells)
        if answers is None or grades is None:
            return None
        try:
            return joined(names, pa.concat_tables(answers), pa.concat_tables(grades), coded)
        except Damaged as damage:
            if len(pairs) == 1:
                self._commits.quarantine(pairs[0][1], _part("grades", pairs[0][1]), damage)
            for pair in pairs if len(pairs) > 1 else ():
                if self._paired([pair], names, coded, cells) is None:
                    break
        return None

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
            picked = [c for c in chosen(self._commits.all(), table) if c.span(table)[1]]
            names = [commit.name if commit.cell else f"{commit.name} {table}" for commit in picked]
            new = {name: commit for name, commit in zip(names, picked, strict=True) if name not in self._origins}
            shared = {name: commit for name, commit in new.items() if commit.bundle}
            alone = {name: commit for name, commit in new.items() if not commit.bundle}
            found = self._each(list(alone.values()), partial(_telling, table), origins)
            rows = self._rows(list(shared.values()), table, told(table), False, None, first=True)
            if found is not None and rows is not None:
                self._origins |= dict(zip(alone, found, strict=True))
                self._origins |= {name: [row] for name, row in zip(shared, (r for one in rows for r in listed(one)), strict=True)}
                return origin_frame([row for name in names for row in self._origins[name]])

    def _rows(
        self,
        picked: Sequence[Commit],
        table: str,
        names: Sequence[str],
        coded: bool,
        cells: Collection[str] | None,
        first: bool = False,
    ) -> list[pa.Table] | None:
        """The rows of one table of these commits, in their order; of a bundle's part those that are theirs. None: as `_each`.

        first: of each commit in a bundle the first row alone.
        """
        look, own = partial(_decoded, names, coded, cells), partial(_part, table)
        if not any(commit.bundle for commit in picked):
            return self._each(picked, own, look)
        several = list({own(commit): commit for commit in picked}.values())
        found = self._each(several, own, look)
        if found is None:
            return None
        starts = np.cumsum([0, *map(len, found)])
        places = {own(commit): (int(starts[i]), len(found[i])) for i, commit in enumerate(several)}
        spans = [commit.span(table) if commit.bundle else (0, places[own(commit)][1]) for commit in picked]
        begin = np.array([places[own(commit)][0] for commit in picked]) + np.array([start for start, _ in spans])
        count = np.array([min(number, 1) if first else number for _, number in spans])
        index = np.arange(count.sum()) + np.repeat(begin - np.cumsum(count) + count, count)
        return [pa.concat_tables(found).unify_dictionaries().take(pa.array(index))]

    def _each(self, picked: Sequence[Commit], which: Callable[[Commit], Part], look: Callable[[Part, bytes], T]) -> list[T] | None:
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
        commits = self._commits.all()
        if table in self._done and self._done[table][0] is commits:  # nothing was published since
            return set(self._done[table][1])
        picked = chosen(commits, table)
        found = {commit.cell for commit in picked if commit.cell and commit.status in wanted}
        if any(not commit.cell for commit in picked):
            outcomes = self.read("outcomes", ["cell", "status"])
            failed = set(outcomes.loc[outcomes["status"] != "ok", "cell"])
            found |= set(self.read(table, ["cell"])["cell"]) - failed
        self._done[table] = commits, found
        return set(found)

    def statuses(self) -> dict[str, str]:
        """ "ok" or "failed" by cell, from manifests alone. A compacted store, whose one commit holds all cells, has none."""
        return {commit.cell: commit.status for commit in chosen(self._commits.all(), "outcomes") if commit.cell}

    def bytes_of(self, table: str) -> int:
        """Size of the parts of a table, whether or not all of their rows count."""
        return sum(
            {part.key: part.bytes for commit in self._commits.all() for part in commit.parts if part.table == table}.values()
        )

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
        data: dict[Part, bytes] = {}
        for table in TABLES:
            picked = [commit for commit in chosen(commits, table) if commit.span(table)[1]]
            parts = self._rows(picked, table, _known(table, None), False, None)
            if parts is None:  # one was damaged, and is put aside
                return self.compact(to)
            if parts:
                raw = compacted(table, parts)
                data[bundles.part(table, COMPACTED, sum(map(len, parts)), raw)] = raw
        name = f"{COMPACTED}-{sha256(''.join(part.sha256 for part in data).encode())[:16]}"
        event_log.copy(self.blobs, other.blobs)
        run = max(commits, key=lambda commit: commit.published)
        other._commits.add([Commit(name, "", run.run, run.attempt, "ok", run.published, tuple(data))], data, lambda: None)


def opened(place: Store | Blobs | Path | str) -> Store:
    """The store at a place, or one that is open already: what it has read it need not read again."""
    return place if isinstance(place, Store) else Store(place)


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
