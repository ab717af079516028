"""The networks every learned method shares: the same scorer and denoiser make a comparison of relaxations fair.

Shapes follow DiffPrune (arXiv 2605.28051, App. A and section 4.4): a scorer of pre-norm transformer blocks over the
tokens of one image, and a denoiser whose attention mask is the identity, which is a per-token network, or, as a control, everyone.
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


class LateInteraction(nn.Module):
    """Question-aware scores: a summary of the question beside every token, and late interaction of tokens with every word.

    The summary is the sum of mapped words over the root of their number, so that its size does not fall with the length of a
    question whose words point in many directions.

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

    def forward(self, z: Tensor, x: Tensor, text: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """z [B N D], x [B N width], text [B T D_text], valid [B T] -> x with the summary of the question, match [B N]."""
        words = self.norm(text.float())
        weight = valid[..., None].float()
        gist = (self.gist(words) * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1).sqrt()
        likeness = z @ functional.normalize(self.word(words), dim=-1).transpose(1, 2) / z.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        gated = likeness * self.gate(words).sigmoid().transpose(1, 2)
        best = gated.masked_fill(~valid[:, None, :], -1.0).amax(-1)
        return x + gist, self.strength * best


class CrossAttention(nn.Module):
    """Question-aware features of tokens: every token attends to the words of the question, whose values are added to it."""

    def __init__(self, text: int, width: int) -> None:
        super().__init__()
        self.heads = num_heads(width)
        self.norm, self.words = nn.LayerNorm(width), nn.LayerNorm(text)
        self.query, self.key_value, self.out = nn.Linear(width, width), nn.Linear(text, 2 * width), nn.Linear(width, width)

    def forward(self, z: Tensor, x: Tensor, text: Tensor, valid: Tensor) -> tuple[Tensor, None]:
        """As of late interaction, but there is no match. A question without words adds nothing."""
        batch, num, width = x.shape
        asked = valid.any(1)[:, None, None, None]
        query = self.query(self.norm(x)).view(batch, num, self.heads, -1).transpose(1, 2)
        words = self.key_value(self.words(text.float()))
        key, value = words.view(batch, -1, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=valid[:, None, None, :] | ~asked)
        return x + self.out(mixed.transpose(1, 2).reshape(batch, num, width)) * asked[:, 0], None


class Scorer(nn.Module):
    """Standardised tokens [B N D] -> scores [B N] (or [B N outputs]); the head has no bias: a constant never trains.

    depth: number of blocks; with none there is no norm either, so that a score is a linear function of its token, learnt as the
           product of two matrices.
    text:  width of the words, where the question is read; cross: by cross-attention instead of late interaction.
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
        cross: bool = False,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        self.inlet = nn.Linear(features, width)
        self.question: LateInteraction | CrossAttention | None = None
        if text:
            self.question = CrossAttention(text, width) if cross else LateInteraction(features, text, width)
        self.blocks = nn.ModuleList(Block(width, heads, attention) for _ in range(depth))
        self.norm = nn.LayerNorm(width) if depth else nn.Identity()
        self.head = nn.Linear(width, outputs, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, z: Tensor, valid: Tensor, text: Tensor | None = None, text_valid: Tensor | None = None) -> Tensor:
        x, match = self.inlet(z), None
        if self.question is not None and text is not None and text_valid is not None:
            x, match = self.question(z, x, text, text_valid)
        asked = z.is_cpu or not torch.cuda.is_current_stream_capturing()  # a graph under capture cannot be asked for values
        mask = None if asked and bool(valid.all()) else valid  # no mask keeps the fused kernel
        for block in self.blocks:
            x = block(x, mask)
        out = self.head(self.norm(x))
        if match is not None:
            out = out + functional.pad(match[..., None], (0, out.shape[-1] - 1))  # of several logits the first, which keeps
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

    everywhere: without that mask, which is the paper's control (Table 5): every token attends to all of its image.
    """

    def __init__(self, features: int, *, everywhere: bool = False) -> None:
        super().__init__()
        out, back = nn.Linear(features, features), nn.Linear(4 * features, features)
        for last in (out, back):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.attend = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, features), out)
        self.feed = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, 4 * features), nn.GELU(), back)
        self.match = nn.Linear(features, 2 * features) if everywhere else None

    def forward(self, z: Tensor, valid: Tensor) -> Tensor:
        """z [B N D], valid [B N] -> [B N D]."""
        z = z + (self.attend(z) if self.match is None else self._everywhere(z, valid))
        return z + self.feed(z)

    def _everywhere(self, z: Tensor, valid: Tensor) -> Tensor:
        assert self.match is not None, "queries and keys are those of the global denoiser"
        norm, own, out = self.attend
        normed, heads = norm(z), num_heads(z.shape[-1])
        parts = torch.cat([self.match(normed), own(normed)], -1)
        query, key, value = parts.view(*z.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=valid[:, None, None, :])
        found: Tensor = out(mixed.transpose(1, 2).reshape(z.shape))
        return found
