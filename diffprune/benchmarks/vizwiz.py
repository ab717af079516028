"""VizWiz-VQA, validation: 4,319 questions that blind people asked about their own pictures (Gurari et al., arXiv 1802.08218).

Papers (llava) print the test split, whose server is closed: validation is the local substitute. `unanswerable` is the commonest
answer, so a method can gain by refusing more often: `refusal_rate` stands beside the score, and
`constant('unanswerable')` tells what refusing always is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffprune.benchmarks import _aggregate, _answers
from diffprune.benchmarks._columns import label, ten, text
from diffprune.benchmarks._table import SHORT, Example, Identity, Row, TableBenchmark
from diffprune.core.benchmark import Grade, Graded, HubDataset
from diffprune.core.registry import nearest

UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT
REFUSAL = "unanswerable"
_ROW = {
    "question_id": "VizWiz_val_00000000.jpg", "question": "WHAT is this?", "category": "unanswerable",
    "answers": ["unanswerable"] * 7 + ["soup", "soup can", "soup"],
}  # fmt: skip
EXAMPLES = (
    Example(_ROW, "llava", "What is this?" + UNANSWERABLE, "Unanswerable", 1.0),
    Example(_ROW, "lmms_eval", "What is this?" + UNANSWERABLE, "Soup.", 0.6),
    Example(_ROW, "llava", "What is this?" + UNANSWERABLE, "a can", 0.0),
)


class Vizwiz(TableBenchmark):
    """Mean soft accuracy, overall and per category.

    mode: `evalai` normalises prediction and annotators, as both protocols do. The challenge's own script normalises the prediction
    alone: `official_raw`, or `official_prenormalised` on predictions as LLaVA uploads them.
    """

    label = "VizWiz"
    splits: ClassVar[tuple[str, ...]] = ("val",)
    limits = {"llava": 128, "lmms_eval": 1024}
    source = HubDataset(
        name="VizWiz-VQA",
        columns=("question_id", "question", "answers"),
        optional=("category",),
        rows={"val": (4_319,)},
        groups={"val": (4_319,)},
    )

    def __init__(self, folder: Path | None = None, mode: str = "evalai") -> None:
        super().__init__(folder)
        if mode not in _answers.VIZWIZ_MODES:
            raise ValueError(f"vizwiz has no mode {mode!r}: {nearest(str(mode), _answers.VIZWIZ_MODES)}")
        self.mode = mode

    def prompt(self, row: Row, protocol: str) -> str:
        """Both protocols: the question capitalised, and what to say when it cannot be answered."""
        return row["question"].capitalize() + UNANSWERABLE

    def identity(self, row: Row, number: int) -> Identity:
        """One question to an image."""
        return Identity(row["question_id"], row["question_id"], row["question_id"], row["category"])

    def credit(self, row: Row, answer: str, protocol: str) -> Grade:
        """See `_answers.vizwiz`."""
        return _answers.vizwiz(answer, row["answers"], protocol, self.mode)

    def aggregate(self, rows: Sequence[Graded]) -> dict[str, float]:
        """Soft accuracy, per category, and the share of answers that refuse."""
        figures = _aggregate.soft_mean(rows)
        return figures | {"refusal_rate": 100 * sum(row.parsed == REFUSAL for row in rows) / len(rows)}

    def flags(self, protocol: str = "llava") -> tuple[str, ...]:
        """Validation stands in for the test split."""
        return ("substitute",) if protocol == "llava" else ()

    @staticmethod
    def tidy(row: dict[str, Any]) -> dict[str, Any]:
        """Ten answers as texts."""
        return {
            "question_id": text(row, "question_id"), "question": text(row, "question"), "answers": ten(row),
            "category": label(row, "category"),
        }  # fmt: skip
