"""SEED-Bench, its image questions: four options, nine kinds of question (Li et al., arXiv 2307.16125).

The main number is `seed_image`. The video rows of the split are left out: they are frames, beyond most contexts, and `seed_all`
is another sample in each protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from diffprune.benchmarks import _aggregate, _answers
from diffprune.benchmarks._columns import gold, identifier, shown, text
from diffprune.benchmarks._table import LETTER, Example, Identity, Row, TableBenchmark
from diffprune.core.benchmark import Grade, Graded, HubDataset
from diffprune.io import dataset_rows

OPTIONS = "ABCD"
_ROW = {
    "question_id": "101669", "question": "How many towels are in the image?", "choice_a": "One", "choice_b": "Two",
    "choice_c": "Three", "choice_d": "Four", "answer": "A", "data_id": "1454426_2591111986", "data_type": "image",
    "question_type_id": 5,
}  # fmt: skip
_PROMPT = "How many towels are in the image?\nA. One\nB. Two\nC. Three\nD. Four" + LETTER
EXAMPLES = (
    Example(_ROW, "llava", _PROMPT, "A", 1.0),
    Example(_ROW, "llava", _PROMPT, "a", 0.0),
    Example(_ROW, "lmms_eval", _PROMPT, "a) One", 1.0),
    Example(_ROW, "lmms_eval", _PROMPT, "(A)", 0.0),
    Example({**_ROW, "choice_a": 1.0}, "lmms_eval", _PROMPT.replace("One", "1"), "<analysis>B or</analysis> A", 1.0),
)


class Seed(TableBenchmark):
    """Accuracy over the questions with data_type `image`."""

    label = "SEED"
    splits: ClassVar[tuple[str, ...]] = ("test",)
    limits = {"llava": 128, "lmms_eval": 1024}
    source = HubDataset(
        name="SEED-Bench",
        columns=(
            "question_id", "question", "choice_a", "choice_b", "choice_c", "choice_d", "answer", "data_id", "data_type",
            "question_type_id",
        ),
    )  # fmt: skip  # how many rows there are is unverified (about 18,000, of them 14,233 images)

    def wanted(self, row: Row) -> bool:
        """No videos."""
        return row["data_type"] == "image"

    def prompt(self, row: Row, protocol: str) -> str:
        """Both protocols: question and options, one a line."""
        return row["question"] + "".join(f"\n{x}. {row[f'choice_{x.lower()}']}" for x in OPTIONS) + LETTER

    def identity(self, row: Row, number: int) -> Identity:
        """Questions about one image are one cluster; the category is the number of the kind of question."""
        return Identity(row["question_id"], row["data_id"], row["data_id"], row["question_type_id"])

    def credit(self, row: Row, answer: str, protocol: str) -> Grade:
        """See `_answers.seed`."""
        return _answers.seed(answer, row["answer"], protocol)

    def aggregate(self, rows: Sequence[Graded]) -> dict[str, float]:
        """`seed_image`, and accuracy per kind of question."""
        figures = _aggregate.mean(rows)
        return {"seed_image": figures["accuracy"]} | figures

    def picture(self, rows: dataset_rows.DatasetRows, number: int) -> Any:
        """The only picture of the list. ValueError: there are more, or none."""
        found = rows.pictures[number]
        if not isinstance(found, list):
            return found
        if len(found) != 1:
            raise ValueError(f"column 'image' has {len(found)} pictures where an image question has one")
        return found[0]

    @staticmethod
    def tidy(row: dict[str, Any]) -> dict[str, Any]:
        """A letter as answer; image or video."""
        if row["data_type"] not in ("image", "video"):
            raise ValueError(f"column 'data_type' is {row['data_type']!r:.80}; it is image or video")
        options = {column: shown(row, column) for column in (f"choice_{x.lower()}" for x in OPTIONS)}
        return {
            "question_id": identifier(row, "question_id"), "question": text(row, "question"), **options,
            "answer": gold(row, among=tuple(OPTIONS)), "data_id": identifier(row, "data_id"), "data_type": row["data_type"],
            "question_type_id": identifier(row, "question_type_id"),
        }  # fmt: skip
