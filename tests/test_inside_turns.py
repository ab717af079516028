"""Caches that go on inside `pruned(...)`: turns of a conversation equal the same turns over full rows with removed columns hidden."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import diffprune
from diffprune.core.budget import Keep
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import VLM, Prompts
from diffprune.vlm import tiny as parts
from tests.test_families import FAMILIES, Features, batch, own, pictures, tiny
from tests.test_inside import hidden, hidden_inputs

ASKED: dict[str, Any] = {
    "max_new_tokens": 4, "min_new_tokens": 4, "suppress_tokens": [parts.IMAGE], "do_sample": False, "return_dict_in_generate": True,
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


def turns(vlm: VLM, given: dict[str, Any], num: int = 2, new_alone: bool = False) -> torch.Tensor:
    """The conversation after so many calls of generate, each of which goes on with the cache of the one before.

    new_alone: later calls are given what the cache lacks, not the whole conversation.
    """
    made = vlm.model.generate(**given, **ASKED)
    for turn in range(1, num):
        made = another(vlm, given, made, turn, new_alone)
    return made.sequences


def another(vlm: VLM, given: dict[str, Any], made: Any, turn: int = 1, new_alone: bool = False) -> Any:
    """What one more turn of generate gives behind what was `made`; `sequences` are the whole conversation."""
    rows, length = given["input_ids"].shape
    ids = torch.cat([made.sequences, torch.tensor([[40, 41, 42 + turn]] * rows)], 1)
    more = ids.shape[1] - length
    mask = torch.cat([given["attention_mask"], torch.ones(rows, more, dtype=torch.long)], 1)
    known = {name: longer(given[name], more) for name in given if name in ("position_ids", "mm_token_type_ids")}
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
    assert torch.equal(found, turns(vlm, hidden_inputs(family)))


@pytest.mark.parametrize("new_alone", [False, True], ids=["whole", "new"])
@pytest.mark.parametrize("family", FAMILIES)
def test_turns_of_one_conversation_without_padding(family: str, new_alone: bool) -> None:
    """`generate` drops a mask of ones, so that positions alone tell what the caller believes to be cached."""
    vlm, prompts, pixels, tokens = single(family)
    with diffprune.pruned(vlm.model, Features(), Keep(4)):
        found = turns(vlm, own(vlm, prompts, pixels), 3, new_alone)
    assert torch.equal(found, turns(vlm, hidden(vlm, prompts, pixels, tokens), 3))
