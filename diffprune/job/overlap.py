"""Whether what a method is calibrated on is tested on: pictures are compared by their pixels, wherever they are from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from diffprune import data as training
from diffprune.core import registry
from diffprune.core.benchmark import Benchmark
from diffprune.core.fitted import CALIBRATION_IMAGES, FittedPruner, TrainablePruner
from diffprune.core.spec import Spec
from diffprune.evaluate.cells import Evaluation
from diffprune.train.recipe import Recipe


def calibrated(methods: Sequence[Spec]) -> list[Spec]:
    """Those that are fitted to pictures without gradients."""
    found = [(spec, registry.find("pruners", spec.name)) for spec in methods]
    return [spec for spec, plugin in found if issubclass(plugin, FittedPruner) and not issubclass(plugin, TrainablePruner)]


def refuse(recipe: Recipe, asked: Evaluation) -> None:
    """Refuse a recipe that calibrates a method on a picture that an evaluation asks about. Others cost nothing.

    Pictures of benchmarks that cannot be opened are passed over: whoever asks about them says so.

    Raises:
        ValueError: names the method, the data, the benchmark and the picture; or the data cannot be read.
    """
    methods, apart = calibrated(recipe.pruners), training.source(recipe.data).calibrates_apart
    if not methods:
        return
    benchmarks: list[Benchmark] = [registry.make("benchmarks", spec) for spec in asked.benchmarks]
    left = [one for one in benchmarks if not apart(one.revision, one.named_split(asked.split))]
    if not left:
        return
    known = {digest(picture) for picture in training.calibration_pictures(recipe.data, CALIBRATION_IMAGES)}
    for benchmark, image_id, picture in _asked(left, asked):
        if digest(picture) in known:
            raise ValueError(
                f"{methods[0]} would be calibrated on picture {image_id!r} of {benchmark.spec}, split {asked.split}: the data "
                f"{str(recipe.data)!r} overlap what is tested; calibrate on other pictures, or ask about other ones"
            )


def _asked(benchmarks: Sequence[Benchmark], asked: Evaluation) -> Iterator[tuple[Benchmark, str, Any]]:
    """Every picture that is asked about, once per data set."""
    seen: set[tuple[str, str]] = set()
    for benchmark in benchmarks:
        for sample in benchmark.samples(asked.split, asked.limit, asked.protocol):
            for number, image_id in enumerate(sample.image_ids):
                if (benchmark.revision, image_id) not in seen:
                    seen.add((benchmark.revision, image_id))
                    try:
                        yield benchmark, image_id, benchmark.nth_image(sample, number)
                    except (ValueError, OSError):
                        continue


def digest(picture: Any) -> bytes:
    """Of a PIL image's size and RGB values."""
    return hashlib.sha256(f"{picture.size} ".encode() + picture.convert("RGB").tobytes()).digest()
