"""MMBench in Chinese, dev: the edition of the harness (4,329 rows). The TSV of the paper goes in as folder=.

The harness keeps the English header "There are several options:" here, and skips only a hint that is null, so the text `nan` would
enter its prompt. Both are faults, and part of that protocol.
"""

from __future__ import annotations

from typing import Any

from diffprune.benchmarks._mmbench import COLUMNS, HEADER, OPTIONAL, Circular
from diffprune.benchmarks._table import Example
from diffprune.core.benchmark import HubDataset
from diffprune.io import dataset_rows

LLAVA = "\n请直接回答选项字母。"
HARNESS = "\n请直接使用所提供的选项字母作为答案回答。"
_ROW = {
    "index": 1000241, "question": "下面哪个是正确的？", "hint": None, "answer": "C", "A": "红", "B": "蓝", "C": "绿", "D": None,
    "category": "attribute_recognition",
}  # fmt: skip
_OPTIONS = "A. 红\nB. 蓝\nC. 绿"
EXAMPLES = (
    Example(_ROW, "llava", f"下面哪个是正确的？\n{_OPTIONS}{LLAVA}", "C", 1.0),
    Example(_ROW, "lmms_eval", f"下面哪个是正确的？ {HEADER}\n{_OPTIONS}\n{HARNESS}", "答案是C", 1.0),
    Example({**_ROW, "hint": "nan"}, "lmms_eval", f"nan 下面哪个是正确的？ {HEADER}\n{_OPTIONS}\n{HARNESS}", "蓝", 0.0),
    Example({**_ROW, "hint": "看图。"}, "llava", f"看图。\n下面哪个是正确的？\n{_OPTIONS}{LLAVA}", "绿", 1.0),
)


class MmbenchCn(Circular):
    """rule: see `Circular`."""

    label = "MMBench-CN"
    instruction = {"llava": LLAVA, "lmms_eval": HARNESS}
    limits = {"llava": 1024, "lmms_eval": 256}
    source = HubDataset("MMBench", COLUMNS, config="cn", optional=OPTIONAL, rows={"dev": (4_329,)})

    def hinted(self, hint: Any) -> bool:
        """Whatever is not null."""
        return not dataset_rows.missing(hint)
