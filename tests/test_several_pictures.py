"""Several pictures per question, from a row of a user's data to answers and to training steps, with a budget of each picture.

Oracles: `vlm.generate` of the same pictures and question; the loss of the family's own forward on what its own processor makes.
"""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffprune import data as training
from diffprune import pruning
from diffprune.core import registry
from diffprune.core.benchmark import Benchmark
from diffprune.core.budget import Keep, Share
from diffprune.core.fitted import TrainablePruner
from diffprune.core.spec import Spec
from diffprune.core.tokens import Relaxation
from diffprune.core.vlm import VLM
from diffprune.data import batch
from diffprune.data.sources import CALIBRATION, TRAIN, VALIDATION, BrokenRows, DrawIndex, Example
from diffprune.evaluate.backend import Question, Shown
from diffprune.evaluate.cells import Evaluation, cells
from diffprune.evaluate.evaluator import Evaluator
from diffprune.evaluate.transformers_backend import TransformersBackend
from diffprune.io.picture_groups import linked
from diffprune.measure import measure
from diffprune.timing.options import Measurement
from diffprune.train.context import LocalContext
from diffprune.train.loss import relaxed_nll
from diffprune.train.recipe import Recipe
from diffprune.train.scorer_trainer import ScorerTrainer
from diffprune.tune.cells import cells as tuning_cells
from diffprune.tune.options import Tuning

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "internvl")


@cache
def tiny(family: str) -> VLM:
    made: VLM = registry.find("models", family).tiny()
    return made


def noise(num: int, size: tuple[int, int] = (48, 40)) -> list[Image.Image]:
    """Pictures of which no two tokens are alike."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(num)]


def written(rows: list[dict[str, Any]], kind: str, num: int = 30) -> str:
    """A file of rows beside its pictures `0.png`, `1.png` ..., the first pixel of each its number."""
    for i, picture in enumerate(noise(num)):
        picture.putpixel((0, 0), (i, 0, 0))
        picture.save(f"{i}.png")
    if kind == "jsonl":
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        lines = ["image,question,answer", *(f'"{json.dumps(r["image"])}","{r["question"]}",{r["answer"]}' for r in rows)]
        Path("rows.csv").write_text("\n".join(lines).replace('"["', '"[""').replace('"]"', '""]"').replace('", "', '"", ""'))
    else:
        held = [row | {"image": [{"bytes": Path(p).read_bytes(), "path": None} for p in row["image"]]} for row in rows]
        pq.write_table(pa.Table.from_pylist(held), "rows.parquet", row_group_size=4)
    return f"rows.{kind}"


def row(images: list[int], question: str = "<image>\n<image>\nwhich of the two?", answer: str = "red") -> dict[str, Any]:
    return {"image": [f"{i}.png" for i in images], "question": question, "answer": answer}


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_training_and_evaluation_read_the_same_pictures_in_their_order(kind: str) -> None:
    """As many leading marks as there are pictures are taken out; a further one is text."""
    rows = [row([3 * i + 2, 3 * i]) for i in range(5)] + [
        row([1, 4, 7], "<image><image><image> <image> which?"),
        row([20], "what?"),
    ]
    path = written(rows, kind)
    asked: Benchmark = registry.make("benchmarks", registry.spec("benchmarks", f"custom({path!r}, suffix='')"))
    evaluated = {
        (*(image.getpixel((0, 0))[0] for image in asked.images(sample)), sample.question): sample
        for sample in asked.samples("test")
    }
    source, trained = training.source(f"{'parquet' if kind == 'parquet' else 'jsonl'}({path!r})"), set()
    for stream in (TRAIN, CALIBRATION, VALIDATION):
        for i in range(20):
            images, pairs = source.draw(DrawIndex(stream, i, 20), 9, BrokenRows())
            trained.add((*(image.getpixel((0, 0))[0] for image in images), pairs[0][0]))
    told = {(3 * i + 2, 3 * i, "which of the two?") for i in range(5)} | {(1, 4, 7, "<image> which?"), (20, "what?")}
    assert evaluated.keys() == trained == told
    assert {len(sample.image_ids) for sample in evaluated.values()} == {1, 2, 3}
    assert evaluated[20, "what?"].group == evaluated[20, "what?"].image_id


def test_rows_that_share_a_picture_are_one_group() -> None:
    """Against a walk along shared names, on random rows."""
    rng = np.random.default_rng(3)
    for _ in range(50):
        rows = [rng.choice(40, rng.integers(1, 4), replace=False).tolist() for _ in range(20)]
        found = linked(rows)
        for i, names in enumerate(rows):
            reached: set[int] = set(names)
            while more := {n for other in rows if reached & set(other) for n in other} - reached:
                reached |= more
            assert found[i] == min(reached)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "paths"])
def test_no_picture_is_both_trained_on_and_held_out(kind: str) -> None:
    rng = np.random.default_rng(0)
    rows = [row([int(n) for n in rng.choice(150, 2, replace=False)], "which?") for _ in range(60)]
    path = written(rows, "jsonl" if kind == "paths" else kind, 150)
    if kind == "paths":  # beside their bytes, but for one picture that has no path
        held = [
            r | {"image": [{"bytes": Path(p).read_bytes(), "path": p if p != "7.png" else None} for p in r["image"]]} for r in rows
        ]
        pq.write_table(pa.Table.from_pylist(held), path := "rows.parquet")
    source = training.source(f"{'jsonl' if kind == 'jsonl' else 'parquet'}({path!r})")
    seen: list[set[int]] = []
    for stream in (TRAIN, CALIBRATION, VALIDATION):
        drawn = [source.draw(DrawIndex(stream, i, 60), 9, BrokenRows()).images for i in range(60)]
        seen.append({image.getpixel((0, 0))[0] for images in drawn for image in images})
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2]) and all(seen)


def test_questions_that_share_a_picture_are_drawn_and_resampled_together() -> None:
    path = written([row([0, 1]), row([1, 2]), row([3, 4]), row([5], "what?")], "jsonl")
    asked: Benchmark = registry.make("benchmarks", registry.spec("benchmarks", f"custom({path!r})"))
    groups = [sample.group for sample in asked.samples("test")]
    assert groups[0] == groups[1] and len(set(groups)) == 3


# --- answers ---------------------------------------------------------------------------------------------------------


def asked_of(images: list[Image.Image], sets: list[list[int]], texts: list[str]) -> list[Question]:
    return [Question(tuple(Shown(i, lambda i=i: images[i]) for i in shown), text) for shown, text in zip(sets, texts, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["unpruned", "grid", "fastv"])
def test_answers_are_those_of_generate(family: str, method: str) -> None:
    """One and several pictures in a batch; two questions about the same pictures go on from one prefill."""
    vlm, images = tiny(family), noise(4)
    sets, texts = [[0, 1], [0, 1], [2], [1, 0, 3]], ["which of the two?", "what?", "what is it?", "how many?"]
    pruner, budget = registry.load("pruners", method), Share({"unpruned": 1, "grid": 1 / 2, "fastv": 3 / 4}[method])
    backend = TransformersBackend(vlm)
    found = backend.answer(asked_of(images, sets, texts), pruner, budget, 6)
    wanted = [
        pruning.generate(vlm, [[images[i] for i in shown]], [text], pruner=pruner, budget=budget, max_new_tokens=6)[0]
        for shown, text in zip(sets, texts, strict=True)
    ]
    assert [answer.text for answer in found] == wanted
    one = [found[2].visual_total, found[2].visual_kept]  # all pictures have one size
    assert [[a.visual_total, a.visual_kept] for a in found] == [[len(s) * n for n in one] for s in sets], "a budget of each picture"
    assert backend.encodings.encoded == 4, "every picture is encoded once"
    assert backend.prefixes.prefilled == (3 if method != "fastv" and not vlm.lacks_shared_prefix() else 0)
    blind = backend.answer_blind(asked_of(images, sets, texts), 3)
    assert [answer.visual_kept for answer in blind] == [0, 0, 0, 0]


def test_a_benchmark_with_several_pictures_is_evaluated() -> None:
    path, vlm = written([row([0, 1]), row([2, 3]), row([5], "what?")], "jsonl"), tiny("llava")
    options = Evaluation(benchmarks=(f"custom({path!r})",), batch=2, answer_tokens=8)
    (cell,) = cells(vlm, [Spec("grid")], [Keep(5)], options)
    rows = Evaluator(TransformersBackend(vlm)).run(cell)
    assert [r.error for r in rows] == [""] * 3
    assert [r.visual_kept for r in rows] == [10, 10, 5]
    images, texts = [noise(6)[0:2], noise(6)[2:4], noise(6)[5:]], [r.question for r in rows]
    for number, picture in enumerate(itertools.chain(*images)):
        picture.putpixel((0, 0), (number if number < 4 else 5, 0, 0))
    assert [r.answer for r in rows] == pruning.generate(vlm, images, texts, pruner="grid", budget=5, max_new_tokens=8)


def test_timing_questions_about_several_pictures_is_refused_before_the_start() -> None:
    path, vlm = written([row([0, 1]), row([2, 3])], "jsonl"), tiny("llava")
    with pytest.raises(ValueError, match=r"question 0 of custom.* shows 2 images, and only questions about one are timed"):
        measure.cells(vlm, [Spec("grid")], [Keep(5)], Measurement(benchmark=f"custom({path!r})", batches=(1,)))
    Path("shelves").mkdir()
    for split in ("test", "calibration"):
        Path("shelves", f"{split}.jsonl").write_text(json.dumps(row([0, 1]) | {"image": ["../0.png", "../1.png"]}) + "\n")
    with pytest.raises(ValueError, match="shows 2 images, and only questions about one are timed"):
        tuning_cells(vlm, [Spec("grid")], Tuning(benchmarks=("custom('shelves')",), least=1))


# --- training --------------------------------------------------------------------------------------------------------


def drawn(images: list[Image.Image]) -> list[Example]:
    return [
        Example(images[:2], [("which of the two?", "red"), ("what?", "a blue car"), ("how many?", "2")]),
        Example(images[2:3], [("what is it?", "a cat")]),
        Example(images[1:4], [("which is green?", "the first"), ("what is it?", "rain")]),
    ]


def own_loss(vlm: VLM, images: list[Image.Image], question: str, answer: str) -> float:
    """Summed NLL of the answer by the family's own forward, which places everything itself."""
    pixels, tokenizer = vlm.pixels(images), vlm.processor.tokenizer
    prompts = vlm.prompts([question], vlm.slots(pixels), vlm.layout(pixels), [len(images)])
    said = torch.tensor([[*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]])
    ids = torch.cat([prompts.input_ids, said], 1)
    labels = torch.full_like(ids, -100)
    labels[:, -said.shape[1] :] = said
    more = {k: torch.cat([v, torch.zeros_like(said)], 1) for k, v in vlm.token_inputs(prompts).items()}
    given = {name: pixels[name] for name in vlm.encoder_inputs if name in pixels}
    return float(vlm.model(input_ids=ids, labels=labels, **more, **given).loss) * said.shape[1]


def whole_loss(vlm: VLM, made: training.TrainBatch) -> float:
    """Of a batch with every token as it is."""
    tokens = vlm.encode(made.pixels)
    return float(relaxed_nll(vlm, made.prompts, tokens, Relaxation(tokens.features, tokens.valid.float()), made.image))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_training_rows_score_answers_as_the_family_does(family: str, packed: bool) -> None:
    vlm, examples = tiny(family), drawn(noise(4))
    made = batch.batch(vlm, examples, packed)
    wanted = sum(own_loss(vlm, list(images), q, a) for images, pairs in examples for q, a in pairs)
    assert whole_loss(vlm, made) == pytest.approx(wanted, abs=1e-3)
    parts = [made.part(vlm, 0, 1), made.part(vlm, 1, 3)]
    assert [part.images for part in parts] == [2, 4] and [part.num_labels for part in parts] == [
        sum(len(vlm.processor.tokenizer(a, add_special_tokens=False)["input_ids"]) + 1 for _, pairs in some for _, a in pairs)
        for some in (examples[:1], examples[1:])
    ]
    assert sum(whole_loss(vlm, part) for part in parts) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("method", ["diffprune", "diffprune(question_aware=True)", "gumbel_keepdrop", "visionselector"])
def test_a_step_in_parts_is_the_step_and_streams_of_noise_are_apart(method: str) -> None:
    path, vlm = written([row([2 * i, 2 * i + 1] if i % 2 else [2 * i]) for i in range(15)], "jsonl"), tiny("llava")
    spec = registry.spec("pruners", method)
    pruner = registry.make("pruners", spec)
    assert isinstance(pruner, TrainablePruner)
    found = []
    for micro in (0, 1):
        recipe = Recipe(
            model="tiny", pruners=(spec,), data=f"jsonl({path!r})", steps=2, images=4, questions=1, questions_alone=1, workers=1,
            calibration_images=4, validation_images=2, budgets=("Keep(5)",), micro_images=micro,
        )  # fmt: skip
        arm = ScorerTrainer(LocalContext(f"out{micro}"), vlm, recipe, pruner, 0)
        stream = training.batches(vlm, recipe.data, seed=0, images=4, questions=1, packed=not arm.aware)
        made = list(itertools.islice(stream, 2))
        assert all(len(set(names)) == len(names) for b in made for names in (b.image_names(), b.row_names()))
        assert sum(len(b.sizes) for b in made) < sum(b.images for b in made)
        found.append([arm.step(b).loss for b in made] + list(arm.validate()))
    assert np.isfinite(found[0]).all() and found[0] == pytest.approx(found[1], rel=2e-3)
