"""ScienceQA, the 2,017 test questions that have an image (Lu et al., arXiv 2209.09513).

LLaVA asks all 4,241 and prints the accuracy on these as "IMG-Accuracy"; the harness asks only these. Other parsers, and the same
prompt but for double blanks, which LLaVA's file of questions does not have.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffprune.benchmarks import _aggregate, _answers
from diffprune.benchmarks._answers import LETTERS
from diffprune.benchmarks._columns import label, text, texts, whole
from diffprune.benchmarks._table import LETTER, Example, Identity, Row, TableBenchmark
from diffprune.core.benchmark import Grade, Graded, HubDataset
from diffprune.io import dataset_rows

_ROW = {"question": "Which is farthest north?", "choices": ["Maine", "Ohio"], "answer": 0, "hint": "", "subject": "social science"}
_HINT = {**_ROW, "hint": "The map shows states."}
_PROMPT = "Which is farthest north?\nA. Maine\nB. Ohio" + LETTER
_BLANKS = {
    **_ROW,
    "question": "Which is  farthest   north?",
    "choices": ["Maine  coast", "Ohio "],
    "hint": " The map  shows states. ",
}
_LLAVA = "Context: The map shows states.\nWhich is farthest  north?\nA. Maine coast\nB. Ohio"
_HARNESS = "Context:  The map  shows states. \nWhich is  farthest   north?\nA. Maine  coast\nB. Ohio "
EXAMPLES = (
    Example(_ROW, "llava", _PROMPT, "A", 1.0),
    Example(_ROW, "lmms_eval", _PROMPT, "a", 1.0),
    Example(_ROW, "llava", _PROMPT, "a", 0.0),
    Example(_HINT, "llava", "Context: The map shows states.\n" + _PROMPT, "The answer is A.", 1.0),
    Example(_HINT, "lmms_eval", "Context: The map shows states.\n" + _PROMPT, "The answer is A.", 0.0),
    Example(_BLANKS, "llava", _LLAVA + LETTER, "A. Maine", 1.0),
    Example(_BLANKS, "lmms_eval", _HARNESS + LETTER, "<think>B</think>A", 1.0),
    Example({**_ROW, "hint": " "}, "llava", _PROMPT, "<think>B</think>A", 0.0),
)


class Scienceqa(TableBenchmark):
    """Accuracy. Questions that share an image are one cluster, known by the hash of the image's bytes."""

    label = "ScienceQA"
    splits: ClassVar[tuple[str, ...]] = ("test",)
    limits = {"llava": 1024, "lmms_eval": 16}
    source = HubDataset(
        name="ScienceQA",
        config="ScienceQA-IMG",
        columns=("question", "choices", "answer", "hint"),
        optional=("subject",),
        rows={"test": (2_017,)},
    )

    def prompt(self, row: Row, protocol: str) -> str:
        """Hint, question, choices, one a line; llava writes one blank for two, once, and leaves outer white space out."""
        hint = row["hint"].strip() if protocol == "llava" else row["hint"]
        lines = [f"Context: {hint}"] if hint else []
        lines += [row["question"], *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False))]
        asked = "\n".join(lines)
        return (asked.replace("  ", " ").strip() if protocol == "llava" else asked) + LETTER

    def identity(self, row: Row, number: int) -> Identity:
        """The rows have no id of their own: it is their place in the split."""
        return Identity(f"{number:05d}", "", "", row["subject"])

    def identities(self, rows: dataset_rows.DatasetRows) -> list[Identity]:
        """With the hash of the picture as group. ValueError: a row without a picture, named."""
        found = []
        for number, row in enumerate(rows.records):
            name = _hash(rows.pictures[number], rows.name(number))
            found.append(self.identity(row, number)._replace(group=name, image_id=name))
        return found

    def credit(self, row: Row, answer: str, protocol: str) -> Grade:
        """See `_answers.scienceqa`."""
        return _answers.scienceqa(answer, LETTERS[row["answer"]], len(row["choices"]), protocol)

    def aggregate(self, rows: Sequence[Graded]) -> dict[str, float]:
        """Accuracy, and per subject."""
        return _aggregate.mean(rows)

    @staticmethod
    def tidy(row: dict[str, Any]) -> dict[str, Any]:
        """The answer is the number of a choice, of which there are at most five."""
        choices, answer = texts(row, "choices"), row["answer"]
        if not 1 <= len(choices) <= len(LETTERS):
            raise ValueError(f"column 'choices' has {len(choices)} of them; 1 to {len(LETTERS)} can be asked for by letter")
        try:
            number = whole(row, "answer")
        except ValueError:
            number = -1
        if not 0 <= number < len(choices):
            raise ValueError(f"column 'answer' is {answer!r:.80}; it must number one of the {len(choices)} choices, from 0")
        return {
            "question": text(row, "question"), "choices": choices, "answer": number, "hint": label(row, "hint"),
            "subject": label(row, "subject"),
        }  # fmt: skip


def _hash(picture: Any, name: str) -> str:
    data = picture.get("bytes") if isinstance(picture, Mapping) else picture
    if isinstance(data, Path):
        data = data.read_bytes() if data.is_file() else None
    if not data:
        raise ValueError(f"{name}: the picture is missing; ScienceQA-IMG has one in every row")
    return hashlib.sha256(data).hexdigest()[:20]
