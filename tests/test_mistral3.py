"""Mistral 3 beyond the contracts of every family: rows of its own processor, the raster, the published size, refusals."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.pixtral import image_processing_pil_pixtral

from diffprune.models.mistral3 import Mistral3

TEXTS = ("<image>and<image>?", "<image>what?")
SIZES = ((48, 40), (32, 16), (96, 48))  # width, height; px; the last is made smaller


@pytest.fixture(autouse=True)
def no_gradient() -> Iterator[None]:
    with torch.inference_mode():
        yield


@cache
def tiny() -> Mistral3:
    return Mistral3.tiny()


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes or SIZES]


def test_rows_and_pixels_are_those_of_the_familys_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor's own file imports torchvision for one function; its PIL form stands in."""
    monkeypatch.setitem(sys.modules, "transformers.models.pixtral.image_processing_pixtral", image_processing_pil_pixtral)
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor

    vlm = tiny()
    parts = vlm.processor
    own = PixtralProcessor(parts.image_processor, parts.tokenizer, patch_size=4, spatial_merge_size=2, image_token="<image>")
    made = own(images=pictures(), text=list(TEXTS), return_tensors="pt", padding=True)
    pixels = vlm.pixels(pictures())
    tokens = vlm.encode(pixels)
    monkeypatch.setattr(vlm, "chat_prompt", lambda question, images: question)
    monkeypatch.setattr(vlm, "_plain", lambda question, images: question)  # the texts hold the places of the images themselves
    ours = vlm.prompts(TEXTS, tokens.present.sum(1).tolist(), tokens.layout, [2, 1])
    assert torch.equal(ours.input_ids, made["input_ids"]) and torch.equal(ours.attention_mask, made["attention_mask"])
    assert torch.equal(pixels["image_sizes"], torch.as_tensor(made["image_sizes"]))
    assert torch.equal(pixels["pixel_values"], made["pixel_values"])


def test_breaks_are_text() -> None:
    """Two rows of three tokens: they are ended by a break and an end, which no budget counts."""
    vlm = tiny()
    assert vlm.placeholder_ids(6, torch.tensor([2, 3])) == [3, 3, 3, 4, 3, 3, 3, 5]
    assert vlm.placeholder_ids(4, None) == [3, 3, 4, 3, 3, 5]
    tokens = vlm.encode(vlm.pixels(pictures((24, 16))))
    prompts = vlm.prompts(["what?"], [6], tokens.layout)
    assert tokens.counts.tolist() == [6] and int(prompts.slots.sum()) == 6 and tokens.grid == (2, 3)
    assert int((prompts.input_ids[~prompts.slots] == 4).sum()) == 1


def test_pictures_of_different_raster_have_no_common_grid() -> None:
    assert tiny().encode(tiny().pixels(pictures())).grid is None


def test_the_published_size_and_the_default_picture() -> None:
    """1540 px, patches of 14 merged 2 x 2: 55 x 55 (configuration of Mistral Small 3.1)."""
    vlm = Mistral3.tiny()
    assert vlm.encode(vlm.pixels(pictures((48, 48)))).counts.tolist() == [vlm.num_visual_tokens]
    vlm.model.config.vision_config.image_size, vlm.model.config.vision_config.patch_size = 1540, 14
    assert vlm._shape().patches == 12100 and vlm.num_visual_tokens == 3025


def test_refusals() -> None:
    vlm = tiny()
    pixels = vlm.pixels(pictures())
    with pytest.raises(ValueError, match="mistral3 needs image_sizes"):
        vlm.read({"input_ids": torch.ones(1, 4, dtype=torch.long), "pixel_values": pixels["pixel_values"]})


def test_a_single_token_alone_is_refused_and_beside_others_taken() -> None:
    """transformers squeezes the row of a single token away; among others it stays."""
    vlm, speck = tiny(), Image.new("RGB", (1, 1))
    with pytest.raises(ValueError, match="is one token, of 8 px at most"):
        vlm.encode(vlm.pixels([speck]))
    assert vlm.encode(vlm.pixels([speck, Image.new("RGB", (48, 48))])).counts.tolist() == [1, 36]
