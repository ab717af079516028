"""MME: two yes/no questions about every image, 14 categories in points (Fu et al., arXiv 2306.13394).

Papers print "MME" for perception (at most 2000) or for the total (2800); both are given, `main` says which comes first.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffprune.benchmarks import _aggregate, _answers
from diffprune.benchmarks._columns import gold, identifier, text
from diffprune.benchmarks._table import SHORT, Example, Identity, Row, TableBenchmark
from diffprune.core.benchmark import Grade, Graded, HubDataset
from diffprune.core.registry import nearest
from diffprune.io import dataset_rows

MAIN = ("perception", "cognition", "total")
CATEGORIES = _aggregate.MME_PERCEPTION + _aggregate.MME_COGNITION
_REQUEST = re.compile(r"\s*Please answer yes or no\.\s*$")
_ROW = {
    "question_id": "code_reasoning/0020.png", "category": "code_reasoning", "answer": "Yes",
    "question": "Is a python code shown in the picture? Please answer yes or no.",
}  # fmt: skip
_TWO_BLANKS = {**_ROW, "question": "Is a python code shown in the picture?  Please answer yes or no."}
_PROMPT = "Is a python code shown in the picture?" + SHORT
EXAMPLES = (
    Example(_ROW, "llava", _PROMPT, "Yes", 1.0),
    Example(_ROW, "llava", _PROMPT, "y", 0.0),
    Example(_ROW, "lmms_eval", _PROMPT, "y", 1.0),
    Example(_TWO_BLANKS, "llava", _PROMPT, "Eyes", 1.0),
    Example(_TWO_BLANKS, "lmms_eval", "Is a python code shown in the picture? " + SHORT, "Nothing", 0.0),
)


class Mme(TableBenchmark):
    """acc + acc+ per category: rows right, and images with both rows right. main: perception, cognition or total."""

    label = "MME"
    formulas = _aggregate.MME
    splits: ClassVar[tuple[str, ...]] = ("test",)
    source = HubDataset(
        name="MME",
        columns=("question_id", "question", "answer", "category"),
        rows={"test": (2_374,)},
        groups={"test": (1_187,)},
    )

    def __init__(self, folder: Path | None = None, main: str = "perception") -> None:
        super().__init__(folder)
        if main not in MAIN:
            raise ValueError(f"mme has no figure {main!r}: {nearest(str(main), MAIN)}")
        self.main = main

    def prompt(self, row: Row, protocol: str) -> str:
        """Without its request for yes or no; lmms_eval deletes it with one blank, so of two blanks one stays."""
        if protocol == "llava":
            return _REQUEST.sub("", row["question"]).strip() + SHORT
        return row["question"].strip().replace(" Please answer yes or no.", "") + SHORT

    def identity(self, row: Row, number: int) -> Identity:
        """Without the place within the pair, which only all rows tell."""
        group = f"{row['category']}/{row['question_id'].removeprefix(row['category'] + '/')}"
        return Identity(group, group, group, row["category"])

    def identities(self, rows: dataset_rows.DatasetRows) -> list[Identity]:
        """Pairs; the two questions of an image are told apart by their text, whatever the order of the rows."""
        found = super().identities(rows)
        questions: dict[str, list[str]] = defaultdict(list)
        for who, row in zip(found, rows.records, strict=True):
            questions[who.group].append(row["question"])
        for group, pair in questions.items():
            if len(pair) != 2:
                raise ValueError(f"{self.place}: MME image {group!r} has {len(pair)} rows where a pair belongs")
        places = [sorted(questions[who.group]).index(row["question"]) for who, row in zip(found, rows.records, strict=True)]
        return [who._replace(id=f"{who.id}#{place}") for who, place in zip(found, places, strict=True)]

    def credit(self, row: Row, answer: str, protocol: str) -> Grade:
        """See `_answers.mme`."""
        return _answers.mme(answer, row["answer"], protocol)

    def aggregate(self, rows: Sequence[Graded]) -> dict[str, float]:
        """Points of perception, cognition and both; per category its score, acc and acc+."""
        figures, main = _aggregate.mme(rows), f"mme_{self.main}"
        return {main: figures[main]} | figures

    @staticmethod
    def tidy(row: dict[str, Any]) -> dict[str, Any]:
        """Answers are yes or no; the category is one of fourteen, in this spelling."""
        if row["category"] not in CATEGORIES:
            raise ValueError(f"column 'category' is {row['category']!r:.80}; MME has {', '.join(CATEGORIES)}")
        return {
            "question_id": identifier(row, "question_id"), "question": text(row, "question"),
            "answer": gold(row, among=("yes", "no")), "category": row["category"],
        }  # fmt: skip
