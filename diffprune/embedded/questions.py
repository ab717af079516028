"""What can be asked about a scene of the embedded world: questions by kind, their answers, and the words of both.

The word that matters most ends every question; options stand before it. Answers are words, two at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from diffprune.embedded.world import COLORS, DIGITS, QUADRANTS, SHAPES, Scene, Thing

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
ALTERNATIVES: Mapping[str, tuple[str, ...]] = {
    "color": COLORS, "shape": SHAPES, "location": QUADRANTS, "count": DIGITS[:7],
}  # fmt: skip


def pick(r: np.random.Generator, of):
    """One item of a sequence, all alike."""
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
    return pick(r, pool) if pool else None


def _existence(s: Scene, r: np.random.Generator, truth: bool | None = None, how: str | None = None) -> list[Asked]:
    """Is there a red ring; one in five asks for the shape alone."""
    truth = bool(r.random() < 0.5) if truth is None else truth
    if how == "shape" or (how is None and r.random() < 0.2):
        shapes = {o.shape for o in s.objects}
        pool = sorted(shapes if truth else set(range(len(SHAPES))) - shapes)
        return [(f"is there a {SHAPES[pick(r, pool)]}", "yes" if truth else "no")] if pool else []
    pair: tuple[int, int] | None
    if truth:
        o = pick(r, s.objects)
        pair = (o.color, o.shape)
    else:
        pair = _absent(s, r, how or pick(r, ("random", "popular", "adversarial")))
    return [(f"is there a {_name(*pair)}", "yes" if truth else "no")] if pair else []


def _only(s: Scene, r: np.random.Generator, trait: str) -> list[Thing]:
    """One object that shares its `trait` ("color", "shape") with no other, so that the trait names it; [] where there is none."""
    values = [getattr(o, trait) for o in s.objects]
    pool = [o for o, value in zip(s.objects, values, strict=True) if values.count(value) == 1]
    return [pick(r, pool)] if pool else []


def _color(s: Scene, r: np.random.Generator) -> list[Asked]:
    return [(f"what is the color of the {SHAPES[o.shape]}", COLORS[o.color]) for o in _only(s, r, "shape")]


def _shape(s: Scene, r: np.random.Generator) -> list[Asked]:
    return [(f"what is the shape that is {COLORS[o.color]}", SHAPES[o.shape]) for o in _only(s, r, "color")]


def _count(s: Scene, r: np.random.Generator) -> list[Asked]:
    colors = [o.color for o in s.objects]
    color = pick(r, colors) if r.random() < 0.8 else int(r.integers(len(COLORS)))
    return [(f"how many objects are {COLORS[color]}", str(colors.count(color)))]


def _location(s: Scene, r: np.random.Generator) -> list[Asked]:
    pool = [o for o in s.objects if o.placed]
    if not pool:
        return []
    o = pick(r, pool)
    return [(f"where is the {_name(o.color, o.shape)}", QUADRANTS[o.quadrant])]


def _sign(s: Scene, r: np.random.Generator) -> list[Asked]:
    """One question per sign of the scene: the contrast pair from which choosing a sign by its colour is learnt."""
    return [(f"what number is on the sign in {COLORS[g.color]}", f"{g.tens} {g.units}") for g in s.signs]


def _position(s: Scene, r: np.random.Generator, truth: bool | None = None) -> list[Asked]:
    truth = bool(r.random() < 0.5) if truth is None else truth
    pool = [o for o in s.objects if o.placed]
    if not pool:
        return []
    o = pick(r, pool)
    quadrant = o.quadrant if truth else pick(r, [q for q in range(4) if q != o.quadrant])
    return [(f"in the {QUADRANTS[quadrant]} is there a {_name(o.color, o.shape)}", "yes" if truth else "no")]


def _tally(s: Scene, r: np.random.Generator, truth: bool | None = None) -> list[Asked]:
    truth = bool(r.random() < 0.5) if truth is None else truth
    colors = [o.color for o in s.objects]
    color = pick(r, colors)
    num = colors.count(color)
    said = num if truth else num + (1 if num == 1 or r.random() < 0.5 else -1)
    return [(f"are there {said} objects that are {COLORS[color]}", "yes" if truth else "no")]


def _missing(s: Scene, r: np.random.Generator) -> list[Asked]:
    """What cannot be answered: the colour of an absent shape, the shape of an absent colour, a sign that is not there."""
    shapes = sorted(set(range(len(SHAPES))) - {o.shape for o in s.objects})
    colors = sorted(set(range(len(COLORS))) - {o.color for o in s.objects})
    plates = sorted(set(range(len(COLORS))) - {g.color for g in s.signs})
    pool = [f"what number is on the sign in {COLORS[pick(r, plates)]}"]
    if shapes:
        pool.append(f"what is the color of the {SHAPES[pick(r, shapes)]}")
    if colors:
        pool.append(f"what is the shape that is {COLORS[pick(r, colors)]}")
    return [(pick(r, pool), UNANSWERABLE)]


def offered(options: Mapping[str, str], question: str) -> str:
    """The prompt of a multiple-choice question: letters and options, a colon, the question."""
    return " ".join(f"{letter} {option}" for letter, option in options.items()) + f" : {question}"


def options_of(r: np.random.Generator, kind: str, answer: str, num: int) -> list[str]:
    """`num` distinct options in random order, the answer among them."""
    wrong = [a for a in ALTERNATIVES[kind] if a != answer]
    picked = [answer, *(wrong[i] for i in r.permutation(len(wrong))[: num - 1])]
    return [picked[i] for i in r.permutation(num)]


def in_chinese(question: str) -> str:
    """The Chinese wording of a colour or shape question."""
    words = question.split()
    stem = "什么 颜色 的" if words[3] == "color" else "什么 形状 是"
    return f"{stem} {CHINESE[words[-1]]}"


def _choice(s: Scene, r: np.random.Generator) -> list[Asked]:
    kind = pick(r, ("color", "color", "shape", "shape", "location", "count"))
    num = 4 if r.random() < 0.7 else 3
    asked = ASK[kind](s, r)
    if not asked:
        return []
    options = options_of(r, kind, asked[0][1], num)
    return [(offered(dict(zip(LETTERS, options, strict=False)), asked[0][0]), LETTERS[options.index(asked[0][1])])]


def _choice_cn(s: Scene, r: np.random.Generator) -> list[Asked]:
    kind = pick(r, ("color", "shape"))
    asked = ASK[kind](s, r)
    if not asked:
        return []
    options = options_of(r, kind, asked[0][1], 4)
    named = {letter: CHINESE[o] for letter, o in zip(LETTERS, options, strict=True)}
    return [(offered(named, in_chinese(asked[0][0])), LETTERS[options.index(asked[0][1])])]


ASK: Mapping[str, Callable[..., list[Asked]]] = {
    "existence": _existence, "color": _color, "shape": _shape, "count": _count, "location": _location, "sign": _sign,
    "choice": _choice, "choice_cn": _choice_cn, "position": _position, "tally": _tally, "missing": _missing,
}  # fmt: skip
KINDS = tuple(ASK)
MIXTURE: Mapping[str, float] = {
    "existence": 0.10, "color": 0.10, "shape": 0.10, "count": 0.12, "location": 0.09, "sign": 0.16, "choice": 0.11,
    "choice_cn": 0.07, "position": 0.05, "tally": 0.05, "missing": 0.05,
}  # fmt: skip


def draw(s: Scene, rng: np.random.Generator, num: int = 12, mixture: Mapping[str, float] = MIXTURE) -> list[tuple[str, str, str]]:
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
    kind = pick(r, ("color", "color", "shape", "shape", "location", "count"))
    answer = pick(r, ALTERNATIVES[kind])
    options = options_of(r, kind, answer, 4 if r.random() < 0.7 else 3)
    chinese = kind in ("color", "shape") and r.random() < 0.4
    named = {letter: CHINESE[o] if chinese else o for letter, o in zip(LETTERS, options, strict=False)}
    return "lookup", offered(named, f"what is {answer}"), LETTERS[options.index(answer)]


def _empty(r: np.random.Generator) -> tuple[str, str, str]:
    color, shape, quadrant = pick(r, COLORS), pick(r, SHAPES), pick(r, QUADRANTS)
    question, answer = pick(
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
