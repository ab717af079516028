"""What MMBench in English and Chinese share: rotations of a question, options that may be missing, the circular score.

A question is asked under several rotations of its options and counts only if all are answered (Liu et al., arXiv 2307.06281).
Rotation k of question i has index i + k x 1,000,000. Undecided answers go to the offline rules (`static`), never to a judge.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffprune.benchmarks import _aggregate, _answers
from diffprune.benchmarks._answers import LETTERS
from diffprune.benchmarks._columns import gold, label, shown, text, whole
from diffprune.benchmarks._table import Identity, Row, TableBenchmark
from diffprune.core.benchmark import Grade, Graded
from diffprune.core.registry import nearest
from diffprune.io import dataset_rows

COLUMNS = ("index", "question", "hint", "answer", "A", "B", "C", "D", "category")
OPTIONAL = ("E", "L2-category", "l2-category", "split")
HEADER = "There are several options:"
ROTATION = 1_000_000
RULES = ("static", "tokens")
READ = "ABCD"  # the options whose text, and whose letter within a sentence, the offline rules know; a bare E is read, too


def absent(value: Any) -> bool:
    """Missing as the harness sees it: null, NaN, empty, or the text `nan`."""
    return dataset_rows.missing(value) or str(value) in ("", "nan")


def void(value: Any) -> bool:
    """Missing as LLaVA sees it: null, NaN, or the texts `nan` and `none` in any case."""
    return dataset_rows.missing(value) or str(value).lower() in ("nan", "none")


class Circular(TableBenchmark):
    """rule: `static` (all offline rules) or `tokens` (without the last, robust one)."""

    splits: ClassVar[tuple[str, ...]] = ("dev",)
    na_words = True
    formulas = _aggregate.CIRCULAR
    instruction: ClassVar[dict[str, str]]  # by protocol

    def __init__(self, folder: Path | None = None, rule: str = "static") -> None:
        super().__init__(folder)
        if rule not in RULES:
            raise ValueError(f"{self.name} has no rule {rule!r}: {nearest(str(rule), RULES)}")
        self.rule = rule

    def hinted(self, hint: Any) -> bool:
        """Whether the harness puts this hint before the question."""
        return not dataset_rows.missing(hint) and hint != "nan"

    def prompt(self, row: Row, protocol: str) -> str:
        """LLaVA's lines; or the harness's header, options and, as its instruction begins with a line feed, a blank line."""
        if protocol == "llava":
            parts = ([] if void(row["hint"]) else [str(row["hint"])]) + [row["question"]]
            for letter in "ABCD":
                if void(row[letter]):
                    break
                parts.append(f"{letter}. {row[letter]}")
            return "\n".join(parts) + self.instruction[protocol]
        hint = f"{row['hint']} " if self.hinted(row["hint"]) else ""
        options = "\n".join(f"{letter}. {row[letter]}" for letter in LETTERS if not absent(row[letter])).rstrip("\n")
        return f"{hint}{row['question']} {HEADER}\n{options}\n{self.instruction[protocol]}"

    def identity(self, row: Row, number: int) -> Identity:
        """Category and L2-category in one, so that both can be summed up."""
        base = str(row["index"] % ROTATION)
        return Identity(str(row["index"]), base, base, f"{row['l2']}/{row['category']}" if row["l2"] else row["category"])

    def identities(self, rows: dataset_rows.DatasetRows) -> list[Identity]:
        """`17x4` is the group of question 17 with its four rotations: a lost one is seen without the data at hand. The number of
        options does not tell how many there are."""
        found = super().identities(rows)
        sizes = Counter(who.group for who in found)
        return [who._replace(group=f"{who.group}x{sizes[who.group]}") for who in found]

    def credit(self, row: Row, answer: str, protocol: str) -> Grade:
        """One rotation; see `_answers.mmbench`."""
        options = {letter: str(row[letter]) for letter in READ if not absent(row[letter])}
        if self.rule == "static":
            return _answers.mmbench(answer, row["answer"], options, protocol)
        parsed = _answers.mmbench_parse(answer, options, robust=False)
        return Grade(float(parsed == row["answer"]), parsed, row["answer"])

    def aggregate(self, rows: Sequence[Graded]) -> dict[str, float]:
        """`circular_accuracy` of groups, accuracy of rows; circular per category and per L2-category.

        Raises:
            ValueError: a group without all of its rotations, named; it would only look better.
        """
        figures = _aggregate.circular(rows, {row.group: int(row.group.rpartition("x")[2]) for row in rows})
        parents: dict[str, list[Graded]] = defaultdict(list)
        for row in rows:
            parents[row.category.partition("/")[0]].append(row)
        for name, part in sorted(parents.items()):
            figures.setdefault(f"circular_accuracy/{name}", _aggregate.circular(part)["circular_accuracy"])
        return figures

    def flags(self, protocol: str = "llava") -> tuple[str, ...]:
        """Papers' numbers come from a server with a judge, on an older edition of 4,377 rows; the harness asks a judge too."""
        return ("substitute",)

    @staticmethod
    def tidy(row: dict[str, Any]) -> dict[str, Any]:
        """The index as a number; missing options and hints stay as they are, because the protocols see them differently."""
        if "split" in row and not dataset_rows.missing(row["split"]) and row["split"] != "dev":
            raise ValueError(f"column 'split' is {row['split']!r:.80}; only dev has answers to grade by")
        answer = gold(row, among=tuple(LETTERS))
        if absent(row.get(answer)):
            raise ValueError(f"column 'answer' is {answer!r}, but there is no such option")
        options = {x: None if dataset_rows.missing(row.get(x)) else shown(row, x) for x in LETTERS}
        return options | {
            "index": whole(row, "index"), "question": text(row, "question"), "answer": answer, "category": label(row, "category"),
            "hint": None if dataset_rows.missing(row.get("hint")) else text(row, "hint"),
            "l2": label(row, "L2-category") or label(row, "l2-category"),
        }  # fmt: skip
