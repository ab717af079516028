"""Synthetic training data: scenes of the embedded world, generated on demand."""

from __future__ import annotations

from functools import lru_cache

from PIL import Image

from diffprune.data.sources import TRAIN, BrokenRows, Check, DrawIndex, Example, TrainingSource
from diffprune.embedded.questions import draw
from diffprune.embedded.world import SPLITS, WORLD_VERSION, scene

drawn = lru_cache(maxsize=1024)(scene)  # methods of one seed that train side by side see most scenes of the others


class WorldSource(TrainingSource):
    """Endless scenes; those for calibration and validation have seeds of their own."""

    identity = ""

    def calibrates_apart(self, revision: str, split: str) -> bool:
        """Splits of the world have seeds of their own."""
        return revision == WORLD_VERSION and split != "calibration"

    def trains_apart(self, revision: str, split: str) -> bool:
        """The same, the split that it trains on apart."""
        return self.calibrates_apart(revision, split) and split != "train"

    def draw(self, index: DrawIndex, questions: int, tally: BrokenRows, check: Check | None = None) -> Example:
        """A picture of the embedded world and questions about it."""
        rng, seeds = index.random(), SPLITS["train" if index.stream == TRAIN else "calibration"]
        picture = drawn(int(rng.integers(seeds.start, seeds.stop)))
        tally.drawn += 1
        pairs = [(question, answer) for _, question, answer in draw(picture, rng, questions)]
        return Example([Image.fromarray(picture.image)], pairs)
