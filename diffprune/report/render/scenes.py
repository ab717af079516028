"""Scenes with their kept and removed tokens, one small SVG each: the picture as PNG, removed patches veiled and hatched."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from diffprune.embedded.world import scene

Masks = Mapping[int, Mapping[str, Any]]
LIMIT = 12  # scenes on one page


@dataclass(frozen=True)
class Picture:
    """One frame: its caption and its SVG (attributes are numbers made here, so it may enter the page as it is)."""

    caption: str
    svg: Markup


def strips(scenes: Masks) -> list[list[Picture]]:
    """One row per scene: the picture, then each method's choice, in the order given.

    scenes: {seed of the embedded world: {label: keep mask, bool [N] or [rows, columns]}}.

    Raises:
        ValueError: a mask that is no square of tokens.
    """
    rows = []
    for seed in sorted(scenes)[:LIMIT]:
        image = scene(int(seed)).image
        row = [Picture(f"scene {seed}", _svg(image, None))]
        for label, mask in scenes[seed].items():
            keep = _mask(mask, label)
            row.append(Picture(f"{label}: {keep.sum()} of {keep.size}", _svg(image, keep)))
        rows.append(row)
    return rows


def _mask(mask: Any, label: str) -> np.ndarray:
    keep = np.asarray(mask)
    if keep.dtype != bool:
        raise ValueError(f"scenes: the mask of {label} has type {keep.dtype}, it must be bool with one entry per token")
    if keep.ndim == 1:
        side = math.isqrt(keep.size)
        if side * side != keep.size:
            raise ValueError(f"scenes: the mask of {label} has {keep.size} tokens, which is no square; give it as [rows, columns]")
        keep = keep.reshape(side, side)
    return keep


def _svg(image: np.ndarray, keep: np.ndarray | None) -> Markup:
    height, width = image.shape[:2]
    out = io.BytesIO()
    Image.fromarray(np.asarray(image, np.uint8)).convert("P", palette=Image.Palette.ADAPTIVE, colors=96).save(
        out, "PNG", optimize=True
    )
    data = base64.b64encode(out.getvalue()).decode()
    picture = f'<image href="data:image/png;base64,{data}" width="{width}" height="{height}" style="image-rendering:pixelated"/>'
    veil = _veil(keep, height, width) if keep is not None else ""
    return Markup(f'<svg viewBox="0 0 {width} {height}" role="img">{picture}{veil}</svg>')


def _veil(keep: np.ndarray, height: int, width: int) -> str:
    """Removed patches under white with a stroke; kept ones with a thin frame."""
    h, w = height / keep.shape[0], width / keep.shape[1]
    boxes = [f"M{c * w:g} {r * h:g}h{w:g}v{h:g}h{-w:g}z" for r, c in np.argwhere(~keep).tolist()]
    strokes = [f"M{c * w:g} {(r + 1) * h:g}l{w:g} {-h:g}" for r, c in np.argwhere(~keep).tolist()]
    frames = [f"M{c * w:g} {r * h:g}h{w:g}v{h:g}h{-w:g}z" for r, c in np.argwhere(keep).tolist()]
    return (
        f'<path d="{"".join(boxes)}" fill="#fff" fill-opacity=".78"/>'
        f'<path d="{"".join(strokes)}" stroke="#999" stroke-width=".35"/>'
        f'<path d="{"".join(frames)}" fill="none" stroke="#111" stroke-width=".5"/>'
    )
