"""TensorBoard: event files below `tensorboard/` in the run's folder, a TensorBoard run for every series.

Records are the truth and event files are made from them: a run that goes on writes its files anew, so that nothing is there twice.
Files are written in place, without the thread and the queue that `SummaryWriter` has for each of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

from diffprune.io.blob_store import remote
from diffprune.track.tracker import Scalars, clean

FOLDER = "tensorboard"
EVENTS = "events.out.tfevents.*"  # how TensorBoard knows its files


class TensorBoard:
    """Writes event files of one run. folder: the run's.

    Raises:
        ValueError: it is no folder but a bucket.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        if remote(folder):
            raise ValueError("event files need a folder, and this run's is a bucket")
        self.folder, self._writers = folder / FOLDER, dict[str, EventsWriter]()
        for old in self.folder.rglob(EVENTS):
            old.unlink(missing_ok=True)

    def log(self, rows: Iterable[Scalars]) -> None:
        """Onto the disk before it returns."""
        touched = set()
        for row in rows:
            touched.add(row.series)
            for name, value in row.finite.items():
                self._writer(row.series).write_event(
                    Event(wall_time=time.time(), step=row.step, summary=scalar(clean(name), value))
                )
        for series in touched & self._writers.keys():
            self._writers[series].flush()

    def _writer(self, series: str) -> EventsWriter:
        if series not in self._writers:
            place = self.folder.joinpath(*map(clean, series.split("/", 1)))
            os.makedirs(place, mode=0o700, exist_ok=True)
            self._writers[series] = EventsWriter(str(place / "events"))
        return self._writers[series]

    def close(self, failed: bool) -> None:
        """Close every file."""
        for writer in self._writers.values():
            writer.close()
