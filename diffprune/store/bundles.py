"""Bundles: the commits of many cells under one manifest, in parts that they share; and which small ones become one larger one.

A commit of its own costs a cell four files and a tenth of a second of a busy disk. A bundle costs as much, whatever it holds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import pyarrow as pa

from diffprune.core.cell import CellColumns
from diffprune.core.records import TABLES, Provenance
from diffprune.store.manifest import BUNDLE, Commit, Part, sha256
from diffprune.store.parts import Columns, encode, record_batch

MOST_CELLS = 4096  # of a bundle: what one damaged bit may cost, and DuckDB reads no manifest of more than 16 MB
MOST_BYTES = 64 << 20  # of its parts: they are held in memory where bundles are merged
TOGETHER = 16  # bundles of about one size that are merged
FULL = 0.75  # of `MOST_CELLS` or `MOST_BYTES`, from which on a bundle stays as it is


@dataclass(frozen=True)
class Prepared:
    """What one commit is to hold. commit: without its parts; about: its cell; records: by table."""

    commit: Commit
    about: CellColumns
    records: dict[str, pa.RecordBatch]

    @property
    def rows(self) -> dict[str, int]:
        """How many by table."""
        return {table: records.num_rows for table, records in self.records.items()}


def batches(found: Sequence[dict[str, Columns]], wrong: list[ValueError]) -> list[dict[str, pa.RecordBatch] | None]:
    """Records of each cell, converted for all cells at once. None: a value of that cell is wrong, and is told of in `wrong`."""
    if not found:
        return []
    try:
        made: list[dict[str, pa.RecordBatch] | None] = [{} for _ in found]
        for table in dict.fromkeys(chain.from_iterable(found)):
            mine = [(number, values[table]) for number, values in enumerate(found) if table in values]
            whole = record_batch(table, [list(chain.from_iterable(same)) for same in zip(*(c for _, c in mine), strict=True)])
            start = 0
            for number, values in mine:
                batch = made[number]
                assert batch is not None
                batch[table] = whole.slice(start, len(values[0]))
                start += len(values[0])
        return made
    except ValueError as error:
        if len(found) == 1:
            wrong.append(error)
            return [None]
        return [batch for one in found for batch in batches([one], wrong)]


def parts(prefix: str, several: Sequence[Prepared], provenance: Provenance) -> dict[Part, bytes]:
    """One part per table of what one or several commits hold, in their order. prefix: what the names of the parts begin with."""
    found = {}
    for table in TABLES:
        mine = [one for one in several if table in one.records]
        if mine:
            cells = [(one.commit.cell, one.about) for one in mine]
            data = encode(table, [one.records[table] for one in mine], cells, provenance)
            found[part(table, prefix, sum(one.rows[table] for one in mine), data)] = data
    return found


def part(table: str, prefix: str, rows: int, data: bytes) -> Part:
    """Named by what is in it."""
    return Part(table, f"{prefix}-{sha256(data)[:16]}.parquet", rows, len(data), sha256(data))


def name_of(commits: Sequence[Commit]) -> str:
    """The name of a bundle: by what is in it. The names of its parts begin with it, so no part belongs to two bundles."""
    return f"{BUNDLE}-{sha256(' '.join(commit.name for commit in commits).encode())[:16]}"


def due(bundles: Sequence[list[Commit]]) -> list[list[Commit]]:
    """The bundles that are to become one now, oldest first; none: there are few of them. Sixteen of about one size do, or so many
    that they fill one, so of n bundles of one cell remain some 50 + n / `MOST_CELLS`, and no row is written more than four times.

    A cell stands in a bundle once, so what holds a cell twice is not merged.
    """
    tiers: dict[tuple[str, int], list[tuple[float, list[Commit]]]] = defaultdict(list)
    for one in sorted(bundles, key=lambda one: one[0].published):
        size = len(one) / MOST_CELLS
        if size < FULL:  # else full whatever it weighs, and its thousands of commits are not gone through
            size = max(size, sum(part.bytes for part in {part for commit in one for part in commit.parts}) / MOST_BYTES)
        if size < FULL:
            tiers[one[0].run, math.floor(math.log(size, TOGETHER))].append((size, one))
    for _, tier in sorted(tiers.items()):
        picked, total, cells = list[list[Commit]](), 0.0, set[str]()
        for size, one in tier:
            if total + size <= 1 and cells.isdisjoint(commit.cell for commit in one):
                picked.append(one)
                total += size
                cells.update(commit.cell for commit in one)
        if len(picked) >= TOGETHER or (len(picked) > 1 and total >= FULL):
            return picked
    return []


def files_left(cells: int) -> int:
    """About so many files are left of so many cells at most, if each comes alone: five to a bundle, three sizes below full ones."""
    full = math.ceil(cells / (FULL * MOST_CELLS))
    return 5 * min(cells, full + 3 * TOGETHER)


def contained(bundles: Sequence[list[Commit]]) -> list[list[Commit]]:
    """The bundles all of whose commits stand in another one as well: a merge was stopped before it had removed them."""
    owner: dict[str, int] = {}
    order = sorted(range(len(bundles)), key=lambda i: -len(bundles[i]))
    for i in order:
        for commit in bundles[i]:
            owner.setdefault(commit.name, i)
    needed = set(owner.values())
    return [bundles[i] for i in order if i not in needed]
