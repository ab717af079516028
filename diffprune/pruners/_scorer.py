"""The networks every learned method shares: the same scorer and denoiser make a comparison of relaxations fair.

Shapes follow DiffPrune (arXiv 2605.28051, App. A and section 4.4): a scorer of pre-norm transformer blocks over the
tokens of one image, and a denoiser whose attention mask is the identity, which is a per-token network.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


def num_heads(width: int) -> int:
    """Attention heads: 64 wide each, as the paper's 16 of 1,024, and down to 16 wide in a narrow network."""
    return math.gcd(width, max(1, width // min(64, max(16, width // 16))))


class Block(nn.Module):
    """Pre-norm self-attention over valid tokens and a feed-forward of four times the width; attention may be left out.

    SiLU is GELU's sigmoid form, x sigmoid(1.702 x) as in CLIP, up to a scale the weights learn; torch's GELU on a CPU costs four
    times as much right after other work.
    """

    def __init__(self, width: int, heads: int, attention: bool) -> None:
        super().__init__()
        self.heads = heads
        self.mix = (
            nn.ModuleDict({"norm": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width)})
            if attention
            else None
        )
        self.feed = nn.ModuleDict(
            {"norm": nn.LayerNorm(width), "up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width)}
        )

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        if self.mix is not None:
            batch, num, width = x.shape
            query, key, value = self.mix["qkv"](self.mix["norm"](x)).view(batch, num, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            mask = None if valid is None else valid[:, None, None, :]
            mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            x = x + self.mix["out"](mixed.transpose(1, 2).reshape(batch, num, width))
        hidden = functional.silu(self.feed["up"](self.feed["norm"](x)))
        return x + self.feed["down"](hidden)


class Question(nn.Module):
    """Question-aware features of tokens: the mean question beside every token, and late interaction with every word.

    Late interaction: the best gated cosine between the token and a question word, which is mapped into the tokens' own space: words
    are few and tokens many, so that whatever is learnt here is paid per word.
    """

    def __init__(self, features: int, text: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(text)
        self.gist = nn.Linear(text, width)
        self.word = nn.Linear(text, features, bias=False)
        self.gate = nn.Linear(text, 1)
        self.strength = nn.Parameter(torch.tensor(2.0))

    def forward(self, z: Tensor, text: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """z [B N D], text [B T D_text], valid [B T] -> gist [B 1 width], match [B N]."""
        words = self.norm(text.float())
        weight = valid[..., None].float()
        gist = (self.gist(words) * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1).sqrt()
        likeness = z @ functional.normalize(self.word(words), dim=-1).transpose(1, 2) / z.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        gated = likeness * self.gate(words).sigmoid().transpose(1, 2)
        best = gated.masked_fill(~valid[:, None, :], -1.0).amax(-1)
        return gist, self.strength * best


class Scorer(nn.Module):
    """Standardised tokens [B N D] -> scores [B N] (or [B N outputs]); the head has no bias: a constant never trains.

    depth: number of blocks; with none there is no norm either, so that a score is a linear function of its token, learnt as the
           product of two matrices.
    """

    def __init__(
        self,
        features: int,
        width: int,
        depth: int,
        heads: int,
        *,
        attention: bool = True,
        text: int | None = None,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        self.inlet = nn.Linear(features, width)
        self.question = Question(features, text, width) if text else None
        self.blocks = nn.ModuleList(Block(width, heads, attention) for _ in range(depth))
        self.norm = nn.LayerNorm(width) if depth else nn.Identity()
        self.head = nn.Linear(width, outputs, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, z: Tensor, valid: Tensor, text: Tensor | None = None, text_valid: Tensor | None = None) -> Tensor:
        x, match = self.inlet(z), None
        if self.question is not None and text is not None and text_valid is not None:
            gist, match = self.question(z, text, text_valid)
            x = x + gist
        asked = z.is_cpu or not torch.cuda.is_current_stream_capturing()  # a graph under capture cannot be asked for values
        mask = None if asked and bool(valid.all()) else valid  # no mask keeps the fused kernel
        for block in self.blocks:
            x = block(x, mask)
        out = self.head(self.norm(x))
        if match is not None:
            out = out + match[..., None]
        return out.squeeze(-1)

    def flops(self, num: int) -> float:
        """Of `num` tokens of one image, forward: every matrix for every token, and attention over all pairs."""
        matrices = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        mixing = sum(block.mix is not None for block in self.blocks)
        return 2 * num * matrices + mixing * 4 * num**2 * self.inlet.out_features


class Denoiser(nn.Module):
    """Returns noised tokens to the distribution the frozen model expects; training only. Starts as the identity.

    One transformer block whose attention mask is the identity: softmax over one element is 1, so attention is
    W_O W_V LN(z). It never sees a neighbour, or noised tokens would receive the content of kept ones.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        out, back = nn.Linear(features, features), nn.Linear(4 * features, features)
        for last in (out, back):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.attend = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, features), out)
        self.feed = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, 4 * features), nn.GELU(), back)

    def forward(self, z: Tensor) -> Tensor:
        z = z + self.attend(z)
        return z + self.feed(z)
