"""Keep mask of visual tokens drawn on the image they come from."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from diffprune.core.tokens import Selection
from diffprune.io.image import open_image

FITS = ("stretch", "pad", "crop")
VEIL = np.array([255.0, 255.0, 255.0])  # what removed parts fade to


def overlay(
    image: Image.Image,
    selection: Selection,
    *,
    index: int = 0,
    grid: tuple[int, int] | None = None,
    fit: str = "stretch",
    fade: float = 0.8,
) -> Image.Image:
    """The picture with the places of removed tokens faded.

    selection: of `pruned(...)` or of a pruner; index: which of its images. grid: (rows, columns), if the selection does not know.
    fit: how the processor brought the picture to the encoder's shape: "stretch" (resized as it is), "pad" (padded to a square), or
    "crop" (the square in the middle; what lies outside was never seen and is faded like what was removed).
    fade: 0 leaves removed parts as they are, 1 leaves nothing of them.

    Raises:
        ValueError: tokens that form no raster of that size, an image the selection lacks, or an unknown `fit`.
    """
    if isinstance(image, list | tuple):
        raise ValueError("give one picture, not a list; index= chooses whose tokens are drawn")
    if not isinstance(selection, Selection):
        raise ValueError(f"a selection is what pruned(...) leaves, `session.selection`, not {f'{selection!r}':.80}")
    if not 0 <= fade <= 1:
        raise ValueError(f"fade is {fade}; it lies from 0 (nothing fades) to 1 (nothing is left)")
    if fit not in FITS:
        raise ValueError(f"fit is {fit!r}; it is one of {', '.join(FITS)}")
    if not 0 <= index < len(selection.keep):
        raise ValueError(f"there is no image {index}: the selection holds {len(selection.keep)}, counted from 0")
    keep = selection.keep[index].cpu()
    rows, columns = grid or selection.grid or _square(len(keep))
    if rows * columns != len(keep):
        raise ValueError(f"{len(keep)} tokens do not fill {rows} rows of {columns}; tiles of one picture are drawn one by one")
    picture = open_image(image)
    raster = Image.fromarray(keep.view(rows, columns).numpy().astype(np.uint8) * 255)
    shown = np.asarray(_fitted(raster, picture.size, fit), dtype=np.float64)[..., None] / 255
    pixels = np.asarray(picture, dtype=np.float64)
    veiled = pixels.mean(-1, keepdims=True) * (1 - fade) + VEIL * fade
    return Image.fromarray((pixels * shown + veiled * (1 - shown)).round().astype(np.uint8))


def _square(num: int) -> tuple[int, int]:
    side = math.isqrt(num)
    if side * side != num:
        raise ValueError(f"{num} tokens are no square; give grid=(rows, columns)")
    return side, side


def _fitted(raster: Image.Image, size: tuple[int, int], fit: str) -> Image.Image:
    """The raster of tokens laid over a picture of `size`: nearest neighbour, so that edges stay edges."""
    width, height = size
    side = {"stretch": size, "pad": (max(size),) * 2, "crop": (min(size),) * 2}[fit]
    laid = Image.new("L", size, 0)
    laid.paste(raster.resize(side, Image.Resampling.NEAREST), ((width - side[0]) // 2, (height - side[1]) // 2))
    return laid
