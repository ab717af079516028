"""Training sources by name: `world`, `jsonl('chats.jsonl', images='pictures')`, `parquet('folder')` ...

What all that read files accept stands in `io/qa_rows.py`, which a benchmark of one's own reads by, too: `image`, `question`,
`answer`, `options`, `id` name columns, and `prompt` is what is asked about pictures with captions.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

from diffprune.core.registry import bound, nearest
from diffprune.core.spec import Spec, parse
from diffprune.data.parquet import parquet_table
from diffprune.data.sources import TrainingSource
from diffprune.data.table import RowTable, TableSource
from diffprune.data.text import text_table
from diffprune.data.world import WorldSource
from diffprune.io import dataset_splits
from diffprune.io import hub as remote
from diffprune.io.dataset_splits import patterns
from diffprune.io.qa_rows import FILE_NAME, IMAGE, QAColumns
from diffprune.io.row_files import row_files

METADATA = ("metadata.jsonl", "metadata.csv")


def world() -> TrainingSource:
    """The embedded world: endless."""
    return WorldSource()


def jsonl(
    file: Path,
    images: Path | None = None,
    image: str = IMAGE,
    question: str = "",
    answer: str = "",
    prompt: str = "",
    options: str = "",
    id: str = "",
) -> TrainingSource:
    """One object per line, one array of objects, a CSV or a TSV.

    file:   with the rows.
    images: folder of the pictures; by default that of the file.
    """
    columns, beside = QAColumns(image, question, answer, options, id, prompt=prompt, captions=True), images or file.parent
    return TableSource(lambda: text_table(file, columns, beside), beside, f"jsonl {columns}")


def parquet(
    place: Path,
    images: Path | None = None,
    image: str = IMAGE,
    question: str = "",
    answer: str = "",
    prompt: str = "",
    options: str = "",
    id: str = "",
) -> TrainingSource:
    """A Parquet file or a folder of them, with images inside or beside.

    place:  the file or the folder.
    images: folder of pictures that are paths; by default that of the files.
    id: the column that says which rows are about the same image, so that none is both trained on and held out; by default the
        path inside the image column, else the bytes of the image, which are then read once before the first step.
    """
    columns = QAColumns(image, question, answer, options, id, prompt=prompt, captions=True)
    beside = images or (place.parent if place.suffix == ".parquet" else place)

    def opened() -> RowTable:
        return parquet_table(str(place), row_files(place, (".parquet",)), columns, beside)

    return TableSource(opened, beside, f"parquet {columns}")


def folder(place: Path, question: str = "", answer: str = "", prompt: str = "") -> TrainingSource:
    """A folder of images with captions in `metadata.jsonl` or `metadata.csv`, whose `file_name` names the image.

    place: the folder.
    """
    columns = QAColumns(FILE_NAME, question, answer, prompt=prompt, captions=True)

    def opened() -> RowTable:
        found = next((place / name for name in METADATA if (place / name).is_file()), None)
        if found is None:
            raise ValueError(f"{place} has neither {' nor '.join(METADATA)}, which would name each image's caption")
        return text_table(found, columns, place)

    return TableSource(opened, place, f"folder {columns}")


def hub(
    repository: str,
    revision: str = "",
    split: str = "train",
    config: str = "default",
    image: str = IMAGE,
    question: str = "",
    answer: str = "",
    prompt: str = "",
    options: str = "",
    id: str = "",
) -> TrainingSource:
    """The Parquet files of one split of a data set on the Hub, at a commit; downloaded at the first draw.

    repository: owner/name.
    revision:   the commit, 40 digits; must be given, so that every run reads the same data.
    split, config: of the data set, as the Hub names them.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"{repository!r} is no data set of the Hub; write 'owner/name'")
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(f"hub({repository!r}) needs revision='<commit>' of 40 digits, so that every run reads the same data")
    columns = QAColumns(image, question, answer, options, id, prompt=prompt, captions=True)

    def opened() -> RowTable:
        wanted = patterns(config, split)
        first = remote.files(repository, revision, wanted)[0]
        place = next(first.parents[pattern.count("/")] for pattern in wanted if first.match(pattern))
        files = dataset_splits.split_files(place, config, split)  # which refuses a missing shard
        return parquet_table(repository, files, columns, None)

    source = TableSource(opened, None, f"hub {columns}")
    source.fetched = True
    source.identity = f"hub {repository} {revision} {config!r} {split!r} {columns}"
    return source


SOURCES: dict[str, Callable[..., TrainingSource]] = {f.__name__: f for f in (world, jsonl, parquet, folder, hub)}


def source_spec(data: str | Spec) -> Spec:
    """Training data as a value; paths are made absolute, as workers may run in another folder, and are no part of it.

    Raises:
        ValueError: no text, or no such source or option; names the nearest one.
    """
    if isinstance(data, Spec):
        return data
    if not isinstance(data, str):
        raise ValueError(f"{data!r:.100} is no training data: write it as text, as in world or jsonl('chats.jsonl')")
    call = parse(data)
    if call.name not in SOURCES:
        raise ValueError(f"no training data {data!r:.200}: {nearest(call.name, SOURCES)}")
    made = bound(call, inspect.signature(SOURCES[call.name]))
    for key, value in made.options:
        if not isinstance(value, str):
            raise ValueError(f"training data {data!r:.200}: {key} is {value!r}, but must be text in quotes")
    return made.at(**{key: Path(place).expanduser().absolute() for key, place in made.places})


def source(data: str | Spec) -> TrainingSource:
    """The source asked for; its files are looked at only when it is drawn from.

    Raises:
        ValueError: no such source or option; names the nearest one.
    """
    asked = source_spec(data)
    return SOURCES[asked.name](**dict(asked.options), **{key: Path(place) for key, place in asked.places})
