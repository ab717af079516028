"""One cell -> predictions: against a plain loop over the questions, and with samples that go wrong."""

from __future__ import annotations

from dataclasses import astuple, replace

import pytest

from diffprune import prune
from diffprune.core import budget, plugins
from diffprune.core.record import Cell
from diffprune.core.vlm import VLM
from diffprune.evaluate import Evaluation, Evaluator, cells
from diffprune.models._load import load

POPE, GQA = "world('pope')", "world('gqa')"


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return load("embedded")


@pytest.fixture(scope="module")
def asked(vlm: VLM) -> list[Cell]:
    return cells(vlm, ["none", "random", "attention"], ["16", "11%"], Evaluation(benchmarks=(POPE, GQA), limit=16, batch=64))


def test_cells_are_every_combination_once(vlm: VLM, asked: list[Cell]) -> None:
    assert len(asked) == len({c.key for c in asked}) == 2 * (1 + 2 * 2)
    assert {(c.pruner, c.budget) for c in asked if c.pruner == "none"} == {("none", "Share(1)")}
    assert {c.model_hash for c in asked} == {vlm.weights_hash}
    again = cells(vlm, ["random", "random(seed=0)"], ["Keep(16)", "16"], Evaluation(benchmarks=(POPE,), limit=16))
    assert len(again) == 1 and again[0] in asked


@pytest.mark.parametrize(
    ("pruners", "budgets", "options", "sentence"),
    [
        (["randum"], ["16"], {}, "did you mean 'random'"),
        (["random"], ["145"], {}, "only 144 visual tokens"),
        (["random"], ["0"], {}, "at least 1"),
        (["random"], [], {}, "no budget given"),
        (["random"], ["16"], {"protocol": "lava"}, "did you mean 'llava'"),
        (["random"], ["16"], {"benchmarks": ("world('popes')",)}, "did you mean 'pope'"),
        (["random"], ["16"], {"benchmarks": ("word('pope')",)}, "did you mean 'world'"),
        (["random"], ["16"], {"split": "tests"}, "did you mean 'test'"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(vlm: VLM, pruners, budgets, options, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        cells(vlm, pruners, budgets, Evaluation(**{"benchmarks": (POPE,)} | options))


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="limt"):
        Evaluation(limt=3)
    with pytest.raises(ValueError, match="limit"):
        Evaluation(limit=0)


def test_answers_are_those_of_a_plain_loop(vlm: VLM, asked: list[Cell]) -> None:
    evaluator = Evaluator(vlm)
    for cell in asked:
        benchmark = plugins.load("benchmarks", cell.benchmark)
        pruner, kept = plugins.load("pruners", cell.pruner), budget.parse(cell.budget)
        found = evaluator.run(cell)
        samples = benchmark.samples(cell.split, cell.limit)
        assert [row.sample for row in found] == [s.id for s in samples]
        if cell.pruner == "none":
            assert sum(row.credit for row in found) / len(found) > 0.6, "the embedded model answers most questions"
        for row, sample in list(zip(found, samples, strict=True))[::8]:
            (answer,) = prune.generate(
                vlm,
                [benchmark.image(sample)],
                [sample.question],
                pruner=pruner,
                budget=kept,
                max_new_tokens=benchmark.max_new_tokens,
            )
            grade = benchmark.grade(sample, answer)
            assert (row.answer, row.credit, row.parsed) == (answer, grade.credit, grade.parsed)
            assert (row.visual_total, row.visual_kept, row.error) == (144, kept.count(144), "")
            assert row.text_tokens == len(vlm.processor.tokenizer(vlm.frame(sample.question))["input_ids"]) - 1


def test_rows_do_not_depend_on_the_batch(vlm: VLM, asked: list[Cell]) -> None:
    for cell in asked[1:3]:
        assert Evaluator(vlm).run(replace(cell, batch=1)) == Evaluator(vlm).run(replace(cell, batch=64))


def test_an_image_is_encoded_once(vlm: VLM, asked: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = Evaluator(vlm)
    rows = {cell.key: evaluator.run(cell) for cell in asked}
    images = {s.image_id for name in (POPE, GQA) for s in plugins.load("benchmarks", name).samples("test", 16)}
    most = 3 * len(images)  # `none`, then with the hash `random` needs, then with attention too
    assert evaluator.encodings.encoded <= most
    before = evaluator.encodings.encoded
    monkeypatch.setattr(vlm, "encode", lambda *_: pytest.fail("every image is known"))
    for cell in reversed(asked):
        assert evaluator.run(cell) == rows[cell.key], "the same, whatever ran before"
    assert evaluator.encodings.encoded == before


def test_a_small_cache_changes_nothing_and_stays_small(vlm: VLM, asked: list[Cell]) -> None:
    small = Evaluator(vlm, cache_mib=0.2)
    assert small.run(asked[1]) == Evaluator(vlm).run(asked[1])
    assert 0 < small.encodings.held_bytes <= 0.2 * 2**20


def test_only_the_culprit_fails(vlm: VLM, asked: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    cell = asked[0]
    clean = Evaluator(vlm).run(cell)
    kind = type(plugins.load("benchmarks", cell.benchmark))
    sample_of = {s.id: s for s in plugins.load("benchmarks", cell.benchmark).samples(cell.split, cell.limit)}
    true_image, bad = kind.image, sample_of[clean[3].sample].image_id
    hit = [i for i, row in enumerate(clean) if sample_of[row.sample].image_id == bad]

    def image(self, sample):
        if sample.image_id == bad:
            raise OSError("image file is truncated\nmore")
        return true_image(self, sample)

    monkeypatch.setattr(kind, "image", image)
    found = Evaluator(vlm).run(cell)
    assert {(found[i].error, found[i].answer, found[i].parsed) for i in hit} == {("OSError: image file is truncated", "", "")}
    assert len(hit) < len(clean)
    for i, row in enumerate(found):
        assert i in hit or astuple(row) == astuple(clean[i])

    monkeypatch.setattr(kind, "image", lambda self, sample: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(RuntimeError, match=r"all 16 questions .* OSError: gone"):
        Evaluator(vlm).run(cell)


def test_a_method_that_refuses_the_budget_or_other_weights_fail_the_cell(vlm: VLM, asked: list[Cell]) -> None:
    (cell,) = cells(vlm, ["grid"], ["Above(0.5)"], Evaluation(benchmarks=(POPE,), limit=2))
    with pytest.raises(ValueError, match="needs a count"):
        Evaluator(vlm).run(cell)
    with pytest.raises(ValueError, match="weights of embedded have changed"):
        Evaluator(vlm).run(replace(asked[0], model_hash="0"))
    with pytest.raises(ValueError, match="weights of random have changed"):
        Evaluator(vlm).run(replace(asked[1], pruner_hash="0"))
