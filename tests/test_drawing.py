"""The overlay: kept places are the picture's own pixels, removed ones are not, whatever way the picture was brought into shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import diffprune
from diffprune.core.tokens import Selection


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 200, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("fit", "size"), [("stretch", (40, 20)), ("pad", (40, 20)), ("crop", (40, 20)), ("pad", (20, 40))])
def test_kept_places_are_untouched_and_others_fade(fit: str, size: tuple[int, int]) -> None:
    """Oracle: the place of every pixel, one by one."""
    keep = torch.zeros(1, 16, dtype=torch.bool)
    keep[0, [0, 5, 10, 14]] = True
    image = picture(*size)
    found = np.asarray(diffprune.overlay(image, Selection(keep), fit=fit)).astype(int)
    before = np.asarray(image).astype(int)
    wide, high = size
    side = {"stretch": (wide, high), "pad": (max(size),) * 2, "crop": (min(size),) * 2}[fit]
    left, top = (wide - side[0]) // 2, (high - side[1]) // 2
    for y in range(high):
        for x in range(wide):
            column, row = (x - left) * 4 // side[0], (y - top) * 4 // side[1]
            kept = 0 <= column < 4 and 0 <= row < 4 and bool(keep[0, row * 4 + column])
            assert (found[y, x] == before[y, x]).all() == kept, (x, y)


def test_what_cannot_be_drawn_is_named() -> None:
    image, keep = picture(8, 8), torch.ones(2, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match="no square"):
        diffprune.overlay(image, Selection(keep))
    with pytest.raises(ValueError, match="do not fill 2 rows of 4"):
        diffprune.overlay(image, Selection(keep), grid=(2, 4))
    with pytest.raises(ValueError, match="no image 2"):
        diffprune.overlay(image, Selection(keep, grid=(2, 3)), index=2)
    with pytest.raises(ValueError, match="fade is 2"):
        diffprune.overlay(image, Selection(keep, grid=(2, 3)), fade=2)
    with pytest.raises(ValueError, match="fit is 'fill'"):
        diffprune.overlay(image, Selection(keep, grid=(2, 3)), fit="fill")
    assert np.array_equal(np.asarray(diffprune.overlay(image, Selection(keep, grid=(2, 3)), index=1)), np.asarray(image))


def test_one_picture_is_drawn_at_a_time() -> None:
    with pytest.raises(ValueError, match="give one picture, not a list; index= chooses"):
        diffprune.overlay([Image.new("RGB", (8, 8))] * 2, Selection(torch.ones(2, 4, dtype=torch.bool)))  # type: ignore[arg-type]
