"""A benchmark of your own: pictures, questions and answers from a file or a folder, graded by a rule you choose. No code needed.

    diffprune evaluate --benchmark "custom('shelves/', grader='vqa')"
    diffprune evaluate --benchmark "custom('rows.jsonl', answer='label', grader='letter', options='choices')"
    diffprune evaluate --benchmark "custom('rows.parquet', grader='mypackage.grades:close_enough')"

Rows come from Parquet, TSV (pictures in base64), JSON lines or CSV (pictures as paths beside the file), or an image folder with
`metadata.jsonl` or `metadata.csv`. A grader `package.module:function` runs your code, function(answer, answers, row) -> credit from
0 to 1; the module must be importable on every worker and may not lie in the folder of the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from diffprune.benchmarks import _aggregate, _folder, _graders
from diffprune.benchmarks._answers import LETTERS, PROTOCOLS
from diffprune.benchmarks._columns import text
from diffprune.benchmarks._groups import drawn
from diffprune.benchmarks._table import LETTER, LONGEST_ANSWER, SHORT
from diffprune.core.benchmark import Benchmark, Grade, Graded, Sample
from diffprune.io import dataset_rows
from diffprune.io.image import open_image

SUFFIX_OF: Mapping[str, str] = {"exact": SHORT, "vqa": SHORT, "yes_no": SHORT, "letter": LETTER}

# (grader, the row's answers and options, answer, protocol, credit)
EXAMPLES: tuple[tuple[str, Mapping[str, Any], str, str, float], ...] = (
    ("exact", {"answers": ["Red"]}, "red.", "llava", 1.0),
    ("exact", {"answers": ["red", "crimson"]}, "Crimson", "llava", 1.0),
    ("exact", {"answers": ["red"]}, "it is red", "llava", 0.0),
    ("exact", {"answers": ["t-shirt"]}, "tshirt", "llava", 0.0),
    ("exact", {"answers": ["t-shirt"]}, "tshirt", "lmms_eval", 1.0),
    ("vqa", {"answers": ["2"] * 8 + ["3"] * 2}, "two", "llava", 1.0),
    ("vqa", {"answers": ["2"] * 8 + ["3"] * 2}, "3", "llava", 0.6),
    ("vqa", {"answers": ["a bus"]}, "Bus.", "llava", 1.0),
    ("vqa", {"answers": ["bus", "coach"]}, "a train", "llava", 0.0),
    ("letter", {"answers": ["B"]}, "B.", "llava", 1.0),
    ("letter", {"answers": ["B"], "options": {"A": "red", "B": "blue"}}, "blue", "llava", 1.0),
    ("letter", {"answers": ["B"], "options": {"A": "red", "B": "blue"}}, "(A)", "llava", 0.0),
    ("yes_no", {"answers": ["yes"]}, "Yes, it is.", "llava", 1.0),
    ("yes_no", {"answers": ["no"]}, "maybe", "llava", 0.0),
    ("yes_no", {"answers": ["no"]}, "yes and no", "llava", 0.0),
    ("contains", {"answers": ["cat"]}, "There is a Cat, asleep.", "llava", 1.0),
    ("contains", {"answers": ["cat"]}, "a catalogue", "llava", 0.0),
    ("contains", {"answers": ["红色"]}, "这是红色的", "llava", 1.0),
)


@dataclass(frozen=True)
class _Split:
    rows: _folder.Rows
    asked: list[Mapping[str, Any]]  # answers, options and every other column that was read, by row


class Custom(Benchmark):
    """Questions about pictures from a file or a folder.

    path:     of a file or a folder. grader: exact, vqa, letter, yes_no, contains, or `package.module:function`.
    image, question, answer, id, group, category, options: names of columns. Where they are not given, `answer` is `answer` or
              `answers`; `id`, `group` and `category` are read where there are columns of these names, an id is else the row's
              number and a group else the picture; `options`, a list, is added to the question as lines `A. text`.
    suffix:   text after each question; by default the instruction of the grader's own benchmarks (one word or phrase, a letter).
    tokens:   the most an answer may have.

    Raises:
        ValueError: no such grader (the nearest is named), or no positive number of tokens.
    """

    protocols: ClassVar[tuple[str, ...]] = PROTOCOLS
    formulas = _aggregate.POPE  # of `yes_no`; the other graders have no figure of these names

    def __init__(
        self,
        path: Path,
        grader: str = "exact",
        image: str = _folder.IMAGE,
        question: str = "question",
        answer: str = "",
        id: str = "",
        group: str = "",
        category: str = "",
        options: str = "",
        suffix: str | None = None,
        tokens: int = 128,
    ) -> None:
        _graders.check(grader)
        if not isinstance(tokens, int) or tokens < 1:
            raise ValueError(f"tokens is {tokens!r}: an answer needs at least 1")
        self.path, self.grader, self.tokens = Path(path).expanduser(), grader, tokens
        self.label = self.path.stem
        self.columns = {"image": image, "question": question, "answer": answer, "id": id, "group": group, "category": category}
        self.options = options
        self.suffix = SUFFIX_OF.get(grader, "") if suffix is None else suffix
        self._read: dict[str, _Split] = {}

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        return _folder.splits(self.path)

    @property
    def splits(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the folder has; `test` where it does not say."""
        return tuple(self._files)

    def _split(self, split: str) -> _Split:
        if split not in self._read:
            given = [self.columns[k] for k in ("question", "answer", "id", "group", "category") if self.columns[k]]
            found = ("answer", "answers", "id", "group", "category") if not self.columns["answer"] else ("id", "group", "category")
            needed = [*given, *([self.options] if self.options else [])]
            optional = [name for name in found if name not in needed]
            rows = _folder.read(self._files[split], needed, optional, self.columns["image"])
            if not rows.records:
                raise ValueError(f"{self.path} has no row in split {split!r}")
            asked = [self._asked(record, rows.places[i]) for i, record in enumerate(rows.records)]
            self._check(rows, asked)
            self._read[split] = _Split(rows, asked)
        return self._read[split]

    def _asked(self, record: Mapping[str, Any], place: str) -> Mapping[str, Any]:
        """A row with `question`, `answers` and `options` in one form, checked."""
        try:
            question = _filled(record, self.columns["question"])
            options = _options(record.get(self.options)) if self.options else {}
            answers = [_filled({column: given}, column) for column, given in self._given(record)]
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        answers = _graders.checked_answers(self.grader, answers, options, place)
        lines = "".join(f"\n{letter}. {option}" for letter, option in options.items())
        return {**record, "question": question + lines + self.suffix, "answers": answers, "options": options}

    def _given(self, record: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """(column, answer) of every accepted answer, as texts."""
        column = self.columns["answer"] or next((name for name in ("answer", "answers") if record.get(name) is not None), "")
        if not column and not {"answer", "answers"} & record.keys():
            raise ValueError("column 'answer' (or 'answers') is missing; name yours with answer=")
        value = record.get(column or "answer")
        listed = value if isinstance(value, list | tuple) else [value]
        told = [entry.get("answer") if isinstance(entry, Mapping) else entry for entry in listed]
        if not told or told == [None] or told == [""]:
            raise ValueError(f"column {column or 'answer'!r} has no answer to grade by")
        words = {True: "yes", False: "no"}
        return [(column, words[a] if isinstance(a, bool) else f"{a}" if isinstance(a, int | float) else a) for a in told]

    def _check(self, rows: _folder.Rows, asked: Sequence[Mapping[str, Any]]) -> None:
        """What only all rows together show."""
        seen: dict[str, str] = {}
        for i, place in enumerate(rows.places):
            name = self._id(rows, i)
            if name in seen:
                raise ValueError(f"{place} has the id {name!r}, which {seen[name]} has already")
            seen[name] = place
        if self.grader == "vqa" and any(len(row["answers"]) == _graders.ANNOTATORS for row in asked):
            for place, row in zip(rows.places, asked, strict=True):
                if len(row["answers"]) != _graders.ANNOTATORS:
                    raise ValueError(f"{place} has {len(row['answers'])} answers where other rows have ten annotators")

    def _named(self, rows: _folder.Rows, i: int, what: str) -> str | None:
        """The value of the column `what`, as text; None where there is no such column or it is empty here."""
        value = rows.records[i].get(self.columns[what] or what)
        return None if dataset_rows.missing(value) or value == "" else f"{value}"

    def _id(self, rows: _folder.Rows, i: int) -> str:
        return self._named(rows, i, "id") or str(i)

    @cached_property
    def revision(self) -> str:  # type: ignore[override]
        """Hash of the bytes of all files and pictures; looks at them when first asked.

        Raises:
            ValueError: whatever is wrong with the data.
        """
        pictures = (rows.picture(i) for split in self._files for rows in [self._split(split).rows] for i in range(len(rows.places)))
        return f"custom@{_folder.content_hash([f for files in self._files.values() for f in files], pictures)}"

    def samples(self, split: str, limit: int | None = None, protocol: str = "llava") -> list[Sample]:
        """Whole groups in the order of the files; see `Benchmark.samples`."""
        self.check_asked(protocol, limit)
        split = self.named_split(split)
        rows = self._split(split).rows
        found = [self._sample(split, i) for i in range(len(rows.places))]
        if limit is not None:
            chosen = drawn([sample.group for sample in found], limit)
            found = [sample for sample in found if sample.group in chosen]
        return found

    def _sample(self, split: str, i: int) -> Sample:
        found = self._split(split)
        image_id = _image_id(found.rows.picture(i), self.path)
        group, category = self._named(found.rows, i, "group") or image_id, self._named(found.rows, i, "category") or ""
        row = {**found.asked[i], "split": split, "number": i}
        return Sample(self._id(found.rows, i), group, image_id, row["question"], row, category)

    def image(self, sample: Sample) -> Image.Image:
        """The picture, RGB, decoded now.

        Raises:
            ValueError: it is missing or damaged; the row is named.
        """
        rows, i = self._split(sample.row["split"]).rows, sample.row["number"]
        return open_image(rows.picture(i), name=f"the picture of {rows.places[i]}")

    def new_tokens(self, protocol: str = "llava") -> int:
        """`tokens`, in every protocol."""
        return self.tokens

    @cached_property
    def _grade(self) -> _graders.Grader:
        return _graders.find(self.grader, self.path if self.path.is_dir() else self.path.parent)

    def grade(self, sample: Sample, answer: str, protocol: str = "llava") -> Grade:
        """Credit by the chosen rule, see `_graders`; what protocols do differently is theirs.

        Raises:
            ValueError: no such protocol, an answer longer than any model writes, or a function that gives no credit.
        """
        self.check_asked(protocol, None)
        if len(answer) > LONGEST_ANSWER:
            raise ValueError(f"{sample.id}: a text of {len(answer):,} characters is no answer of {self.tokens} tokens")
        return self._grade(answer, sample.row, protocol)

    def aggregate(self, rows: Sequence[Graded]) -> dict[str, float]:
        """`accuracy` (mean credit x 100) and per category; `vqa` names it `soft_accuracy` too; `yes_no` adds F1 and the like."""
        if self.grader == "vqa":
            return _aggregate.soft_mean(rows)
        if self.grader == "yes_no":
            return _aggregate.mean(rows) | _aggregate.pope(rows)
        return _aggregate.mean(rows)


def _filled(row: Mapping[str, Any], column: str) -> str:
    value = text(row, column)
    if not value.strip():
        raise ValueError(f"column {column!r} is empty; it must hold text")
    return value


def _options(found: Any) -> dict[str, str]:
    """A list of choices, or a mapping from letters -> text by letter.

    Raises:
        ValueError: none, or more than there are letters in the published rules.
    """
    listed = list(found.values()) if isinstance(found, Mapping) else list(found) if isinstance(found, list | tuple) else []
    if not 1 < len(listed) <= len(LETTERS):
        raise ValueError(f"{len(listed)} options; a list of 2 to {len(LETTERS)} is needed")
    return {letter: f"{option}" for letter, option in zip(LETTERS, listed, strict=False)}


def _image_id(picture: Any, root: Path) -> str:
    """Equal for equal pictures: the path of a file, the hash of bytes."""
    if isinstance(picture, Mapping):
        picture = picture.get("bytes") or str(picture.get("path"))
    if isinstance(picture, Path):
        return str(picture.relative_to(root)) if picture.is_relative_to(root) else str(picture)
    return blake2b(picture if isinstance(picture, bytes) else f"{picture}".encode(), digest_size=10).hexdigest()
