"""One cell -> predictions: against a plain loop over the questions, and with samples that go wrong."""

from __future__ import annotations

from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffprune import pruning
from diffprune.benchmarks.world import World
from diffprune.core import budget, registry
from diffprune.core.records import Cell
from diffprune.core.vlm import VLM
from diffprune.evaluate.cache import TOKENISED_MIB, Tokenised
from diffprune.evaluate.cells import Evaluation, cells
from diffprune.evaluate.evaluator import Evaluator, gathered
from diffprune.vlm.load import load

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


def test_blind_is_asked_once_and_answers_as_if_there_were_no_picture(vlm: VLM) -> None:
    options = Evaluation(benchmarks=(POPE,), limit=16, batch=8, blind=True)
    *_, blind = asked = cells(vlm, ["none", "random"], ["16", "4"], options)
    assert [(c.pruner, c.budget) for c in asked] == [
        ("none", "Share(1)"), ("random", "Keep(16)"), ("random", "Keep(4)"), ("blind", "Keep(0)"),
    ]  # fmt: skip
    evaluator = Evaluator(vlm)
    found = evaluator.run(blind)
    assert evaluator.encodings.encoded == 0 and {(row.visual_kept, row.error) for row in found} == {(0, "")}
    questions = [row.question for row in found]
    prompts = vlm.prompts(questions, [vlm.num_visual_tokens] * len(questions))
    for i, row in enumerate(found):  # one by one, the slots cut out by hand
        keep = prompts.attention_mask[i].bool() & ~prompts.slots[i]
        ids, positions = prompts.input_ids[i, keep][None], prompts.position_ids[i, keep][None]
        made = vlm.model.generate(
            input_ids=ids, position_ids=positions, attention_mask=ids * 0 + 1, max_new_tokens=4, do_sample=False,
            pad_token_id=vlm.processor.tokenizer.pad_token_id,
        )[0, ids.shape[1] :]  # fmt: skip
        assert vlm.processor.tokenizer.decode(made, skip_special_tokens=True).strip() == row.answer
    assert len({row.answer for row in found if row.question == questions[0]}) == 1


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
        benchmark = registry.load("benchmarks", cell.benchmark)
        pruner, kept = registry.load("pruners", cell.pruner), budget.parse(cell.budget)
        found = evaluator.run(cell)
        samples = benchmark.samples(cell.split, cell.limit)
        assert [row.sample for row in found] == [s.id for s in samples]
        if cell.pruner == "none":
            assert sum(row.credit for row in found) / len(found) > 0.6, "the embedded model answers most questions"
        for row, sample in list(zip(found, samples, strict=True))[::8]:
            (answer,) = pruning.generate(
                vlm,
                [benchmark.image(sample)],
                [sample.question],
                pruner=pruner,
                budget=kept,
                max_new_tokens=benchmark.new_tokens(cell.protocol),
            )
            grade = benchmark.grade(sample, answer)
            assert (row.answer, row.credit, row.parsed) == (answer, grade.credit, grade.parsed)
            assert (row.visual_total, row.visual_kept, row.error) == (144, kept.count(144), "")
            assert row.text_tokens == len(vlm.processor.tokenizer(vlm.chat_prompt(sample.question))["input_ids"]) - 1


def test_rows_do_not_depend_on_the_batch(vlm: VLM, asked: list[Cell]) -> None:
    for cell in asked[:3]:
        evaluator = Evaluator(vlm)
        alone, *together = [evaluator.run(replace(cell, batch=size)) for size in (1, 7, 64)]
        assert together == [alone, alone]


def test_batches_are_the_whole_cell_and_any_process_may_answer_them(vlm: VLM, asked: list[Cell]) -> None:
    cell = replace(asked[1], batch=7)
    evaluator = Evaluator(vlm)
    batches = evaluator.batches(cell)
    assert sorted(sum(batches, [])) == list(range(16)) and [len(b) for b in batches] == [7, 7, 2]
    found = {}
    for index in reversed(batches):
        found |= Evaluator(vlm).answer(cell, index)
    assert gathered(cell, found) == evaluator.run(cell)


@pytest.mark.parametrize("length", [1, 2])
def test_answers_are_greedy_and_as_long_as_the_benchmark_says(vlm: VLM, asked: list[Cell], length: int, monkeypatch) -> None:
    """Against a loop of argmax over the model's own forward, one question at a time, that stops at the end token or the length."""
    cell = asked[0]
    monkeypatch.setattr(type(registry.load("benchmarks", cell.benchmark)), "new_tokens", lambda self, protocol: length)
    found = Evaluator(vlm).run(cell)
    assert {row.generated_tokens for row in found} == {length}, "a word and the end token are two"
    benchmark, tokenizer = registry.load("benchmarks", cell.benchmark), vlm.processor.tokenizer
    for row, sample in list(zip(found, benchmark.samples(cell.split, cell.limit), strict=True))[::5]:
        inputs = dict(vlm.processor(images=[benchmark.image(sample)], text=[vlm.chat_prompt(sample.question)], return_tensors="pt"))
        made: list[int] = []
        while len(made) < length and made[-1:] != [vlm.model.generation_config.eos_token_id]:
            ids = torch.cat([inputs["input_ids"], torch.tensor([made], dtype=torch.long)], 1)
            logits = vlm.model(input_ids=ids, pixel_values=inputs["pixel_values"], attention_mask=torch.ones_like(ids)).logits
            made.append(int(logits[0, -1].argmax()))
        assert row.answer == tokenizer.decode(made, skip_special_tokens=True).strip()


def test_shorter_answers_are_those_answers_cut_and_another_cell(vlm: VLM, asked: list[Cell]) -> None:
    whole = asked[0]
    options = Evaluation(benchmarks=(POPE,), limit=16, answer_tokens=1)
    (cut,) = cells(vlm, ["none"], [], options)
    assert (cut.mode, replace(cut, mode="eager")) == ("eager, answers cut at 1 tokens", whole) and cut.key != whole.key
    words = vlm.processor.tokenizer
    for short, full in zip(Evaluator(vlm).run(cut), Evaluator(vlm).run(whole), strict=True):
        assert short.generated_tokens == 1 and full.generated_tokens > 1
        assert short.answer == words.decode(words(full.answer, add_special_tokens=False)["input_ids"][:1]).strip()
    (longer,) = cells(vlm, ["none"], [], options.model_copy(update={"answer_tokens": 10**6}))
    assert Evaluator(vlm).run(longer) == Evaluator(vlm).run(whole), "never longer than the benchmark says"


def test_a_failure_while_answering_or_grading_is_a_row_with_its_class(vlm: VLM, asked: list[Cell], monkeypatch) -> None:
    """Out of memory at batches of two and more: asked again one by one. What fails alone is no wrong answer but an error."""
    cell = asked[0]
    clean, true_answer, true_grade = Evaluator(vlm).run(cell), pruning.answer, World.grade

    def cramped(vlm, packed, tokens):
        if len(packed.kept) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return true_answer(vlm, packed, tokens)

    def picky(self, sample, answer, protocol="llava"):
        if sample.id == clean[2].sample:
            raise KeyError("target")
        return true_grade(self, sample, answer, protocol)

    monkeypatch.setattr(pruning, "answer", cramped)
    assert Evaluator(vlm).run(cell) == clean
    monkeypatch.setattr(World, "grade", picky)
    found = Evaluator(vlm).run(cell)
    assert [row.error for row in found if row.error] == ["KeyError: 'target'"] and found[2].error
    assert [row for row in found if not row.error] == clean[:2] + clean[3:]


def test_every_data_set_is_looked_at_before_anything_runs(vlm: VLM) -> None:
    names = ("two", "one")
    for name in names:
        Path(name).mkdir()
        Path(name, "rows.jsonl").write_text("" if name == "two" else '{"image": "a.png", "question": "?", "answer": "x"}\n')
    Image.new("RGB", (96, 96)).save("one/a.png")
    with pytest.raises(ValueError, match=r"two has no row in split 'test'"):
        cells(vlm, ["none"], [], Evaluation(benchmarks=tuple(f"custom('{name}')" for name in names)))


def test_an_image_is_encoded_once(vlm: VLM, asked: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = Evaluator(vlm)
    rows = {cell.key: evaluator.run(cell) for cell in asked}
    images = {s.image_id for name in (POPE, GQA) for s in registry.load("benchmarks", name).samples("test", 16)}
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


def test_questions_are_tokenised_batch_by_batch_and_once(vlm: VLM, asked: list[Cell], monkeypatch) -> None:
    """However many methods ask; what is kept is bounded, and without room for anything the rows are the same."""
    few = [replace(cell, batch=5) for cell in asked[:4]]
    rows = [Evaluator(vlm).run(cell) for cell in few]
    true_prompts, sizes = vlm.prompts, []
    monkeypatch.setattr(vlm, "prompts", lambda questions, *rest: sizes.append(len(questions)) or true_prompts(questions, *rest))
    evaluator = Evaluator(vlm)
    assert [evaluator.run(cell) for cell in few] == rows and sizes == [5, 5, 5, 1]
    assert 0 < evaluator.tokenised.held_bytes <= TOKENISED_MIB * 2**20
    for mebibytes, times in ((0.0, 4 * len(few)), (0.03, 4 * len(few))):  # no room at all; room for one batch
        sizes.clear()
        evaluator.tokenised = Tokenised(mebibytes)
        assert [evaluator.run(cell) for cell in few] == rows and len(sizes) == times
        assert evaluator.tokenised.held_bytes <= mebibytes * 2**20


def test_only_the_culprit_fails(vlm: VLM, asked: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    cell = asked[0]
    clean = Evaluator(vlm).run(cell)
    kind = type(registry.load("benchmarks", cell.benchmark))
    sample_of = {s.id: s for s in registry.load("benchmarks", cell.benchmark).samples(cell.split, cell.limit)}
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
