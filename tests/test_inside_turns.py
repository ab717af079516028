"""Caches that go on inside `pruned(...)`: turns of a conversation equal those over full rows with the removed columns hidden."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import diffprune
from diffprune.core.budget import Keep, Share
from diffprune.core.site import ENCODED, Cut, Site, Stage
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import VLM, Prompts
from diffprune.vlm import tiny as parts
from tests import test_sliding_windows as windowed
from tests.test_decoder_cuts import Staged, hiding, live_of, whole
from tests.test_families import FAMILIES, Features, batch, close, own, pictures, tiny
from tests.test_inside import hidden, hidden_inputs

ASKED: dict[str, Any] = {
    "max_new_tokens": 4, "min_new_tokens": 4, "suppress_tokens": [parts.IMAGE], "do_sample": False, "return_dict_in_generate": True,
    "output_logits": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_gradient() -> Iterator[None]:
    with torch.inference_mode():
        yield


def single(family: str, question: str = "what?", picture: int = 0) -> tuple[VLM, Prompts, dict[str, torch.Tensor], VisualTokens]:
    """One question about one picture."""
    vlm = tiny(family)
    pixels = vlm.pixels(pictures()[picture : picture + 1])
    tokens = vlm.encode(pixels)
    return vlm, vlm.prompts([question], tokens.present.sum(1).tolist(), tokens.layout), pixels, tokens


def turns(vlm: VLM, given: dict[str, Any], num: int = 2, new_alone: bool = False) -> Any:
    """What the last of so many calls of generate gives, each of which goes on with the cache of the one before.

    new_alone: later calls are given what the cache lacks, not the whole conversation.
    """
    made = vlm.model.generate(**given, **ASKED)
    for turn in range(1, num):
        made = another(vlm, given, made, turn, new_alone)
    return made


def same(found: Any, wanted: Any) -> None:
    """Whether two conversations are, and the logits of their last turns."""
    assert torch.equal(found.sequences, wanted.sequences)
    for ours, theirs in zip(found.logits, wanted.logits, strict=True):
        close(ours, theirs)


def another(vlm: VLM, given: dict[str, Any], made: Any, turn: int = 1, new_alone: bool = False) -> Any:
    """What one more turn of generate gives behind what was `made`; `sequences` are the whole conversation."""
    rows, length = given["input_ids"].shape
    ids = torch.cat([made.sequences, torch.tensor([[40, 41, 42 + turn]] * rows)], 1)
    more = ids.shape[1] - length
    mask = torch.cat([given["attention_mask"], torch.ones(rows, more, dtype=torch.long)], 1)
    known = {name: longer(given[name], more) for name in given if name == "position_ids" or name.endswith("token_type_ids")}
    shown = ids[:, made.sequences.shape[1] - 1 :] if new_alone else ids  # the newest token is in no cache yet
    found = vlm.model.generate(input_ids=shown, attention_mask=mask, past_key_values=made.past_key_values, **known, **ASKED)
    found.sequences = torch.cat([ids, found.sequences[:, shown.shape[1] :]], 1)
    return found


def longer(value: torch.Tensor, by: int) -> torch.Tensor:
    """Positions that go on, or token types of text."""
    is_positions = value.ndim == 3 or int(value.max()) > 1
    more = value[..., -1:] + torch.arange(1, by + 1) if is_positions else value.new_zeros(len(value), by)
    return torch.cat([value, more], -1)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_turn_of_generate_goes_on_with_the_cache(family: str) -> None:
    vlm, prompts, pixels, _ = batch(family)
    with diffprune.pruned(vlm.model, Features(), Keep(4)):
        found = turns(vlm, own(vlm, prompts, pixels))
    same(found, turns(vlm, hidden_inputs(family)))


@pytest.mark.parametrize("new_alone", [False, True], ids=["whole", "new"])
@pytest.mark.parametrize("family", FAMILIES)
def test_turns_of_one_conversation_without_padding(family: str, new_alone: bool) -> None:
    """`generate` drops a mask of ones, so that positions alone tell what the caller believes to be cached."""
    vlm, prompts, pixels, tokens = single(family)
    with diffprune.pruned(vlm.model, Features(), Keep(4)):
        found = turns(vlm, own(vlm, prompts, pixels), 3, new_alone)
    same(found, turns(vlm, hidden(vlm, prompts, pixels, tokens), 3))


def test_text_of_a_later_turn_does_not_see_what_comes_after_it() -> None:
    """Types of the whole row say that a picture was where the cache has the new text now; a picture's tokens see each other."""
    vlm, prompts, pixels, tokens = single("gemma3")
    end = int(prompts.slots.nonzero().max()) + 2  # so little text that new text comes to lie where the picture was
    prompts = replace(prompts, **{name: value[:, :end] for name, value in vars(prompts).items() if value is not None})
    with diffprune.pruned(vlm.model, Features(), Keep(4)):
        found = turns(vlm, own(vlm, prompts, pixels))
    same(found, turns(vlm, hidden(vlm, prompts, pixels, tokens)))


# -- the cache knows its rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_and_a_copy_of_it_go_on_in_a_later_block(family: str) -> None:
    """As where a server enters the block for every request."""
    vlm, prompts, pixels, tokens = single(family)
    given = own(vlm, prompts, pixels)
    with diffprune.pruned(vlm.model, Features(), Keep(4)):
        made = vlm.model.generate(**given, **ASKED)
    copied = copy.copy(made)
    copied.past_key_values = copy.deepcopy(made.past_key_values)
    oracle = hidden(vlm, prompts, pixels, tokens)
    for first in (made, copied):
        with diffprune.pruned(vlm.model, "random", Keep(3)):  # what is in the cache was chosen already
            found = another(vlm, given, another(vlm, given, first), 2)
        same(found, turns(vlm, oracle, 3))


@pytest.mark.parametrize("family", FAMILIES)
def test_conversations_in_one_block_may_alternate(family: str) -> None:
    """Two with a picture each, and one of text alone between them, which is not pruned."""
    chats = [single(family), single(family, "how many things are there?", 2)]
    vlm, text = chats[0][0], {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with diffprune.pruned(vlm.model, Features(), Keep(4)) as session:
        given = [own(vlm, prompts, pixels) for _, prompts, pixels, _ in chats]
        made = [vlm.model.generate(**one, **ASKED) for one in given]
        newest = session.selection
        alone = turns(vlm, text)
        found = [another(vlm, *pair) for pair in zip(given, made, strict=True)]
        assert session.selection is newest
    for one, chat in zip(found, chats, strict=True):
        same(one, turns(vlm, hidden(*chat)))
    same(alone, turns(vlm, text))


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "qwen2_vl"])
def test_cuts_inside_the_decoder_and_windows_are_those_of_the_cache(name: str) -> None:
    vlm, prompts, pixels, tokens = windowed.batch(name)
    plan = (Cut(ENCODED, Share(0.7)), Cut(Site(Stage.DECODER, 1), Keep(5)))
    given, text = own(vlm, prompts, pixels), {"input_ids": torch.tensor([[7, 8, 9]])}
    with diffprune.pruned(vlm.model, Staged(plan), Keep(1)):
        made = vlm.model.generate(**given, **ASKED)
        vlm.model.generate(**text, **ASKED)
        second = another(vlm, given, made)
    with diffprune.pruned(vlm.model, Staged(plan), Keep(1)):
        third = another(vlm, given, second, 2)
    with (
        diffprune.pruned(vlm.model, Features(), Keep(1)),
        pytest.raises(ValueError, match=r"whose method cuts .* layers \[1\]: go on with it in a block of that method"),
    ):
        another(vlm, given, third, 3)
    with hiding(vlm, live_of(vlm, prompts, tokens, Staged(plan))):
        wanted = turns(vlm, given | {"position_ids": whole(vlm, prompts, tokens)["position_ids"]}, 3)
    same(third, wanted)


def test_a_cache_that_was_filled_outside_goes_on_unpruned() -> None:
    vlm, prompts, pixels, _ = single("llava")
    given = own(vlm, prompts, pixels)
    made = vlm.model.generate(**given, **ASKED)
    kept = copy.deepcopy(made.past_key_values)
    with diffprune.pruned(vlm.model, Features(), Keep(4)):
        found = another(vlm, given, made)
        short = vlm.model(**given, use_cache=True).past_key_values
        lost = DynamicCache([(layer.keys, layer.values) for layer in short.layers])  # without the note
        mask = torch.nn.functional.pad(given["attention_mask"], (0, 1), value=1)
        with pytest.raises(ValueError, match="filled elsewhere"):
            vlm.model(input_ids=given["input_ids"][:, -1:], attention_mask=mask, past_key_values=lost)
    made.past_key_values = kept
    same(found, another(vlm, given, made))
