"""Ten small benchmarks over the embedded world, each with the answer format of one of the ten real ones.

Scene i of a split serves all ten, so pictures are encoded once. A maker gives the rows of one scene - whole groups - or none
when the scene cannot serve it; `rows` adds what all rows share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from zlib import crc32

import numpy as np

from diffprune.embedded.questions import (
    ALTERNATIVES,
    ASK,
    CHINESE,
    LETTERS,
    UNANSWERABLE,
    Asked,
    in_chinese,
    offered,
    options_of,
    pick,
)
from diffprune.embedded.world import COLORS, DIGITS, SPLITS, Scene, scene

Row = dict[str, object]


def _row(kind: str, asked: Asked, category: str, **more: object) -> Row:
    question, answer = asked
    return {"question": question, "answer": answer, "answers": None, "options": None, "category": category, "kind": kind} | more


def _ten(r: np.random.Generator, answer: str, others: tuple[str, ...]) -> list[str]:
    """Ten annotators: seven to ten agree with the answer, the rest give plausible others."""
    wrong = [o for o in others if o != answer]
    dissent = [pick(r, wrong) for _ in range(int(r.integers(0, 4)))]
    said = dissent + [answer] * (10 - len(dissent))
    return [said[i] for i in r.permutation(10)]


def _others(kind: str, answer: str, r: np.random.Generator) -> tuple[str, ...]:
    """What annotators who disagree could say."""
    if answer in ("yes", "no"):
        return ("yes", "no")
    if kind == "sign":
        tens, units = answer.split()
        return (f"{tens} {pick(r, DIGITS)}", f"{units} {tens}", tens, UNANSWERABLE)
    if kind == "missing":
        return (*COLORS, "no")
    return ALTERNATIVES[kind]


def _annotated(kind: str, s: Scene, r: np.random.Generator, category: str) -> list[Row]:
    return [_row(kind, asked, category, answers=_ten(r, asked[1], _others(kind, asked[1], r))) for asked in ASK[kind](s, r)]


def _lettered(kind: str, s: Scene, r: np.random.Generator, num: int, category: str) -> list[Row]:
    asked = ASK[kind](s, r)
    if not asked:
        return []
    options = options_of(r, kind, asked[0][1], num)
    named = dict(zip(LETTERS, options, strict=False))
    return [_row("choice", (offered(named, asked[0][0]), LETTERS[options.index(asked[0][1])]), category, options=named)]


def _circular(s: Scene, r: np.random.Generator, chinese: bool) -> list[Row]:
    """One question under the four rotations of its options (MMBench)."""
    kind = pick(r, ("color", "shape"))
    asked = ASK[kind](s, r)
    if not asked:
        return []
    question, answer = asked[0]
    options = options_of(r, kind, answer, 4)
    found = []
    for k in range(4):
        turned = options[k:] + options[:k]
        named = {letter: CHINESE[o] if chinese else o for letter, o in zip(LETTERS, turned, strict=True)}
        prompt = offered(named, in_chinese(question) if chinese else question)
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
    pair = [asked for truth in (True, False) for asked in ASK["existence"](s, r, truth, how)]
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
NAMES = tuple(_MAKERS)


def _groups(benchmark: str, split: str) -> Iterator[list[Row]]:
    """Groups of one benchmark in order: scene i of the split is the i-th that is looked at, for every benchmark."""
    if benchmark not in _MAKERS:
        raise ValueError(f"no benchmark {benchmark!r} in the world; there are {', '.join(NAMES)}")
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
