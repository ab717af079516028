"""Measuring as Ray work: one process has a host to itself; what it has timed together is published before the next begins. Every
session asked for has a process of its own.

A process that dies costs what it was timing, not what it had timed: another takes up the rest. Cells of which one process after the
other dies are given up, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from ray.exceptions import RayError

from diffprune.core.cell import Cell
from diffprune.core.errors import first_line
from diffprune.core.records import Outcome, Provenance
from diffprune.core.spec import Spec
from diffprune.distributed import metrics
from diffprune.distributed.cluster import connect
from diffprune.distributed.exclusive import exclusive
from diffprune.distributed.sweep import TRIES, SweepFailed
from diffprune.io.run_lock import attempts_at
from diffprune.io.shared_storage import Proof, proof
from diffprune.measure import measure as timing
from diffprune.store import Store
from diffprune.timing.options import Measurement
from diffprune.vlm.load import load


def timed(
    model: Spec, cells: Sequence[Cell], options: Measurement, storage: Proof | None = None
) -> Iterator[dict[Cell, timing.Measured]]:
    """What is found about the cells of each session, in the process that asks, which loads the model itself; nothing, as soon as it
    has. storage: of the run, which this host has to see."""
    if storage:
        storage.check()
    vlm = load(model)
    yield {}
    for group in timing.together(cells):
        yield timing.measure(vlm, group, options)


def measure(
    cells: Sequence[Cell],
    options: Measurement,
    store: Store,
    provenance: Provenance,
    *,
    model: Spec,
    address: str | None = None,
    gpus: float = 0.0,
    accelerator: str = "",
) -> None:
    """Time the cells and publish what is found. gpus, accelerator: see `exclusive`.

    Raises:
        SweepFailed: some cells could not be timed; the others are in the store, and so are the reasons (`outcomes`).
        RuntimeError: the process died, or hung, again and again while it loaded the model, or its host does not see the storage.
        ValueError: as `timing.measure`, or the model cannot be loaded.
    """
    left, failed, deaths, loaded = list(cells), list[str](), 0, False
    storage, began = proof(attempts_at(store.blobs, provenance.run), provenance.attempt), time.monotonic()

    def publish(found: Mapping[Cell, timing.Measured]) -> None:
        nonlocal left
        for cell, one in found.items():
            store.publish(one.tables, cell=cell, provenance=provenance)
            metrics.CELLS.add(1, provenance.run, "measure", one.outcome.status)
            if one.outcome.status != "ok":
                failed.append(f"{cell.method.label} {cell.columns().budget}: {one.outcome.reason}")
        left = [cell for cell in left if cell not in found]
        if found:
            done, spent = len(cells) - len(left), time.monotonic() - began
            print(f"measure: {done}/{len(cells)} cells, {spent:.0f} s, about {spent / done * len(left):.0f} s left", flush=True)

    with connect(address):
        while left:
            session = [cell for cell in left if timing.measured(cell).seed == timing.measured(left[0]).seed]
            try:
                for found in exclusive(
                    timed, model, session, options, storage, address=address, gpus=gpus, accelerator=accelerator
                ):
                    loaded, deaths = True, 0 if found else deaths
                    publish(found)
            except RayError as error:
                deaths, reason = deaths + 1, first_line(error)
                metrics.worker_lost(provenance.run, "measure", reason)
                if deaths < TRIES:
                    print(f"measure: its process died ({reason}); another measures the {len(left)} cells left", flush=True)
                    continue
                told = f"the process that measures died {TRIES} times in a row, last: {reason}"
                if not loaded:
                    raise RuntimeError(told) from error
                lost = timing.Measured([], [], Outcome("failed", told, 0, 0.0))
                publish(dict.fromkeys(timing.together(left)[0], lost))  # those it was at: they are timed in this order
                deaths = 0
    if failed:
        raise SweepFailed(f"{len(failed)} of {len(cells)} cells could not be measured; first {failed[0]}")
