"""A method that is calibrated on pictures it is tested on is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffprune import data as training
from diffprune.core import registry
from diffprune.core.fitted import CALIBRATION_IMAGES
from diffprune.evaluate.cells import Evaluation
from diffprune.io.image import open_image
from diffprune.job import overlap
from diffprune.job.job import Job
from diffprune.job.plan import Plan
from diffprune.train.recipe import Recipe
from tests.test_own_job import shelves


def job(tmp_path: Path, split: str, pruner: str) -> Job:
    place = shelves(tmp_path / "shelf", "train", "test", rows=24)
    recipe = Recipe(pruners=(pruner,), data=f"folder('{place / split}')", workers=1)
    return Job(name="mine", train=recipe, evaluate=Evaluation(benchmarks=(f"custom('{place}')",)), baselines=())


@pytest.mark.parametrize("pruner", ["btp", "pore(attention)"])
def test_a_calibration_set_that_overlaps_the_test_split_is_refused(tmp_path: Path, pruner: str) -> None:
    for stages in (["train"], ["train", "report"]):
        with pytest.raises(ValueError, match=r"calibrated on picture '.*' of custom, split test: the data 'folder' overlap"):
            Plan(job(tmp_path / stages[-1], "test", pruner), tmp_path, None).check(stages)
    Plan(job(tmp_path / "apart", "train", pruner), tmp_path, None).check(["train"])


def test_what_takes_gradients_or_is_not_fitted_is_not_looked_at(tmp_path: Path) -> None:
    Plan(job(tmp_path, "test", "diffprune"), tmp_path, None).check(["train"])
    specs = [registry.spec("pruners", text) for text in ("btp", "attention", "diffprune", "pore(fastv)")]
    assert overlap.calibrated(specs) == [specs[0], specs[3]]


def test_the_world_calibrates_on_scenes_of_its_own() -> None:
    asked, world = Evaluation(limit=2), training.source("world")
    overlap.refuse(Recipe(pruners=("btp",)), asked)
    revision = registry.make("benchmarks", asked.benchmarks[0]).revision
    assert [world.calibrates_apart(revision, split) for split in ("test", "train", "calibration")] == [True, True, False]
    assert not training.source("folder('x')").calibrates_apart(revision, "test") and not world.calibrates_apart("other", "test")


def test_pictures_are_those_that_are_calibrated_on(tmp_path: Path) -> None:
    place = shelves(tmp_path, "train", rows=24) / "train"
    found = list(training.calibration_pictures(f"folder('{place}')", CALIBRATION_IMAGES))
    digests = {overlap.digest(open_image(file)) for file in sorted(place.glob("*.png"))}
    assert len(found) == CALIBRATION_IMAGES and {overlap.digest(one) for one in found} < digests, (
        "part of the data, again and again"
    )
    changed = found[0].copy()
    changed.putpixel((5, 5), (1, 2, 3))
    assert overlap.digest(changed) != overlap.digest(found[0])
