"""Balanced Token Pruning: staged cuts that weigh unlike tokens early and attention late (BTP, arXiv 2505.22038)."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from diffprune.core.budget import Budget
from diffprune.core.evidence import decoder_attention, decoder_features
from diffprune.core.fitted import CALIBRATION_IMAGES, Artifact, FittedPruner, FittingRun
from diffprune.core.pruner import Pruner, Reference
from diffprune.core.site import Cut, Plan, Site, Stage, staged
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.core.vlm import Shape
from diffprune.io import checkpoint as files
from diffprune.io.hub import scorer_folder
from diffprune.pruners._depth import scaled
from diffprune.pruners._greedy import cosines, farther
from diffprune.pruners._quotas import lowest
from diffprune.pruners._scorer_config import trained_on

ATTENTION = decoder_attention(raw=True)  # of the prompt's last token in the layer before the cut
AFTER = (3, 6, 14, 22)  # of 32 layers: the release cuts before the 4th, 7th, 15th and 23rd
POWERS = (1.0, 1.0, math.log2(3), math.log2(48))  # of the share a cut leaves: 576 -> 288 -> 144 -> 48 -> 1 where it is a half
POOLS = (318 / 86, 193 / 129, 57 / 48, 1.0)  # candidates among which attention is balanced, to one that is taken
SPATIAL = 0.5  # of what the first cut leaves: spread over the raster, 144 of 288
SHIFTED = 0.93  # cosine of a token before and behind a layer, below which the layer has changed it
CARD = """---
library_name: diffprune
tags: [visual-token-pruning]
---
# {spec}

Depths of cuts for `{model}`: after the decoder layers {after}. Use it with

    pruner = diffprune.from_pretrained("{folder}")

{facts}
"""


class Step(NamedTuple):
    """One cut. layer: after so many; power: of the share that it leaves; stage: of the published four, the first it stands for."""

    layer: int
    power: float
    stage: int


class Btp(FittedPruner):
    """Up to four cuts. Each keeps a share, lambda, of its tokens by attention, and fills up with those least like all it has.

    By attention: of the best (scaled products of queries and keys, mean over heads, query of the prompt's last token), more than
    are taken, those in the first part of the image come first, as many places as the cut leaves tokens; this balances that
    attention leans to the end of a sequence. By likeness: max-min of 1 - cosine of hidden states, begun with all that is chosen;
    in the first cut half of the tokens are spread over the raster before (max-min of Manhattan distance from the first).

    Shares, pools and depths are those of the authors' code for LLaVA-1.5 (86 of 288 by attention, 129 of 144, 48 of 48), where
    the paper's table has a lambda of 0.6, 0.8 and 1. `fit` moves each cut, among the layers nearer to its published depth than to
    another's, behind the one that changes most tokens of the calibration images (cosine below 0.93). The paper says that cuts
    lie around layers of large shifts; that rule, what is taken first where the parts of the first cut overlap, and that likeness
    is measured to all that is chosen in every cut, as the authors' code for Qwen2.5-VL does, are ours.

    How we differ: the budget is the average over layers, and one share follows from it, which cuts take to powers that make
    LLaVA-1.5's 576, 288, 144, 48 where it is a half (an average of 129). The last cut then leaves one token, where the release
    leaves none. Depths that fall together in a shallow decoder are one cut with both reductions and the first one's lambda.

    weights:     a folder it was saved to, or a repository of the Hub.
    lambdas:     share by attention in each of the four cuts.
    other_model: it may serve another model than the one it was calibrated on.

    Raises:
        ValueError: lambdas that are no four shares, or a folder with something else in it.
    """

    label = "BTP"
    reference = Reference("Balanced Token Pruning: Accelerating Vision Language Models Beyond Local Optimization", "2505.22038")
    option_labels = {"lambdas": "lambda", "other_model": "calibrated on another model"}
    needs = frozenset({ATTENTION})

    def __init__(
        self, weights: Path | None = None, *, lambdas: tuple[float, ...] = (0.3, 0.9, 1.0, 1.0), other_model: bool = False
    ) -> None:
        numbers = isinstance(lambdas, tuple) and all(type(x) in (int, float) and 0 <= x <= 1 for x in lambdas)
        if not numbers or len(lambdas) != len(AFTER):
            raise ValueError(
                f"btp(lambdas={lambdas!r}): give four shares from 0 to 1, one for each cut, as in (0.3, 0.9, 1.0, 1.0)"
            )
        self.lambdas, self.other_model = lambdas, other_model
        self.after: tuple[int, ...] | None = None
        self.layers, self.shift = 0, torch.zeros(0)
        if weights is not None:
            self._load(scorer_folder(str(weights)))

    def cuts(self, budget: Budget, shape: Shape) -> Plan:
        """Where it is not calibrated yet, at the published depths.

        Raises:
            ValueError: calibrated for a decoder of another depth, or a budget that its cuts cannot meet.
        """
        if self.after is not None and self.layers != shape.layers:
            raise ValueError(
                f"BTP was calibrated for a decoder of {self.layers} layers, this one has {shape.layers}; calibrate it anew"
            )
        steps = joined(self.after or published(shape.layers))
        return staged(budget, shape.layers, [s.layer for s in steps], [s.power for s in steps])

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        """Raises ValueError: it has not been calibrated, or no count is asked for."""
        if self.after is None:
            raise ValueError("btp is not calibrated yet: train it (diffprune train), then write btp(weights='folder')")
        counts, valid = cut.budget.counts(tokens.counts), tokens.valid
        stage = next(step.stage for step in joined(self.after) if step.layer == cut.site.layer)
        attended = floored(counts * self.lambdas[stage])
        keep = torch.zeros_like(valid)
        if stage == 0:
            keep = spread(tokens, floored(counts * min(SPATIAL, 1 - self.lambdas[0])).minimum(counts - attended))
        keep = keep | balanced(tokens.given(ATTENTION).float(), valid, attended, POOLS[stage], counts)
        return Selection(farther(cosines(tokens.features, valid).neg_(), keep, valid, counts))

    def fit(self, run: FittingRun) -> Artifact:
        """Shares of tokens that each layer but the last changes, and the depths they ask for. Two layers are looked at together."""
        self.layers = run.vlm.shape.layers
        self.shift = torch.tensor(
            [shifted(run.calibration(_Before(layer), CALIBRATION_IMAGES), layer) for layer in range(self.layers - 1)]
        )
        self.after = chosen(self.shift, published(self.layers))
        return run.save(self, images=CALIBRATION_IMAGES, after=list(self.after), shift=[round(x, 4) for x in self.shift.tolist()])

    def save_pretrained(self, folder: Path | str, **facts: Any) -> None:
        """config.json + model.safetensors + README.md in `folder`; `facts` go into config and card."""
        assert self.after is not None, "fit comes before save"
        lines = "\n".join(f"- {key}: {value}" for key, value in facts.items())
        depths = ", ".join(str(step.layer) for step in joined(self.after))
        told = {"spec": self.spec, "model": facts.get("model", "a VLM"), "after": depths, "folder": Path(folder).name}
        config = {"method": "btp", "spec": str(self.spec.without_places()), "layers": self.layers, "facts": facts}
        tensors = {"after": torch.tensor(self.after), "shift": self.shift}
        self.weights_sha256 = files.write(folder, tensors, config, CARD.format(facts=lines, **told))[:20]

    def _load(self, folder: Path) -> None:
        tensors, config = files.read(folder)
        if config.get("method") != "btp":
            raise ValueError(f"{folder}: these weights belong to {config.get('method')!r}, not to 'btp'")
        layers, after = config.get("layers"), tensors.get("after", torch.zeros(0)).flatten().tolist()
        deep = layers if isinstance(layers, int) else 0
        if len(after) != len(AFTER) or after != sorted(after) or not all(type(x) is int and 1 <= x < deep for x in after):
            raise ValueError(
                f"{folder / files.FILE}: tensor 'after' is {after}, but must be four depths in order, below the decoder's"
            )
        self.layers, self.after, self.shift = deep, tuple(after), tensors.get("shift", torch.zeros(0))
        self.weights_sha256 = config[files.CHECKSUM][:20]
        self.trained_on, self.recipe, self.trained_seed = trained_on(config, folder / files.CONFIG)


class _Before(Pruner):
    """Looks at hidden states before and behind one decoder layer. Removes nothing."""

    def __init__(self, layer: int) -> None:
        self.layer, self.needs = layer, frozenset({decoder_features(layer)})

    def cuts(self, budget: Budget, shape: Shape) -> Plan:
        return (Cut(Site(Stage.DECODER, self.layer + 1), budget),)

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        return Selection(tokens.valid)


def shifted(tokens: VisualTokens, layer: int) -> float:
    """Share of all valid tokens whose hidden states before and behind a layer have a cosine below `SHIFTED`."""
    before, behind = (x[tokens.valid].float() for x in (tokens.given(decoder_features(layer)), tokens.features))
    return float((functional.cosine_similarity(before, behind, dim=-1) < SHIFTED).float().mean())


def published(layers: int) -> tuple[int, ...]:
    """The release's depths as the same fractions of a decoder of `layers`; in a shallow one some are equal."""
    return tuple(scaled((one,), layers)[0] for one in AFTER)


def chosen(shift: Tensor, depths: tuple[int, ...]) -> tuple[int, ...]:
    """Depths near `depths`, each behind the layer with the largest `shift` [L - 1]; ties go to the nearest, then to the earlier."""
    found = []
    for depth in depths:
        near = [d for d in range(1, len(shift) + 1) if min(depths, key=lambda one: (abs(one - d), one)) == depth]
        found.append(max(near, key=lambda d: (float(shift[d - 1]), -abs(d - depth), -d)))
    return tuple(found)


def joined(after: tuple[int, ...]) -> tuple[Step, ...]:
    """The cuts, those at one depth as one."""
    return tuple(
        Step(depth, sum(p for p, one in zip(POWERS, after, strict=True) if one == depth), after.index(depth))
        for depth in sorted(set(after))
    )


def floored(values: Tensor) -> Tensor:
    """[B] int: whole numbers, rounded down as the release does; what is below one by the last digits alone is one."""
    return (values.double() + 1e-4).long()


def spread(tokens: VisualTokens, counts: Tensor) -> Tensor:
    """Mask [B N] of `counts` [B] tokens spread over the raster, or, of tokens without one, along the sequence: max-min from the
    first. Whole images of one size have the same, which are found once."""
    num = tokens.valid.shape[1]
    columns = tokens.grid[1] if tokens.grid else num
    asked = set(counts.tolist())
    if len(asked) == 1 and bool(tokens.valid.all()):
        return points(num, columns, *asked).to(counts.device).expand(len(counts), -1)
    return farther(raster(num, columns).to(counts.device), torch.zeros_like(tokens.valid), tokens.valid, counts)


@lru_cache(maxsize=64)
def points(num: int, columns: int, count: int) -> Tensor:
    """[1 N] bool: the spread of `count` of `num` tokens in lines of `columns`."""
    every = torch.ones(1, num, dtype=torch.bool)
    return farther(raster(num, columns), ~every, every, torch.tensor([count]))


def raster(num: int, columns: int) -> Tensor:
    """[N N] float: Manhattan distance of tokens in lines of `columns`."""
    place = torch.arange(num)
    row, column = place // columns, place % columns
    return ((row[:, None] - row).abs() + (column[:, None] - column).abs()).float()


def balanced(attention: Tensor, valid: Tensor, counts: Tensor, pool: float, early: Tensor) -> Tensor:
    """Mask [B N] of `counts` [B] tokens: of the `pool` times as many with most attention those among an image's `early` [B] first
    tokens, then the others, each by falling attention."""
    rank = attention.masked_fill(~valid, -math.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    candidates = valid & (rank < floored(counts * pool)[:, None])
    late = (valid.cumsum(1) - 1 >= early[:, None]).long()
    return lowest([late, rank], candidates, counts)
