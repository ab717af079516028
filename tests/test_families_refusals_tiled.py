"""What families with tiles and the Gemma families refuse, and that a picture is itself whatever batch it comes in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffprune.core import registry
from diffprune.core.evidence import IDENTITY
from diffprune.core.vlm import VLM

TILED = ("idefics3", "internvl", "smolvlm")
RASTERS = ("gemma3", "paligemma")
SIZES = ((48, 40), (64, 32))  # width, height; px: five and three tiles


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]


def tiny(family: str) -> VLM:
    made: VLM = registry.find("models", family).tiny()
    return made


@pytest.mark.parametrize("family", TILED)
def test_rows_and_pixels_of_different_pictures_are_refused(family: str) -> None:
    vlm = tiny(family)
    first, second = pictures()
    tokens = vlm.encode(vlm.pixels([first]))
    rows = vlm.prompts(["what?"], tokens.counts.tolist(), tokens.layout)
    with pytest.raises(ValueError, match="come from one call of the model's processor"):
        vlm.read({"input_ids": rows.input_ids, **vlm.pixels([second])})


@pytest.mark.parametrize("family", TILED)
def test_pictures_of_different_size_share_a_batch(family: str) -> None:
    vlm = tiny(family)
    together = vlm.encode(vlm.pixels(pictures()), frozenset({IDENTITY}))
    assert together.counts.tolist() == [20, 12], "four tokens a tile, the whole picture is one of the tiles"
    for i, picture in enumerate(pictures()):
        alone = vlm.encode(vlm.pixels([picture]), frozenset({IDENTITY})).given(IDENTITY)
        assert torch.equal(alone, together.given(IDENTITY)[i : i + 1])


@pytest.mark.parametrize(("family", "num"), [("idefics3", 20), ("smolvlm", 20), ("internvl", 4), ("gemma3", 16), ("paligemma", 16)])
def test_a_square_picture_of_the_default_size_has_the_stated_number_of_tokens(family: str, num: int) -> None:
    vlm = tiny(family)
    side = {"internvl": 16, "gemma3": 64}.get(family, 32)
    tokens = vlm.encode(vlm.pixels([Image.new("RGB", (side, side), (9, 80, 200))]))
    assert tokens.counts.tolist() == [vlm.num_visual_tokens] == [num]
    stated, own = (vlm.prompts(["what?"], [num], layout) for layout in (None, tokens.layout))
    assert torch.equal(stated.input_ids, own.input_ids), "without a layout the default size is meant"
