"""What the ten published benchmarks share: rows of a table with pictures, read from a folder at a known revision.

A benchmark's own file says where its rows are, how they are asked (`prompt`), told apart (`identity`), graded (`credit`) and
summed up. Everything that can be wrong with rows is refused here, with the name of the row.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from PIL import Image

from diffprune.benchmarks import _fixtures
from diffprune.benchmarks._answers import PROTOCOLS, without_reasoning
from diffprune.benchmarks._groups import drawn
from diffprune.core.benchmark import Benchmark, Grade, Graded, HubDataset, Sample
from diffprune.io import dataset_manifest, dataset_rows, dataset_splits, hub
from diffprune.io.dataset_manifest import FIXTURE
from diffprune.io.image import open_image

Row = Mapping[str, Any]

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LONGEST_ANSWER = 1_000_000  # characters; no model writes more in 1024 tokens, so such a text is no answer


class Example(NamedTuple):
    """A row of the published schema, how a protocol asks it (the prompt, byte for byte), an answer, and its credit."""

    row: Row
    protocol: str
    prompt: str
    answer: str
    credit: float


class Identity(NamedTuple):
    """How rows are told apart: see `Sample`."""

    id: str
    group: str
    image_id: str
    category: str = ""
    question_type: str = ""


@dataclass(frozen=True)
class Loaded:
    """One split, checked: its rows, who they are, and what it is called."""

    rows: dataset_rows.DatasetRows
    identities: Sequence[Identity]
    revision: str


class TableBenchmark(Benchmark):
    """A published benchmark. folder: with the hub's Parquet files or a TSV of the same columns; without it, what `diffprune
    fetch` has downloaded is read. `fixture` is a few rows of our own, for trying the code; a folder of that name is `./fixture`.

    Under lmms_eval what a model thinks aloud in `<think>` or `<analysis>` tags is stripped before grading, as that harness does by
    default."""

    protocols: ClassVar[tuple[str, ...]] = PROTOCOLS
    source: HubDataset
    limits: ClassVar[Mapping[str, int]] = {"llava": 128, "lmms_eval": 16}  # tokens of an answer
    na_words: ClassVar[bool] = False  # of a TSV; see `DatasetFiles`

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._loaded: dict[str, Loaded] = {}

    @property
    def name(self) -> str:
        """Of the plug-in: its file's."""
        return type(self).__module__.rpartition(".")[2]

    def new_tokens(self, protocol: str = "llava") -> int:
        """As the protocol's own runs have it."""
        self.check_asked(protocol, None)
        return self.limits[protocol]

    # --- what a benchmark's own file says

    @abstractmethod
    def prompt(self, row: Row, protocol: str) -> str:
        """The text of the user turn, byte for byte as the protocol has it."""

    @abstractmethod
    def identity(self, row: Row, number: int) -> Identity:
        """Who a row is; `number` is its place in the split."""

    @abstractmethod
    def credit(self, row: Row, answer: str, protocol: str) -> Grade:
        """The grade of an answer to a row."""

    @staticmethod
    def tidy(row: dict[str, Any]) -> dict[str, Any]:
        """What is kept of a row, in memory. ValueError: the row is unusable; the reader adds its name."""
        return row

    def identities(self, rows: dataset_rows.DatasetRows) -> list[Identity]:
        """Of all rows; overridden where a row alone does not tell. ValueError: an incomplete group, named."""
        return [self.identity(row, number) for number, row in enumerate(rows.records)]

    def part(self, split: str) -> tuple[str, str]:
        """(configuration, split) on the hub, of one of our splits."""
        return self.source.config, split

    def wanted(self, row: Row) -> bool:
        """Whether a row is asked at all."""
        return True

    def picture(self, rows: dataset_rows.DatasetRows, number: int) -> Any:
        """The undecoded picture of a row."""
        return rows.pictures[number]

    # --- reading

    @property
    def place(self) -> Path:
        """The folder that is read."""
        if str(self.folder) == FIXTURE:
            return _fixtures.made(self.name)
        return Path(self.folder).expanduser() if self.folder else hub.data_folder(self.source.name)

    def _files(self, config: str, split: str) -> tuple[Path, ...]:
        try:
            return tuple(dataset_splits.split_files(self.place, config, split))
        except ValueError as error:
            if self.folder:
                raise
            raise ValueError(
                f"{self.name} is not on this machine ({error}): run `diffprune fetch {self.name}`, or give folder="
            ) from None

    def read(self, config: str, split: str) -> dataset_rows.DatasetRows:
        """Rows of one part of the source; kept while they are among the last that were read.

        Raises:
            ValueError: no such files, a missing column, or a row that `tidy` refuses (named).
        """
        source = self.source
        table = dataset_rows.DatasetFiles(self._files(config, split), source.columns, source.optional, source.image, self.na_words)
        return _read(table, type(self), tuple((f.stat().st_size, f.stat().st_mtime_ns) for f in table.files))

    def loaded(self, split: str) -> Loaded:
        """A split (its literal name) with everything about it checked.

        Raises:
            ValueError: files or columns are missing, ids occur twice, a group is incomplete, counts are not the published ones.
        """
        if split not in self._loaded:
            rows = self.read(*self.part(split))
            identities = self.identities(rows)
            for twice, times in Counter(i.id for i in identities).items():
                if times > 1:
                    raise ValueError(f"{self.place}: {self.name} has {times} rows with the id {twice!r} in split {split!r}")
            self._loaded[split] = Loaded(rows, identities, self._revision(split, rows, identities))
        return self._loaded[split]

    def _revision(self, split: str, rows: dataset_rows.DatasetRows, identities: Sequence[Identity]) -> str:
        """`gqa@<commit>`, `gqa@rows-<hash>` of a folder without a manifest, `gqa@fixture-<hash>`; ` incomplete` where counts are
        not the published ones, which only a folder given by the user may have."""
        manifest = dataset_manifest.Manifest.read(self.place)
        said = manifest.splits.get("/".join(self.part(split))) if manifest else None
        if said and said["hash"] != rows.hash:
            raise ValueError(
                f"{self.place}: the rows of split {split!r} are not those that were fetched; run `diffprune fetch` again"
            )
        if manifest and manifest.commit == FIXTURE:
            return f"{self.name}@{FIXTURE}-{rows.hash[:12]}"
        wrong = self._miscounted(split, len(rows.records), len({i.group for i in identities}))
        if not self.folder and (wrong or not said):
            raise ValueError(f"{self.place}: {self.name}, split {split!r}, {self._again(wrong)}")
        named = manifest.commit[:12] if manifest and said else f"rows-{rows.hash[:12]}"
        return f"{self.name}@{named}" + (" incomplete" if wrong else "")

    def _again(self, wrong: str) -> str:
        return f"{f'has {wrong}' if wrong else 'was never checked'}: run `diffprune fetch {self.name}` again"

    def _miscounted(self, split: str, num_rows: int, num_groups: int) -> str:
        for found, expected, what in ((num_rows, self.source.rows, "rows"), (num_groups, self.source.groups, "groups")):
            if split in expected and found not in expected[split]:
                return f"{found:,} {what} where {' or '.join(f'{n:,}' for n in expected[split])} belong"
        return ""

    @cached_property
    def revision(self) -> str:  # type: ignore[override]
        """Of the main split's data; looks at them when first asked."""
        return self.loaded(self.splits[0]).revision

    # --- the contract

    def samples(self, split: str, limit: int | None = None, protocol: str = "llava") -> list[Sample]:
        """Whole groups in the order of the files; see `Benchmark.samples`."""
        self.check_asked(protocol, limit)
        split = self.named_split(split)
        loaded = self.loaded(split)
        records = loaded.rows.records
        asked = [n for n, record in enumerate(records) if self.wanted(record)]
        if limit is not None:
            chosen = drawn([loaded.identities[n].group for n in asked], limit)
            asked = [n for n in asked if loaded.identities[n].group in chosen]
        return [self._sample(split, n, loaded.identities[n], records[n], protocol) for n in asked]

    def _sample(self, split: str, number: int, who: Identity, record: Row, protocol: str) -> Sample:
        row = {**record, "split": split, "number": number}
        return Sample(who.id, who.group, who.image_id, self.prompt(record, protocol), row, who.category, who.question_type)

    def image(self, sample: Sample) -> Image.Image:
        """The picture, RGB, decoded now.

        Raises:
            ValueError: there is none, or it is damaged; the row is named.
        """
        rows, number = self.loaded(sample.row["split"]).rows, sample.row["number"]
        name = f"the picture of {self.name} {sample.id} ({rows.name(number)})"
        try:
            found = self.picture(rows, number)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if found is None:
            raise ValueError(f"{name} is missing")
        return open_image(found, name=name)

    def grade(self, sample: Sample, answer: str, protocol: str = "llava") -> Grade:
        """Grade by the published rule of the protocol; lmms_eval's is asked without a model's reasoning (`without_reasoning`).

        Raises:
            ValueError: no such protocol, or a text too long to be an answer.
        """
        self.check_asked(protocol, None)
        if len(answer) > LONGEST_ANSWER:
            raise ValueError(
                f"{self.name} {sample.id}: a text of {len(answer):,} characters is no answer of {self.new_tokens(protocol)} tokens"
            )
        return self.credit(sample.row, without_reasoning(answer) if protocol == "lmms_eval" else answer, protocol)

    def constant(self, answer: str, split: str = "test", protocol: str = "llava") -> dict[str, float]:
        """The figures of a model that says the same to every question (`yes`, `A`, `unanswerable`): what they are worth blind."""
        graded = []
        for sample in self.samples(split, None, protocol):
            found = self.grade(sample, answer, protocol)
            graded.append(Graded(sample.group, sample.category, found.credit, found.parsed, found.target))
        return self.aggregate(graded)

    # --- fetching

    def parts(self) -> list[tuple[str, str]]:
        """Every (configuration, split) that a main run needs."""
        return [self.part(self.splits[0])]

    def fetch(self, folder: Path | None = None) -> str:
        """Download what is missing (nothing, if the folder was given), check all of it and write the manifest.

        Raises:
            ValueError: the hub cannot be reached or lacks a part, or the rows are not the published ones.
        """
        if self.folder:
            return self._said(self)
        place = folder or self.place
        manifest = hub.fetch(self.source, self.parts(), place)
        for config, split in self.parts():  # what is checked below must not pass for checked if this is interrupted
            manifest.splits.pop(f"{config}/{split}", None)
        manifest.write(place)
        fetched = copy(self)
        fetched.folder, fetched._loaded = place, {}
        if fetched.loaded(self.splits[0]).revision.endswith("incomplete"):
            raise ValueError(f"{place}: {self.name} as downloaded does not have the published number of rows or groups")
        for config, split in self.parts():
            rows = fetched.read_part(config, split)
            manifest.splits[f"{config}/{split}"] = {"rows": len(rows.records), "hash": rows.hash, "bytes": rows.bytes}
        manifest.write(place)
        fetched._loaded = {}  # of which the revision is now known
        return self._said(fetched, "" if manifest.pinned else f" (unpinned: main is at {manifest.commit[:12]} now)")

    def _said(self, found: TableBenchmark, note: str = "") -> str:
        loaded = found.loaded(self.splits[0])
        sizes = sum(found.read_part(*part).bytes for part in self.parts()) / 2**20
        groups = len({who.group for who in loaded.identities})
        counts = f"{len(loaded.rows.records):,} rows in {groups:,} groups, {sizes:,.1f} MiB"
        return f"{self.name}: {counts}, revision {loaded.revision}{note}, in {found.place}"

    def read_part(self, config: str, split: str) -> dataset_rows.DatasetRows:
        """Rows of any of `parts`; overridden where a part has columns of its own."""
        return self.read(config, split)


@lru_cache(maxsize=4)
def _read(
    table: dataset_rows.DatasetFiles, kind: type[TableBenchmark], state: tuple[tuple[int, int], ...]
) -> dataset_rows.DatasetRows:
    """`state` (sizes and times of the files) is only part of the key: rows of a changed file are read again."""
    return dataset_rows.read(table, kind.tidy)
