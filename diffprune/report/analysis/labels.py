"""How methods, budgets and benchmarks are written and drawn: one label, one colour, one place in the order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from diffprune.core import budget as budgets
from diffprune.core.registry import parse_call

NAMES = {
    "none": "Unpruned",
    "blind": "No image",
    "diffprune": "DiffPrune",
    "gumbel_topk": "Gumbel top-K",
    "gumbel_keepdrop": "Gumbel keep/drop",
    "random": "Random",
    "grid": "Grid",
    "attention": "Attention",
}
WORDS = {"attention": "self-attention"}  # options that would read wrong in a label
RULES = ("attention", "grid", "random")  # training-free and image-only
SEEDS = frozenset({"weights", "seed"})  # options that make another seed of one method, not another method
BENCHMARKS = {
    "gqa": "GQA", "mmbench": "MMBench", "mmbench_cn": "MMBench-CN", "mme": "MME", "pope": "POPE", "scienceqa": "ScienceQA",
    "vqav2": "VQAv2", "textvqa": "TextVQA", "seed": "SEED", "vizwiz": "VizWiz", "world": "World",
}  # fmt: skip

# Okabe and Ito's palette: told apart with every common colour blindness, and in grey by marker and dash.
_STYLES = {
    "Unpruned": ("#1a1a1a", "none", "-"),
    "DiffPrune": ("#0072B2", "o", "-"),
    "DiffPrune, question-aware": ("#56B4E9", "D", "-"),
    "Gumbel top-K": ("#D55E00", "s", "--"),
    "Gumbel keep/drop": ("#E69F00", "^", "--"),
    "Attention": ("#009E73", "v", ":"),
    "Grid": ("#CC79A7", "P", ":"),
    "Random": ("#808080", "x", ":"),
}
_SPARE = (("#8C564B", "<", "-."), ("#7B4FA3", ">", "-."), ("#B8860B", "h", "-."), ("#3B6E6E", "*", "-."), ("#A03030", "p", "-."))


@dataclass(frozen=True)
class Method:
    """A method apart from its seeds: `name` is the plug-in, `options` the words that tell variants apart."""

    name: str
    options: tuple[str, ...]
    replaced: bool = False

    @property
    def label(self) -> str:
        return ", ".join((NAMES.get(self.name, self.name[:40]), *self.options))

    @property
    def order(self) -> tuple[int, int, str]:
        """Unpruned, DiffPrune, Gumbel-Softmax, the rules, others; then what also reads the question; then variants."""
        families = ("none", "diffprune", "gumbel_topk", "gumbel_keepdrop", "gumbel", "", *RULES)
        family = self.name if self.name in families else "gumbel" if self.gumbel else ""
        special = 1 if self.options == ("question-aware",) else 2 if self.options and not self.gumbel else 0
        return special, families.index(family), self.label

    @property
    def gumbel(self) -> bool:
        return self.name.startswith("gumbel")

    @property
    def reads_question(self) -> bool:
        return "question-aware" in self.options

    @property
    def rule(self) -> bool:
        return self.name in RULES


def _option(key: str, value: object) -> str:
    words = WORDS.get(key, key.replace("_", "-"))
    if value is True:
        return words
    if value is False or value is None:
        return f"without {words}"
    return f"{words} {value}"


@lru_cache(maxsize=4096)
def method(spelling: str) -> Method:
    """The method a spelling belongs to; weights and seeds are dropped, `replaced(...)` is looked through.

    A spelling that is no call (a foreign row) is its own method, cut to 40 characters.
    """
    try:
        name, args, kwargs = parse_call(spelling)
    except ValueError:
        return Method(spelling[:40] or "?", ())
    if name == "replaced":
        inner = method(str(kwargs.get("method", args[0] if args else "")))
        return Method(inner.name, inner.options, replaced=True)
    return Method(name, tuple(_option(k, v) for k, v in sorted(kwargs.items()) if k not in SEEDS))


def ordered(spellings: Iterable[object]) -> list[str]:
    """Labels of the methods spelled, each once, in the order of tables."""
    orders = {made.label: made.order for made in map(method, map(str, spellings))}
    return sorted(orders, key=orders.__getitem__)


@lru_cache(maxsize=4096)
def budget(spelling: str) -> tuple[str, float]:
    """(kind, number): ("Keep", 16), ("Share", 0.11), ("Above", 0.5), or ("", nan) for what is no budget."""
    try:
        value = budgets.parse(spelling)
    except ValueError:
        return "", float("nan")
    return type(value).__name__, float(vars(value)[_FIELDS[type(value)]])


_FIELDS = {budgets.Keep: "num", budgets.Share: "share", budgets.Above: "threshold"}


@lru_cache(maxsize=4096)
def benchmark(spelling: str) -> str:
    """`world(like='pope')` -> `POPE`, `custom(path='data/shop')` -> `shop`: the column heading."""
    try:
        name, args, kwargs = parse_call(spelling)
    except ValueError:
        return spelling[:24] or "?"
    if name in ("custom", "lmms"):
        return Path(str(kwargs.get("path") or kwargs.get("task") or (args or [name])[0])).stem
    like = kwargs.get("like", args[0] if args else None) if name == "world" else None
    return BENCHMARKS.get(str(like), str(like)) if like else BENCHMARKS.get(name, name)


def style(label: str) -> tuple[str, str, str]:
    """Colour, marker and dash of a method, the same in every figure of every report."""
    if label in _STYLES:
        return _STYLES[label]
    return _SPARE[sum(map(ord, label)) % len(_SPARE)]
