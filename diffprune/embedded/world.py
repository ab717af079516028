"""The embedded VLM's world: small pictures of shapes, number signs, decoys and clutter.

A scene is a 96 x 96 RGB picture made from one integer. Objects (6 shapes x 6 colours, 10-26 px, at any pixel) and signs
(two digits on a coloured plate) are asked about; decoys (grey, black) look like objects and never are; clutter is vivid and
means nothing. Things never overlap. A token is an 8 x 8 px patch, so a scene is 12 x 12 = 144 tokens.

A seed belongs to exactly one split, and each split has background textures of its own, so no picture of one split can occur in
another. numpy and PIL only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

WORLD_VERSION = "3"
IMAGE_SIZE, PATCH = 96, 8
SIDE = IMAGE_SIZE // PATCH
NUM_TOKENS = SIDE * SIDE

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
COLORS = ("red", "green", "blue", "yellow", "purple", "white")
DIGITS = tuple("0123456789")
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
DECOYS = ("heart", "diamond", "moon", "T", "H", "L")
CLUTTER = ("mosaic", "checkerboard", "noise")
FULL = 5  # the highest level: the world as it is asked about

# Kinds of token: 0 background, 1-6 the shapes, then these.
TENS, UNITS, CLUTTERED, DECOY, NUM_KINDS = 7, 8, 9, 10, 11

SPLITS: Mapping[str, range] = {
    "train": range(0, 10**9),
    "calibration": range(10**9, 2 * 10**9),
    "test": range(2 * 10**9, 3 * 10**9),
    "confirmation": range(3 * 10**9, 4 * 10**9),  # test pictures that no study looked at while something was being chosen
}
_TEXTURES = {"train": range(0, 160), "calibration": range(160, 200), "test": range(200, 240), "confirmation": range(240, 280)}

_RGB = np.array([[215, 40, 40], [40, 170, 60], [50, 80, 225], [235, 210, 50], [160, 50, 180], [240, 240, 240]], np.float32)
_GREY = (20, 60, 95, 130)
_DARK_INK = frozenset({1, 3, 5})  # plates on which digits are dark
_SIZES = (10, 12, 14, 16, 18, 20, 23, 26)
_SIZE_SHARES = np.cumsum(np.array([2, 3, 3, 3, 2, 2, 1, 1]) / 17)
_FONT = (
    "01110 10001 10011 10101 11001 10001 01110", "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111", "11110 00001 00001 01110 00001 00001 11110",
    "00010 00110 01010 10010 11111 00010 00010", "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110", "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110", "01110 10001 10001 01111 00001 00010 01100",
)  # fmt: skip


# --- what a scene is -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thing:
    """An object: indices into COLORS and SHAPES, its centre and size in pixels."""

    color: int
    shape: int
    x: float
    y: float
    size: int

    @property
    def quadrant(self) -> int:
        return 2 * int(self.y > IMAGE_SIZE / 2) + int(self.x > IMAGE_SIZE / 2)

    @property
    def placed(self) -> bool:
        """Whether the centre is far enough from both middle lines (4 px) for its quadrant to be asked."""
        return abs(self.x - IMAGE_SIZE / 2) > 4 and abs(self.y - IMAGE_SIZE / 2) > 4


@dataclass(frozen=True)
class Sign:
    """A plate of 26 x 16 px: index of its colour, its two digits, its top left corner in pixels."""

    color: int
    tens: int
    units: int
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    """A picture and everything that is in it.

    image: uint8 [96, 96, 3]. Token labels, int [144], -1 where they do not apply: kind, color, digit, quadrant (of the
    object's centre); anchor: bool [144], one token per object (at its centre) and one per digit.
    """

    seed: int
    image: np.ndarray
    objects: tuple[Thing, ...]
    signs: tuple[Sign, ...]
    decoys: tuple[int, ...]
    clutter: tuple[int, ...]
    kind: np.ndarray
    color: np.ndarray
    digit: np.ndarray
    quadrant: np.ndarray
    anchor: np.ndarray

    def caption(self) -> np.ndarray:
        """What a caption would name, float [NUM_CAPTION] of 0/1: shapes, colours, a sign, plate colours, decoys, clutter."""
        named = np.zeros(NUM_CAPTION, np.float32)
        starts = np.cumsum([0, len(SHAPES), len(COLORS), 1, len(COLORS), len(DECOYS)])
        present = (
            [o.shape for o in self.objects], [o.color for o in self.objects], [0] * bool(self.signs),
            [s.color for s in self.signs], self.decoys, self.clutter,
        )  # fmt: skip
        for start, indices in zip(starts, present, strict=True):
            named[[start + i for i in indices]] = 1
        return named


NUM_CAPTION = len(SHAPES) + len(COLORS) + 1 + len(COLORS) + len(DECOYS) + len(CLUTTER)


def split_of(seed: int) -> str:
    """The one split whose range holds this seed."""
    for name, seeds in SPLITS.items():
        if seed in seeds:
            return name
    raise ValueError(f"seed {seed} is in no split: {dict(SPLITS)}")


def oracle_rank(scene: Scene) -> np.ndarray:
    """Tokens in the order a label oracle keeps them, int [144]: anchors, other object and sign tokens, then the rest.

    Anchors come first, so any budget of at least one token per object and digit covers them all. Ties keep raster order;
    background stands before clutter and decoys.
    """
    asked = (scene.kind > 0) & (scene.kind < CLUTTERED)
    order = np.where(scene.anchor, 0, np.where(asked, 1, np.where(scene.kind == 0, 2, 3)))
    return np.argsort(order, kind="stable")


def oracle_mask(scene: Scene, keep: int = 32) -> np.ndarray:
    """The tokens a label oracle keeps, bool [144] with exactly `keep` true."""
    mask = np.zeros(NUM_TOKENS, bool)
    mask[oracle_rank(scene)[:keep]] = True
    return mask


# --- drawing ---------------------------------------------------------------------------------------------------------


@cache
def _stencil(name: str, size: int) -> np.ndarray:
    """Coverage of one shape or decoy, float [size, size] in [0, 1], drawn at 8 x and averaged down."""
    side = size * 8
    end = side - 1
    im = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(im)

    def box(*corners: float, fill: int = 255) -> None:
        draw.rectangle([side * corners[0], side * corners[1], end * corners[2], end * corners[3]], fill=fill)

    def oval(*corners: float, fill: int = 255) -> None:
        draw.ellipse([side * corners[0], side * corners[1], side * corners[2] - 1, side * corners[3] - 1], fill=fill)

    def poly(*points: tuple[float, float]) -> None:
        draw.polygon([(x * end, y * end) for x, y in points], fill=255)

    match name:
        case "circle":
            oval(0, 0, 1, 1)
        case "square":
            box(0.04, 0.04, 0.96, 0.96)
        case "triangle":
            poly((0.5, 0), (1, 1), (0, 1))
        case "cross":
            box(0.34, 0, 0.66, 1)
            box(0, 0.34, 1, 0.66)
        case "ring":
            oval(0, 0, 1, 1)
            oval(0.28, 0.28, 0.72, 0.72, fill=0)
        case "star":
            turn = [-np.pi / 2 + k * np.pi / 5 for k in range(10)]
            radius = [0.5 if k % 2 == 0 else 0.2 for k in range(10)]
            poly(*((0.5 + r * np.cos(t), 0.5 + r * np.sin(t)) for r, t in zip(radius, turn, strict=True)))
        case "heart":
            oval(0, 0.02, 0.52, 0.55)
            oval(0.48, 0.02, 1, 0.55)
            poly((0.04, 0.38), (0.96, 0.38), (0.5, 1))
        case "diamond":
            poly((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5))
        case "moon":
            oval(0, 0, 1, 1)
            oval(0.35, -0.1, 1.2, 0.8, fill=0)
        case "T":
            box(0, 0, 1, 0.3)
            box(0.36, 0, 0.64, 1)
        case "H":
            box(0, 0, 0.3, 1)
            box(0.7, 0, 1, 1)
            box(0, 0.36, 1, 0.62)
        case "L":
            box(0, 0, 0.32, 1)
            box(0, 0.7, 1, 1)
    return np.asarray(im.resize((size, size), Image.Resampling.BOX), np.float32)[..., None] / 255


@cache
def _digit(value: int) -> np.ndarray:
    """One digit, float [14, 10, 1] of 0/1."""
    rows = np.array([[int(c) for c in row] for row in _FONT[value].split()], np.float32)
    return np.kron(rows, np.ones((2, 2), np.float32))[..., None]


@cache
def _texture(index: int, size: int = 192) -> np.ndarray:
    """One background texture, uint8 [size, size, 3]: coarse noise, fine noise or stripes around a mid tone."""
    r = np.random.default_rng([index, size])
    base, style = r.uniform(60, 170, 3), r.integers(3)
    if style < 2:
        cells = 12 if style == 0 else 48
        field = r.uniform(-1, 1, (cells, cells)).astype(np.float32)
    else:
        y, x = np.mgrid[0:size, 0:size]
        angle, frequency = r.uniform(0, np.pi), r.uniform(0.1, 0.5)
        field = np.sin((x * np.cos(angle) + y * np.sin(angle)) * frequency).astype(np.float32)
    field = np.asarray(Image.fromarray(field).resize((size, size), Image.Resampling.BICUBIC))
    contrast = r.uniform(8, 32) * r.uniform(0.5, 1, 3)
    return np.clip(base + field[..., None] * contrast, 0, 255).astype(np.uint8)


class _Canvas:
    """A picture being drawn: places boxes without overlap, paints them, and labels the tokens they cover."""

    def __init__(self, r: np.random.Generator, texture: np.ndarray) -> None:
        self.r = r
        y, x = r.integers(0, texture.shape[0] - IMAGE_SIZE + 1, 2)
        self.image = texture[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE].astype(np.float32)
        self.boxes: list[tuple[int, int, int, int]] = []
        self.labels = np.full((5, SIDE, SIDE), -1, np.int64)  # kind, color, digit, quadrant, anchor
        self.labels[0] = self.labels[4] = 0
        self._cover = np.full((SIDE, SIDE), 9.9, np.float32)  # px a thing must exceed to own a token

    def place(self, height: int, width: int, tries: int = 25) -> tuple[int, int] | None:
        """A free top left corner (y, x), at least 1 px from every other box, or None after `tries` draws."""
        ys = self.r.integers(0, IMAGE_SIZE - height + 1, tries).tolist()
        xs = self.r.integers(0, IMAGE_SIZE - width + 1, tries).tolist()
        for y, x in zip(ys, xs, strict=True):
            if all(y > b + 1 or t > y + height + 1 or x > e + 1 or s > x + width + 1 for t, s, b, e in self.boxes):
                self.boxes.append((y, x, y + height, x + width))
                return y, x
        return None

    def paint(self, y: int, x: int, stencil: np.ndarray, color: np.ndarray | float) -> None:
        """Blend `color` in where stencil [h, w, 1] is 1."""
        h, w = stencil.shape[:2]
        region = self.image[y : y + h, x : x + w]
        region += stencil * (color - region)

    def label(self, y: int, x: int, cover: np.ndarray, kind: int, color=-1, digit=-1, quadrant=-1, anchor=False) -> None:
        """Give the tokens that the thing at (y, x) covers most its labels; cover: float [h, w] in [0, 1]."""
        h, w = cover.shape
        top, bottom, left, right = y // PATCH, (y + h - 1) // PATCH + 1, x // PATCH, (x + w - 1) // PATCH + 1
        pad = np.zeros(((bottom - top) * PATCH, (right - left) * PATCH), np.float32)
        pad[y - top * PATCH : y - top * PATCH + h, x - left * PATCH : x - left * PATCH + w] = cover
        area = pad.reshape(bottom - top, PATCH, right - left, PATCH).sum((1, 3))
        cy, cx = (y + h // 2) // PATCH, (x + w // 2) // PATCH
        if anchor:
            area[cy - top, cx - left] += 1000  # the anchor is always the thing's own
        best = self._cover[top:bottom, left:right]
        won = area > best
        best[won] = area[won]
        self.labels[:4, top:bottom, left:right][:, won] = np.array([kind, color, digit, quadrant])[:, None]
        if anchor:
            self.labels[4, cy, cx] = 1


def _draw_signs(c: _Canvas, num: int) -> tuple[Sign, ...]:
    signs = []
    for color in c.r.permutation(len(COLORS))[:num].tolist():
        spot = c.place(16, 26, 40)
        if spot is None:
            continue
        y, x = spot
        tens, units = c.r.integers(0, 10, 2).tolist()
        c.image[y : y + 16, x : x + 26] = _RGB[color] * c.r.uniform(0.85, 1.05)
        for k, value in enumerate((tens, units)):
            c.paint(y + 1, x + 2 + 12 * k, _digit(value), 15.0 if color in _DARK_INK else 250.0)
            c.label(y, x + 13 * k, np.ones((16, 13), np.float32), TENS + k, color, value, anchor=True)
        signs.append(Sign(color, tens, units, x, y))
    return tuple(signs)


def _draw_objects(c: _Canvas, num: int) -> tuple[Thing, ...]:
    """Objects with distinct (colour, shape) pairs, from a few colours and shapes so that both repeat."""
    colors = c.r.permutation(len(COLORS))[: c.r.integers(2, 6)]
    shapes = c.r.permutation(len(SHAPES))[: c.r.integers(3, 7)]
    pairs = c.r.permutation(len(colors) * len(shapes))[:num].tolist()
    objects = []
    for pair in pairs:
        color, shape = int(colors[pair // len(shapes)]), int(shapes[pair % len(shapes)])
        size = _SIZES[int(np.searchsorted(_SIZE_SHARES, c.r.random()))]
        spot = c.place(size, size)
        if spot is None:
            size = 12
            spot = c.place(size, size, 60)
        if spot is None:
            continue
        y, x = spot
        stencil = _stencil(SHAPES[shape], size)
        tint = np.clip(_RGB[color] * c.r.uniform(0.85, 1.1) + c.r.uniform(-12, 12, 3), 0, 255)
        c.paint(y, x, stencil, tint.astype(np.float32))
        thing = Thing(color, shape, x + size / 2, y + size / 2, size)
        c.label(y, x, stencil[..., 0], 1 + shape, color, quadrant=thing.quadrant, anchor=True)
        objects.append(thing)
    return tuple(objects)


def _draw_decoys(c: _Canvas, num: int) -> tuple[int, ...]:
    drawn = []
    for _ in range(num):
        which, size = int(c.r.integers(len(DECOYS))), _SIZES[c.r.integers(6)]
        spot = c.place(size, size)
        if spot is None:
            continue
        stencil = _stencil(DECOYS[which], size)
        c.paint(*spot, stencil, _GREY[c.r.integers(4)] + c.r.uniform(-10, 10))
        c.label(*spot, stencil[..., 0], DECOY)
        drawn.append(which)
    return tuple(drawn)


def _draw_clutter(c: _Canvas, num: int) -> tuple[int, ...]:
    drawn = []
    for _ in range(num):
        which = int(c.r.integers(len(CLUTTER)))
        h, w = c.r.integers(8, 17, 2).tolist()
        spot = c.place(h, w)
        if spot is None:
            continue
        if CLUTTER[which] == "mosaic":
            patch = np.kron(c.r.uniform(0, 255, (4, 4, 3)), np.ones((4, 4, 1)))
        elif CLUTTER[which] == "checkerboard":
            board = (np.add.outer(np.arange(16) // 2, np.arange(16) // 2) % 2)[..., None]
            one, two = _RGB[c.r.integers(0, len(COLORS), 2)]
            patch = board * one + (1 - board) * two
        else:
            patch = c.r.uniform(0, 255, (16, 16, 3))
        y, x = spot
        c.image[y : y + h, x : x + w] = patch[:h, :w]
        c.label(y, x, np.ones((h, w), np.float32), CLUTTERED)
        drawn.append(which)
    return tuple(drawn)


def scene(seed: int, level: int = FULL) -> Scene:
    """The scene of this seed. `level` 0 (one object, one sign) to 5 (the full world) is the curriculum of pre-training."""
    r = np.random.default_rng(seed)
    textures = _TEXTURES[split_of(seed)]
    canvas = _Canvas(r, _texture(textures[r.integers(len(textures))]))
    if level == FULL:
        num_signs = int(np.searchsorted((0.1, 0.45), r.random()))  # none 10 %, one 35 %, two 55 %
        num_objects, num_decoys, num_clutter = (int(r.integers(*span)) for span in ((3, 7), (2, 6), (2, 5)))
    else:
        num_signs = 1 if level < 2 else int(r.integers(1, 3))
        num_objects = int(r.integers(1, level + 2))
        num_decoys = int(r.integers(0, level + 1)) if level else 0
        num_clutter = int(r.integers(0, level)) if level else 0
    signs = _draw_signs(canvas, num_signs)
    objects = _draw_objects(canvas, num_objects)
    decoys = _draw_decoys(canvas, num_decoys)
    clutter = _draw_clutter(canvas, num_clutter)
    grain = r.standard_normal((IMAGE_SIZE, IMAGE_SIZE, 1), np.float32) * 6
    image = np.clip(canvas.image + grain, 0, 255).astype(np.uint8)
    kind, color, digit, quadrant, anchor = canvas.labels.reshape(5, NUM_TOKENS)
    return Scene(seed, image, objects, signs, decoys, clutter, kind, color, digit, quadrant, anchor.astype(bool))
