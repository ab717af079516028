"""GQA, balanced test-dev: 12,578 questions about 398 images, answered with a word or phrase (Hudson & Manning, arXiv 1902.09506).

Questions and images are two configurations of one repository, joined by imageId. `testdev_all` is another number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from diffprune.benchmarks import _aggregate, _answers
from diffprune.benchmarks._columns import gold, identifier, text
from diffprune.benchmarks._table import SHORT, Example, Identity, Loaded, Row, TableBenchmark
from diffprune.core.benchmark import Grade, Graded, HubDataset
from diffprune.io import dataset_rows

IMAGES = ("testdev_balanced_images", "testdev")
_ROW = {"id": "201307251", "imageId": "n161313", "question": "Is it overcast?", "answer": "no"}
EXAMPLES = (
    Example(_ROW, "llava", "Is it overcast?" + SHORT, "No.", 1.0),
    Example(_ROW, "lmms_eval", "Is it overcast?" + SHORT, "No!", 1.0),
    Example(_ROW, "llava", "Is it overcast?" + SHORT, "No!", 0.0),
    Example(_ROW, "lmms_eval", "Is it overcast?" + SHORT, "No, it is not", 0.0),
    Example({**_ROW, "answer": "tshirt"}, "lmms_eval", "Is it overcast?" + SHORT, "t-shirt", 1.0),
)


class Gqa(TableBenchmark):
    """Correct if the words are the same: case and final periods aside (llava), case and all punctuation aside (lmms_eval)."""

    label = "GQA"
    splits: ClassVar[tuple[str, ...]] = ("testdev",)
    source = HubDataset(
        name="GQA",
        config="testdev_balanced_instructions",
        columns=("id", "imageId", "question", "answer"),
        image="",
        rows={"testdev": (12_578,)},
        groups={"testdev": (398,)},
    )

    def prompt(self, row: Row, protocol: str) -> str:
        """Both protocols: the question and the short-answer instruction."""
        return row["question"] + SHORT

    def identity(self, row: Row, number: int) -> Identity:
        """Questions about one image are one cluster."""
        return Identity(row["id"], row["imageId"], row["imageId"])

    def credit(self, row: Row, answer: str, protocol: str) -> Grade:
        """See `_answers.gqa`."""
        return _answers.gqa(answer, row["answer"], protocol)

    def aggregate(self, rows: Sequence[Graded]) -> dict[str, float]:
        """Accuracy."""
        return _aggregate.mean(rows)

    @staticmethod
    def tidy(row: dict[str, Any]) -> dict[str, Any]:
        """Ids and image ids as text."""
        return {
            "id": identifier(row, "id"), "imageId": identifier(row, "imageId"), "question": text(row, "question"),
            "answer": gold(row),
        }  # fmt: skip

    def parts(self) -> list[tuple[str, str]]:
        """Questions and images."""
        return [self.part(self.splits[0]), IMAGES]

    def read_part(self, config: str, split: str) -> dataset_rows.DatasetRows:
        """The images have columns of their own."""
        if (config, split) != IMAGES:
            return self.read(config, split)
        return dataset_rows.read(dataset_rows.DatasetFiles(self._files(config, split), ("id",)))

    def loaded(self, split: str) -> Loaded:
        """Questions, and the place of every image.

        Raises:
            ValueError: also where a question's image is not there.
        """
        if split not in self._loaded:
            images = self.read_part(*IMAGES)
            self._images, self._place = images, {identifier(row, "id"): n for n, row in enumerate(images.records)}
            loaded = super().loaded(split)
            for who in loaded.identities:
                if who.image_id not in self._place:
                    del self._loaded[split]
                    raise ValueError(f"{self.place}: image {who.image_id!r} of question {who.id!r} is not in {IMAGES[0]}")
        return self._loaded[split]

    def picture(self, rows: dataset_rows.DatasetRows, number: int) -> Any:
        """From the other configuration."""
        return self._images.pictures[self._place[rows.records[number]["imageId"]]]
