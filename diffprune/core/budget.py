"""How many visual tokens survive: a closed set of three.

`Keep(64)` a count, `Share(1/9)` a share of each image's tokens, `Above(0.5)` a threshold on standardised scores.
A budget *picks from scores*, so a method that only scores never sees a count and gains thresholds for free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from diffprune.core.registry import nearest
from diffprune.core.spec import Call
from diffprune.core.spec import parse as parse_call


def standardise(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores [B N] with mean 0 and standard deviation 1 over each image's valid tokens.

    A scorer trained through a budgeted soft top-K is free up to a constant per image, so one threshold
    across images needs this. An image whose scores are all equal becomes all zeros.
    """
    scores, count = scores.float(), valid.sum(1, keepdim=True).clamp_min(1)
    mean = (scores.where(valid, 0.0)).sum(1, keepdim=True) / count
    centred = (scores - mean).where(valid, 0.0)
    variance = centred.square().sum(1, keepdim=True) / count
    return centred / variance.where(variance > 1e-24, 1.0).sqrt()  # so that the gradient is finite where all are equal


def top(scores: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    """Mask [B N] of the `count` [B] largest valid scores; ties go to the earlier token, so equal inputs prune equally."""
    scores = scores.float().where(valid, -math.inf)
    asked = count.tolist() if scores.is_cpu else []  # where asking is cheap, no sort unless the edge is a tie
    if 0 < (most := max(asked, default=0)) < scores.shape[1]:
        best = scores.topk(most, dim=1).values
        edge = best[:, -1:] if min(asked) == most else best.gather(1, count[:, None].clamp_min(1).long() - 1)
        kept = scores >= edge  # an edge of -inf takes padding in, and is found out by the count
        if kept.sum(1).tolist() == asked:
            return kept
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranked = torch.arange(order.shape[1], device=order.device) < count[:, None]
    return torch.empty_like(valid).scatter_(1, order, ranked).logical_and_(valid)


MOST = 10**9  # tokens that a budget may name; no image has so many


def _whole(number: object) -> bool:
    """Whether a value is a number of tokens: a whole one from 1 to `MOST`; a truth value is none."""
    return isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= MOST


def _spelled(number: float) -> float:
    """A number as budgets spell it, to six digits: equal spellings are equal budgets."""
    return float(f"{number:.6g}")


@dataclass(frozen=True)
class Keep:
    """Keep `num` tokens of every image (all of an image that has fewer)."""

    num: int

    def __post_init__(self) -> None:
        if not _whole(self.num):
            raise ValueError(
                f"Keep({self.num!r:.40}): the number of tokens to keep is a whole number of at least 1, at most {MOST:,}"
            )

    def count(self, total: int) -> int:
        return min(self.num, total)

    def counts(self, totals: Tensor) -> Tensor:
        """[B] int: `count` of each of `totals` [B]."""
        return totals.clamp_max(self.num)

    def pick(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Survivors [B N] bool among `valid`, by `scores` [B N]."""
        return top(scores, valid, self.counts(valid.sum(1)))

    def __str__(self) -> str:
        return f"Keep({self.num})"


@dataclass(frozen=True)
class Share:
    """Keep this share of every image's tokens, rounded to the nearest count, never below one."""

    share: float

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not (isinstance(self.share, (int, float)) and 0 < self.share <= 1):
            raise ValueError(f"Share({self.share!r}): the share to keep lies above 0 and at most 1")
        object.__setattr__(self, "share", _spelled(self.share))

    def count(self, total: int) -> int:
        return max(1, math.floor(self.share * total + 0.5)) if total else 0

    def counts(self, totals: Tensor) -> Tensor:
        """[B] int: `count` of each of `totals` [B]."""
        return (self.share * totals.double() + 0.5).long().clamp_min(1).minimum(totals)

    def pick(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Survivors [B N] bool among `valid`, by `scores` [B N]."""
        return top(scores, valid, self.counts(valid.sum(1)))

    def __str__(self) -> str:
        return f"Share({self.share:.6g})"


class CountNeeded(ValueError):
    """A method that needs a number of tokens was given a budget that names none."""


@dataclass(frozen=True)
class Above:
    """Keep tokens whose standardised score exceeds `threshold`; `least` to `most` of them, all of an image that has fewer."""

    threshold: float
    least: int = 1
    most: int | None = None

    def __post_init__(self) -> None:
        given = self.threshold
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not abs(given) <= MOST:  # NaN compares as False
            raise ValueError(f"Above({given!r:.40}): the threshold is a number of standard deviations, as in Above(0.5)")
        for name in ("least", "most"):
            count = getattr(self, name)
            if not (_whole(count) or (name == "most" and count is None)):
                raise ValueError(
                    f"Above({given!r:.40}, {name}={count!r:.40}): {name} is a number of tokens, a whole one of at least 1, at most "
                    f"{MOST:,}, as in Above(0.5, {name}=4)"
                )
        object.__setattr__(self, "threshold", _spelled(given))
        if self.most is not None and self.most < self.least:
            raise ValueError(f"{self}: needs 1 <= least <= most, else an image could lose every token")

    def count(self, total: int) -> int:
        """Raises CountNeeded: a threshold keeps a different number of every image."""
        raise CountNeeded(f"{self} keeps a different number of tokens per image; this method needs a count, as in Keep(64)")

    def counts(self, totals: Tensor) -> Tensor:
        """Raises CountNeeded, as `count` does."""
        return torch.full_like(totals, self.count(0))

    def pick(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Survivors [B N] bool among `valid`, by `scores` [B N]."""
        over = ((standardise(scores, valid) > self.threshold) & valid).sum(1)
        most = valid.sum(1) if self.most is None else valid.sum(1).clamp_max(self.most)
        return top(scores, valid, over.clamp_min(self.least).minimum(most))

    def __str__(self) -> str:
        extra = f", least={self.least}" if self.least != 1 else ""
        extra += f", most={self.most}" if self.most is not None else ""
        return f"Above({self.threshold:.6g}{extra})"


@dataclass(frozen=True)
class Eased:
    """A budget on its way down from everything, in training: N^(1 - g) K^g of an image's N tokens, of which `budget` keeps K.

    exponent: g in [0, 1], linear in the logarithm of the keep ratio; 0 keeps everything, 1 what `budget` keeps.
    """

    budget: Keep | Share
    exponent: float

    def count(self, total: int) -> int:
        return max(1, math.floor(total ** (1 - self.exponent) * self.budget.count(total) ** self.exponent + 0.5)) if total else 0

    def counts(self, totals: Tensor) -> Tensor:
        """[B] int: `count` of each of `totals` [B]."""
        return torch.tensor([self.count(total) for total in totals.tolist()], device=totals.device)

    def pick(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Survivors [B N] bool among `valid`, by `scores` [B N]."""
        return top(scores, valid, self.counts(valid.sum(1)))

    def __str__(self) -> str:
        return f"Eased({self.budget}, {self.exponent:.4g})"


@dataclass(frozen=True)
class Each:
    """A count of its own for every image of a batch: what a plan's cut means for images of several sizes.

    nums: in the order of the images.
    """

    nums: tuple[int, ...]

    def count(self, total: int) -> int:
        """The most that any of them keeps."""
        return min(max(self.nums), total)

    def counts(self, totals: Tensor) -> Tensor:
        """[B] int: those of the images, as far as they have so many."""
        return torch.tensor(self.nums, device=totals.device).minimum(totals)

    def pick(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Survivors [B N] bool among `valid`, by `scores` [B N]."""
        return top(scores, valid, self.counts(valid.sum(1)))

    def __str__(self) -> str:
        return f"Each({', '.join(map(str, self.nums))})"


Budget = Keep | Share | Above | Eased | Each
KINDS: dict[str, type[Keep] | type[Share] | type[Above]] = {"Keep": Keep, "Share": Share, "Above": Above}

EXAMPLES = {"Keep": "Keep(64)", "Share": "Share(1/9)", "Above": "Above(0.5) or Above(0.5, least=4, most=64)"}
SPELLINGS = "write Keep(64), Share(1/9), Above(0.5), 64 or 22%"


def parse(text: str) -> Budget:
    """A budget from its spelling: `Keep(64)`, `Share(1/9)`, `Above(0.5, least=4)`, or shorter `64`, `22%`, `1/9`, `0.11`.

    Raises:
        ValueError: not a budget, or one outside its range; the sentence says what would be right.
    """
    if not isinstance(text, str):
        raise ValueError(f"{f'{text!r}':.80} is not a budget: {SPELLINGS}")
    short = text.strip()
    if "(" not in short or short.endswith("%"):
        return _short(short)
    try:
        call = parse_call(short)
    except ValueError as error:
        raise ValueError(f"{error}: {SPELLINGS}") from None
    if call.name not in KINDS:
        raise ValueError(f"{text!r:.200} is not a budget: {SPELLINGS}")
    return KINDS[call.name](**_arguments(call))


def _arguments(call: Call) -> dict[str, Any]:
    """What a budget's call gives, by name.

    Raises:
        ValueError: an unknown option (the nearest is named), one value too many, or none; with what would be right.
    """
    known = [field.name for field in fields(KINDS[call.name])]
    right = EXAMPLES[call.name]
    if len(call.args) > len(known):
        raise ValueError(
            f"{call.name} takes {len(known)} value{'s' * (len(known) > 1)} at most, not {len(call.args)}: write {right}"
        )
    found = dict(zip(known, call.args, strict=False))
    for key, value in call.options:
        if key not in known:
            raise ValueError(f"{call.name} has no option {key!r:.200}: {nearest(key, known)}, as in {right}")
        if key in found:
            raise ValueError(f"{call.name} is given {key!r} twice: write {right}")
        found[key] = value
    if known[0] not in found:
        raise ValueError(f"{call.name} lacks its {known[0]}: write {right}")
    return found


def _short(text: str) -> Budget:
    """A budget without its name: `64`, `22%`, `1/9`, `0.11`."""
    over, slash, under = text.partition("/")
    number: float
    try:
        if text.endswith("%"):
            number = float(text[:-1]) / 100
        elif slash:
            number = float(over) / float(under)
        else:
            number = int(text) if text.lstrip("+-").isdigit() else float(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r} is not a budget: {SPELLINGS}") from None
    return Keep(number) if isinstance(number, int) else Share(number)
