"""Whether what a method is trained or calibrated on is tested on: pictures are compared by their pixels, wherever they are from.

All pictures of a calibration are compared with all that are asked about. Of training data and of what is asked about LOOKED each
are compared, evenly spread: all of small data; of large ones enough to find whole splits that are in both, not a single picture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from diffprune import data as training
from diffprune.core import registry
from diffprune.core.benchmark import Benchmark, Sample
from diffprune.core.fitted import CALIBRATION_IMAGES, FittedPruner, TrainablePruner
from diffprune.core.spec import Spec
from diffprune.evaluate.cells import Evaluation
from diffprune.io.image import digest
from diffprune.train.recipe import Recipe

LOOKED = 512  # pictures of each side that are compared for methods that train on many


class Overlap(ValueError):
    """A picture is both learnt from and tested on."""


def calibrated(methods: Sequence[Spec]) -> list[Spec]:
    """Those that are fitted to pictures without gradients."""
    found = [(spec, registry.find("pruners", spec.name)) for spec in methods]
    return [spec for spec, plugin in found if issubclass(plugin, FittedPruner) and not issubclass(plugin, TrainablePruner)]


def refuse(recipe: Recipe, asked: Evaluation) -> str:
    """Refuse a recipe that trains or calibrates a method on a picture that an evaluation asks about; says what was compared, ""
    where names alone tell that there is nothing to compare.

    Benchmarks, and pictures of them, that cannot be opened are passed over: whoever asks about them says so.

    Raises:
        Overlap: names the method, the data, the benchmark and the picture.
        ValueError: the data cannot be read.
    """
    source, fitted = training.source(recipe.data), calibrated(recipe.pruners)
    trained = [spec for spec in recipe.pruners if spec not in fitted]
    benchmarks: list[Benchmark] = [registry.make("benchmarks", spec) for spec in asked.benchmarks]
    if fitted and (left := _left(benchmarks, asked, source.calibrates_apart)):
        known = {digest(picture) for picture in training.calibration_pictures(recipe.data, CALIBRATION_IMAGES)}
        _compare(known, _pictures(_asked(left, asked)), fitted[0], "calibrate", recipe, asked)
    if not (trained and source.size and (left := _left(benchmarks, asked, source.trains_apart))):
        return ""
    questions = _asked(left, asked)
    shown = questions[:: max(1, -(-len(questions) // LOOKED))]
    known = {digest(picture) for picture in source.spread(LOOKED)}
    looked = _compare(known, _pictures(shown), trained[0], "train", recipe, asked)
    return f"{len(known)} pictures of the data and {looked} of {len(questions)} that are asked about compared: none is in both"


def _left(benchmarks: Sequence[Benchmark], asked: Evaluation, apart: Callable[[str, str], bool]) -> list[Benchmark]:
    """Those whose pictures could be among the data's. Where the split cannot be named, as its files are not here: none."""
    found = []
    for one in benchmarks:
        with contextlib.suppress(ValueError, OSError):
            found += [] if apart(one.revision, one.named_split(asked.split)) else [one]
    return found


def _compare(
    known: set[bytes], pictures: Iterable[tuple[Benchmark, str, Any]], method: Spec, verb: str, recipe: Recipe, asked: Evaluation
) -> int:
    """How many pictures were compared. verb: "train" or "calibrate". Raises Overlap: one of them is known."""
    looked = 0
    for benchmark, image_id, picture in pictures:
        looked += 1
        if digest(picture) in known:
            raise Overlap(
                f"{method} would be {verb.rstrip('e')}ed on picture {image_id!r} of {benchmark.spec}, split {asked.split}: the "
                f"data {str(recipe.data)!r} overlap what is tested; {verb} on other pictures, or ask about other ones"
            )
    return looked


def _asked(benchmarks: Sequence[Benchmark], asked: Evaluation) -> list[tuple[Benchmark, Sample, int]]:
    """Every picture that is asked about, once per data set: (benchmark, question, number of the picture in it)."""
    found: dict[tuple[str, str], tuple[Benchmark, Sample, int]] = {}
    for benchmark in benchmarks:
        with contextlib.suppress(ValueError, OSError):
            for sample in benchmark.samples(asked.split, asked.limit, asked.protocol):
                for number, image_id in enumerate(sample.image_ids):
                    found.setdefault((benchmark.revision, image_id), (benchmark, sample, number))
    return list(found.values())


def _pictures(shown: Iterable[tuple[Benchmark, Sample, int]]) -> Iterator[tuple[Benchmark, str, Any]]:
    """(benchmark, name of the picture, PIL image) of those that can be opened."""
    for benchmark, sample, number in shown:
        with contextlib.suppress(ValueError, OSError):
            yield benchmark, sample.image_ids[number], benchmark.nth_image(sample, number)
