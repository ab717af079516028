"""Slot attention over visual tokens (Locatello et al., arXiv 2006.15055) and the decoder that rebuilds tokens from slots."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

ITERATIONS = 3
HEADS = 4  # of the decoder


class SlotAttention(nn.Module):
    """Standardised tokens [B N D] and draws [B K width] -> slots [B K width] and what each claims of every token [B K N].

    Slots start at mean + exp(log_deviation) * draw. Every iteration: attention of the tokens to the slots, a softmax over *slots*;
    each slot's mean of the values it claims; a GRU; a residual feed-forward. Gradients pass through the last iteration alone, and
    straight through to the start (bi-level optimisation, arXiv 2210.08990), as in OC-VTP's release.
    """

    blocks = ()

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.entering, self.inlet = nn.LayerNorm(features), nn.Linear(features, 2 * features)
        self.narrow, self.norm = nn.Linear(2 * features, width), nn.LayerNorm(width)
        self.key, self.value, self.query = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.asking, self.fed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.update = nn.GRUCell(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.mean = nn.Parameter(torch.randn(width) * width**-0.5)
        self.log_deviation = nn.Parameter(torch.zeros(width))

    def forward(self, z: Tensor, valid: Tensor, draws: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        """valid [B N], live [B K] bool: tokens and slots that are there; what is claimed by or of others is 0."""
        inside = self.norm(self.narrow(functional.gelu(self.inlet(self.entering(z)))))
        key, value = self.key(inside), self.value(inside)
        start = self.mean + self.log_deviation.exp() * draws
        slots, hidden = start, ~live[..., None]
        with torch.no_grad():
            for _ in range(ITERATIONS - 1):
                slots = self._iterate(slots, key, value, valid, hidden)[0]
        return self._iterate(slots.detach() + start - start.detach(), key, value, valid, hidden)

    def _iterate(self, slots: Tensor, key: Tensor, value: Tensor, valid: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        likeness = self.query(self.asking(slots)) @ key.transpose(1, 2) / key.shape[-1] ** 0.5
        claim = likeness.masked_fill(hidden, -torch.inf).softmax(1).where(valid[:, None], 0.0)
        share = claim / claim.sum(2, keepdim=True).clamp_min(1e-8)
        new = self.update((share @ value).flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        return new + self.feed(self.fed(new)), claim

    def flops(self, num: int) -> float:
        """Of `num` tokens of one image, forward, with a ninth as many slots."""
        slots, width = max(1, num // 9), self.key.out_features
        tokens = self.inlet.weight.numel() + self.narrow.weight.numel() + 2 * width**2
        each = width**2 + self.update.weight_ih.numel() + self.update.weight_hh.numel() + 8 * width**2
        return 2.0 * num * tokens + 2.0 * ITERATIONS * slots * (each + 2 * num * width)


class Rebuild(nn.Module):
    """Slots [B K width] and a few of the tokens -> all standardised tokens [B N D]; training only.

    A transformer decoder as wide as the tokens: its queries are the visible tokens, and one learned query for all others, each with
    its place; its memory is the slots. As in OC-VTP's release the queries are normalised once, for the first layer's sum too, and
    what comes out is read as it is.
    """

    def __init__(self, features: int, width: int, depth: int) -> None:
        super().__init__()
        wide = HEADS * math.ceil(features / HEADS)
        self.inlet, self.memory = (nn.Sequential(nn.Linear(n, wide, bias=False), nn.LayerNorm(wide)) for n in (features, width))
        self.hidden = nn.Parameter(torch.randn(wide) * wide**-0.5)
        layer = nn.TransformerDecoderLayer(wide, HEADS, 4 * wide, 0.0, "gelu", batch_first=True, norm_first=True, bias=False)
        self.layers = nn.TransformerDecoder(layer, depth)
        self.first, self.layers.layers[0].norm1 = self.layers.layers[0].norm1, nn.Identity()

    def forward(self, slots: Tensor, live: Tensor, z: Tensor, valid: Tensor, visible: Tensor) -> Tensor:
        """live [B K], valid, visible [B N] bool."""
        known = torch.where(visible[..., None], self.inlet(z), self.hidden)
        asked = known + places(z.shape[1], known.shape[-1], z.device)
        found: Tensor = self.layers(
            self.first(asked), self.memory(slots), tgt_key_padding_mask=~valid, memory_key_padding_mask=~live
        )  # fmt: skip
        return found[..., : z.shape[-1]]


def places(num: int, width: int, device: torch.device) -> Tensor:
    """[num width]: sines and cosines of a token's place in its image (Vaswani et al., arXiv 1706.03762, section 3.5)."""
    rate = 10_000 ** (-torch.arange(0, width, 2, device=device) / width)
    angle = torch.arange(num, device=device)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]
