"""Training data without files: pictures of the embedded world, drawn on demand."""

from __future__ import annotations

from typing import Any

from PIL import Image

from diffprune.data.sources import TRAIN, Asked, BrokenRows, DrawIndex, Source
from diffprune.embedded.questions import draw
from diffprune.embedded.world import SPLITS, scene


class World(Source):
    """Endless scenes; those for calibration and validation have seeds of their own."""

    identity = ""

    def draw(self, place: DrawIndex, questions: int, tally: BrokenRows) -> tuple[Any, Asked]:
        """A picture of the embedded world and questions about it."""
        rng, seeds = place.random(), SPLITS["train" if place.stream == TRAIN else "calibration"]
        picture = scene(int(rng.integers(seeds.start, seeds.stop)))
        tally.drawn += 1
        return Image.fromarray(picture.image), [asked[1:] for asked in draw(picture, rng, questions)]
