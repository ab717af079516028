"""What every family under `models/` promises, found by file name: a tiny random instance against the family's own code.

Batches hold prompts of different length, several images in one prompt, images of different size, and budgets that keep different
counts per image. Oracles are the family's own `generate` and the full-length run with the removed columns masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Keep, parse
from diffprune.core.pruner import ScorePruner
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import VLM, Prompts

FAMILIES = registry.names("models")
BUDGETS = ("Share(1/3)", "Keep(1)", "Keep(5)", "Above(0.5)", "Above(9, least=2)")
QUESTIONS = ("which of the two?", "what?", "how many things are there in this picture")
IMAGES = (2, 1, 1)  # per prompt
SIZES = ((48, 40), (32, 32), (64, 32), (36, 64))  # width, height; px


class Features(ScorePruner):
    """A score that depends on the token alone, so that it cannot hide a mistake in the order of tokens."""

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        weight = torch.randn(tokens.features.shape[-1], generator=torch.Generator().manual_seed(9))
        return tokens.features.float() @ weight.to(tokens.features.device)


@pytest.fixture(autouse=True)
def no_gradient() -> Iterator[None]:
    with torch.inference_mode():
        yield


def pictures() -> list[Image.Image]:
    """Noise, so that no two tokens are alike."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]


@cache
def tiny(family: str) -> VLM:
    with torch.inference_mode(False):  # whoever asks first, it can be trained through
        made: VLM = registry.find("models", family).tiny()
    return made


@cache
def batch(family: str) -> tuple[VLM, Prompts, dict[str, torch.Tensor], VisualTokens]:
    """Three prompts over four images."""
    with torch.inference_mode():
        vlm = tiny(family)
        pixels = vlm.pixels(pictures())
        tokens = vlm.encode(pixels)
        prompts = vlm.prompts(QUESTIONS, tokens.present.sum(1).tolist(), tokens.layout, IMAGES)
    return vlm, prompts, pixels, tokens


def own(vlm: VLM, prompts: Prompts, pixels: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The inputs as a user hands them to the family's own model: no positions, nothing of ours."""
    given = {name: pixels[name] for name in vlm.encoder_inputs if name in pixels}
    return {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask, **vlm.token_inputs(prompts), **given}


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_budget_is_the_familys_own_run(family: str) -> None:
    vlm, prompts, pixels, tokens = batch(family)
    packed = pruning.shrink(vlm, prompts, tokens, registry.load("pruners", "unpruned"), parse("Share(1)"))
    close(pruning.forward(vlm, packed, logits_to_keep=1).logits[:, -1], vlm.model(**own(vlm, prompts, pixels)).logits[:, -1])
    made = vlm.model.generate(**own(vlm, prompts, pixels), max_new_tokens=6, do_sample=False)
    ours = vlm.model.generate(**pruning.decoder_inputs(vlm, packed), max_new_tokens=6, do_sample=False)
    assert torch.equal(ours, made)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_removing_equals_hiding(family: str, attention: str) -> None:
    vlm, prompts, _, tokens = batch(family)
    before = vlm.model.config._attn_implementation
    vlm.model.set_attn_implementation(attention)
    try:
        for budget in (parse(text) for text in BUDGETS):
            packed = pruning.shrink(vlm, prompts, tokens, Features(), budget)
            short = pruning.forward(vlm, packed, logits_to_keep=1).logits[:, -1]
            close(short, hidden(vlm, prompts, tokens, budget))
            assert packed.kept.tolist() == pruning.select(vlm, prompts, tokens, Features(), budget).counts.tolist()
            assert len(packed.features) == int(packed.prompts.slots.sum())
    finally:
        vlm.model.set_attn_implementation(before)


def hidden(vlm: VLM, prompts: Prompts, tokens: VisualTokens, budget: Any) -> torch.Tensor:
    """Oracle: the full-length run with the removed columns masked, same positions."""
    full = pruning.shrink(vlm, prompts, tokens, registry.load("pruners", "unpruned"), parse("Share(1)"))
    left = pruning.select(vlm, prompts, tokens, Features(), budget).present
    mask = full.prompts.attention_mask.clone()
    mask[full.prompts.slots] = left[tokens.present].long()
    return pruning.forward(vlm, replace(full, prompts=replace(full.prompts, attention_mask=mask)), logits_to_keep=1).logits[:, -1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_equals_one_by_one(family: str) -> None:
    vlm, prompts, pixels, tokens = batch(family)
    together = pruning.forward(vlm, pruning.shrink(vlm, prompts, tokens, Features(), parse("Above(0.5)")), logits_to_keep=1).logits[
        :, -1
    ]
    first = 0
    for row, count in enumerate(IMAGES):
        alone = vlm.encode(vlm.part(pixels, first, first + count))
        assert len(alone) == count
        wanted = tokens[torch.arange(first, first + count)].padded(alone.valid.shape[1])
        close(alone.features[alone.valid], wanted.features[wanted.valid])
        ask = vlm.prompts(QUESTIONS[row : row + 1], alone.present.sum(1).tolist(), alone.layout, [count])
        one = pruning.forward(vlm, pruning.shrink(vlm, ask, alone, Features(), parse("Above(0.5)")), logits_to_keep=1).logits[0, -1]
        close(one, together[row])
        first += count


@pytest.mark.parametrize("positions", pruning.POSITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_short_and_equals_recomputation(family: str, positions: str) -> None:
    """Greedy with a cache against the next token of ever longer rows without one."""
    vlm, prompts, _, tokens = batch(family)
    packed = pruning.shrink(vlm, prompts, tokens, Features(), Keep(3), positions)
    length = packed.prompts.input_ids.shape[1]
    text = prompts.attention_mask.sum(1) - prompts.slots.sum(1)
    assert length == int((packed.prompts.slots.sum(1) + text).max()), "the rows are kept + text long"
    out = vlm.model.generate(
        **pruning.decoder_inputs(vlm, packed), max_new_tokens=3, min_new_tokens=3, do_sample=False,
        suppress_tokens=[vlm.model.config.image_token_id], return_dict_in_generate=True,
    )  # fmt: skip
    assert out.past_key_values.get_seq_length() == length + 2, "the cache holds the rows and what was generated"
    longer = packed
    for step in range(3):
        logits = pruning.forward(vlm, longer, logits_to_keep=1, use_cache=False).logits[:, -1]
        logits[:, [vlm.model.config.image_token_id, *ends(vlm)]] = -torch.inf
        token = logits.argmax(-1, keepdim=True)
        assert torch.equal(token[:, 0], out.sequences[:, length + step])
        longer = replace(longer, prompts=extended(longer.prompts, token))


def ends(vlm: VLM) -> list[int]:
    end = vlm.model.generation_config.eos_token_id
    return end if isinstance(end, list) else [] if end is None else [end]


def extended(prompts: Prompts, token: torch.Tensor) -> Prompts:
    """The rows with one more token, at the position after their last."""
    none = torch.zeros_like(token, dtype=torch.bool)
    where = torch.cat([prompts.position_ids, prompts.position_ids[:, -1:] + 1], 1)
    mask = torch.cat([prompts.attention_mask, torch.ones_like(token)], 1)
    return Prompts(
        torch.cat([prompts.input_ids, token], 1),
        mask,
        where,
        torch.cat([prompts.slots, none], 1),
        torch.cat([prompts.question, ~none], 1),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_original_positions_are_those_of_the_full_row(family: str) -> None:
    vlm, prompts, _, tokens = batch(family)
    left = pruning.select(vlm, prompts, tokens, Features(), Keep(4)).present[tokens.present]
    packed = pruning.shrink(vlm, prompts, tokens, Features(), Keep(4)).prompts
    assert torch.equal(visual(packed.position_ids, packed.slots), visual(prompts.position_ids, prompts.slots)[left])
    compact = pruning.shrink(vlm, prompts, tokens, Features(), Keep(4), "compact").prompts
    for row in range(len(compact)):
        where = compact.position_ids[row][compact.attention_mask[row].bool()]
        assert torch.equal(where.reshape(len(where), -1)[:, -1], torch.arange(len(where)))


def visual(positions: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Coordinates of visual tokens, without the text coordinate of M-RoPE."""
    found = positions[slots]
    return found if found.ndim == 1 else found[:, 1:]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_processor_made_is_read_as_our_own_rows(family: str) -> None:
    vlm, prompts, pixels, tokens = batch(family)
    seen, rows = vlm.read(own(vlm, prompts, pixels))
    for name in ("input_ids", "attention_mask", "position_ids", "slots"):
        assert torch.equal(getattr(rows, name), getattr(prompts, name)), name
    again = vlm.encode(seen)
    assert torch.equal(again.features, tokens.features) and torch.equal(again.valid, tokens.valid)


@pytest.mark.parametrize("family", FAMILIES)
def test_encoding_leaves_no_hook_and_projection_is_the_familys_own(family: str) -> None:
    """Oracle: our projected features are what the family's own `get_image_features` returns, separators included."""
    vlm, _, pixels, tokens = batch(family)
    given = {name: pixels[name] for name in vlm.encoder_inputs if name in pixels}
    wanted = vlm.model.model.get_image_features(**given, return_dict=True).pooler_output
    flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in wanted])
    close(pruning.embeddings(vlm, tokens), flat)
    assert not vlm.model.model.get_submodule(vlm.projector_input)._forward_pre_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_image_has_the_number_of_tokens_the_family_states(family: str) -> None:
    vlm = tiny(family)
    assert vlm.num_visual_tokens >= 1 and vlm.shape.layers >= 1
    with pytest.raises(ValueError, match="give one image"):
        pruning.generate(vlm, pictures(), ["what?"], pruner=Features(), budget=Keep(1))
    with pytest.raises(ValueError, match="without an image"):
        pruning.generate(vlm, [[]], ["what?"], pruner=Features(), budget=Keep(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_are_known_without_the_encoder(family: str) -> None:
    vlm, _, pixels, tokens = batch(family)
    assert vlm.slots(pixels) == tokens.present.sum(1).tolist()
    layout = vlm.layout(pixels)
    assert (layout is None and tokens.layout is None) or torch.equal(layout, tokens.layout)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_answers(family: str) -> None:
    vlm = tiny(family)
    images = [pictures()[:2], pictures()[2], pictures()[3]]
    answers = pruning.generate(vlm, images, QUESTIONS, pruner=registry.load("pruners", "random"), budget=Keep(4), max_new_tokens=5)
    assert len(answers) == 3 and all(isinstance(text, str) for text in answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_of_any_size_and_mode_are_answered_and_broken_ones_refused(family: str, tmp_path: Path) -> None:
    vlm, pruner = tiny(family), registry.load("pruners", "random")
    odd = [picture.resize(size) for picture, size in zip(pictures(), ((7, 90), (33, 31), (64, 64), (1, 1)), strict=True)]
    deep = Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30) * 70)
    for image in (odd[0], odd[1], odd[2].convert("L"), odd[2].convert("CMYK"), odd[2].convert("RGBA"), deep):
        assert len(pruning.generate(vlm, [image], ["what?"], pruner=pruner, budget=Keep(1), max_new_tokens=1)) == 1
    (tmp_path / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 40)
    with pytest.raises(ValueError, match=r"half\.png"):
        pruning.generate(vlm, [tmp_path / "half.png"], ["what?"], pruner=pruner, budget=Keep(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_runs_where_weights_are_bfloat16(family: str) -> None:
    """Removing equals hiding also in bfloat16, to its rounding."""
    vlm: VLM = registry.find("models", family).tiny(seed=1)
    vlm.model.to(torch.bfloat16)
    tokens = vlm.encode(vlm.pixels(pictures()[:1]))
    prompts = vlm.prompts(QUESTIONS[:1], tokens.present.sum(1).tolist(), tokens.layout)
    packed = pruning.shrink(vlm, prompts, tokens, Features(), Keep(4))
    found = pruning.forward(vlm, packed, logits_to_keep=1).logits[:, -1]
    assert found.dtype == torch.bfloat16
    wanted = hidden(vlm, prompts, tokens, Keep(4))
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()
