"""MMBench in English, dev: the edition of the harness (4,329 rows), or of the paper (4,377 rows, 1,176 questions)."""

from __future__ import annotations

from pathlib import Path

from diffprune.benchmarks._mmbench import COLUMNS, HEADER, OPTIONAL, Circular
from diffprune.benchmarks._table import LETTER, Example
from diffprune.core.benchmark import HubDataset
from diffprune.core.registry import nearest

EDITIONS = {
    "lmms": HubDataset("MMBench", COLUMNS, config="en", optional=OPTIONAL, rows={"dev": (4_329,)}),
    "20230712": HubDataset("MMBench_EN", COLUMNS, optional=OPTIONAL, rows={"dev": (4_377,)}, groups={"dev": (1_176,)}),
}
_ROW = {
    "index": 241, "question": "Which one is right?", "hint": "Look at the picture.", "answer": "B", "A": "red", "B": "blue",
    "C": "green", "D": None, "category": "attribute_recognition",
}  # fmt: skip
_NAN = {**_ROW, "hint": "nan", "D": "nan"}
_FIVE = {**_ROW, "hint": None, "D": "pink", "E": "grey", "answer": "E"}
_OPTIONS = "A. red\nB. blue\nC. green"
_HARNESS = f"Which one is right? {HEADER}\n{_OPTIONS}\n{LETTER}"
EXAMPLES = (
    Example(_ROW, "llava", f"Look at the picture.\nWhich one is right?\n{_OPTIONS}{LETTER}", "B", 1.0),
    Example(_ROW, "lmms_eval", f"Look at the picture. {_HARNESS}", "(B) blue", 1.0),
    Example(_NAN, "llava", f"Which one is right?\n{_OPTIONS}{LETTER}", "It is blue", 1.0),
    Example(_NAN, "lmms_eval", _HARNESS, "E", 0.0),
    Example({**_ROW, "hint": None, "C": "green\n"}, "lmms_eval", _HARNESS, "<think>A or C?</think>\nB", 1.0),
    Example({**_ROW, "hint": None, "C": 7.0}, "lmms_eval", _HARNESS.replace("green", "7"), "It is B because E is absurd", 1.0),
    Example(_FIVE, "lmms_eval", _HARNESS.replace("green", "green\nD. pink\nE. grey"), "It must be **E**", 0.0),
)


class Mmbench(Circular):
    """edition: `lmms` (the harness's) or `20230712` (the paper's; also the TSV mmbench_dev_20230712). rule: see `Circular`."""

    label = "MMBench"
    instruction = {"llava": LETTER, "lmms_eval": LETTER}
    limits = {"llava": 1024, "lmms_eval": 1024}

    def __init__(self, folder: Path | None = None, edition: str = "lmms", rule: str = "static") -> None:
        super().__init__(folder, rule)
        if str(edition) not in EDITIONS:
            raise ValueError(f"mmbench has no edition {edition!r}: {nearest(str(edition), EDITIONS)}")
        self.source = EDITIONS[str(edition)]
