"""Weights & Biases (extra `wandb`), by the library's own API from the process that drives the run.

WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY and the library's login hold as they do elsewhere; without WANDB_PROJECT the project is
`diffprune`. A run that goes on is the same run there, and is not told again what it knows.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffprune.io.blob_store import remote
from diffprune.track.tracker import Scalars, Told, clean


class Wandb:
    """A run of W&B. Each series has a step axis of its own."""

    name = "wandb"

    def __init__(self, folder: Path, run: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self.told = Told(folder, self.name)
        self.told.run = self.told.run or uuid.uuid4().hex[:12]
        self.told.save()
        quiet = wandb.Settings(console="off", silent=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "diffprune", id=self.told.run, name=run, resume="allow",
            dir=None if remote(folder) else str(folder),
            config=dict(settings), settings=quiet,
        )  # fmt: skip
        self._axes: set[str] = set()

    def log(self, rows: Iterable[Scalars]) -> None:
        """New rows, each with the step of its series."""
        for row in self.told.new(rows):
            series = "/".join(map(clean, row.series.split("/", 1)))
            if series not in self._axes:
                self._axes.add(series)
                self._run.define_metric(f"{series}/step")
                self._run.define_metric(f"{series}/*", step_metric=f"{series}/step")
            self._run.log({f"{series}/step": row.step} | {f"{series}/{clean(k)}": v for k, v in row.finite.items()})
        self.told.save()

    def close(self, failed: bool) -> None:
        """Send what is left, and say how the run ended."""
        self._run.finish(exit_code=int(failed))
