"""Training data that are not there, are empty or too few are refused before anything starts, by a dry run as by a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffprune.cli import commands
from diffprune.core import registry
from diffprune.job import training_data, tuning
from diffprune.job.job import Job
from diffprune.job.plan import Plan
from diffprune.train.recipe import Recipe
from diffprune.tune.options import Tuning
from diffprune.vlm.load import load
from tests.contracts import tokens
from tests.test_own_job import shelves

JSONL = "jsonl('rows.jsonl', images='pictures', question='text', answer='label')"


def write(num: int = 24, missing: int = 0, images: str = "pictures") -> None:
    """Rows about pictures, the first `missing` of which do not exist."""
    Path(images).mkdir()
    rows = []
    for i in range(num):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(Path(images) / f"{i}.png")
        rows.append({"image": "nope.png" if i < missing else f"{i}.png", "text": "what?", "label": f"a{i}"})
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


def sentence(*more: str) -> str:
    """What `diffprune train` says with and without --dry-run; the same."""
    line = ["train", "--scorer", "diffprune", "--set", f"train.data={JSONL}", "--set", "train.steps=1", *more]
    code, dry = commands.call([*line, "--dry-run"])
    assert (code, commands.call(line)) == (2, (2, dry)), "a run says the same, and starts nothing"
    assert not Path("runs").exists() and "\n" not in dry
    return dry


def test_rows_that_are_not_there_or_are_none_are_refused() -> None:
    assert "rows.jsonl cannot be read as training data" in sentence()
    Path("pictures").mkdir()
    Path("rows.jsonl").write_text("")
    assert "rows.jsonl has no row with an image" in sentence()


def test_pictures_that_are_not_there_are_refused() -> None:
    write(images="elsewhere")
    assert "there is no folder of pictures" in sentence() and "name the right one with images=" in sentence()
    Path("elsewhere").rename("pictures")
    for file in Path("pictures").iterdir():
        file.write_bytes(file.read_bytes()[:40])
    assert "training rows drawn so far cannot be used" in sentence()


def test_data_of_which_too_much_is_broken_are_refused() -> None:
    write(missing=5)
    assert "more than max_broken_share=0.01 allows; the first: " in sentence() and "nope.png" in sentence()


@pytest.mark.parametrize("name", training_data.COUNTS)
def test_more_than_there_is_is_refused(name: str) -> None:
    write()
    said = sentence("--set", f"train.{name}=1000")
    assert f"train.{name} is 1,000, but the data jsonl(answer='label', question='text') have 24 rows with a picture" in said


def test_less_than_the_default_is_refused_as_well_where_it_is_more_than_there_is() -> None:
    write()
    said = sentence("--set", "train.calibration_images=30")
    assert "train.calibration_images is 30, but the data" in said and said.endswith("--set train.calibration_images=24")
    line = ["train", "--scorer", "diffprune", "--set", f"train.data={JSONL}", "--dry-run"]
    assert commands.call(line) == (0, ""), "the default of 64 looks at those that there are"


def test_a_dry_run_prints_the_first_example(capsys: pytest.CaptureFixture[str]) -> None:
    write()
    line = ["train", "--scorer", "diffprune", "--set", f"train.data={JSONL}", "--dry-run"]
    assert commands.call(line) == (0, "")
    assert "train: the first example is an image of 32 x 32, question 'what?', answer 'a" in capsys.readouterr().out


def test_a_job_that_states_its_model_is_planned_where_its_data_are_not() -> None:
    job = Job(name="far", train=Recipe(data=JSONL, workers=1), config={"model_type": "llava"}, baselines=())
    plan = Plan(job, Path("runs/far"), None)
    plan.check_training(["train"], dry=True)
    assert "rows.jsonl): a run here would be refused" in plan.trained_on["train"][0]
    with pytest.raises(ValueError, match="cannot be read as training data"):
        plan.check_training(["train"])


def test_changed_settings_under_one_name_are_named() -> None:
    """A scorer is there that fewer steps made."""
    recipe = Recipe(pruners=("diffprune",), workers=1)
    place = Path("runs/mine/scorers/diffprune-0")
    method = registry.load("pruners", "diffprune")
    method.build(tokens())
    facts = {"recipe": recipe.model_dump(mode="json"), "recipe_key": recipe.key(recipe.pruners[0]), "seed": 0}
    method.save_pretrained(place, **facts)
    plan = Plan(Job(name="mine", train=recipe, baselines=()), Path("runs/mine"), None)
    assert not plan.untrained()
    other = recipe.model_copy(update={"steps": 1000, "clip": 0.5, "workers": 2})
    plan = Plan(Job(name="mine", train=other, baselines=()), Path("runs/mine"), None)
    with pytest.raises(ValueError, match=r"with other settings \(clip 1.0 -> 0.5, steps 200 -> 1000\): .* as in --name mine-2"):
        plan.untrained()
    method.save_pretrained(place, **facts | {"recipe_key": "0" * 20})
    with pytest.raises(ValueError, match=r"was trained by other code, or on data or a model that have changed: .* --name mine-2"):
        plan = Plan(Job(name="mine", train=recipe, baselines=()), Path("runs/mine"), None)
        plan.untrained()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"targets": (0.5,)}, "tune.targets: 0.5 is no speedup, as keeping all tokens has 1"),
        ({"targets": (1.5, 1e6)}, "tune.targets: 1e\\+06 cannot be reached, as prefill with one of"),
        ({"calibration": 1000}, "tune.calibration is 1,000 and takes all .* pictures of split .*, so none is left to hold out"),
    ],
)
def test_what_no_tuning_can_find_is_refused(settings: dict[str, Any], says: str) -> None:
    shelf = shelves(Path("shelf"), "calibration", "test", rows=24)
    options = Tuning(benchmarks=(f"custom('{shelf}')",), **{"calibration": 8, "held_out": 8} | settings)
    vlm = load("embedded")
    tuning.check(vlm, options.model_copy(update={"calibration": 8, "targets": (1.5,)}))
    with pytest.raises(ValueError, match=says):
        tuning.check(vlm, options)


def test_a_grader_that_does_not_exist_is_refused_before_the_start() -> None:
    write()
    line = ["evaluate", "--pruner", "grid", "--budget", "4", "--dry-run", "--benchmark"]
    asked = "custom('rows.jsonl', question='text', answer='label', grader='os:nofunc')"
    Path("rows.jsonl").write_text(Path("rows.jsonl").read_text().replace('"image": "', '"image": "pictures/'))
    code, said = commands.call([*line, asked])
    assert code == 2 and "grader 'os:nofunc': os has no function 'nofunc'" in said
