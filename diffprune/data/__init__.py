"""Training batches: images, questions and labelled answers, a pure function of (seed, step, rank).

Image `i` of step `t` is drawn by its number alone, so a resumed run sees what it would have seen, and N workers together see
what one worker with the whole batch sees. Sources are spelled like plug-ins: `world`, `jsonl('chats.jsonl', images='pictures')`,
`parquet('folder')`, `folder('folder')`, `hub('owner/name', revision='...')`; see `catalog.py`. Images for calibration and
validation are never trained on: they are picked by a hash of the image's id (`order.py`). Files are read row by row, or row
group by row group; rows that are broken are counted, skipped and replaced (`table.py`).
"""

from diffprune.data.batch import TrainBatch, block_mask, packed_rows, rows
from diffprune.data.catalog import SOURCES, source, source_spec
from diffprune.data.sources import CALIBRATION, VALIDATION, BrokenRows, Example, QAPairs, TooManyBroken, TrainingSource
from diffprune.data.stream import batches, calibration, calibration_pictures, first_batch, first_example, look, validation

__all__ = [
    "CALIBRATION",
    "SOURCES",
    "VALIDATION",
    "BrokenRows",
    "Example",
    "QAPairs",
    "TooManyBroken",
    "TrainBatch",
    "TrainingSource",
    "batches",
    "block_mask",
    "calibration",
    "calibration_pictures",
    "first_batch",
    "first_example",
    "look",
    "packed_rows",
    "rows",
    "source",
    "source_spec",
    "validation",
]
