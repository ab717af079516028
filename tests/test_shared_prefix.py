"""Questions that go on from one prefill of their image, against one prefill per question: logits, answers, rows of cells."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from diffprune import pruning
from diffprune.benchmarks.world import LIKES, World
from diffprune.core import budget, registry
from diffprune.core.budget import Keep, Share, parse
from diffprune.core.cell import Cell
from diffprune.core.evidence import QUESTION
from diffprune.core.pruner import Pruner, ScorePruner
from diffprune.core.site import Cut, Site, Stage
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.core.vlm import VLM, Prompts
from diffprune.evaluate.backend import Question, Shown
from diffprune.evaluate.cells import Evaluation, cells
from diffprune.evaluate.evaluator import Evaluator, evaluated
from diffprune.evaluate.transformers_backend import TransformersBackend
from diffprune.pruning import shared_prefix
from diffprune.vlm.load import load

STUDY = Path(__file__).parents[1] / "jobs" / "studies" / "shared_prefix.py"
FAMILIES = registry.names("models")
REASONS = dict.fromkeys(("gemma3", "paligemma"), "its decoder reads pictures in both directions") | {
    "mistral3": "its decoder has sliding windows of 4096",  # by the configuration's default; published checkpoints have none
}
SIZES = ((48, 40), (32, 32), (64, 32))  # width, height; px
OWNER = (0, 1, 0, 0, 2, 1, 0)  # the image of each question
QUESTIONS = ("which of the two?", "what?", "how many things are there", "why", "is it red or is it blue?", "who?", "where is it")
SIDE_BY_SIDE = (0.0, 1e4)  # what a copy of a prefix costs: nothing, one question per row; much, all about an image in one


class Features(ScorePruner):
    """A score that depends on the token alone."""

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        weight = torch.randn(tokens.features.shape[-1], generator=torch.Generator().manual_seed(9))
        return tokens.features.float() @ weight


class Aware(Features):
    """Asks for the question."""

    needs = frozenset({QUESTION})


class Inside(Features):
    """Cuts in the decoder."""

    def cuts(self, budget: Any, shape: Any) -> Any:
        return (Cut(Site(Stage.DECODER, 1), budget),)


@pytest.fixture(autouse=True)
def no_gradient() -> Iterator[None]:
    with torch.inference_mode():
        yield


@cache
def tiny(family: str) -> VLM:
    with torch.inference_mode(False):
        made: VLM = registry.find("models", family).tiny()
    return made


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]


def batch(vlm: VLM) -> tuple[Prompts, VisualTokens]:
    """One row per question, one row of tokens per image."""
    tokens, owner = vlm.encode(vlm.pixels(pictures())), torch.tensor(OWNER)
    layout = None if tokens.layout is None else tokens.layout[owner]
    return vlm.prompts(QUESTIONS, tokens.present.sum(1)[owner].tolist(), layout), tokens


def continued(vlm: VLM, prompts: Prompts, tokens: VisualTokens, pruner: Pruner, asked: Any) -> tuple[Any, list[Any]]:
    """(where the rows part, a prefix per image)."""
    where = shared_prefix.shared(prompts, OWNER)
    assert where is not None
    rows = where.prefixes(prompts, range(len(SIZES)))
    return where, shared_prefix.prefill(vlm, rows, pruning.shrink(vlm, rows, tokens, pruner, asked))


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_shares_prefixes_or_says_why_not(family: str) -> None:
    assert shared_prefix.refusal(tiny(family), Features(), Keep(4)) == REASONS.get(family, "")


@pytest.mark.parametrize("copied", SIDE_BY_SIDE)
@pytest.mark.parametrize("text", ["Share(1)", "Share(1/3)", "Keep(1)", "Above(0.5)", "Above(9, least=2)"])
@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"gemma3", "paligemma"}))
def test_logits_are_those_of_a_prefill_per_question(family: str, text: str, copied: float, monkeypatch) -> None:
    """Behind the questions and behind two more tokens, against the whole rows without a cache."""
    vlm, owner = tiny(family), torch.tensor(OWNER)
    monkeypatch.setattr(shared_prefix, "COPIED", copied)
    if "sliding" in REASONS.get(family, ""):
        monkeypatch.setattr(vlm.model.config.get_text_config(), "sliding_window", None)
    prompts, tokens = batch(vlm)
    where, prefixes = continued(vlm, prompts, tokens, Features(), parse(text))
    packed = pruning.shrink(vlm, prompts, tokens[owner], Features(), parse(text))
    continuation = shared_prefix.Continuation(vlm, prompts, where, prefixes)
    assert continuation.table.shape[1] == (4 if copied else 1)
    assert torch.equal(continuation.rows.input_ids, packed.prompts.input_ids)
    assert [prefixes[i].kept for i in OWNER] == packed.kept.tolist() and [prefixes[i].total for i in OWNER] == packed.total.tolist()
    logits, said = continuation.start(), torch.arange(10, 10 + len(OWNER))
    for step in range(3):
        close(logits, pruning.forward(vlm, packed, logits_to_keep=1).logits[:, -1])
        packed, logits = longer(packed, said + step), continuation.step(said + step)
    assert logits.shape[0] == len(OWNER)


def longer(packed: pruning.Packed, said: torch.Tensor) -> pruning.Packed:
    """The rows with one more token of text."""
    rows = packed.prompts
    one, last = torch.ones(len(said), 1, dtype=torch.long), rows.position_ids[:, -1:] + 1
    grown = replace(
        rows, input_ids=torch.cat([rows.input_ids, said[:, None]], 1), attention_mask=torch.cat([rows.attention_mask, one], 1),
        position_ids=torch.cat([rows.position_ids, last], 1), slots=torch.cat([rows.slots, one < 0], 1),
        question=torch.cat([rows.question, one < 0], 1), index=None,
    )  # fmt: skip
    return replace(packed, prompts=grown)


GENERATION: tuple[dict[str, Any], ...] = (
    {},
    {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    {"eos_token_id": [2, 40, 50, 60, 70, 80], "min_new_tokens": 3},
    {"eos_token_id": None},
    {"suppress_tokens": list(range(100, 200)), "temperature": 0.7, "do_sample": True},
)


@pytest.mark.parametrize("copied", SIDE_BY_SIDE)
@pytest.mark.parametrize("settings", GENERATION)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl"])
def test_answers_obey_the_checkpoints_generation_settings(
    family: str, settings: dict[str, Any], copied: float, monkeypatch
) -> None:
    """Token for token what `pruning.answer` says, also where answers are longer than the cache has room for at first."""
    vlm, owner = tiny(family), torch.tensor(OWNER)
    monkeypatch.setattr(shared_prefix, "COPIED", copied)
    for name, value in settings.items():
        monkeypatch.setattr(vlm.model.generation_config, name, value)
    prompts, tokens = batch(vlm)
    packed = pruning.shrink(vlm, prompts, tokens[owner], Features(), Share(1 / 3))
    where, prefixes = continued(vlm, prompts, tokens, Features(), Share(1 / 3))
    for length in (1, 2, 40)[2 * ("min_new_tokens" in settings) :]:
        found = shared_prefix.answer(vlm, prompts, where, prefixes, length)
        assert found == pruning.answer(vlm, packed, length)
        assert max(found[1]) <= length


def test_who_reads_the_question_or_cuts_inside_the_decoder_shares_nothing(monkeypatch) -> None:
    vlm = tiny("llava")
    assert shared_prefix.refusal(vlm, Aware(), Keep(4)).endswith("reads the question")
    assert shared_prefix.refusal(vlm, Inside(), Keep(4)).endswith("removes tokens inside the decoder")
    before = vlm.model.config._attn_implementation
    vlm.model.set_attn_implementation("eager")
    assert "eager attention" in shared_prefix.refusal(vlm, Features(), Keep(4))
    vlm.model.set_attn_implementation(before)
    with monkeypatch.context() as changed:
        changed.setattr(vlm.model.generation_config, "stop_strings", ["."])
        assert "stop strings" in shared_prefix.refusal(vlm, Features(), Keep(4))
    assert shared_prefix.refusal(vlm, Features(), Keep(4)) == ""
    backend = TransformersBackend(vlm)
    asked = [Question((Shown(i, lambda i=i: pictures()[i]),), text) for i, text in zip(OWNER, QUESTIONS, strict=True)]
    wanted = TransformersBackend(vlm, shares=False).answer(asked, Aware(), Keep(4), 5)
    assert backend.answer(asked, Aware(), Keep(4), 5) == wanted and backend.prefixes.prefilled == 0
    assert backend.answer(asked[:2], Features(), Keep(4), 5) and backend.prefixes.prefilled == 0, "no image is asked about twice"


@pytest.mark.parametrize("family", ["gemma3", "mistral3"])
def test_sliding_windows_share_nothing(family: str, monkeypatch) -> None:
    vlm = tiny(family)
    text = vlm.model.config.get_text_config()
    monkeypatch.setattr(vlm, "packs", True, raising=False)
    monkeypatch.setattr(text, "sliding_window", 32)
    assert shared_prefix.refusal(vlm, Features(), Keep(4)) == "its decoder has sliding windows of 32"


def test_rows_that_part_before_their_image_share_nothing(monkeypatch) -> None:
    vlm = tiny("llava")
    prompts, _ = batch(vlm)
    assert shared_prefix.shared(prompts, OWNER) is not None
    end = prompts.slots[2].nonzero().max()
    for change in ("input_ids", "position_ids"):
        values = getattr(prompts, change).clone()
        values[2, end - 3] += 1
        assert shared_prefix.shared(replace(prompts, **{change: values}), OWNER) is None
    nothing_behind = replace(prompts, slots=prompts.slots.clone())
    nothing_behind.slots[1, -1] = True
    assert shared_prefix.shared(nothing_behind, OWNER) is None
    monkeypatch.setattr(vlm.processor.tokenizer, "chat_template", "{{ messages[0]['content'][1]['text'] }}<image>!")
    asked = [Question((Shown(0, lambda: pictures()[0]),), text) for text in ("what?", "who is it?")]
    backend = TransformersBackend(vlm)
    wanted = TransformersBackend(vlm, shares=False).answer(asked, Features(), Keep(4), 5)
    assert backend.answer(asked, Features(), Keep(4), 5) == wanted and backend.prefixes.prefilled == 0


class Last(Features):
    """Keeps the last token of the first image, everything of the others."""

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        keep = tokens.valid.clone()
        keep[0, :-1] = False
        return Selection(keep)


def test_a_prefix_tells_which_of_its_tokens_are_left() -> None:
    """Also where the longest row, whose first column is a visual token, keeps least and so is padded."""
    vlm = tiny("llava")
    tokens = vlm.encode(vlm.pixels(pictures()[:2]))
    prompts = vlm.prompts(["the longest of them?", "why?"], tokens.present.sum(1).tolist())
    assert prompts.slots[0, 0]
    where = shared_prefix.shared(prompts, (0, 1))
    assert where is not None
    rows = where.prefixes(prompts, (0, 1))
    first, second = shared_prefix.prefill(vlm, rows, pruning.shrink(vlm, rows, tokens, Last(), Share(1)))
    assert first.left.tolist() == [False] * 15 + [True] and second.left.tolist() == [True] * 16


@pytest.mark.parametrize("counts", [(2, 2, 2), (40, 2, 2, 2), (1, 1, 7), (5,)])
def test_a_table_holds_every_question_once_beside_others_about_its_image(counts: tuple[int, ...]) -> None:
    owner = [image for image, count in enumerate(counts) for _ in range(count)]
    table = shared_prefix.in_rows(owner, [3 + b % 5 for b in range(len(owner))], 32)
    assert sorted(b for row in table for b in row if b >= 0) == list(range(len(owner)))
    assert len({len(row) for row in table}) == 1 and all(len({owner[b] for b in row if b >= 0}) == 1 for row in table)
    assert sum(map(len, table)) < 1.5 * len(owner), "one image with many questions makes no wide table of padding"


# -- the embedded benchmark -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return load("embedded")


def asking(vlm: VLM, pruners: list[str], budgets: list[str], **options: Any) -> list[Cell]:
    made = [registry.spec("pruners", text) for text in pruners]
    return cells(vlm, made, [budget.parse(text) for text in budgets], Evaluation(**options))


@pytest.mark.slow
def test_all_ten_benchmarks_have_the_same_rows(vlm: VLM) -> None:
    """Every image is prefilled once for a method and budget, whatever the benchmark that asks about it."""
    mine, alone = (Evaluator(TransformersBackend(vlm, shares=shares)) for shares in (True, False))
    found = [*asking(vlm, ["unpruned", "random"], ["32"], limit=6), *asking(vlm, ["attention"], ["7"], limit=6)]
    alone._asked = mine._asked  # the questions are drawn once
    images, answers = set(), 0
    for cell in found:
        rows, spec = mine.run(cell), evaluated(cell)
        assert rows == alone.run(cell)
        answers += len(rows)
        images |= {(spec.pruner, spec.budget, sample.image_id) for sample in mine._ask(spec.questions).samples}
    assert len(found) == 3 * len(LIKES)
    prefilled = [one.backend.prefixes.prefilled for one in (mine, alone)]
    assert prefilled == [len(images), 0] and len(images) < answers / 2


def test_rows_do_not_depend_on_the_batch_or_on_what_is_kept(vlm: VLM) -> None:
    for cell in asking(vlm, ["attention"], ["11%"], benchmarks=("world('vqav2')",), limit=20):
        wanted = Evaluator(TransformersBackend(vlm, shares=False)).run(cell)
        for size, mebibytes in ((64, 1024.0), (7, 0.0), (7, 1.0), (1, 1024.0)):
            asked = replace(cell, subject=replace(evaluated(cell), batch=size))
            backend = TransformersBackend(vlm, prefix_mib=mebibytes)
            assert Evaluator(backend).run(asked) == wanted
            assert backend.prefixes._kept.currsize <= mebibytes * 2**20 and (backend.prefixes.prefilled > 0) == (size > 1)


def test_batches_hold_whole_images_and_every_question_once(vlm: VLM) -> None:
    (cell,) = asking(vlm, ["unpruned"], [], benchmarks=("world('mmbench')",), limit=40)
    mine = Evaluator(TransformersBackend(vlm))
    samples = mine._ask(evaluated(cell).questions).samples
    for size, wanted in ((64, [40]), (10, [8] * 5), (3, [3, 1] * 10), (1, [1] * 40)):
        batches = mine.batches(replace(cell, subject=replace(evaluated(cell), batch=size)))
        assert [len(index) for index in batches] == wanted
        assert sorted(sum(batches, [])) == list(range(40))
        if size >= 4:
            assert sum(len({samples[i].image_id for i in index}) for index in batches) == 10


def test_a_question_that_fails_is_a_row_of_its_own(vlm: VLM, monkeypatch) -> None:
    """Its image cannot be opened; the other questions of the batch have their answers."""
    (cell,) = asking(vlm, ["attention"], ["16"], benchmarks=("world('pope')",), limit=16)
    clean, opened = Evaluator(TransformersBackend(vlm)).run(cell), World.image

    def damaged(self: World, sample: Any) -> Any:
        if sample.id == clean[3].sample:
            raise OSError("damaged")
        return opened(self, sample)

    monkeypatch.setattr(World, "image", damaged)
    backend = TransformersBackend(vlm)
    rows = Evaluator(backend).run(cell)
    assert rows[3].error == "OSError: damaged" and [r for r in rows if not r.error] == clean[:3] + clean[4:]


@pytest.mark.slow
def test_the_study_times_both_arms_and_finds_the_same_rows(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(STUDY), "--out", str(tmp_path), "--rounds", "2", "--limit", "2", "--method", "Attention, 32"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "table.csv")
    assert table.method.tolist() == ["Attention, 32"] and (table.differing == 0).all() and (table.prefixes < table.answers).all()
    assert (table[["alone_per_s", "shared_per_s", "ratio"]] > 0).all(axis=None)
    assert "| Attention, 32 |" in (tmp_path / "README.md").read_text()
