"""Folders of small rows for the tests of this folder: the ones made by us, and single rows put where a test wants them."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from diffprune.benchmarks import _fixtures
from diffprune.benchmarks._table import TableBenchmark
from diffprune.core import registry
from diffprune.io import dataset_rows

MAIN = {name: next(iter(_fixtures.tables(name))) for name in _fixtures.NAMES}  # the file that a test changes


def load(name: str, folder: Path | str, **options: Any) -> TableBenchmark:
    """A benchmark on a folder."""
    words = "".join(f", {key}={value!r}" for key, value in options.items())
    return registry.load("benchmarks", f"{name}(folder={str(folder)!r}{words})")


def rows(name: str) -> list[dict[str, Any]]:
    """All rows of a benchmark's questions, to be changed and written again."""
    kinds = {path.split("/")[0] for path in [MAIN[name]]}
    return [row for path, found in _fixtures.tables(name).items() if path.split("/")[0] in kinds for row in found]


def write(folder: Path, name: str, records: Sequence[Mapping[str, Any]]) -> TableBenchmark:
    """The benchmark on these rows instead of its own, in one file, without a manifest."""
    others = {path: found for path, found in _fixtures.tables(name).items() if path.split("/")[0] != MAIN[name].split("/")[0]}
    for path, found in {**others, MAIN[name].replace("-of-00002", "-of-00001"): records}.items():
        dataset_rows.write_parquet(folder / path, found, row_group=2)
    return load(name, folder)


def tsv(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """The rows as a TSV with pictures in base64, as MMBench is published elsewhere; rotations point to the first picture."""
    frame = pd.DataFrame([dict(record) for record in records])
    texts = [base64.b64encode(record["image"]["bytes"]).decode() for record in records]
    frame["image"] = [
        t if record["index"] < 1_000_000 else str(record["index"] % 1_000_000) for t, record in zip(texts, records, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, sep="\t", index=False)
