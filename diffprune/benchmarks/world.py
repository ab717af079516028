"""The embedded world's ten small benchmarks: pictures of shapes and signs, asked and graded as the ten real ones are.

`world('pope')` asks yes/no questions with balanced negatives and reports the mean of three F1; `world('mmbench')` asks each
question under four rotations; `world('vizwiz')` has ten annotators and unanswerable questions; and so on. The questions come
from `diffprune.embedded.benchmarks`; the rules are the real benchmarks' own (`_answers`, `_aggregate`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

from PIL import Image

from diffprune.benchmarks import _aggregate, _answers
from diffprune.benchmarks._groups import drawn
from diffprune.core import registry
from diffprune.core.benchmark import Benchmark, Formula, Grade, Graded, Sample
from diffprune.core.registry import nearest
from diffprune.embedded.benchmarks import NAMES
from diffprune.embedded.benchmarks import rows as world_rows
from diffprune.embedded.world import WORLD_VERSION, scene

Row = Mapping[str, Any]

_GRADES: Mapping[str, Callable[[Row, str, str], Grade]] = {
    "gqa": lambda row, answer, protocol: _answers.gqa(answer, row["answer"], protocol),
    "mmbench": lambda row, answer, protocol: _answers.mmbench(answer, row["answer"], row["options"], protocol),
    "mmbench_cn": lambda row, answer, protocol: _answers.mmbench(answer, row["answer"], row["options"], protocol),
    "mme": lambda row, answer, protocol: _answers.mme(answer, row["answer"], protocol),
    "pope": lambda row, answer, protocol: _answers.pope(answer, row["answer"], protocol),
    "scienceqa": lambda row, answer, protocol: _answers.scienceqa(answer, row["answer"], len(row["options"]), protocol),
    "vqav2": lambda row, answer, protocol: _answers.vqav2(answer, row["answers"], protocol),
    "textvqa": lambda row, answer, protocol: _answers.evalai_vqa(answer, row["answers"], protocol),
    "seed": lambda row, answer, protocol: _answers.seed(answer, row["answer"], protocol),
    "vizwiz": lambda row, answer, protocol: _answers.evalai_vqa(answer, row["answers"], protocol),
}
_ROTATIONS = 4  # the world asks every circular question under four rotations
_AGGREGATES: Mapping[str, Callable[[Sequence[Graded]], dict[str, float]]] = {
    "gqa": _aggregate.mean,
    "mmbench": lambda graded: _aggregate.circular(graded, _ROTATIONS),
    "mmbench_cn": lambda graded: _aggregate.circular(graded, _ROTATIONS),
    "mme": _aggregate.mme,
    "pope": _aggregate.pope,
    "scienceqa": _aggregate.mean,
    "vqav2": _aggregate.soft_mean,
    "textvqa": _aggregate.soft_mean,
    "seed": _aggregate.mean,
    "vizwiz": _aggregate.soft_mean,
}
LIKES = NAMES  # of those that word the questions: what is asked does not hang on how it is graded

# (like, the row's columns for grading, answer, protocol, credit)
EXAMPLES: tuple[tuple[str, Row, str, str, float], ...] = (
    ("gqa", {"answer": "red"}, "Red.", "llava", 1.0),
    ("gqa", {"answer": "red"}, "it is red", "llava", 0.0),
    ("mmbench", {"answer": "B", "options": {"A": "red", "B": "blue", "C": "green"}}, "blue", "llava", 1.0),
    ("mmbench_cn", {"answer": "B", "options": {"A": "红", "B": "蓝"}}, "答案是B", "llava", 1.0),
    ("mme", {"answer": "no"}, "No, it is not", "llava", 1.0),
    ("mme", {"answer": "yes"}, "y", "lmms_eval", 1.0),
    ("pope", {"answer": "yes"}, "maybe", "llava", 1.0),
    ("pope", {"answer": "yes"}, "maybe", "lmms_eval", 0.0),
    ("scienceqa", {"answer": "A", "options": {"A": "1", "B": "2"}}, "a", "llava", 0.0),
    ("scienceqa", {"answer": "A", "options": {"A": "1", "B": "2"}}, "a", "lmms_eval", 1.0),
    ("vqav2", {"answers": ["2"] * 8 + ["3"] * 2}, "two", "llava", 1.0),
    ("textvqa", {"answers": ["4 7"] * 9 + ["7 4"]}, "7 4", "llava", 0.3),
    ("seed", {"answer": "C"}, "C.", "llava", 0.0),
    ("seed", {"answer": "C"}, "c", "lmms_eval", 1.0),
    ("vizwiz", {"answers": ["unanswerable"] * 10}, "Unanswerable", "lmms_eval", 1.0),
)


@lru_cache(maxsize=512)
def _picture(seed: int) -> Image.Image:
    return Image.fromarray(scene(seed).image).convert("RGB")


class World(Benchmark):
    """Questions about the embedded world in the manner of one real benchmark.

    like: one of gqa mmbench mmbench_cn mme pope scienceqa vqav2 textvqa seed vizwiz.

    Raises:
        ValueError: no such benchmark; the nearest name is given.
    """

    revision = WORLD_VERSION
    protocols: ClassVar[tuple[str, ...]] = _answers.PROTOCOLS
    splits: ClassVar[tuple[str, ...]] = ("test", "confirmation", "calibration", "train")
    QUESTIONS: ClassVar[int] = 120  # of a full run, rounded up to whole groups; ten benchmarks ask 1,200 in all

    def __init__(self, like: str) -> None:
        if like not in LIKES:
            raise ValueError(f"the world has no benchmark like {like!r}: {nearest(str(like), LIKES)}")
        self.like = like
        self._namesake: type[Benchmark] = registry.find("benchmarks", like)
        self.label = self._namesake.label

    def flags(self, protocol: str = "llava") -> tuple[str, ...]:
        """Asked and graded as the namesake, about other pictures."""
        return ("embedded",)

    def formula(self, figure: str) -> Formula:
        """The namesake's."""
        return self._namesake.formulas.get(figure, Formula())

    def new_tokens(self, protocol: str = "llava") -> int:
        """The longest answers are two words and the end token."""
        return 4

    def samples(self, split: str, limit: int | None = None, protocol: str = "llava") -> list[Sample]:
        """The questions of `train`, `calibration`, `test` or `confirmation`, the same ones every time and under every protocol.

        limit: that many questions, rounded up to whole groups, which are drawn by a hash of their name; a smaller limit is a part
        of a larger one. Above QUESTIONS it asks for more than a full run does.
        """
        self.check_asked(protocol, limit)
        split = self.named_split(split)
        found = world_rows(self.like, split, max(self.QUESTIONS, limit or 0))
        if limit is not None and limit < self.QUESTIONS:
            chosen = drawn([str(row["group"]) for row in found], limit)
            found = [row for row in found if row["group"] in chosen]
        return [self._sample(row) for row in found]

    @staticmethod
    def _sample(row: Row) -> Sample:
        return Sample(
            id=row["id"],
            group=row["group"],
            image_id=str(row["image_seed"]),
            question=row["question"],
            row=dict(row),
            category=row["category"],
            question_type=row["kind"],
        )

    def image(self, sample: Sample) -> Image.Image:
        """The 96 x 96 px picture, RGB. Equal pictures are drawn once and shared: do not change them."""
        return _picture(int(sample.row["image_seed"]))

    def grade(self, sample: Sample, answer: str, protocol: str = "llava") -> Grade:
        """Grade by the rule of the real benchmark under this protocol; lmms_eval's is asked without a model's reasoning.

        Raises:
            ValueError: no such protocol.
        """
        said = _answers.without_reasoning(answer) if protocol == "lmms_eval" else answer
        return _GRADES[self.like](sample.row, said, protocol)

    def aggregate(self, rows: Sequence[Graded]) -> dict[str, float]:
        """The real benchmark's figures, main one first, and `accuracy` (mean credit x 100)."""
        return _AGGREGATES[self.like](rows)
