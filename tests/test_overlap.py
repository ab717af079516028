"""A method that is calibrated on pictures it is tested on is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffprune import data as training
from diffprune.core import registry
from diffprune.core.fitted import CALIBRATION_IMAGES
from diffprune.evaluate.cells import Evaluation
from diffprune.io.image import digest, open_image
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
            Plan(job(tmp_path / stages[-1], "test", pruner), tmp_path, None).check_training(stages)
    Plan(job(tmp_path / "apart", "train", pruner), tmp_path, None).check_training(["train"])


def test_a_training_set_that_overlaps_the_test_split_is_refused_and_one_that_does_not_is_told(tmp_path: Path) -> None:
    for stages in (["train"], ["evaluate"]):
        with pytest.raises(
            ValueError, match=r"diffprune would be trained on picture '.*' of custom, split test: the data 'folder'"
        ):
            Plan(job(tmp_path / stages[0], "test", "diffprune"), tmp_path, None).check_training(stages)
    apart = Plan(job(tmp_path / "apart", "train", "diffprune"), tmp_path, None)
    apart.check_training(["train"])
    assert apart.trained_on["train"][1] == "24 pictures of the data and 24 of 24 that are asked about compared: none is in both"
    specs = [registry.spec("pruners", text) for text in ("btp", "attention", "diffprune", "pore(fastv)")]
    assert overlap.calibrated(specs) == [specs[0], specs[3]]


def test_data_that_are_gone_keep_nobody_from_asking_scorers_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = job(tmp_path, "train", "diffprune")
    (tmp_path / "shelf" / "train").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="train"):
        Plan(mine, tmp_path, None).check_training(["train", "evaluate"])
    for stages in (["evaluate"], ["train", "evaluate"]):
        monkeypatch.setattr(Plan, "untrained", lambda _: [])  # a folder with every scorer
        plan = Plan(mine, tmp_path, None)
        plan.check_training(stages)
        assert plan.trained_on["train"][-1].startswith("not compared with what is asked, as the data cannot be read: ")


def test_of_many_pictures_some_of_each_side_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "LOOKED", 7)
    mine = job(tmp_path, "train", "diffprune")
    assert mine.train and mine.evaluate
    told = overlap.refuse(mine.train, mine.evaluate)
    assert told == "7 pictures of the data and 6 of 24 that are asked about compared: none is in both"
    same = job(tmp_path / "same", "test", "diffprune")
    assert same.train and same.evaluate
    with pytest.raises(ValueError, match="overlap what is tested"):
        overlap.refuse(same.train, same.evaluate)


def test_the_world_calibrates_on_scenes_of_its_own() -> None:
    asked, world = Evaluation(limit=2), training.source("world")
    overlap.refuse(Recipe(pruners=("btp",)), asked)
    revision = registry.make("benchmarks", asked.benchmarks[0]).revision
    assert [world.calibrates_apart(revision, split) for split in ("test", "train", "calibration")] == [True, True, False]
    assert not training.source("folder('x')").calibrates_apart(revision, "test") and not world.calibrates_apart("other", "test")
    assert [world.trains_apart(revision, split) for split in ("test", "train", "calibration")] == [True, False, False]
    assert overlap.refuse(Recipe(), asked) == ""


def test_pictures_are_those_that_are_calibrated_on(tmp_path: Path) -> None:
    place = shelves(tmp_path, "train", rows=24) / "train"
    found = list(training.calibration_pictures(f"folder('{place}')", CALIBRATION_IMAGES))
    digests = {digest(open_image(file)) for file in sorted(place.glob("*.png"))}
    assert len(found) == CALIBRATION_IMAGES and {digest(one) for one in found} < digests, "part of the data, again and again"
    changed = found[0].copy()
    changed.putpixel((5, 5), (1, 2, 3))
    assert digest(changed) != digest(found[0])
