"""POPE: is there such an object in the picture? 500 images, three ways of choosing what is asked for (Li et al., arXiv 2305.10355).

Data: the hub's copy has the newer question lists (3 x 3,000); LLaVA's paper used the older ones (random has 2,910), which share
2,942 / 2,956 / 2,766 questions with them. Under `llava` the hub's rows are therefore a substitute; a folder with the older
lists in the same columns (8,910 rows) is accepted too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffprune.benchmarks import _aggregate, _answers
from diffprune.benchmarks._columns import gold, identifier, text
from diffprune.benchmarks._table import SHORT, Example, Identity, Row, TableBenchmark
from diffprune.core.benchmark import Grade, Graded, HubDataset
from diffprune.core.registry import nearest

CATEGORIES = ("adversarial", "popular", "random")
_ROW = {
    "id": "0", "question_id": "1", "question": "Is there a snowboard in the image?", "answer": "yes",
    "image_source": "COCO_val2014_000000310196", "category": "adversarial",
}  # fmt: skip
_BLANKS = {**_ROW, "question": "Is there a snowboard in the image? "}
_PROMPT = "Is there a snowboard in the image?" + SHORT
EXAMPLES = (
    Example(_ROW, "llava", _PROMPT, "Yes, there is.", 1.0),
    Example(_ROW, "lmms_eval", _PROMPT, "Yes, there is.", 0.0),
    Example(_ROW, "lmms_eval", _PROMPT, "Yes", 1.0),
    Example({**_ROW, "answer": "no"}, "llava", _PROMPT, "NO", 0.0),
    Example({**_ROW, "answer": "no"}, "lmms_eval", _PROMPT, "NO", 1.0),
    Example(_BLANKS, "llava", "Is there a snowboard in the image? " + SHORT, "no", 0.0),
    Example(_BLANKS, "lmms_eval", _PROMPT, "<think>No, wait.</think>\nYes", 1.0),
    Example(_ROW, "llava", _PROMPT, "<think>yes or no </think>Yes", 0.0),
)


class Pope(TableBenchmark):
    """Mean F1 of the three categories first, and everything pooled.

    rule: how answers are read: `official` (llava), `strict` (lmms_eval) or `word` (VLMEvalKit); by default the protocol's.
    """

    label = "POPE"
    formulas = _aggregate.POPE
    splits: ClassVar[tuple[str, ...]] = ("test",)
    limits = {"llava": 128, "lmms_eval": 128}
    source = HubDataset(
        name="POPE",
        commit="4db1276",
        columns=("question_id", "question", "answer", "image_source", "category"),
        rows={"test": (9_000, 8_910)},
        groups={"test": (500,)},
    )

    def __init__(self, folder: Path | None = None, rule: str | None = None) -> None:
        super().__init__(folder)
        if rule is not None and rule not in _answers.POPE_RULES:
            raise ValueError(f"pope has no rule {rule!r}: {nearest(str(rule), _answers.POPE_RULES)}")
        self.rule = rule

    def prompt(self, row: Row, protocol: str) -> str:
        """The question (lmms_eval: without outer white space) and the short-answer instruction."""
        return (row["question"].strip() if protocol == "lmms_eval" else row["question"]) + SHORT

    def identity(self, row: Row, number: int) -> Identity:
        """Questions are numbered per category; all about one image are one cluster."""
        return Identity(f"{row['category']}/{row['question_id']}", row["image_source"], row["image_source"], row["category"])

    def credit(self, row: Row, answer: str, protocol: str) -> Grade:
        """See `_answers.pope`."""
        return _answers.pope(answer, row["answer"], protocol, self.rule)

    def aggregate(self, rows: Sequence[Graded]) -> dict[str, float]:
        """`f1_mean`, pooled accuracy, precision, recall, F1, yes-ratio of the predictions, share of answers not read."""
        return _aggregate.pope(rows)

    def flags(self, protocol: str = "llava") -> tuple[str, ...]:
        """The hub has other questions than the paper."""
        return ("substitute",) if protocol == "llava" else ()

    @staticmethod
    def tidy(row: dict[str, Any]) -> dict[str, Any]:
        """Answers are yes or no; the category is one of three."""
        if row["category"] not in CATEGORIES:
            raise ValueError(f"column 'category' is {row['category']!r:.80}; POPE has {', '.join(CATEGORIES)}")
        return {
            "question_id": identifier(row, "question_id"), "question": text(row, "question"),
            "answer": gold(row, among=("yes", "no")), "image_source": text(row, "image_source"), "category": row["category"],
        }  # fmt: skip
