"""Edges of `pruned(...)` and of the public arguments: each either equals a run that hides tokens, or is refused by one sentence."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache

import diffprune
from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Keep, Share
from diffprune.core.evidence import QUESTION, Question
from diffprune.core.pruner import ScorePruner
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import VLM
from diffprune.vlm import tiny as parts
from diffprune.vlm.load import model_spec
from tests.test_decoder_cuts import batch as deep_batch
from tests.test_decoder_cuts import deep
from tests.test_families import FAMILIES, QUESTIONS, Features, batch, close, own, pictures, tiny
from tests.test_inside import hidden_inputs


@pytest.fixture(autouse=True)
def no_gradient() -> Iterator[None]:
    with torch.inference_mode():
        yield


OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "suppress_tokens": [parts.IMAGE]}


# -- generation without a cache ----------------------------------------------------------------------------------------

WITHOUT_CACHE = {
    "beams": {"num_beams": 3, "do_sample": False},
    "beams, several answers": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "sampling, several answers": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize("mode", WITHOUT_CACHE)
@pytest.mark.parametrize("family", FAMILIES)
def test_repeated_rows_without_a_cache_equal_hiding(family: str, mode: str) -> None:
    """Rows of one prompt differ in what was generated, and share its pictures."""
    vlm, prompts, pixels, _ = batch(family)
    asked = {**OPTIONS, **WITHOUT_CACHE[mode], "use_cache": False}
    torch.manual_seed(5)
    with diffprune.pruned(vlm.model, Features(), Keep(4)):
        found = vlm.model.generate(**own(vlm, prompts, pixels), **asked)
    torch.manual_seed(5)
    assert torch.equal(found, vlm.model.generate(**hidden_inputs(family), **asked))


AWARE = ("cdpruner", "sparsevlm", "diffprune(untrained=True, question_aware=True)")


@pytest.mark.parametrize("name", AWARE)
def test_a_picture_has_the_question_of_its_own_row(name: str) -> None:
    """As many pictures as rows, of which one shows two and one none: each row chooses as it does alone."""
    vlm = deep("llava")
    pixels, method, budget = vlm.pixels(pictures()[:3]), registry.load("pruners", name), Share(0.6)
    questions, images = ["which of these two?", "no picture at all", "what?"], (2, 0, 1)
    tokens = vlm.encode(pixels, method.needs)
    prompts = vlm.prompts(questions, tokens.present.sum(1).tolist(), tokens.layout, images)
    together = pruning.shrink(vlm, prompts, tokens, method, budget)
    logits = pruning.forward(vlm, together, logits_to_keep=1).logits[:, -1]
    for row, own_images in ((0, [0, 1]), (2, [2])):
        alone = tokens[torch.tensor(own_images)]
        one = vlm.prompts([questions[row]], alone.present.sum(1).tolist(), alone.layout, [images[row]])
        packed = pruning.shrink(vlm, one, alone, method, budget)
        close(pruning.forward(vlm, packed, logits_to_keep=1).logits[0, -1], logits[row])


class Reads(ScorePruner):
    """A score that depends on the question, and counts how often it was asked."""

    needs = frozenset({QUESTION})

    def __init__(self) -> None:
        self.words: list[int] = []

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        question = tokens.evidence[QUESTION]
        assert isinstance(question, Question)
        self.words.append(int(question.valid.sum(1)[0]))
        total = (question.embedding * question.valid[..., None]).sum((1, 2))
        return tokens.features.float().sum(-1) * total[:, None]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_what_was_generated_is_no_question_and_pictures_are_encoded_once(options: dict[str, Any]) -> None:
    vlm, prompts, pixels, _ = batch("llava")
    calls, method = [], Reads()
    hook = vlm.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    with diffprune.pruned(vlm.model, method, Keep(4)):
        found = vlm.model.generate(**own(vlm, prompts, pixels), **OPTIONS, use_cache=False, do_sample=False, **options)
        first, once = list(method.words), len(calls)
        cached = vlm.model.generate(**own(vlm, prompts, pixels), **OPTIONS, do_sample=False, **options)
    hook.remove()
    assert torch.equal(found, cached) and once == 1 and len(first) == 1 and method.words == first * 2


@pytest.mark.parametrize("name", [*AWARE, "fastv", "pyramiddrop"])
def test_what_labels_ask_for_is_no_question(name: str) -> None:
    """Scoring an answer chooses as answering does; labels of text before a picture change nothing."""
    vlm = deep("llava")
    image = vlm.pixels(pictures()[:1])
    tokens = vlm.encode(image)
    rows = vlm.prompts(["what?", "which of these?"], tokens.counts.tolist() * 2)
    asked = own(vlm, rows, {"pixel_values": image["pixel_values"].repeat(2, 1, 1, 1)})
    answer = torch.arange(40, 52).expand(2, -1)
    ids, mask = (torch.cat([asked[key], more], 1) for key, more in (("input_ids", answer), ("attention_mask", answer > 0)))
    labels = torch.cat([torch.full_like(asked["input_ids"], -100), answer], 1)
    before = labels.clone()
    before[:, 0] = ids[:, 0]
    chosen = []
    with diffprune.pruned(vlm.model, registry.load("pruners", name), Share(0.7)) as session:
        for given in (asked, {**asked, "input_ids": ids, "attention_mask": mask, "labels": labels}):
            vlm.model(**given)
            chosen.append(session.selection)
        vlm.model(**{**asked, "input_ids": ids, "attention_mask": mask, "labels": before})
        chosen.append(session.selection)
    first, *others = [found.keep for found in chosen if found is not None]
    assert len(others) == 2 and all(torch.equal(keep, first) for keep in others)


@pytest.mark.parametrize("name", ["cdpruner", "fastv"])
def test_what_token_types_call_an_answer_is_no_question(name: str) -> None:
    """PaliGemma's suffix, scored without labels."""
    vlm = deep("paligemma")
    pixels = vlm.pixels(pictures()[:1])
    asked = own(vlm, vlm.prompts(["which of these?"], [vlm.num_visual_tokens]), pixels)
    said = torch.arange(40, 52)[None]
    more = {"input_ids": said, "attention_mask": torch.ones_like(said), "token_type_ids": torch.ones_like(said)}
    with diffprune.pruned(vlm.model, registry.load("pruners", name), Share(0.7)) as session:
        vlm.model(**asked)
        first = session.selection
        vlm.model(**{**asked, **{key: torch.cat([asked[key], value], 1) for key, value in more.items()}})
    assert first is not None and session.selection is not None and torch.equal(session.selection.keep, first.keep)


# -- padding, chunks, compiled models ---------------------------------------------------------------------------


def test_a_cache_cut_elsewhere_and_rows_padded_on_the_right_have_a_sentence_each() -> None:
    vlm, prompts, pixels, _ = batch("llava")
    given = own(vlm, prompts, pixels)
    order = (1 - given["attention_mask"]).argsort(dim=1, stable=True)
    right = given | {name: given[name].gather(1, order) for name in ("input_ids", "attention_mask")}
    with diffprune.pruned(vlm.model, Features(), Keep(4)):
        with pytest.raises(ValueError, match=r"rows padded on the right cannot be continued .*pad on the left"):
            vlm.model.generate(**right, max_new_tokens=3, do_sample=False)
        left, moved = (vlm.model(**rows).logits[:, -1] for rows in (given, right))
        close(moved, left)  # one call alone does not mind
        out = vlm.model(**given, use_cache=True)
        out.past_key_values.crop(-2)
        mask = torch.nn.functional.pad(given["attention_mask"], (0, 1), value=1)
        with pytest.raises(
            ValueError,
            match=r"cut or filled elsewhere .*give the whole conversation and an empty cache",
        ):
            vlm.model(input_ids=given["input_ids"][:, -1:], attention_mask=mask, past_key_values=out.past_key_values)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_static_caches_are_refused_whatever_the_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A direct call has a mask for each row's tokens all the same, and flash attention in generate as well."""
    vlm, prompts, pixels, _ = batch(family)
    given, config = own(vlm, prompts, pixels), vlm.model.config
    for method in (Features(), "fastv"):
        with (
            diffprune.pruned(vlm.model, method, Share(0.6)),
            pytest.raises(ValueError, match=r"static caches .* or give a DynamicCache"),
        ):
            vlm.model(**given, past_key_values=StaticCache(config, max_cache_len=256))
    for part in (config, config.text_config):
        monkeypatch.setattr(part, "_attn_implementation_internal", "flash_attention_2")
    with diffprune.pruned(vlm.model, Features(), Keep(4)), pytest.raises(ValueError, match="static caches"):
        vlm.model.generate(**given, max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_in_chunks_is_refused(family: str) -> None:
    vlm, prompts, pixels, _ = batch(family)
    with (
        diffprune.pruned(vlm.model, Features(), Keep(4)),
        pytest.raises(ValueError, match="prefill_chunk_size splits pictures before they are pruned; leave it unset"),
    ):
        vlm.model.generate(**own(vlm, prompts, pixels), max_new_tokens=2, prefill_chunk_size=8)


def test_a_compiled_model_generates_as_the_model_itself() -> None:
    vlm, prompts, pixels, _ = batch("llava")
    compiled = torch.compile(vlm.model, backend="eager")
    asked = {**OPTIONS, "do_sample": False}
    with diffprune.pruned(vlm.model, Features(), Keep(4)):
        wanted = vlm.model.generate(**own(vlm, prompts, pixels), **asked)
    with diffprune.pruned(compiled, Features(), Keep(4)):
        assert torch.equal(compiled.generate(**own(vlm, prompts, pixels), **asked), wanted)
    assert not vlm.model._forward_pre_hooks


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")  # hooks ask which thread they are in
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("name", ["attention", "fastv"])
def test_compiled_code_prunes_as_the_model_itself(name: str) -> None:
    vlm, prompts, pixels, _ = deep_batch("llava")
    given, asked = own(vlm, prompts, pixels), {**OPTIONS, "do_sample": False}
    with diffprune.pruned(vlm.model, name, Share(0.5)):
        wanted, logits = vlm.model.generate(**given, **asked), vlm.model(**given).logits
    vlm.model.compile(backend="eager")
    try:
        plain = vlm.model(**given).logits  # compiled before there are hooks
        with diffprune.pruned(vlm.model, name, Share(0.5)):
            assert torch.equal(vlm.model.generate(**given, **asked), wanted)
            assert torch.equal(vlm.model(**given).logits, logits)
        assert torch.equal(vlm.model(**given).logits, plain)
    finally:
        vlm.model._compiled_call_impl = None


# -- threads -----------------------------------------------------------------------------------------------------------


def in_a_thread(call: Any) -> tuple[Any, list[str]]:
    """What a call returns in another thread, and what it warned of."""
    found: list[Any] = []

    def run() -> None:
        with torch.inference_mode():
            found.append(call())

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    return found[0], [str(warning.message) for warning in heard]


def test_the_block_holds_for_the_thread_that_enters_it() -> None:
    vlm, prompts, pixels, _ = batch("llava")
    given, asked = own(vlm, prompts, pixels), {**OPTIONS, "do_sample": False}
    plain, logits = vlm.model.generate(**given, **asked), vlm.model(**given).logits
    with diffprune.pruned(vlm.model, Features(), Keep(4)) as session:
        for call, wanted in ((lambda: vlm.model(**given).logits, logits), (lambda: vlm.model.generate(**given, **asked), plain)):
            found, heard = in_a_thread(call)
            assert torch.equal(found, wanted) and session.selection is None
            assert any("another thread" in line and "is not pruned" in line for line in heard)
        pruned = vlm.model.generate(**given, **asked)
    assert not torch.equal(pruned, plain)

    def entered() -> torch.Tensor:
        with diffprune.pruned(vlm.model, Features(), Keep(4)):
            made: torch.Tensor = vlm.model.generate(**given, **asked)
        return made

    found, heard = in_a_thread(entered)
    assert torch.equal(found, pruned) and not heard, "entered where generate is called"


@pytest.mark.parametrize("name", ["divprune", "attention"])
def test_a_picture_that_another_thread_encodes_meanwhile_is_not_taken_for_ours(name: str) -> None:
    """The other thread's call begins and ends while ours is in the encoder, and once more while it is in the projector."""
    vlm, prompts, pixels, _ = batch("llava")
    given, begun = own(vlm, prompts, pixels), list[int]()
    other = {**given, "pixel_values": given["pixel_values"].flip(0) * 0.5}

    def meanwhile(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread() and len(begun) < 4:
            begun.append(1)
            in_a_thread(lambda: vlm.model(**other))

    with diffprune.pruned(vlm.model, name, Keep(4)):
        wanted = vlm.model(**given).logits
        inner = vlm.model.model.vision_tower.encoder.layers[0], vlm.model.model.multi_modal_projector
        hooks = [module.register_forward_hook(meanwhile) for module in inner]
        found = vlm.model(**given).logits
    for hook in hooks:
        hook.remove()
    assert len(begun) >= 2 and torch.equal(found, wanted)


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clear", "meant"), [(4, Keep(4)), (0.25, Share(0.25)), ("4", Keep(4)), ("25%", Share(0.25)), (Keep(4), Keep(4))]
)
def test_a_budget_may_be_spelled(clear: Any, meant: Any) -> None:
    vlm, prompts, pixels, _ = batch("llava")
    ask = {"pruner": Features(), "max_new_tokens": 3}
    wanted = pruning.generate(vlm, pictures()[0], "what?", budget=meant, **ask)
    assert pruning.generate(vlm, pictures()[0], "what?", budget=clear, **ask) == wanted
    with diffprune.pruned(vlm.model, Features(), clear) as session:
        vlm.model(**own(vlm, prompts, pixels))
    assert session.budget == meant


def test_a_pruner_may_be_spelled_and_a_loaded_vlm_is_a_model() -> None:
    vlm, prompts, pixels, _ = batch("llava")
    keeps = []
    for method, model in (("random", vlm.model), (diffprune.pruner("random"), vlm)):
        with diffprune.pruned(model, method, 4) as session:
            vlm.model(**own(vlm, prompts, pixels))
        assert session.selection is not None
        keeps.append(session.selection.keep)
    assert torch.equal(*keeps)
    ask: dict[str, Any] = {"budget": 4, "max_new_tokens": 3}
    spelled, made = (pruning.generate(vlm, pictures()[0], "what?", pruner=p, **ask) for p in ("grid", diffprune.pruner("grid")))
    assert spelled == made


def test_one_picture_one_question(tmp_path: Path) -> None:
    vlm, ask = tiny("llava"), {"pruner": "grid", "budget": 4, "max_new_tokens": 3}
    one, two = pictures()[:2]
    one.save(tmp_path / "one.png")
    wanted = pruning.generate(vlm, [one], ["what?"], **ask)
    for image in (one, tmp_path / "one.png", str(tmp_path / "one.png"), (tmp_path / "one.png").read_bytes()):
        assert pruning.generate(vlm, image, "what?", **ask) == wanted
        assert pruning.generate(vlm, [image], ["what?"], **ask) == wanted
    assert pruning.generate(vlm, [one, two], "what?", **ask) == pruning.generate(vlm, [[one, two]], ["what?"], **ask)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"budget": None}, "None is not a budget: write Keep"),
    ({"budget": True}, "True is not a budget: write Keep"),
    ({"budget": 0}, r"Keep\(0\)"),
    ({"budget": 2.5}, r"Share\(2.5\)"),
    ({"budget": "many"}, "'many' is not a budget"),
    ({"pruner": None}, "None is not a pruner: write diffprune.pruner"),
    ({"pruner": Features}, "Features'> is not a pruner: write"),
    ({"pruner": "rondom"}, "did you mean 'random'"),
    ({"questions": ["what?", "how?"]}, "one image and 2 questions: give one image"),
    ({"images": [1, 2], "questions": ["what?"]}, "2 images and 1 questions: give one image"),
    ({"images": [None], "questions": ["what?"]}, "NoneType; a path, the bytes of a file or a PIL image"),
    ({"images": [3], "questions": [7]}, "a question is text, not 7"),
    ({"questions": "a cat \ud83d"}, "question 0 holds half a character"),
    ({"images": [], "questions": []}, "a question without an image"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0; it is a whole number"),
    ({"max_new_tokens": "4"}, "max_new_tokens is '4'"),
    ({"positions": "odd"}, "positions is 'odd'"),
    ({"vlm": "embedded"}, "generate takes a model as diffprune.load gives it, not str"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_arguments_of_another_kind_are_refused_by_a_sentence(changes: dict[str, Any], reason: str) -> None:
    usual: dict[str, Any] = {
        "vlm": tiny("llava"), "images": pictures()[0], "questions": "what?", "pruner": "grid", "budget": 4, "max_new_tokens": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match=reason):
        pruning.generate(**usual | changes)
    if changes.keys() & {"budget", "pruner", "positions"}:
        given: dict[str, Any] = {"pruner": "grid", "budget": 4} | changes
        with pytest.raises(ValueError, match=reason), diffprune.pruned(usual["vlm"], **given):
            pass


NAMELESS: list[tuple[Callable[[Any], Any], Any, str]] = [
    (diffprune.load, None, "a model is named by a text or a folder, as 'embedded' or 'models/mine', not by None"),
    (diffprune.load, ["embedded"], "not by ['embedded']"),
    (diffprune.pruner, None, "a pruner is named by a text (diffprune list pruners has them), not by None"),
    (diffprune.pruner, 4, "not by 4"),
    (diffprune.benchmark, None, "a benchmark is named by a text (diffprune list benchmarks has them), not by None"),
    (diffprune.parse, None, "None is not a budget: write Keep"),
    (diffprune.Store, None, "a store lies in a folder or in blobs, not in None"),
    (diffprune.from_pretrained, None, "no scorer 'None': give a folder"),
    (lambda selection: diffprune.overlay(pictures()[0], selection), None, "a selection is what pruned(...) leaves"),
]


@pytest.mark.parametrize(("call", "value", "reason"), NAMELESS, ids=[reason for *_, reason in NAMELESS])
def test_what_is_no_name_is_refused_by_a_sentence(call: Callable[[Any], Any], value: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        call(value)


def test_a_model_may_be_named_by_a_path(tmp_path: Path) -> None:
    folder = Path(diffprune.__file__).parent / "embedded" / "checkpoint"
    assert model_spec(folder) == model_spec(str(folder)) and model_spec(folder).place("folder") == folder


def test_questions_and_images_are_read_as_before() -> None:
    vlm: VLM = tiny("llava")
    shown = [pictures()[:2], pictures()[2], (pictures()[3],)]
    assert len(pruning.generate(vlm, shown, QUESTIONS, pruner="grid", budget=4, max_new_tokens=1)) == 3
    assert len(pruning.generate(vlm, tuple(shown), iter(QUESTIONS), pruner="grid", budget=4, max_new_tokens=1)) == 3  # type: ignore[arg-type]
