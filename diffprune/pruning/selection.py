"""What a method selects, checked, and what it does to the tokens: some are replaced, some merged, some no longer valid."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diffprune.core.pruner import Pruner
from diffprune.core.site import Cut
from diffprune.core.tokens import Selection, VisualTokens


def chosen(pruner: Pruner, tokens: VisualTokens, cut: Cut) -> Selection:
    """What a method selects at one cut.

    Raises:
        ValueError: as the method's `select` does, or it answers with something else than a mask over the tokens.
    """
    found = pruner.select(tokens, cut)
    if not isinstance(found, Selection):
        raise ValueError(f"{pruner.label} selects a {type(found).__name__}, but must return a Selection")
    keep, wanted = found.keep, tokens.valid.shape
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != wanted:
        told = f"{keep.dtype} {list(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
        raise ValueError(f"{pruner.label} keeps {told}, but a selection's keep is a tensor of bool [B, N] = {list(wanted)}")
    return found


def applied(tokens: VisualTokens, chosen: Selection) -> VisualTokens:
    """The tokens after a selection: `valid` reduced to the survivors, features replaced or merged as it says."""
    if chosen.features is not None:
        deepstack = tokens.deepstack if chosen.deepstack is None else chosen.deepstack
        tokens = replace(tokens, features=chosen.features, deepstack=deepstack)
    if chosen.mix is not None:
        tokens = merged(tokens, chosen.keep, chosen.mix)
    return replace(tokens, valid=chosen.keep)


def merged(tokens: VisualTokens, keep: Tensor, mix: Tensor) -> VisualTokens:
    """Survivors as the weighted sums of tokens that `mix` says; `valid` is left as it is.

    keep, mix: of `Selection`. DeepStack features go the same way, and a token's size is shared out over the survivors it goes into
    in proportion to its weights. A survivor that is itself and nothing else stays as it is, bit by bit.
    """
    mix = mix.float().masked_fill(~tokens.valid[:, None], 0.0)
    index = keep.int().argsort(dim=1, descending=True, stable=True)[:, : mix.shape[1]]  # [B K], survivors first
    real = torch.arange(mix.shape[1], device=keep.device) < keep.sum(1, keepdim=True)
    alone = (mix.gather(2, index[..., None])[..., 0] == 1) & ((mix != 0).sum(-1) == 1)
    changed = (real & ~alone)[..., None]
    mix = mix * real[..., None]

    def added(values: Tensor) -> Tensor:
        """[B N C], each survivor replaced by its sum."""
        place = index[..., None].expand(-1, -1, values.shape[2])
        sums = mix @ values.float().masked_fill(~tokens.valid[..., None], 0.0)
        return values.scatter(1, place, torch.where(changed, sums.to(values.dtype), values.gather(1, place)))

    size = torch.ones_like(tokens.valid, dtype=torch.float32) if tokens.size is None else tokens.size
    sizes = (mix / mix.sum(1, keepdim=True).clamp_min(1e-30) * size[:, None]).sum(-1)
    deepstack = None if tokens.deepstack is None else added(tokens.deepstack)
    size = size.scatter(1, index, torch.where(real, sizes, size.gather(1, index)))
    return replace(tokens, features=added(tokens.features), deepstack=deepstack, size=size)
