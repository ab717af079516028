"""VQAv2, validation: 214,354 questions about 40,504 COCO images, ten annotators each (Goyal et al., arXiv 1612.00837).

Papers (llava) print test-dev, which only a server can grade: validation is the local substitute and another number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffprune.benchmarks import _aggregate, _answers
from diffprune.benchmarks._columns import ten, text, whole
from diffprune.benchmarks._table import SHORT, Example, Identity, Row, TableBenchmark
from diffprune.core.benchmark import Grade, Graded, HubDataset
from diffprune.core.registry import nearest

_YES = [{"answer": "yes", "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)]
_ROW = {"question_id": 262148000, "image_id": 262148, "question": "Is it day?", "answer_type": "yes/no", "answers": _YES}
_MIXED = {**_ROW, "answers": [*_YES[:7], *({**a, "answer": "no"} for a in _YES[7:])]}
_TWO = {**_ROW, "answer_type": "number", "answers": [{**a, "answer": "two"} for a in _YES]}
_PROMPT = "Is it day?" + SHORT
EXAMPLES = (
    Example(_ROW, "llava", _PROMPT, "Yes.", 1.0),
    Example(_MIXED, "llava", _PROMPT, "No", 0.9),
    Example(_MIXED, "lmms_eval", _PROMPT, "no", 0.9),
    Example(_TWO, "llava", _PROMPT, "two", 0.0),  # unanimous answers are compared raw with a prediction normalised to "2"
    Example(_TWO, "lmms_eval", _PROMPT, "two", 1.0),
)


class Vqav2(TableBenchmark):
    """Mean soft accuracy, overall and per type of answer.

    mode: `official_raw`, `official_prenormalised` (llava) or `always` (lmms_eval); by default the protocol's.
    """

    label = "VQAv2"
    splits: ClassVar[tuple[str, ...]] = ("validation",)
    source = HubDataset(
        name="VQAv2",
        columns=("question_id", "image_id", "question", "answers", "answer_type"),
        rows={"validation": (214_354,)},
        groups={"validation": (40_504,)},
    )

    def __init__(self, folder: Path | None = None, mode: str | None = None) -> None:
        super().__init__(folder)
        if mode is not None and mode not in _answers.VQA_MODES:
            raise ValueError(f"vqav2 has no mode {mode!r}: {nearest(str(mode), _answers.VQA_MODES)}")
        self.mode = mode

    def prompt(self, row: Row, protocol: str) -> str:
        """Both protocols: the question and the short-answer instruction."""
        return row["question"] + SHORT

    def identity(self, row: Row, number: int) -> Identity:
        """Questions about one image are one cluster."""
        return Identity(str(row["question_id"]), str(row["image_id"]), str(row["image_id"]), row["answer_type"])

    def credit(self, row: Row, answer: str, protocol: str) -> Grade:
        """See `_answers.vqav2`."""
        return _answers.vqav2(answer, row["answers"], protocol, self.mode)

    def aggregate(self, rows: Sequence[Graded]) -> dict[str, float]:
        """Soft accuracy, and per type of answer: yes/no, number, other."""
        return _aggregate.soft_mean(rows)

    def flags(self, protocol: str = "llava") -> tuple[str, ...]:
        """Validation stands in for test-dev."""
        return ("substitute",) if protocol == "llava" else ()

    @staticmethod
    def tidy(row: dict[str, Any]) -> dict[str, Any]:
        """Ten answers as texts, by position."""
        return {
            "question_id": whole(row, "question_id"), "image_id": whole(row, "image_id"), "question": text(row, "question"),
            "answers": ten(row), "answer_type": text(row, "answer_type"),
        }  # fmt: skip
