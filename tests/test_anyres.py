"""LLaVA-NeXT and LLaVA-OneVision beyond the contracts of every family: lines, newlines, tiles, the encoder's attention, refusals.

Rows of text are compared with those of the family's own processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextProcessor, LlavaOnevisionProcessor

import diffprune
from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Keep, Share
from diffprune.core.evidence import IDENTITY, encoder_attention
from diffprune.models.llava_next import LlavaNext
from diffprune.models.llava_onevision import LlavaOnevision, part_of_groups
from diffprune.timing.flops import encoder_flops

SIZES = ((48, 40), (32, 32), (64, 32), (36, 64))  # width, height; px
TEXTS = ("<image>and<image>?", "<image>what?", "look<image>how many things")


@pytest.fixture(autouse=True)
def no_gradient() -> Iterator[None]:
    with torch.inference_mode():
        yield


@cache
def tiny(family: str) -> Any:
    return registry.find("models", family).tiny()


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes or SIZES]


class WithoutVideos(LlavaOnevisionProcessor):
    """The family's processor where no video processor can be built, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return type(argument)


def processor(family: str) -> Any:
    parts = tiny(family).processor
    if family == "llava_next":
        return LlavaNextProcessor(
            parts.image_processor, parts.tokenizer, patch_size=8, vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )  # fmt: skip
    return WithoutVideos(
        parts.image_processor, parts.tokenizer, None, num_image_tokens=16, vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_rows_are_those_of_the_familys_processor(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny(family)
    made = processor(family)(images=pictures(), text=list(TEXTS), return_tensors="pt", padding=True)
    tokens = vlm.encode(vlm.pixels(pictures()))
    monkeypatch.setattr(vlm, "chat_prompt", lambda question, images: question)
    monkeypatch.setattr(vlm, "_plain", lambda question, images: question)  # the texts hold the places of the images themselves
    ours = vlm.prompts(TEXTS, tokens.present.sum(1).tolist(), tokens.layout, [2, 1, 1])
    assert torch.equal(ours.input_ids, made["input_ids"]) and torch.equal(ours.attention_mask, made["attention_mask"])


def test_pictures_shown_whole_are_read_from_the_processor() -> None:
    """A list per prompt: two pictures of one prompt have no tiles, and one newline each."""
    vlm, (a, b, c, d) = tiny("llava_onevision"), pictures()
    made = processor("llava_onevision")(images=[[a, b], [c], [d]], text=list(TEXTS), return_tensors="pt", padding=True)
    pixels, prompts = vlm.read(made)
    tokens = vlm.encode(pixels)
    assert tokens.counts.tolist()[:2] == [16, 16] and tokens.present.sum(1).tolist()[:2] == [17, 17]
    packed = pruning.shrink(vlm, prompts, tokens, registry.load("pruners", "unpruned"), Keep(16))
    logits = pruning.forward(vlm, packed, logits_to_keep=1).logits
    torch.testing.assert_close(logits[:, -1], vlm.model(**made).logits[:, -1], rtol=0, atol=1e-5)
    for start, stop in ((0, 1), (1, 2), (0, 3), (2, 4)):
        part = vlm.encode(vlm.part(pixels, start, stop))
        wanted = tokens[torch.arange(start, stop)].padded(part.valid.shape[1])
        torch.testing.assert_close(part.features[part.valid], wanted.features[wanted.valid], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="take whole prompts"):
        vlm.part(pixels, 1, 3)


def test_parts_of_groups_keep_what_is_tiled() -> None:
    groups = torch.tensor([1, 3, 1, 2])
    assert part_of_groups(groups, 0, 7).tolist() == [1, 3, 1, 2]
    assert part_of_groups(groups, 0, 1).tolist() == [1]
    assert part_of_groups(groups, 2, 5).tolist() == [2, 1]
    assert part_of_groups(groups, 3, 4).tolist() == [2]
    assert part_of_groups(groups, 4, 6).tolist() == [1, 2]


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_a_newline_ends_its_line_and_goes_with_its_last_token(family: str) -> None:
    tokens = tiny(family).encode(tiny(family).pixels(pictures()))
    assert tokens.row_id is not None
    for image in range(len(tokens)):
        line = tokens.row_id[image][: int(tokens.present[image].sum())].tolist()
        assert line[:16] == [0] * 16, "the overview has no lines"
        number, run = 1, 0
        for entry in line[16:]:
            assert entry == (number if entry > 0 else -number) and (entry > 0 or run), "lines follow each other, none is empty"
            number, run = (number + 1, 0) if entry < 0 else (number, run + 1)
        assert run == 0, "every line ends with a newline"
    first = torch.zeros_like(tokens.valid)
    first[:, [0, 17]] = True
    left = type(tokens)(**{**vars(tokens), "valid": first})
    assert left.present.sum(1).tolist() == [3] * 4, "a token of the overview, one of the first line, its newline"


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_a_picture_too_narrow_for_a_token_a_line_keeps_its_newlines(family: str) -> None:
    """The family's packing leaves newlines alone of its tiles; oracle: its own run, of its processor's rows."""
    vlm, narrow = tiny(family), pictures((2, 1000), (48, 40))
    made = processor(family)(images=narrow, text=["<image>what?", "<image>how many?"], return_tensors="pt", padding=True)
    tokens = vlm.encode(vlm.pixels(narrow))
    assert tokens.present.sum(1).tolist() == vlm.slots(vlm.pixels(narrow))
    wanted = vlm.model(**made).logits[:, -1]
    with diffprune.pruned(vlm.model, registry.load("pruners", "unpruned"), Share(1)):
        torch.testing.assert_close(vlm.model(**made).logits[:, -1], wanted, rtol=0, atol=1e-5)
    with diffprune.pruned(vlm.model, registry.load("pruners", "grid"), Keep(3)) as session:
        assert torch.isfinite(vlm.model(**made).logits).all()
    assert session.selection is not None and session.selection.keep.sum(1).tolist() == [3, 3]


def test_tokens_of_a_resized_picture_are_the_projected_ones() -> None:
    """Oracle: what the family's own code made of the picture, newlines taken out."""
    vlm = tiny("llava_onevision")
    pixels = vlm.pixels(pictures((64, 64)))
    tokens = vlm.encode(pixels)
    assert tokens.projected and tokens.counts.tolist() == [16 + 5 * 5], "8 x 8 tokens are resized to 5 x 5"
    (own,) = vlm.model.model.get_image_features(**pixels, return_dict=True).pooler_output
    newlines = (own == vlm.model.model.image_newline).all(-1)
    assert int(newlines.sum()) == 5
    assert torch.equal(tokens.features[tokens.valid], own[~newlines])


def test_attention_of_the_encoder_follows_its_tokens() -> None:
    """Oracle: eager attention of each tile's [CLS]; which token is which is found by its features."""
    vlm = tiny("llava_next")
    pixels = vlm.pixels(pictures())
    tokens = vlm.encode(pixels, frozenset({encoder_attention(), IDENTITY}))
    tiles = torch.cat([own[:count] for own, count in zip(pixels["pixel_values"], vlm._tiles(pixels), strict=True)])
    tower, before = vlm.model.model.vision_tower, vlm.model.config._attn_implementation
    vlm.model.set_attn_implementation("eager")
    try:
        seen = tower(tiles, output_attentions=True, output_hidden_states=True)
    finally:
        vlm.model.set_attn_implementation(before)
    features = seen.hidden_states[-2][:, 1:].flatten(0, 1)
    attention = seen.attentions[-2][:, :, 0, 1:].mean(1).flatten()
    nearest = torch.cdist(tokens.features[tokens.valid], features).argmin(-1)
    assert len(set(nearest.tolist())) == len(nearest)
    assert tokens.given(encoder_attention()) is not None and tokens.given(IDENTITY) is not None
    torch.testing.assert_close(tokens.given(encoder_attention())[tokens.valid], attention[nearest], rtol=0, atol=1e-5)
    assert not tower.encoder.layers[1]._forward_pre_hooks
    alone = vlm.encode(vlm.pixels(pictures()[:2][1:]), frozenset({IDENTITY}))
    assert torch.equal(alone.given(IDENTITY), tokens.given(IDENTITY)[1:2]), "tiles of padding do not count as the picture"


@pytest.mark.parametrize(
    ("kind", "side", "default", "newlines", "tiles"),
    [(LlavaNext, 336, 2880, 48, 5), (LlavaOnevision, 384, 7290, 81, 37)],
)
def test_sizes_of_the_published_models(kind: Any, side: int, default: int, newlines: int, tiles: int) -> None:
    """576 x 5 tokens and 24 x 2 newlines; 729 x 10 tokens and 81 newlines after resizing to 81 x 81."""
    vlm = kind.tiny()
    vlm.model.config.vision_config.image_size, vlm.model.config.vision_config.patch_size = side, 14
    vlm.model.config.image_grid_pinpoints = type(vlm.model.config)().image_grid_pinpoints
    if kind is LlavaOnevision:
        vlm.model.config.vision_aspect_ratio = "anyres_max_9"
    shape = vlm._shape()
    assert vlm.num_visual_tokens == default and shape.tiles == tiles
    assert int((vlm._orders({"image_sizes": vlm._default_size})[0] < 0).sum()) == newlines
    assert encoder_flops(shape) == tiles * encoder_flops(type(shape)(**{**vars(shape), "tiles": 1}))


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_the_default_picture_has_the_tokens_stated(family: str) -> None:
    vlm = tiny(family)
    assert vlm.encode(vlm.pixels(pictures((64, 64)))).counts.tolist() == [vlm.num_visual_tokens]


def test_refusals() -> None:
    vlm, onevision = tiny("llava_next"), tiny("llava_onevision")
    ids, pixels = torch.ones(1, 4, dtype=torch.long), vlm.pixels(pictures())
    with pytest.raises(ValueError, match=r"llava_next needs pixel_values \[images, tiles, 3, height, width\] with image_sizes"):
        vlm.read({"input_ids": ids, "pixel_values": pixels["pixel_values"]})
    with pytest.raises(ValueError, match="as its processor makes them"):
        vlm.read({"input_ids": ids, "pixel_values": pixels["pixel_values"][0], "image_sizes": pixels["image_sizes"]})
    with pytest.raises(ValueError, match="takes images, not videos"):
        onevision.read({"input_ids": ids, "pixel_values_videos": pixels["pixel_values"]})
