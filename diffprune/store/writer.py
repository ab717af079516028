"""A thread that publishes the cells of a sweep, many at a time: no worker waits for the disk, and no file is made for one cell."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from diffprune.core.cell import Cell
from diffprune.core.records import Provenance
from diffprune.io.outage import joined
from diffprune.store.bundles import FULL, MOST_CELLS
from diffprune.store.parquet import Store
from diffprune.store.unfinished import Kept, Unfinished

EVERY_S = 15.0  # the longest a cell waits for others; what the death of this process costs is this, and one write
MOST_WAITING = int(FULL * MOST_CELLS), 200_000  # cells and rows that do not wait for others: so many need no merging


class Writer:
    """Publishes while a `with` block lasts: every `every_s` seconds, when many cells are there, and at the end of the block,
    however it ends. What was published is merged in the background; see `Store.merge`.

    Raises (from `publish`, or at the end of the block unless it raises already): what the store met, see `Store.publish_all`.
    """

    def __init__(self, store: Store, provenance: Provenance, every_s: float = EVERY_S) -> None:
        self.store, self.provenance, self.every_s = store, provenance, every_s
        self.unfinished = Unfinished(store.blobs, provenance.run)
        self._keeping = list[tuple[Cell, Kept]]()
        self._waiting, self._rows, self._since = list[tuple[Cell, Mapping[str, Sequence[Any]]]](), 0, 0.0
        self._closing = False
        self._error: BaseException | None = None
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)

    def publish(self, cell: Cell, records: Mapping[str, Sequence[Any]]) -> None:
        """Hand over; waits only where the disk is two bundles behind."""
        with self._change:
            self._change.wait_for(lambda: self._error or not self._full)
            if self._error:
                raise self._error
            self._since = self._since if self._waiting else time.monotonic()
            self._waiting.append((cell, records))
            self._rows += sum(map(len, records.values()))
            if len(self._waiting) == 1 or self._full:
                self._change.notify_all()

    def keep(self, found: Sequence[tuple[Cell, Kept]]) -> None:
        """Hand over new answers of cells that are not finished; see `Unfinished`. They are forgotten when the cell is published."""
        with self._change:
            self._keeping += found
            self._change.notify_all()

    @property
    def _full(self) -> bool:
        return len(self._waiting) >= MOST_WAITING[0] or self._rows >= MOST_WAITING[1]

    def _run(self) -> None:
        while any(due := self._due()):
            some, kept = due
            try:
                if some:
                    self.store.publish_all(some, self.provenance)
                    self.unfinished.forget(cell.key for cell, _ in some)
                published = {cell.key for cell, _ in some}
                if kept := [(cell, found) for cell, found in kept if cell.key not in published]:
                    self.store.check_owner(self.provenance)
                    self.unfinished.keep(kept)
                if some and not self._closing:
                    self.store.merge(self.provenance)
            except BaseException as error:  # told where it can be raised
                with self._change:
                    self._error = self._error or error
                    if isinstance(error, OSError) and not self._closing:  # tried once more at the end: the disk may have room then
                        self._waiting[:0] = some
                    self._change.notify_all()

    def _due(self) -> tuple[list[tuple[Cell, Mapping[str, Sequence[Any]]]], list[tuple[Cell, Kept]]]:
        """What is to be published and what to be kept now; waits for it. Nothing: the block has ended."""
        with self._change:
            while not self._closing and (self._error or not (self._full or self._keeping)):
                left = self._since + self.every_s - time.monotonic() if self._waiting and not self._error else None
                if left is not None and left <= 0:
                    break
                self._change.wait(left)
            kept, self._keeping = self._keeping, []
            if kept and not (self._closing or self._full or time.monotonic() - self._since >= self.every_s):
                return [], kept
            some, self._waiting, self._rows = self._waiting, [], 0
            self._change.notify_all()
            return some, kept

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *raised: object) -> None:
        with self._change:
            self._closing = True
            self._change.notify_all()
        joined(self._thread)
        if kind is None:
            if self._error:
                raise self._error
            self.store.merge(self.provenance)
