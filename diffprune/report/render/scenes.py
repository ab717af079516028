"""Scenes with their kept and removed tokens, one small SVG each: the picture as PNG, removed patches veiled and hatched."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from diffprune.embedded.world import scene
from diffprune.report.analysis.comparison import FULL
from diffprune.report.analysis.scenes import Asked, Scene
from diffprune.report.render.escape import plain

LIMIT = 12  # scenes on one page


@dataclass(frozen=True)
class Picture:
    """One frame: its caption, the answer given to the question and whether it was right, and its SVG (attributes are numbers and
    escaped words made here, so it may enter the page as it is)."""

    caption: str
    svg: Markup
    answer: str = ""
    right: bool = False


@dataclass(frozen=True)
class Strip:
    """A picture, then each method's choice in the order given; question and target where one was asked."""

    pictures: tuple[Picture, ...]
    question: str = ""
    target: str = ""


def strips(scenes: Sequence[Scene]) -> list[Strip]:
    """One per scene, `LIMIT` at most.

    Raises:
        ValueError: a mask that is no square of tokens.
    """
    return [_strip(one) for one in scenes[:LIMIT]]


def _strip(one: Scene) -> Strip:
    image, asked = scene(one.seed).image, one.asked
    row = [Picture(f"scene {one.seed}", _svg(one.seed, image, None, f"Scene {one.seed}, all tokens"), *_answer(asked, FULL))]
    for label, mask in one.masks.items():
        keep = _mask(mask, label)
        says = f"{plain(label, 60)}: {keep.sum()} of {keep.size}"
        row.append(Picture(says, _svg(one.seed, image, keep, f"Scene {one.seed}, tokens kept by {says}"), *_answer(asked, label)))
    return Strip(tuple(row), asked.question if asked else "", asked.target if asked else "")


def _answer(asked: Asked | None, label: str) -> tuple[str, bool]:
    text, credit = asked.answers.get(label, ("", 0.0)) if asked else ("", 0.0)
    return text, credit >= 1


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


def _svg(seed: int, image: np.ndarray, keep: np.ndarray | None, alt: str) -> Markup:
    """The scene, once with its pixels and under a mask a reference to them."""
    height, width = image.shape[:2]
    inside = f'<use href="#scene-{seed}"/>{_veil(keep, height, width)}' if keep is not None else _pixels(seed, image)
    return Markup(f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(alt)}">{inside}</svg>')


def _pixels(seed: int, image: np.ndarray) -> str:
    height, width = image.shape[:2]
    out = io.BytesIO()
    Image.fromarray(np.asarray(image, np.uint8)).convert("P", palette=Image.Palette.ADAPTIVE, colors=96).save(
        out, "PNG", optimize=True
    )
    data = base64.b64encode(out.getvalue()).decode()
    size = f'width="{width}" height="{height}" style="image-rendering:pixelated"'
    return f'<image id="scene-{seed}" href="data:image/png;base64,{data}" {size}/>'


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
