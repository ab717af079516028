"""Identity: keys hold names, options and content hashes, so the same question has the same key in every folder, for ever."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import ray

from diffprune.cli import commands
from diffprune.core import registry
from diffprune.core.budget import Above, Keep, Share
from diffprune.core.cell import (
    Cell,
    CurveSpec,
    EvaluateSpec,
    MeasureSpec,
    Method,
    OverheadSpec,
    Questions,
    SearchSpec,
    TrainSpec,
    TrialSpec,
    TuneSettings,
    TuneSpec,
)
from diffprune.core.spec import Spec
from diffprune.data import calibration
from diffprune.evaluate.cells import Evaluation, cells
from diffprune.evaluate.evaluator import Evaluator
from diffprune.evaluate.transformers_backend import TransformersBackend
from diffprune.store import Store
from diffprune.vlm.load import load

# --- keys ------------------------------------------------------------------------------------------------------------

MODEL = Spec("llava-hf/llava-1.5-7b-hf", (("image_mode", "pad"),), "0123456789abcdef0123", "a1b2c3d4e5f6")
METHOD = Spec("diffprune", (("denoiser", False), ("depth", 2)), "fedcba9876543210fedc", "b2c3d4e5f6a1")
QUESTIONS = Questions(Spec("mme", (("main", "total"),), source="c3d4e5f6a1b2"), "mme@0123456789ab", "llava", "test", 100)
SETTINGS = TuneSettings(
    questions=(QUESTIONS,), graders=("d4e5f6a1b2c3",), batch=8, calibration=64, held_out=32, margin=0.02, candidates=3, least=1,
    most=None, corrections=2, repeats=3, curve_repeats=20, warmup=3, seed=0,
)  # fmt: skip
TUNE = TuneSpec(METHOD, "threshold", 2.0, SETTINGS)
SUBJECTS: dict[str, Any] = {
    "evaluate": EvaluateSpec(METHOD, Share(1 / 9), QUESTIONS),
    "wrapped": EvaluateSpec(Spec("replaced", (("method", METHOD),)), Keep(64), QUESTIONS, answer_tokens=2),
    "blind": EvaluateSpec(Spec("unpruned"), Share(1), QUESTIONS, blind=True),
    "measure": MeasureSpec(METHOD, Keep(64), QUESTIONS, batch=8, mode="graph"),
    "tune": TUNE,
    "trial": TrialSpec(TUNE, Above(0.5, least=4)),
    "curve": CurveSpec(SETTINGS),
    "overhead": OverheadSpec(METHOD, SETTINGS),
    "train": TrainSpec(Spec("diffprune"), "00112233445566778899", 1),
    "search": SearchSpec(Spec("diffprune"), "00112233445566778899", (1000, 1001), 48, (50, 100)),
}

# A changed key makes every store useless. Where that is meant, say so in the commit, raise `store.columns.VERSION`, and replace
# these by what `python -m tests.test_identity` prints.
KEYS = {
    "evaluate": "c526249bb62a9630ecd2",
    "wrapped": "9fff3783b118a01e62a8",
    "blind": "23d1d43ba4cb9e254b21",
    "measure": "17421558019813e35f8a",
    "tune": "fa24b62f11041a5972e7",
    "trial": "226b64e4cf8da53e817f",
    "curve": "77c9d8526fe088a19a90",
    "overhead": "600ad28c4752755a52de",
    "train": "819504d8efdc22fb717d",
    "search": "9dcfad96473a025c815b",
}


def asked(name: str) -> Cell:
    return Cell(MODEL, "bfloat16", SUBJECTS[name])


@pytest.mark.parametrize("name", SUBJECTS)
def test_keys_are_the_same_for_ever(name: str) -> None:
    assert asked(name).key == KEYS[name]


def variations(value: Any) -> Iterator[Any]:
    """The value with one thing in it changed, at any depth."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, (int, float)):
        yield value + 1
    elif isinstance(value, str):
        yield {"threshold": "count", "eager": "graph", "graph": "eager"}.get(value, f"{value}x")
    elif value is None:
        yield 7
    elif isinstance(value, Spec):
        yield from (replace(value, name=f"{value.name}x"), replace(value, weights_sha256=f"{value.weights_sha256}x"))
        yield replace(value, source=f"{value.source}x")
        yield value.with_options(more=1)
        for key, option in value.options:
            yield from (value.with_options(**{key: other}) for other in variations(option))
    elif isinstance(value, (Keep, Share, Above)):
        yield Keep(3)
    elif isinstance(value, tuple):
        yield (*value, *value)
        for i, one in enumerate(value):
            yield from ((*value[:i], other, *value[i + 1 :]) for other in variations(one))
    else:
        for field in fields(value):
            yield from (replace(value, **{field.name: other}) for other in variations(getattr(value, field.name)))


@pytest.mark.parametrize("name", SUBJECTS)
def test_whatever_changes_the_question_changes_the_key(name: str) -> None:
    cell = asked(name)
    others = [replace(cell, subject=other) for other in variations(cell.subject)]
    others += [replace(cell, model=other) for other in variations(cell.model)] + [replace(cell, dtype="float32")]
    assert len(others) > 8 and len({cell.key, *(other.key for other in others)}) == 1 + len(others)


def test_what_tables_say_and_where_files_lie_do_not() -> None:
    for name in SUBJECTS:
        cell = asked(name)
        told = replace(cell, method=Method("DiffPrune", "DiffPrune", "trained", recipe="r", scorer_seed=1), benchmark_label="MME")
        placed = replace(cell, model=cell.model.at(folder="/a"))
        assert told == placed == cell and told.key == placed.key == cell.key
    moved = replace(SUBJECTS["evaluate"], pruner=METHOD.at(weights="/a"))
    assert Cell(MODEL, "bfloat16", moved).key == asked("evaluate").key


# --- the same weights in other places --------------------------------------------------------------------------------


@pytest.fixture
def scorer() -> Path:
    """A scorer for the tiny model, with random weights, as training saves it."""
    vlm = load("tiny(llava)")
    made: Any = registry.load("pruners", "diffprune")
    made.build(vlm.encode(calibration(vlm, "world", 2).pixels))
    made.save_pretrained("run/scorers/diffprune-0", recipe_key="a" * 20, seed=0)
    return Path("run/scorers/diffprune-0")


def test_the_same_weights_are_one_method_wherever_they_lie(scorer: Path) -> None:
    shutil.copytree(scorer, "elsewhere/copy")
    Path("link").symlink_to(scorer.absolute())
    written = [str(scorer), f"./{scorer}", f"run/../{scorer}/", str(scorer.absolute()), "link", "elsewhere/copy"]
    vlm, options = load("tiny(llava)"), Evaluation(benchmarks=("world('gqa')",), limit=4)
    made = [registry.load("pruners", f"diffprune(weights={place!r})") for place in written]
    assert len({one.spec for one in made}) == 1 and made[0].spec.weights_sha256
    asked = [cells(vlm, [registry.spec("pruners", f"diffprune(weights={place!r})")], [Keep(4)], options) for place in written]
    assert len({cell.key for (cell,) in asked}) == 1 and len({cell for (cell,) in asked}) == 1
    rows = [Evaluator(TransformersBackend(vlm)).run(cell) for (cell,) in asked]
    assert all(one == rows[0] for one in rows) and rows[0]
    told = {(c.method, c.pruner, c.recipe, c.scorer_seed) for (cell,) in asked for c in [cell.columns()]}
    assert told == {("DiffPrune", "diffprune", "a" * 20, 0)}


def test_other_weights_in_the_same_place_are_another_question_and_refused(scorer: Path) -> None:
    vlm, options = load("tiny(llava)"), Evaluation(benchmarks=("world('gqa')",), limit=4)
    spelled = registry.spec("pruners", f"diffprune(weights={str(scorer)!r})")
    (before,) = cells(vlm, [spelled], [Keep(4)], options)
    made: Any = registry.load("pruners", "diffprune")
    made.build(vlm.encode(calibration(vlm, "world", 3).pixels))
    shutil.rmtree(scorer)
    made.save_pretrained(scorer, recipe_key="a" * 20, seed=0)
    (after,) = cells(vlm, [spelled], [Keep(4)], options)
    assert before.key != after.key
    with pytest.raises(ValueError, match="the weights of diffprune have changed"):
        Evaluator(TransformersBackend(vlm)).run(before)


# --- a finished run in another folder --------------------------------------------------------------------------------

JOB = """
from diffprune.job import Evaluation, Job, Recipe

job = Job(
    name="small", model="tiny(llava)", budgets=("Keep(4)",), baselines=("unpruned", "grid"), replaced=("diffprune",), workers=1,
    train=Recipe(
        model="tiny(llava)", pruners=("diffprune",), seeds=(0, 1), steps=1, images=2, questions=1, calibration_images=2,
        validation_images=2, validate_every=0, grad_cosine_every=0, checkpoint_every=0, workers=1,
    ),
    evaluate=Evaluation(benchmarks=("world('gqa')",), limit=4),
)
"""


def listed(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_a_finished_run_that_was_moved_asks_no_model_and_reports_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    Path("small.py").write_text(JOB)
    assert commands.call(["run", "small.py", "--out", "runs"]) == (0, "")
    done, page = Store("runs/small/store").done(), listed(Path("runs/small/report"))
    assert len(done) == 2 + 2 + 1 + 2, "two rules, two scorers, the first replaced, and their two trainings"
    capsys.readouterr()

    Path("archive").mkdir()
    Path("runs/small").rename("archive/small")
    ray.shutdown()  # what tests before this one may have left
    assert commands.call(["run", "small.py", "--out", "archive"]) == (0, "")
    said = capsys.readouterr().out
    assert "all 2 scorers are there already" in said and "all 5 cells are in the store already" in said
    assert not ray.is_initialized() and not Path("runs/small").exists()
    assert Store("archive/small/store").done() == done and listed(Path("archive/small/report")) == page

    shutil.copytree("archive/small/scorers/diffprune-1", "copied/scorer/here")
    named = [f"--pruner={text}" for text in ("grid", "diffprune(weights='copied/scorer/here')")]
    assert commands.call(["run", "small.py", "--out", "archive", *named]) == (0, "")
    assert "all 5 cells are in the store already" in capsys.readouterr().out
    assert Store("archive/small/store").done() == done
    assert listed(Path("archive/small/report")) == page, "a copy of a scorer is that scorer, not a third seed"


if __name__ == "__main__":
    print("\n".join(f'    "{name}": "{asked(name).key}",' for name in SUBJECTS))
