"""Assisted decoding inside `pruned(...)`: guesses stand behind the prompt in the first forward already, and are no part of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import diffprune
from diffprune.core import registry
from diffprune.core.budget import Keep, Share
from diffprune.core.site import ENCODED, Cut, Site, Stage
from diffprune.core.vlm import VLM
from diffprune.vlm import tiny as parts
from tests import test_sliding_windows as windowed
from tests.test_decoder_cuts import Staged, Watched, deep
from tests.test_families import FAMILIES, Features, own, pictures, tiny
from tests.test_inside_turns import another, same

OPTIONS: dict[str, Any] = {
    "max_new_tokens": 10, "do_sample": False, "suppress_tokens": [parts.IMAGE], "return_dict_in_generate": True,
    "output_logits": True,
}  # fmt: skip
LOOKUP: dict[str, Any] = {**OPTIONS, "prompt_lookup_num_tokens": 3}


@pytest.fixture(autouse=True)
def no_gradient() -> Iterator[None]:
    with torch.inference_mode():
        yield


def repeating(vlm: VLM) -> dict[str, Any]:
    """Inputs of one question about one picture, whose end stands in it before: what came after that is the first guess."""
    pixels = vlm.pixels(pictures()[:1])
    tokens = vlm.encode(pixels)
    given = own(vlm, vlm.prompts(["what?"], tokens.present.sum(1).tolist(), tokens.layout), pixels)
    end = torch.tensor([[40, 41, 42, 43, 40, 41]])
    given["input_ids"] = torch.cat([given["input_ids"], end], 1)
    for name in given:
        if name == "attention_mask" or name.endswith("token_type_ids"):
            given[name] = torch.cat([given[name], torch.full_like(end, int(name == "attention_mask"))], 1)
    return given


def compare(vlm: VLM, method: Any, budget: Any, options: dict[str, Any], **others: Any) -> None:
    """Oracle: plain greedy decoding, which sees no guesses."""
    given, asked = repeating(vlm), list[int]()
    hook = vlm.model.register_forward_pre_hook(lambda *call: asked.append(call[2]["logits_to_keep"]), with_kwargs=True)
    try:
        with diffprune.pruned(vlm.model, method, budget, **others) as session:
            plain = vlm.model.generate(**given, **OPTIONS)
            chosen, num = session.selection, len(asked)
            found = vlm.model.generate(**given, **options)
            again = session.selection
    finally:
        hook.remove()
    assert asked[num] > 1, "the first forward has guesses"
    same(found, plain)
    assert chosen is not None and again is not None and torch.equal(chosen.keep, again.keep)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_lookup_gives_the_answer_of_plain_decoding(family: str) -> None:
    compare(tiny(family), Features(), Keep(4), LOOKUP)


@pytest.mark.parametrize("name", ["cdpruner", "sparsevlm", "fastv", "dart"])
@pytest.mark.parametrize("family", ["llava", "gemma3", "paligemma"])
def test_guesses_are_no_question_and_no_last_token_of_the_prompt(family: str, name: str) -> None:
    compare(deep(family), name, Share(0.6), LOOKUP)


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "paligemma", "qwen2_vl"])
def test_guesses_in_sliding_windows(name: str) -> None:
    vlm = windowed.batch(name)[0]
    compare(vlm, Features(), Keep(4), LOOKUP)
    inside = Cut(Site(Stage.DECODER, 1), Keep(5))
    compare(vlm, Watched((inside,)), Keep(1), LOOKUP)
    compare(vlm, Staged((Cut(ENCODED, Share(0.7)), inside)), Keep(1), LOOKUP)


def test_guesses_behind_renumbered_rows() -> None:
    compare(tiny("llava"), Features(), Keep(4), LOOKUP, positions="compact")


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl"])
def test_an_assistant_model_gives_the_answer_of_plain_decoding(family: str) -> None:
    assistant = registry.find("models", family).tiny(seed=1).model
    compare(tiny(family), Features(), Keep(4), {**OPTIONS, "assistant_model": assistant})
    compare(deep(family), "fastv", Share(0.6), {**OPTIONS, "assistant_model": assistant})


@pytest.mark.parametrize("family", ["llava", "gemma3", "paligemma", "qwen2_vl"])
def test_another_turn_goes_on_with_a_cache_from_which_guesses_were_taken(family: str) -> None:
    for vlm, method, budget in ((tiny(family), Features(), Keep(4)), (deep(family), "fastv", Share(0.6))):
        given = repeating(vlm)
        with diffprune.pruned(vlm.model, method, budget):
            wanted, found = (another(vlm, given, vlm.model.generate(**given, **options)) for options in (OPTIONS, LOOKUP))
        same(found, wanted)
