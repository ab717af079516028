"""Training sources by name: `world`, `jsonl('chats.jsonl', images='pictures')`, `parquet('folder')` ...

Fields of all that read files: `image`, `question`, `answer` name columns, `prompt` is the question of rows that have none. By
default the answer is the first there of `conversations` (turns of LLaVA-665K or of chats), `answer`, `caption`,
`caption_enriched` (ImageNet-1K-VL-Enriched), `text`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

from diffprune.core.registry import bound, nearest
from diffprune.core.spec import Spec, parse
from diffprune.data.parquet import ParquetTable, parquet_files
from diffprune.data.qa_fields import PROMPT, QAFields
from diffprune.data.sources import TrainingSource
from diffprune.data.table import RowTable, TableSource
from diffprune.data.text import TextTable
from diffprune.data.world import WorldSource
from diffprune.io import dataset_splits
from diffprune.io import hub as remote
from diffprune.io.dataset_splits import patterns

METADATA = ("metadata.jsonl", "metadata.csv")


def world() -> TrainingSource:
    """The embedded world: endless."""
    return WorldSource()


def jsonl(
    file: Path, images: Path | None = None, image: str = "image", question: str = "", answer: str = "", prompt: str = PROMPT
) -> TrainingSource:
    """One object per line (or one array of objects); images are paths in the folder `images`, by default the file's own."""
    fields = QAFields(image, question, answer, prompt)
    return TableSource(lambda: TextTable(file, fields), fields, lambda: images or file.parent, f"jsonl {fields}")


def parquet(
    place: Path,
    images: Path | None = None,
    image: str = "image",
    question: str = "",
    answer: str = "",
    prompt: str = PROMPT,
    id: str = "",
) -> TrainingSource:
    """A Parquet file or a folder of them; images inside, or as paths in the folder `images`, by default that of the files."""
    fields = QAFields(image, question, answer, prompt)
    beside = images or (place.parent if place.suffix == ".parquet" else place)

    def opened() -> RowTable:
        return ParquetTable(str(place), parquet_files(place), fields, id)

    return TableSource(opened, fields, lambda: beside, f"parquet {fields} id={id!r}")


def folder(place: Path, question: str = "", answer: str = "", prompt: str = PROMPT) -> TrainingSource:
    """A folder of images with captions in `metadata.jsonl` or `metadata.csv`, whose `file_name` names the image."""
    fields = QAFields("file_name", question, answer, prompt)

    def opened() -> RowTable:
        found = next((place / name for name in METADATA if (place / name).is_file()), None)
        if found is None:
            raise ValueError(f"{place} has neither {' nor '.join(METADATA)}, which would name each image's caption")
        return TextTable(found, fields)

    return TableSource(opened, fields, lambda: place, f"folder {fields}")


def hub(
    repository: str,
    revision: str = "",
    split: str = "train",
    config: str = "default",
    image: str = "image",
    question: str = "",
    answer: str = "",
    prompt: str = PROMPT,
    id: str = "",
) -> TrainingSource:
    """The Parquet files of one split of a data set on the Hub, at a commit; downloaded at the first draw."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"{repository!r} is no data set of the Hub; write 'owner/name'")
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(f"hub({repository!r}) needs revision='<commit>' of 40 digits, so that every run reads the same data")
    fields = QAFields(image, question, answer, prompt)

    def opened() -> RowTable:
        wanted = patterns(config, split)
        first = remote.files(repository, revision, wanted)[0]
        place = next(first.parents[pattern.count("/")] for pattern in wanted if first.match(pattern))
        files = dataset_splits.split_files(place, config, split)  # which refuses a missing shard
        return ParquetTable(repository, files, fields, id)

    def beside() -> Path:
        raise ValueError("the image is a path, but only images inside the Parquet files of the Hub can be read")

    source = TableSource(opened, fields, beside, f"hub {fields} id={id!r}")
    source.identity = f"hub {repository} {revision} {config!r} {split!r} {fields} id={id!r}"
    return source


SOURCES: dict[str, Callable[..., TrainingSource]] = {f.__name__: f for f in (world, jsonl, parquet, folder, hub)}


def source_spec(data: str | Spec) -> Spec:
    """Training data as a value; paths are made absolute, as workers may run in another folder, and are no part of it.

    Raises:
        ValueError: no such source or option; names the nearest one.
    """
    if isinstance(data, Spec):
        return data
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
