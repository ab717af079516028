"""The embedded VLM's world: small pictures of shapes, number signs, decoys and clutter, and what can be asked about them.

A scene is a 96 x 96 RGB picture made from one integer. Objects (6 shapes x 6 colours, 10-26 px, at any pixel) and signs
(two digits on a coloured plate) are asked about; decoys (grey, black) look like objects and never are; clutter is vivid and
means nothing. Things never overlap. A token is an 8 x 8 px patch, so a scene is 12 x 12 = 144 tokens.

A seed belongs to exactly one split, and each split has background textures of its own, so no picture of one split can occur in
another. numpy and PIL only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from zlib import crc32

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
}
_TEXTURES = {"train": range(0, 160), "calibration": range(160, 200), "test": range(200, 240)}

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


# --- what can be asked -----------------------------------------------------------------------------------------------
# The word that matters most ends every question; options stand before it. Answers are words, two at most.

LETTERS = ("A", "B", "C", "D")
CHINESE: Mapping[str, str] = dict(
    zip(
        SHAPES + COLORS,
        ("圆", "方块", "三角", "十字", "圆环", "星", "红", "绿", "蓝", "黄", "紫", "白"),
        strict=True,
    )
)
UNANSWERABLE = "unanswerable"
WORDS = (
    *SHAPES, *COLORS, *DIGITS, *LETTERS, *CHINESE.values(),
    *"yes no unanswerable top bottom left right".split(),
    *"is there a what the color of shape that how many objects are where number on sign in :".split(),
    *"什么 颜色 的 形状 是".split(),
)  # fmt: skip

Asked = tuple[str, str]  # question, answer
_ALTERNATIVES: Mapping[str, tuple[str, ...]] = {
    "color": COLORS, "shape": SHAPES, "location": QUADRANTS, "count": DIGITS[:7],
}  # fmt: skip


def _one(r: np.random.Generator, of):
    return of[int(r.integers(len(of)))]


def _name(color: int, shape: int) -> str:
    return f"{COLORS[color]} {SHAPES[shape]}"


def _absent(s: Scene, r: np.random.Generator, how: str) -> tuple[int, int] | None:
    """A (colour, shape) no object has. random: any; popular: the commonest colour of the scene; adversarial: both seen."""
    seen = {(o.color, o.shape) for o in s.objects}
    colors, shapes = [o.color for o in s.objects], [o.shape for o in s.objects]
    if how == "random":
        pool = [(c, h) for c in range(len(COLORS)) for h in range(len(SHAPES))]
    elif how == "popular":
        top = max(sorted(set(colors)), key=colors.count)
        pool = [(top, h) for h in range(len(SHAPES))]
    else:
        pool = [(c, h) for c in colors for h in shapes]
    pool = [pair for pair in pool if pair not in seen]
    return _one(r, pool) if pool else None


def _existence(s: Scene, r: np.random.Generator, truth: bool | None = None, how: str | None = None) -> list[Asked]:
    """Is there a red ring; one in five asks for the shape alone."""
    truth = bool(r.random() < 0.5) if truth is None else truth
    if how == "shape" or (how is None and r.random() < 0.2):
        shapes = {o.shape for o in s.objects}
        pool = sorted(shapes if truth else set(range(len(SHAPES))) - shapes)
        return [(f"is there a {SHAPES[_one(r, pool)]}", "yes" if truth else "no")] if pool else []
    pair: tuple[int, int] | None
    if truth:
        o = _one(r, s.objects)
        pair = (o.color, o.shape)
    else:
        pair = _absent(s, r, how or _one(r, ("random", "popular", "adversarial")))
    return [(f"is there a {_name(*pair)}", "yes" if truth else "no")] if pair else []


def _color(s: Scene, r: np.random.Generator) -> list[Asked]:
    shapes = [o.shape for o in s.objects]
    pool = [o for o in s.objects if shapes.count(o.shape) == 1]
    if not pool:
        return []
    o = _one(r, pool)
    return [(f"what is the color of the {SHAPES[o.shape]}", COLORS[o.color])]


def _shape(s: Scene, r: np.random.Generator) -> list[Asked]:
    colors = [o.color for o in s.objects]
    pool = [o for o in s.objects if colors.count(o.color) == 1]
    if not pool:
        return []
    o = _one(r, pool)
    return [(f"what is the shape that is {COLORS[o.color]}", SHAPES[o.shape])]


def _count(s: Scene, r: np.random.Generator) -> list[Asked]:
    colors = [o.color for o in s.objects]
    color = _one(r, colors) if r.random() < 0.8 else int(r.integers(len(COLORS)))
    return [(f"how many objects are {COLORS[color]}", str(colors.count(color)))]


def _location(s: Scene, r: np.random.Generator) -> list[Asked]:
    pool = [o for o in s.objects if o.placed]
    if not pool:
        return []
    o = _one(r, pool)
    return [(f"where is the {_name(o.color, o.shape)}", QUADRANTS[o.quadrant])]


def _sign(s: Scene, r: np.random.Generator) -> list[Asked]:
    """One question per sign of the scene: the contrast pair from which choosing a sign by its colour is learnt."""
    return [(f"what number is on the sign in {COLORS[g.color]}", f"{g.tens} {g.units}") for g in s.signs]


def _position(s: Scene, r: np.random.Generator, truth: bool | None = None) -> list[Asked]:
    truth = bool(r.random() < 0.5) if truth is None else truth
    pool = [o for o in s.objects if o.placed]
    if not pool:
        return []
    o = _one(r, pool)
    quadrant = o.quadrant if truth else _one(r, [q for q in range(4) if q != o.quadrant])
    return [(f"in the {QUADRANTS[quadrant]} is there a {_name(o.color, o.shape)}", "yes" if truth else "no")]


def _tally(s: Scene, r: np.random.Generator, truth: bool | None = None) -> list[Asked]:
    truth = bool(r.random() < 0.5) if truth is None else truth
    colors = [o.color for o in s.objects]
    color = _one(r, colors)
    num = colors.count(color)
    said = num if truth else num + (1 if num == 1 or r.random() < 0.5 else -1)
    return [(f"are there {said} objects that are {COLORS[color]}", "yes" if truth else "no")]


def _missing(s: Scene, r: np.random.Generator) -> list[Asked]:
    """What cannot be answered: the colour of an absent shape, the shape of an absent colour, a sign that is not there."""
    shapes = sorted(set(range(len(SHAPES))) - {o.shape for o in s.objects})
    colors = sorted(set(range(len(COLORS))) - {o.color for o in s.objects})
    plates = sorted(set(range(len(COLORS))) - {g.color for g in s.signs})
    pool = [f"what number is on the sign in {COLORS[_one(r, plates)]}"]
    if shapes:
        pool.append(f"what is the color of the {SHAPES[_one(r, shapes)]}")
    if colors:
        pool.append(f"what is the shape that is {COLORS[_one(r, colors)]}")
    return [(_one(r, pool), UNANSWERABLE)]


def offered(options: Mapping[str, str], question: str) -> str:
    """The prompt of a multiple-choice question: letters and options, a colon, the question."""
    return " ".join(f"{letter} {option}" for letter, option in options.items()) + f" : {question}"


def _options(r: np.random.Generator, kind: str, answer: str, num: int) -> list[str]:
    """`num` distinct options in random order, the answer among them."""
    wrong = [a for a in _ALTERNATIVES[kind] if a != answer]
    picked = [answer, *(wrong[i] for i in r.permutation(len(wrong))[: num - 1])]
    return [picked[i] for i in r.permutation(num)]


def _chinese(question: str) -> str:
    """The Chinese wording of a colour or shape question."""
    words = question.split()
    stem = "什么 颜色 的" if words[3] == "color" else "什么 形状 是"
    return f"{stem} {CHINESE[words[-1]]}"


def _choice(s: Scene, r: np.random.Generator) -> list[Asked]:
    kind = _one(r, ("color", "color", "shape", "shape", "location", "count"))
    num = 4 if r.random() < 0.7 else 3
    asked = ASK[kind](s, r)
    if not asked:
        return []
    options = _options(r, kind, asked[0][1], num)
    return [(offered(dict(zip(LETTERS, options, strict=False)), asked[0][0]), LETTERS[options.index(asked[0][1])])]


def _choice_cn(s: Scene, r: np.random.Generator) -> list[Asked]:
    kind = _one(r, ("color", "shape"))
    asked = ASK[kind](s, r)
    if not asked:
        return []
    options = _options(r, kind, asked[0][1], 4)
    named = {letter: CHINESE[o] for letter, o in zip(LETTERS, options, strict=True)}
    return [(offered(named, _chinese(asked[0][0])), LETTERS[options.index(asked[0][1])])]


ASK: Mapping[str, Callable[..., list[Asked]]] = {
    "existence": _existence, "color": _color, "shape": _shape, "count": _count, "location": _location, "sign": _sign,
    "choice": _choice, "choice_cn": _choice_cn, "position": _position, "tally": _tally, "missing": _missing,
}  # fmt: skip
KINDS = tuple(ASK)
MIXTURE: Mapping[str, float] = {
    "existence": 0.10, "color": 0.10, "shape": 0.10, "count": 0.12, "location": 0.09, "sign": 0.16, "choice": 0.11,
    "choice_cn": 0.07, "position": 0.05, "tally": 0.05, "missing": 0.05,
}  # fmt: skip


def questions(
    s: Scene, rng: np.random.Generator, num: int = 12, mixture: Mapping[str, float] = MIXTURE
) -> list[tuple[str, str, str]]:
    """`num` questions about one scene, drawn freely from a mixture of kinds: (kind, question, answer).

    Kinds a scene cannot serve are drawn again; a question about signs brings one for each sign. Questions are distinct unless
    the scene runs out of them. `mixture` needs a kind that every scene serves (existence, count, tally, missing).
    """
    kinds, shares = list(mixture), np.array(list(mixture.values()))
    edges = np.cumsum(shares / shares.sum())
    found: list[tuple[str, str, str]] = []
    seen: set[str] = set()
    draws = 0
    while len(found) < num:
        draws += 1
        kind = kinds[min(int(np.searchsorted(edges, rng.random())), len(kinds) - 1)]
        for question, answer in ASK[kind](s, rng):
            if question not in seen or draws > 4 * num:
                found.append((kind, question, answer))
                seen.add(question)
    return found[:num]


def text_only(rng: np.random.Generator, num: int) -> list[tuple[str, str, str]]:
    """`num` questions that come without any picture, as a language model meets them: (kind, question, answer).

    lookup (two in three): which letter stands before a word, the options in English or Chinese - a dictionary and the form of
    multiple choice. empty: a question of the world where there is nothing to see - no, 0, unanswerable.
    """
    return [_lookup(rng) if rng.random() < 2 / 3 else _empty(rng) for _ in range(num)]


def _lookup(r: np.random.Generator) -> tuple[str, str, str]:
    kind = _one(r, ("color", "color", "shape", "shape", "location", "count"))
    answer = _one(r, _ALTERNATIVES[kind])
    options = _options(r, kind, answer, 4 if r.random() < 0.7 else 3)
    chinese = kind in ("color", "shape") and r.random() < 0.4
    named = {letter: CHINESE[o] if chinese else o for letter, o in zip(LETTERS, options, strict=False)}
    return "lookup", offered(named, f"what is {answer}"), LETTERS[options.index(answer)]


def _empty(r: np.random.Generator) -> tuple[str, str, str]:
    color, shape, quadrant = _one(r, COLORS), _one(r, SHAPES), _one(r, QUADRANTS)
    question, answer = _one(
        r,
        (
            (f"is there a {color} {shape}", "no"),
            (f"in the {quadrant} is there a {color} {shape}", "no"),
            (f"how many objects are {color}", "0"),
            (f"what is the color of the {shape}", UNANSWERABLE),
            (f"what is the shape that is {color}", UNANSWERABLE),
            (f"what number is on the sign in {color}", UNANSWERABLE),
        ),
    )
    return "empty", question, answer


# --- ten small benchmarks --------------------------------------------------------------------------------------------
# Scene i of a split serves all ten, so pictures are encoded once. A maker gives the rows of one scene - whole groups - or
# none when the scene cannot serve it; `rows` adds what all rows share.

Row = dict[str, object]


def _row(kind: str, asked: Asked, category: str, **more: object) -> Row:
    question, answer = asked
    return {"question": question, "answer": answer, "answers": None, "options": None, "category": category, "kind": kind} | more


def _ten(r: np.random.Generator, answer: str, others: tuple[str, ...]) -> list[str]:
    """Ten annotators: seven to ten agree with the answer, the rest give plausible others."""
    wrong = [o for o in others if o != answer]
    dissent = [_one(r, wrong) for _ in range(int(r.integers(0, 4)))]
    said = dissent + [answer] * (10 - len(dissent))
    return [said[i] for i in r.permutation(10)]


def _others(kind: str, answer: str, r: np.random.Generator) -> tuple[str, ...]:
    """What annotators who disagree could say."""
    if answer in ("yes", "no"):
        return ("yes", "no")
    if kind == "sign":
        tens, units = answer.split()
        return (f"{tens} {_one(r, DIGITS)}", f"{units} {tens}", tens, UNANSWERABLE)
    if kind == "missing":
        return (*COLORS, "no")
    return _ALTERNATIVES[kind]


def _annotated(kind: str, s: Scene, r: np.random.Generator, category: str) -> list[Row]:
    return [_row(kind, asked, category, answers=_ten(r, asked[1], _others(kind, asked[1], r))) for asked in ASK[kind](s, r)]


def _lettered(kind: str, s: Scene, r: np.random.Generator, num: int, category: str) -> list[Row]:
    asked = ASK[kind](s, r)
    if not asked:
        return []
    options = _options(r, kind, asked[0][1], num)
    named = dict(zip(LETTERS, options, strict=False))
    return [_row("choice", (offered(named, asked[0][0]), LETTERS[options.index(asked[0][1])]), category, options=named)]


def _circular(s: Scene, r: np.random.Generator, chinese: bool) -> list[Row]:
    """One question under the four rotations of its options (MMBench)."""
    kind = _one(r, ("color", "shape"))
    asked = ASK[kind](s, r)
    if not asked:
        return []
    question, answer = asked[0]
    options = _options(r, kind, answer, 4)
    found = []
    for k in range(4):
        turned = options[k:] + options[:k]
        named = {letter: CHINESE[o] if chinese else o for letter, o in zip(LETTERS, turned, strict=True)}
        prompt = offered(named, _chinese(question) if chinese else question)
        pair = (prompt, LETTERS[turned.index(answer)])
        found.append(_row("choice_cn" if chinese else "choice", pair, kind, options=named))
    return found


def _mme(s: Scene, r: np.random.Generator, turn: int) -> list[Row]:
    """One yes and one no about one picture; existence, count, position, color in turn."""
    category = ("existence", "count", "position", "color")[turn % 4]
    how = {"existence": ("shape",), "color": ("adversarial",)}.get(category, ())
    kind = {"count": "tally", "color": "existence"}.get(category, category)
    pair = [asked for truth in (True, False) for asked in ASK[kind](s, r, truth, *how)]
    return [_row(kind, asked, category) for asked in pair] if len(pair) == 2 else []


def _pope(s: Scene, r: np.random.Generator, turn: int) -> list[Row]:
    """One yes, one no; the absent pair is random, popular or adversarial in turn."""
    how = ("random", "popular", "adversarial")[turn % 3]
    pair = [asked for truth in (True, False) for asked in _existence(s, r, truth, how)]
    return [_row("existence", asked, how) for asked in pair] if len(pair) == 2 else []


def _gqa(s: Scene, r: np.random.Generator, turn: int) -> list[Row]:
    return [_row(kind, asked, kind) for kind in ("color", "shape") for asked in ASK[kind](s, r)]


def _mmbench(s: Scene, r: np.random.Generator, turn: int) -> list[Row]:
    return _circular(s, r, chinese=False)


def _mmbench_cn(s: Scene, r: np.random.Generator, turn: int) -> list[Row]:
    return _circular(s, r, chinese=True)


def _scienceqa(s: Scene, r: np.random.Generator, turn: int) -> list[Row]:
    return _lettered("location", s, r, 4, "location") + _lettered("count", s, r, 3, "count")


def _vqav2(s: Scene, r: np.random.Generator, turn: int) -> list[Row]:
    yes_no = ("existence", "position")[turn % 2]
    other = ("color", "location", "shape")[turn % 3]
    return [
        row
        for kind, category in ((yes_no, "yes/no"), ("count", "number"), (other, "other"))
        for row in _annotated(kind, s, r, category)
    ]


def _textvqa(s: Scene, r: np.random.Generator, turn: int) -> list[Row]:
    return _annotated("sign", s, r, "sign")


def _seed(s: Scene, r: np.random.Generator, turn: int) -> list[Row]:
    kinds = ("color", "shape", "location", "count")
    return [row for k in range(2) for row in _lettered(kinds[(turn + k) % 4], s, r, 4, kinds[(turn + k) % 4])]


def _vizwiz(s: Scene, r: np.random.Generator, turn: int) -> list[Row]:
    """About 35 % cannot be answered, as in the real one."""
    found = []
    for k in range(2):
        kind = "missing" if r.random() < 0.35 else ("color", "shape", "sign", "count")[(turn + k) % 4]
        category = UNANSWERABLE if kind == "missing" else "other"
        found += _annotated(kind, s, r, category)[:1]
    return found


_MAKERS: Mapping[str, Callable[[Scene, np.random.Generator, int], list[Row]]] = {
    "gqa": _gqa, "mmbench": _mmbench, "mmbench_cn": _mmbench_cn, "mme": _mme, "pope": _pope, "scienceqa": _scienceqa,
    "vqav2": _vqav2, "textvqa": _textvqa, "seed": _seed, "vizwiz": _vizwiz,
}  # fmt: skip
BENCHMARKS = tuple(_MAKERS)


def _groups(benchmark: str, split: str) -> Iterator[list[Row]]:
    """Groups of one benchmark in order: scene i of the split is the i-th that is looked at, for every benchmark."""
    if benchmark not in _MAKERS:
        raise ValueError(f"no benchmark {benchmark!r} in the world; there are {', '.join(BENCHMARKS)}")
    if split not in SPLITS:
        raise ValueError(f"no split {split!r} in the world; there are {', '.join(SPLITS)}")
    for turn, seed in enumerate(SPLITS[split]):
        r = np.random.default_rng([seed, crc32(benchmark.encode())])
        made = _MAKERS[benchmark](scene(seed), r, turn)
        shared = {"group": str(seed), "image_seed": seed}
        yield [{"id": f"{benchmark}-{seed}-{k}"} | shared | row for k, row in enumerate(made)]


def rows(benchmark: str, split: str, n: int) -> list[Row]:
    """At least `n` questions of one benchmark, in whole groups (so a few more), the same ones every time.

    A row: id; group (may never be split, and is what is resampled: the picture, whose rows are one circular group or one
    yes/no pair where the format has those); image_seed; question (the final prompt in world words, options included, without
    the system frame); answer (short gold answer); answers (ten annotators) or None; options (letter -> text) or None;
    category; kind (question type).
    """
    found: list[Row] = []
    for group in _groups(benchmark, split):
        if len(found) >= n:
            break
        found += group
    return found
