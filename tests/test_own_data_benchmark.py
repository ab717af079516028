"""A benchmark of a user's own data: the same questions wherever it lies, letters of any script, pictures of any size."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffprune.benchmarks.custom import Custom
from diffprune.core import registry
from diffprune.core.benchmark import Sample
from diffprune.embedded import vlm as embedded
from diffprune.embedded import world
from diffprune.evaluate.cells import Evaluation, cells
from diffprune.evaluate.evaluator import Evaluator
from diffprune.evaluate.transformers_backend import TransformersBackend
from diffprune.io.dataset_splits import split_files
from diffprune.vlm.load import load


def written(folder: Path, num: int = 30, size: tuple[int, int] = (64, 48), **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(num):
        Image.new("RGB", size, (i, 50, 0)).save(folder / f"{i}.png")
        rows += [{"image": f"{i}.png", "question": f"is there a circle {k}", "answer": "no", **more} for k in range(2)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# --- the draw (line 5) -----------------------------------------------------------------------------------------------


def test_a_limit_draws_the_same_questions_wherever_the_data_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    here = written(Path("data/own"))
    shutil.copytree(here, "moved/elsewhere")
    ways = [here, here.absolute(), Path("data/../data/own"), here / "rows.jsonl", Path("moved/elsewhere")]

    def drawn(path: Path) -> list[tuple[str, str, str]]:
        return [(s.id, s.group, s.image_id) for s in Custom(path).samples("test", 7)]

    found = [drawn(path) for path in ways]
    monkeypatch.chdir(here)
    found += [drawn(Path(".")), drawn(Path("rows.jsonl"))]
    assert len(found[0]) == 8 and all(one == found[0] for one in found)


def test_equal_pictures_are_one_picture_whatever_they_are_called() -> None:
    path = written(Path("own"), 2)
    shutil.copy("own/0.png", "own/1.png")
    samples = Custom(path).samples("test")
    assert len({sample.image_id for sample in samples}) == 1 == len({sample.group for sample in samples})


# --- graders (line 6) ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grader", "accepted", "said", "credit"),
    [
        ("contains", "sí", "un síntoma", 0),
        ("contains", "sí", "sí, claro", 1),
        ("contains", "café", "dos cafés", 0),
        ("contains", "café", "un café.", 1),
        ("contains", "cat", "a catalogue", 0),
        ("contains", "кот", "который", 0),
        ("contains", "кот", "это кот", 1),
        ("contains", "红色", "这是红色的", 1),
        ("contains", "cat", "这是cat吗", 1),
        ("contains", "ネコ", "これはネコです", 1),
        ("contains", "고양이", "고양이가 있다", 1),
        ("contains", "แมว", "นี่คือแมวดำ", 1),
        ("contains", "बिल्ली", "बिल्लीयाँ", 0),
        ("contains", "cat", "concat cat", 1),
        ("contains", "12", "1 123", 0),
        ("contains", "12%", "about 12%", 1),
        ("exact", "café", "Café.", 1),
        ("exact", "ñandú", "ñandu", 0),
        ("vqa", "café", "cafe", 0),
        ("vqa", "café", "a café", 1),
    ],
)
@pytest.mark.parametrize("forms", [("NFC", "NFC"), ("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_letters_of_any_script_and_both_ways_to_write_an_accent(
    grader: str, accepted: str, said: str, credit: float, forms: tuple[str, str]
) -> None:
    row = {"answers": [unicodedata.normalize(forms[0], accepted)]}
    found = Custom(Path("nowhere"), grader).grade(Sample("0", "0", "0", "", row), unicodedata.normalize(forms[1], said))
    assert found.credit == credit


def test_options_are_composed_too() -> None:
    row = {"answers": ["B"], "options": {"A": "rojo", "B": unicodedata.normalize("NFD", "café")}}
    assert Custom(Path("nowhere"), "letter").grade(Sample("0", "0", "0", "", row), "café").credit == 1


# --- the embedded model (line 11) ------------------------------------------------------------------------------------


def test_the_embedded_model_answers_about_pictures_of_any_size() -> None:
    written(Path("own"), 1, (640, 480))
    rows = [json.loads(line) | {"image": f"{i}.png"} for i, line in enumerate(Path("own/rows.jsonl").read_text().splitlines())]
    for i, size in enumerate([(640, 480), (7, 300)]):
        Image.new("RGB", size, (90, 50, 0)).save(f"{i}.png")
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    vlm = load("embedded")
    asked = registry.spec("benchmarks", "custom('questions.jsonl', grader='vqa')")  # the README's line
    (cell,) = cells(vlm, [registry.spec("pruners", "unpruned")], [], Evaluation(benchmarks=(asked,)))
    assert [row.error for row in Evaluator(TransformersBackend(vlm)).run(cell)] == ["", ""]


def test_pictures_of_the_world_stay_as_they_are_and_others_are_resized() -> None:
    vlm = load("embedded")
    scenes = [world.scene(seed).image for seed in range(4)]
    assert torch.equal(vlm.pixels([Image.fromarray(scene) for scene in scenes])["pixel_values"], _untouched(scenes))
    large = Image.fromarray(scenes[0]).resize((320, 200))
    resized = large.resize((96, 96), Image.Resampling.BICUBIC)
    assert torch.equal(vlm.pixels([large])["pixel_values"], vlm.pixels([resized])["pixel_values"])
    shipped = vlm.processor.image_processor.to_dict()
    assert {k: v for k, v in embedded.processor().image_processor.to_dict().items() if k in shipped} == shipped


def _untouched(scenes: list[Any]) -> torch.Tensor:
    whole = embedded.processor().image_processor
    whole.do_resize = False
    made: torch.Tensor = whole(images=[Image.fromarray(scene) for scene in scenes], return_tensors="pt")["pixel_values"]
    assert torch.allclose(made, embedded.pixels(scenes))
    return made


def test_hidden_tables_of_a_published_benchmark_are_no_data() -> None:
    Path("set").mkdir()
    for name in ("set/MMBench_DEV_EN.tsv", "set/._MMBench_DEV_EN.tsv"):
        Path(name).write_text("")
    assert [path.name for path in split_files(Path("set"), "default", "dev")] == ["MMBench_DEV_EN.tsv"]
