"""One cell -> predictions: against a plain loop over the questions, and with samples that go wrong."""

from __future__ import annotations

from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffprune import pruning
from diffprune.benchmarks.world import World
from diffprune.core import budget, registry
from diffprune.core.budget import Budget, Keep, Share
from diffprune.core.cell import Cell
from diffprune.core.spec import Spec
from diffprune.core.vlm import VLM
from diffprune.evaluate.cache import TOKENISED_MIB, Tokenised
from diffprune.evaluate.cells import Evaluation, cells
from diffprune.evaluate.evaluator import Evaluator, evaluated, gathered
from diffprune.evaluate.transformers_backend import TransformersBackend
from diffprune.vlm.load import load

POPE, GQA = "world('pope')", "world('gqa')"


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return load("embedded")


def asking(vlm: VLM, pruners: list[str], budgets: list[str], **options: Any) -> list[Cell]:
    """Cells by the spellings of methods and budgets."""
    made = [registry.spec("pruners", text) for text in pruners]
    return cells(vlm, made, [budget.parse(text) for text in budgets], Evaluation(**options))


@pytest.fixture(scope="module")
def asked(vlm: VLM) -> list[Cell]:
    return asking(vlm, ["unpruned", "random", "attention"], ["16", "11%"], benchmarks=(POPE, GQA), limit=16)


def evaluator(vlm: VLM, cache_mib: float = 2048) -> Evaluator:
    return Evaluator(TransformersBackend(vlm, cache_mib))


def changed(cell: Cell, **changes: Any) -> Cell:
    """The same question with other fields of its subject."""
    return replace(cell, subject=replace(evaluated(cell), **changes))


def test_cells_are_every_combination_once(vlm: VLM, asked: list[Cell]) -> None:
    assert len(asked) == len({c.key for c in asked}) == 2 * (1 + 2 * 2)
    assert {c.model for c in asked} == {vlm.spec} and vlm.spec.weights_sha256
    assert {evaluated(c).budget for c in asked if c.method.kind == "bound"} == {Share(1)}
    (again,) = asking(vlm, ["random", "random(seed=0)"], ["Keep(16)", "16"], benchmarks=(POPE,), limit=16)
    assert again in asked


def test_blind_is_asked_once_and_answers_as_if_there_were_no_picture(vlm: VLM) -> None:
    found = asking(vlm, ["unpruned", "random"], ["16", "4"], benchmarks=(POPE,), limit=16, batch=8, blind=True)
    told: list[tuple[str, Budget, bool]] = [(c.method.label, (s := evaluated(c)).budget, s.blind) for c in found]
    assert told == [
        ("Unpruned", Share(1), False), ("Random", Keep(16), False), ("Random", Keep(4), False), ("No image", Share(1), True),
    ]  # fmt: skip
    backend = TransformersBackend(vlm)
    rows = Evaluator(backend).run(found[-1])
    assert backend.encodings.encoded == 0 and {(row.visual_kept, row.error) for row in rows} == {(0, "")}
    questions = [row.question for row in rows]
    prompts = vlm.prompts(questions, [vlm.num_visual_tokens] * len(questions))
    for i, row in enumerate(rows):  # one by one, the slots cut out by hand
        keep = prompts.attention_mask[i].bool() & ~prompts.slots[i]
        ids, positions = prompts.input_ids[i, keep][None], prompts.position_ids[i, keep][None]
        made = vlm.model.generate(
            input_ids=ids, position_ids=positions, attention_mask=ids * 0 + 1, max_new_tokens=4, do_sample=False,
            pad_token_id=vlm.processor.tokenizer.pad_token_id,
        )[0, ids.shape[1] :]  # fmt: skip
        assert vlm.processor.tokenizer.decode(made, skip_special_tokens=True).strip() == row.answer
    assert len({row.answer for row in rows if row.question == questions[0]}) == 1


@pytest.mark.parametrize(
    ("pruners", "budgets", "options", "sentence"),
    [
        (["randum"], ["16"], {}, "did you mean 'random'"),
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
        asking(vlm, pruners, budgets, **{"benchmarks": (POPE,)} | options)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="limt"):
        Evaluation(limt=3)
    with pytest.raises(ValueError, match="limit"):
        Evaluation(limit=0)


def test_answers_are_those_of_a_plain_loop(vlm: VLM, asked: list[Cell]) -> None:
    mine = evaluator(vlm)
    for cell in asked:
        spec = evaluated(cell)
        benchmark, pruner = registry.make("benchmarks", spec.questions.benchmark), registry.make("pruners", spec.pruner)
        found = mine.run(cell)
        samples = benchmark.samples(spec.questions.split, spec.questions.limit)
        assert [row.sample for row in found] == [s.id for s in samples]
        if cell.method.kind == "bound":
            assert sum(row.credit for row in found) / len(found) > 0.6, "the embedded model answers most questions"
        for row, sample in list(zip(found, samples, strict=True))[::8]:
            (answer,) = pruning.generate(
                vlm, [benchmark.image(sample)], [sample.question], pruner=pruner, budget=spec.budget,
                max_new_tokens=benchmark.new_tokens(spec.questions.protocol),
            )  # fmt: skip
            grade = benchmark.grade(sample, answer)
            assert (row.answer, row.credit, row.parsed) == (answer, grade.credit, grade.parsed)
            assert (row.visual_total, row.visual_kept, row.error) == (144, spec.budget.count(144), "")
            assert row.text_tokens == len(vlm.processor.tokenizer(vlm.chat_prompt(sample.question))["input_ids"]) - 1


def test_rows_do_not_depend_on_the_batch(vlm: VLM, asked: list[Cell]) -> None:
    for cell in asked[:3]:
        alone, *together = [evaluator(vlm).run(changed(cell, batch=size)) for size in (1, 7, 64)]
        assert together == [alone, alone]


def test_batches_are_the_whole_cell_and_any_process_may_answer_them(vlm: VLM, asked: list[Cell]) -> None:
    cell, mine = changed(asked[1], batch=7), evaluator(vlm)
    batches = mine.batches(cell)
    assert sorted(sum(batches, [])) == list(range(16)) and [len(b) for b in batches] == [6, 6, 4]
    found = {}
    for index in reversed(batches):
        found |= evaluator(vlm).answer(cell, index)
    assert gathered(cell, found) == mine.run(cell)


@pytest.mark.parametrize("length", [1, 2, None])
def test_answers_are_greedy_and_as_long_as_the_cell_says(vlm: VLM, asked: list[Cell], length: int | None) -> None:
    """Against a loop of argmax over the model's own forward, one question at a time, that stops at the end token or the length."""
    cell = changed(asked[0], answer_tokens=length)
    found, asks = evaluator(vlm).run(cell), evaluated(cell).questions
    benchmark, tokenizer = registry.make("benchmarks", asks.benchmark), vlm.processor.tokenizer
    assert {row.generated_tokens for row in found} == {length or 2}, "a word and the end token are two"
    for row, sample in list(zip(found, benchmark.samples(asks.split, asks.limit), strict=True))[::5]:
        inputs = dict(vlm.processor(images=[benchmark.image(sample)], text=[vlm.chat_prompt(sample.question)], return_tensors="pt"))
        made: list[int] = []
        while len(made) < (length or 4) and made[-1:] != [vlm.model.generation_config.eos_token_id]:
            ids = torch.cat([inputs["input_ids"], torch.tensor([made], dtype=torch.long)], 1)
            logits = vlm.model(input_ids=ids, pixel_values=inputs["pixel_values"], attention_mask=torch.ones_like(ids)).logits
            made.append(int(logits[0, -1].argmax()))
        assert row.answer == tokenizer.decode(made, skip_special_tokens=True).strip()


def test_a_cut_of_answers_is_a_field_of_the_cell_and_never_lengthens_them(vlm: VLM, asked: list[Cell]) -> None:
    (cut,) = asking(vlm, ["unpruned"], [], benchmarks=(POPE,), limit=16, answer_tokens=1)
    assert changed(cut, answer_tokens=None) == asked[0] and cut.key != asked[0].key
    assert (cut.columns().answer_tokens, asked[0].columns().answer_tokens) == (1, None)
    assert evaluator(vlm).run(changed(cut, answer_tokens=10**6)) == evaluator(vlm).run(asked[0])


def test_a_failure_while_answering_or_grading_is_a_row_with_its_class(vlm: VLM, asked: list[Cell], monkeypatch) -> None:
    """Out of memory at batches of two and more: asked again one by one. What fails alone is no wrong answer but an error."""
    cell = asked[0]
    clean, true_answer, true_grade = evaluator(vlm).run(cell), pruning.answer, World.grade

    def cramped(vlm, packed, tokens, **options):
        if len(packed.kept) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return true_answer(vlm, packed, tokens, **options)

    def picky(self, sample, answer, protocol="llava"):
        if sample.id == clean[2].sample:
            raise KeyError("target")
        return true_grade(self, sample, answer, protocol)

    monkeypatch.setattr(pruning, "answer", cramped)
    assert evaluator(vlm).run(cell) == clean
    monkeypatch.setattr(World, "grade", picky)
    found = evaluator(vlm).run(cell)
    assert [row.error for row in found if row.error] == ["KeyError: 'target'"] and found[2].error
    assert [row for row in found if not row.error] == clean[:2] + clean[3:]


def test_every_data_set_is_looked_at_before_anything_runs(vlm: VLM) -> None:
    names = ("two", "one")
    for name in names:
        Path(name).mkdir()
        Path(name, "rows.jsonl").write_text("" if name == "two" else '{"image": "a.png", "question": "?", "answer": "x"}\n')
    Image.new("RGB", (96, 96)).save("one/a.png")
    with pytest.raises(ValueError, match=r"two has no row in split 'test'"):
        asking(vlm, ["unpruned"], [], benchmarks=tuple(f"custom('{name}')" for name in names))


def test_an_image_is_encoded_once(vlm: VLM, asked: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TransformersBackend(vlm)
    rows = {cell.key: Evaluator(backend).run(cell) for cell in asked}
    images = {s.image_id for name in (POPE, GQA) for s in registry.load("benchmarks", name).samples("test", 16)}
    assert backend.encodings.encoded <= 3 * len(images), "`unpruned`, then with the hash `random` needs, then with attention too"
    monkeypatch.setattr(vlm, "encode", lambda *_: pytest.fail("every image is known"))
    for cell in reversed(asked):
        assert Evaluator(backend).run(cell) == rows[cell.key], "the same, whatever ran before"


def test_a_small_cache_changes_nothing_and_stays_small(vlm: VLM, asked: list[Cell]) -> None:
    small = TransformersBackend(vlm, cache_mib=0.2)
    assert Evaluator(small).run(asked[1]) == evaluator(vlm).run(asked[1])
    assert 0 < small.encodings.held_bytes <= 0.2 * 2**20


def test_questions_are_tokenised_batch_by_batch_and_once(vlm: VLM, asked: list[Cell], monkeypatch) -> None:
    """However many methods ask; what is kept is bounded, and without room for anything the rows are the same."""
    few = [changed(cell, batch=5) for cell in asked[:4]]
    rows = [evaluator(vlm).run(cell) for cell in few]
    true_prompts, sizes = vlm.prompts, []
    monkeypatch.setattr(vlm, "prompts", lambda questions, *rest: sizes.append(len(questions)) or true_prompts(questions, *rest))
    backend = TransformersBackend(vlm)
    assert [Evaluator(backend).run(cell) for cell in few] == rows and sizes == [4, 4, 4, 4]
    assert 0 < backend.tokenised.held_bytes <= TOKENISED_MIB * 2**20
    for mebibytes, times in ((0.0, 4 * len(few)), (0.03, 4 * len(few))):  # no room at all; room for one batch
        sizes.clear()
        backend.tokenised = Tokenised(mebibytes)
        assert [Evaluator(backend).run(cell) for cell in few] == rows and len(sizes) == times
        assert backend.tokenised.held_bytes <= mebibytes * 2**20


def test_only_the_culprit_fails(vlm: VLM, asked: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    cell = asked[0]
    clean = evaluator(vlm).run(cell)
    kind, asks = World, evaluated(cell).questions
    sample_of = {s.id: s for s in registry.make("benchmarks", asks.benchmark).samples(asks.split, asks.limit)}
    true_image, bad = kind.image, sample_of[clean[3].sample].image_id
    hit = [i for i, row in enumerate(clean) if sample_of[row.sample].image_id == bad]

    def image(self, sample):
        if sample.image_id == bad:
            raise OSError("image file is truncated\nmore")
        return true_image(self, sample)

    monkeypatch.setattr(kind, "image", image)
    found = evaluator(vlm).run(cell)
    assert {(found[i].error, found[i].answer, found[i].parsed) for i in hit} == {("OSError: image file is truncated", "", "")}
    assert len(hit) < len(clean)
    for i, row in enumerate(found):
        assert i in hit or astuple(row) == astuple(clean[i])

    monkeypatch.setattr(kind, "image", lambda self, sample: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(RuntimeError, match=r"all 16 questions .* OSError: gone"):
        evaluator(vlm).run(cell)


def test_a_method_that_refuses_the_budget_or_other_weights_fail_the_cell(vlm: VLM, asked: list[Cell]) -> None:
    (cell,) = asking(vlm, ["grid"], ["Above(0.5)"], benchmarks=(POPE,), limit=2)
    with pytest.raises(ValueError, match="needs a count"):
        evaluator(vlm).run(cell)
    with pytest.raises(ValueError, match="weights of embedded have changed"):
        evaluator(vlm).run(replace(asked[0], model=replace(vlm.spec, weights_sha256="0")))
    with pytest.raises(ValueError, match="weights of random have changed"):
        evaluator(vlm).run(changed(asked[1], pruner=Spec("random", weights_sha256="0")))
    with pytest.raises(ValueError, match="data of world"):
        evaluator(vlm).run(changed(asked[1], questions=replace(evaluated(asked[1]).questions, revision="0")))
