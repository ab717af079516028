"""`pruned(model, ...)`: generate inside the block equals a run that hides the removed tokens; outside, nothing changed."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import diffprune
from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Above, Keep
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import VLM, Prompts
from tests.test_families import FAMILIES, Features, batch, own, pictures, tiny

MODES = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "several answers": {"num_beams": 2, "num_return_sequences": 2, "do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 2, "temperature": 0.8},
    "no cache": {"do_sample": False, "use_cache": False},
}


@cache
def hidden_inputs(family: str) -> dict[str, Any]:
    """Oracle for the batch of a family, see `hidden`."""
    return hidden(*batch(family))


@torch.inference_mode()
def hidden(vlm: VLM, prompts: Prompts, pixels: dict[str, torch.Tensor], tokens: VisualTokens) -> dict[str, Any]:
    """Oracle: the whole rows with the removed columns masked, positions of the whole rows."""
    left = pruning.select(vlm, prompts, tokens, Features(), Keep(4)).present[tokens.present]
    mask = prompts.attention_mask.clone()
    mask[prompts.slots] = left.long()
    full = pruning.shrink(vlm, replace(prompts), tokens, registry.load("pruners", "unpruned"), diffprune.Share(1))
    where = pruning.decoder_inputs(vlm, full)["position_ids"]
    return own(vlm, prompts, pixels) | {"attention_mask": mask, "position_ids": where}


def generate(vlm: VLM, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    torch.manual_seed(5)
    skip = vlm.model.config.image_token_id
    made: torch.Tensor = vlm.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, suppress_tokens=[skip], **options)
    return made


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_inside_equals_hiding(family: str, mode: str) -> None:
    vlm, prompts, pixels, _ = batch(family)
    with torch.inference_mode():
        with diffprune.pruned(vlm.model, Features(), Keep(4)) as session:
            found = generate(vlm, own(vlm, prompts, pixels), **MODES[mode])
        wanted = generate(vlm, hidden_inputs(family), **MODES[mode])
    assert torch.equal(found, wanted), "the prompt as it was, then the same answers"
    if mode == "greedy":
        assert session.selection is not None and session.selection.keep.sum(1).tolist() == [4] * 4


@pytest.mark.parametrize("positions", pruning.POSITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_inside_is_our_own_path(family: str, positions: str) -> None:
    vlm, prompts, pixels, tokens = batch(family)
    with torch.inference_mode():
        with diffprune.pruned(vlm.model, Features(), Above(0.5), positions=positions):
            found = generate(vlm, own(vlm, prompts, pixels), do_sample=False)[:, prompts.input_ids.shape[1] :]
        packed = pruning.shrink(vlm, prompts, tokens, Features(), Above(0.5), positions)
        wanted = generate(vlm, pruning.decoder_inputs(vlm, packed), do_sample=False)[:, packed.prompts.input_ids.shape[1] :]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loop_of_ones_own_needs_neither_mask_nor_positions(family: str) -> None:
    """The second step of a hand-written loop equals the second token of generate."""
    vlm, prompts, pixels, _ = batch(family)
    with torch.inference_mode(), diffprune.pruned(vlm.model, Features(), Keep(4)):
        made = generate(vlm, own(vlm, prompts, pixels), do_sample=False, output_logits=True, return_dict_in_generate=True)
        first = vlm.model(**own(vlm, prompts, pixels), use_cache=True)
        token = made.sequences[:, prompts.input_ids.shape[1]][:, None]
        mask = torch.cat([prompts.attention_mask, torch.ones_like(token)], 1)
        second = vlm.model(input_ids=token, attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(first.logits[:, -1], made.logits[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(second.logits[:, -1], made.logits[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_as_it_was_on_exit_also_after_an_exception(family: str) -> None:
    vlm, prompts, pixels, _ = batch(family)
    model = vlm.model
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(module.training, *(p.requires_grad for p in module.parameters())) for module in model.modules()]
    with torch.inference_mode():
        before = model(**own(vlm, prompts, pixels)).logits
        with pytest.raises(KeyError), diffprune.pruned(model, Features(), Keep(4)):
            model(**own(vlm, prompts, pixels))
            raise KeyError
        after = model(**own(vlm, prompts, pixels)).logits
    assert torch.equal(before, after) and not model._forward_pre_hooks
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert flags == [(module.training, *(p.requires_grad for p in module.parameters())) for module in model.modules()]


class Heard(BaseStreamer):
    """Counts what a streamer is given."""

    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value)

    def end(self) -> None:
        self.pieces.append(torch.tensor([-1]))


def test_streaming_text_without_pictures_and_gradients() -> None:
    vlm, prompts, pixels, _ = batch("llava")
    first = {name: value[:1] for name, value in own(vlm, prompts, pixels).items()} | {"pixel_values": pixels["pixel_values"][:2]}
    heard = Heard()
    with diffprune.pruned(vlm.model, Features(), Keep(4)):
        with torch.inference_mode():
            generate(vlm, first, do_sample=False, streamer=heard)
            text = torch.tensor([[7, 8, 9]])
            alone = vlm.model(input_ids=text).logits
        assert len(heard.pieces) == 6, "the prompt, four tokens, the end"
        labels = first["input_ids"].masked_fill(first["input_ids"] == 3, -100)
        loss = vlm.model(**first, labels=labels).loss
    torch.testing.assert_close(alone, vlm.model(input_ids=text).logits)
    assert torch.isfinite(loss)


def test_what_cannot_be_pruned_is_refused() -> None:
    vlm, prompts, pixels, _ = batch("llava")
    given = own(vlm, prompts, pixels)

    def refused(reason: str, **changes: Any) -> None:
        with torch.inference_mode(), pytest.raises(ValueError, match=reason):
            vlm.model.generate(**given | changes, max_new_tokens=2, do_sample=False)

    with diffprune.pruned(vlm.model, Features(), Keep(4)):
        refused("static caches", cache_implementation="static")
        refused("inputs_embeds", inputs_embeds=vlm.embed(prompts.input_ids))
        refused("places for visual tokens", pixel_values=pixels["pixel_values"][:1])
        refused("places for visual tokens", pixel_values=pixels["pixel_values"][:1], num_beams=2)
        for changes in ({"pixel_values": pixels["pixel_values"][:1]}, {"logits_to_keep": torch.tensor([3])}):
            with torch.inference_mode(), pytest.raises(ValueError, match="places"):
                vlm.model(**given | changes)
        with torch.inference_mode(), pytest.raises(ValueError, match="cannot be used inside"):
            _cropped(vlm, given)
        with pytest.raises(ValueError, match="already inside"), diffprune.pruned(vlm.model, Features(), Keep(4)):
            pass
        with torch.inference_mode(), pytest.raises(ValueError, match="a later turn"):
            cache = vlm.model(**given, use_cache=True).past_key_values
            vlm.model(**given, past_key_values=cache)
    with pytest.raises(ValueError, match="positions is 'odd'"), diffprune.pruned(vlm.model, Features(), Keep(4), positions="odd"):
        pass
    with diffprune.pruned(vlm.model, Features(), Keep(4)):
        pass  # and after all that it can be used again


def _cropped(vlm: VLM, given: dict[str, Any]) -> None:
    """A cache somebody else shortened."""
    out = vlm.model(**given, use_cache=True)
    out.past_key_values.crop(-1)
    mask = torch.nn.functional.pad(given["attention_mask"], (0, 1), value=1)
    vlm.model(input_ids=given["input_ids"][:, -1:], attention_mask=mask, past_key_values=out.past_key_values)


def test_no_vlm_is_refused() -> None:
    with pytest.raises(ValueError), diffprune.pruned(torch.nn.Linear(2, 2), Features(), Keep(4)):
        pass


def test_prompt_lookup_gives_the_same_answer() -> None:
    """Candidates are checked several at once and rejected ones leave the cache; the answer is still greedy's."""
    vlm = tiny("llava")
    pixels = vlm.pixels(pictures()[:1])
    prompts = vlm.prompts(["aa aa aa aa aa"], vlm.encode(pixels).counts.tolist())
    options = {"max_new_tokens": 12, "do_sample": False}
    with torch.inference_mode(), diffprune.pruned(vlm.model, Features(), Keep(2)):
        plain = vlm.model.generate(**own(vlm, prompts, pixels), **options)
        assert torch.equal(vlm.model.generate(**own(vlm, prompts, pixels), **options, prompt_lookup_num_tokens=3), plain)
