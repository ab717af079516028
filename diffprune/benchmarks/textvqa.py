"""TextVQA, validation: 5,000 questions about the writing in 3,166 images (Singh et al., arXiv 1904.08920).

With the OCR line 58.2, without it about 46 for LLaVA-1.5-7B; LLaVA-NeXT's published number is without. Hence the switch.
Whether the hub's `ocr_tokens` are the lists LLaVA used is unverified until the first download.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffprune.benchmarks import _aggregate, _answers
from diffprune.benchmarks._columns import identifier, ten, text, texts, whole
from diffprune.benchmarks._table import SHORT, Example, Identity, Row, TableBenchmark
from diffprune.core.benchmark import Grade, Graded, HubDataset

OCR = "\nReference OCR token: "
_TOKENS = ["DAKOTA", "DIGITAL", "Single-Use", "Camera", "Pire", "digitat"]
_QUESTION = "What is the brand of this camera?"
_ROW = {
    "question_id": 34602, "image_id": "003a8ae2ef43b901", "question": _QUESTION.lower(), "ocr_tokens": _TOKENS,
    "answers": ["dakota"] * 6 + ["nous les gosses", "dakota", "clos culombu", "dakota digital"],
}  # fmt: skip
_LINE = OCR + "DAKOTA, DIGITAL, Single-Use, Camera, Pire, digitat"
EXAMPLES = (
    Example(_ROW, "llava", _QUESTION + _LINE + SHORT, "Dakota", 1.0),
    Example(_ROW, "lmms_eval", _QUESTION + SHORT, "Dakota Digital.", 0.3),
    Example({**_ROW, "ocr_tokens": []}, "llava", _QUESTION + OCR + SHORT, "camera", 0.0),
)


class Textvqa(TableBenchmark):
    """Mean soft accuracy. ocr: whether the prompt has the line of OCR tokens; by default in llava only, as LLaVA-1.5 has it."""

    label = "TextVQA"
    splits: ClassVar[tuple[str, ...]] = ("validation",)
    limits = {"llava": 128, "lmms_eval": 1024}
    source = HubDataset(
        name="textvqa",
        columns=("question_id", "image_id", "question", "answers", "ocr_tokens"),
        rows={"validation": (5_000,)},
        groups={"validation": (3_166,)},
    )

    def __init__(self, folder: Path | None = None, ocr: bool | None = None) -> None:
        super().__init__(folder)
        if ocr not in (None, True, False):
            raise ValueError(f"textvqa: ocr is {ocr!r}; it is True, False, or left out for the protocol's own")
        self.ocr = ocr

    def prompt(self, row: Row, protocol: str) -> str:
        """The question capitalised, the OCR line if asked for, the short-answer instruction."""
        ocr = protocol == "llava" if self.ocr is None else self.ocr
        return row["question"].capitalize() + (OCR + ", ".join(row["ocr_tokens"]) if ocr else "") + SHORT

    def identity(self, row: Row, number: int) -> Identity:
        """Questions about one image are one cluster."""
        return Identity(str(row["question_id"]), row["image_id"], row["image_id"])

    def credit(self, row: Row, answer: str, protocol: str) -> Grade:
        """See `_answers.evalai_vqa`."""
        return _answers.evalai_vqa(answer, row["answers"], protocol)

    def aggregate(self, rows: Sequence[Graded]) -> dict[str, float]:
        """Soft accuracy."""
        return _aggregate.soft_mean(rows)

    @staticmethod
    def tidy(row: dict[str, Any]) -> dict[str, Any]:
        """Ten answers as texts; no tokens are an empty list."""
        return {
            "question_id": whole(row, "question_id"), "image_id": identifier(row, "image_id"), "question": text(row, "question"),
            "answers": ten(row), "ocr_tokens": texts(row, "ocr_tokens"),
        }  # fmt: skip
