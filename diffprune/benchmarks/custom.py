"""A benchmark of your own: pictures, questions and answers from a file or a folder, graded by a rule you choose. No code needed.

    diffprune evaluate --benchmark "custom('shelves/', grader='vqa')"
    diffprune evaluate --benchmark "custom('rows.jsonl', answer='label', grader='letter', options='choices')"
    diffprune evaluate --benchmark "custom('rows.parquet', grader='mypackage.grades:close_enough')"

Rows come from Parquet, JSON lines or one JSON array, CSV or TSV, or an image folder with `metadata.jsonl` or `metadata.csv`; what
their columns may hold stands in `io/qa_rows.py`, by which training reads, too. A question may show several pictures; a budget
is one of each picture.

A grader `package.module:function` runs your code, function(answer, answers, row) -> credit from 0 to 1; the module must be
importable on every worker and may not lie in the folder of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from diffprune.benchmarks import _aggregate, _folder, _graders
from diffprune.benchmarks._answers import LETTERS, PROTOCOLS
from diffprune.benchmarks._groups import drawn
from diffprune.benchmarks._table import LETTER, LONGEST_ANSWER, SHORT
from diffprune.core.benchmark import Benchmark, Grade, Graded, Sample
from diffprune.core.spec import Spec
from diffprune.io.image import open_image
from diffprune.io.picture_groups import linked
from diffprune.io.qa_rows import IMAGE, QAColumns

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
class _Question:
    """asked: question, answers, options, id, group, category and every other column that was read."""

    id: str
    row: _folder.StoredRow
    asked: Mapping[str, Any]


class Custom(Benchmark):
    """Questions about pictures from a file or a folder.

    path:     of a file or a folder. grader: exact, vqa, letter, yes_no, contains, or `package.module:function`.
    image, question, answer, id, group, category, options: names of columns. Where they are not given, `answer` is `answer` or
              `answers`; `id`, `group` and `category` are read where there are columns of these names, an id is else the row's
              number and a group else the picture, by its content, or all pictures that questions about several tie together;
              `options` are added to the question as lines `A. text`.
    suffix:   text after each question; by default the instruction of the grader's own benchmarks (one word or phrase, a letter).
    tokens:   the most an answer may have.
    title:    what tables call it; by default the name of the file or folder. Tells two data sets of one job apart.

    Raises:
        ValueError: no such grader (the nearest is named), or no positive number of tokens.
    """

    protocols: ClassVar[tuple[str, ...]] = PROTOCOLS
    formulas = _aggregate.POPE  # of `yes_no`; the other graders have no figure of these names

    def __init__(
        self,
        path: Path,
        grader: str = "exact",
        image: str = IMAGE,
        question: str = "",
        answer: str = "",
        id: str = "",
        group: str = "",
        category: str = "",
        options: str = "",
        suffix: str | None = None,
        tokens: int = 128,
        title: str = "",
    ) -> None:
        _graders.check(grader)
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
            raise ValueError(f"tokens is {tokens!r}, but must be a whole number of at least 1, the most an answer may have")
        self.path, self.grader, self.tokens = Path(path).expanduser(), grader, tokens
        self.label = title or self.path.stem
        self.columns = QAColumns(image, question, answer, options, id, group, category)
        self.suffix = SUFFIX_OF.get(grader, "") if suffix is None else suffix
        self._read: dict[str, list[_Question]] = {}
        self._hashes = _folder.PictureHashes()

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        return _folder.splits(self.path)

    @property
    def splits(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the folder has; `test` where it does not say."""
        return tuple(self._files)

    def _questions(self, split: str) -> list[_Question]:
        if split not in self._read:
            found = _folder.read(self._files[split], self.columns)
            if not found:
                raise ValueError(f"{self.path} has no row in split {split!r}")
            asked = [question for number, row in enumerate(found) for question in self._asked(row, number)]
            self._check(asked)
            self._read[split] = asked
        return self._read[split]

    def _asked(self, row: _folder.StoredRow, number: int) -> list[_Question]:
        """The questions of a row, checked, with `answers` and `options` in one form."""
        try:
            options, pairs = row.columns.choices(row.record), row.columns.pairs(row.record, lambda: len(row.pictures()))
            named = {what: row.columns.name(row.record, what) for what in _folder.NAMED}
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from None
        if more := sorted(options.keys() - set(LETTERS)):
            raise ValueError(f"{row.place}: there is an option {more[0]}; the published rules know {', '.join(LETTERS)}")
        found = []
        for turn, (question, accepted) in enumerate(pairs):
            answers = _graders.checked_answers(self.grader, accepted, options, row.place)
            told = {"question": question + self.suffix, "answers": answers, "options": options}
            name = named["id"] or str(number)
            found.append(_Question(name if len(pairs) == 1 else f"{name}.{turn}", row, {**row.record, **named, **told}))
        return found

    def _check(self, asked: Sequence[_Question]) -> None:
        """What only all rows together show."""
        seen: dict[str, str] = {}
        ten = any(len(one.asked["answers"]) == _graders.ANNOTATORS for one in asked)
        for one in asked:
            place, answers = one.row.place, len(one.asked["answers"])
            if one.id in seen:
                raise ValueError(f"{place} has the id {one.id!r}, which {seen[one.id]} has already")
            seen[one.id] = place
            if self.grader == "vqa" and ten and answers != _graders.ANNOTATORS:
                raise ValueError(f"{place} has {answers} answers where other rows have ten annotators")

    @cached_property
    def revision(self) -> str:  # type: ignore[override]
        """Hash of the bytes of all files and pictures; looks at them when first asked.

        Raises:
            ValueError: whatever is wrong with the data.
        """
        pictures = (picture for split in self._files for one in self._questions(split) for picture in one.row.pictures())
        return f"custom@{self._hashes.revision([f for files in self._files.values() for f in files], pictures)}"

    def samples(self, split: str, limit: int | None = None, protocol: str = "llava") -> list[Sample]:
        """Whole groups in the order of the files; see `Benchmark.samples`."""
        self.check_asked(protocol, limit)
        split = self.named_split(split)
        questions = self._questions(split)
        images = [[self._hashes.name(picture) for picture in one.row.pictures()] for one in questions]
        told = zip(questions, images, linked(images), strict=True)
        found = [self._sample(split, number, one, shown, tied) for number, (one, shown, tied) in enumerate(told)]
        if limit is not None:
            chosen = drawn([sample.group for sample in found], limit)
            found = [sample for sample in found if sample.group in chosen]
        return found

    def _sample(self, split: str, number: int, one: _Question, images: Sequence[str], tied: str) -> Sample:
        row = {**one.asked, "split": split, "number": number}
        first, *further = images
        group = one.asked["group"] or tied
        return Sample(one.id, group, first, row["question"], row, row["category"], further_images=tuple(further))

    def image(self, sample: Sample) -> Image.Image:
        """The picture, RGB, decoded now; of several the first.

        Raises:
            ValueError: it is missing or damaged; the row is named.
        """
        return self.nth_image(sample, 0)

    def nth_image(self, sample: Sample, number: int) -> Image.Image:
        """One of the pictures, as `image`."""
        row = self._questions(sample.row["split"])[sample.row["number"]].row
        return open_image(row.pictures()[number], name=f"the picture of {row.place}")

    def new_tokens(self, protocol: str = "llava") -> int:
        """`tokens`, in every protocol."""
        return self.tokens

    @cached_property
    def _grade(self) -> _graders.Grader:
        return _graders.find(self.grader, _beside(self.path))

    @classmethod
    def foreign_grader(cls, asked: Spec) -> Callable[..., Any] | None:
        """The user's function, if `grader` names one."""
        name, place = str(asked.get("grader", "")), asked.place("path")
        return _graders.function(name, place and _beside(place.expanduser())) if ":" in name else None

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


def _beside(path: Path) -> Path:
    """The folder of the data."""
    return path if path.is_dir() else path.parent
