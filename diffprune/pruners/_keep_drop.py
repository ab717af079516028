"""Keep or drop, token by token: Gumbel-Softmax over two logits, straight through, and a loss on the share that is kept."""

from __future__ import annotations

from torch import Tensor

from diffprune.core.fitted import Annealing, Progress
from diffprune.core.noise import Noise
from diffprune.core.tokens import Relaxation, VisualTokens


def geometric(progress: Progress, annealing: Annealing) -> float:
    """Temperature from 1 to the recipe's last one over all steps, as in Dynamic-LLaVA (arXiv 2412.00876)."""
    return float(annealing.end ** (progress.step / max(progress.steps - 1, 1)))


def keep_or_drop(
    tokens: VisualTokens, logits: Tensor, counts: Tensor, ratio_weight: float, temperature: float, noise: Noise
) -> Relaxation:
    """Of each token's logits of keep and drop [B N 2] one is drawn; gradients are those of the softmax (arXiv 2106.02034).

    Penalty: ratio_weight * (share kept - counts / tokens)^2, mean over images. counts: [B], tokens to let through.
    """
    gumbel = -(-noise.uniform(tokens.valid, 2).log()).log()
    soft = ((logits.log_softmax(-1) + gumbel) / temperature).softmax(-1)[..., 0]
    hard = (soft > 0.5).to(soft.dtype)
    mask = (hard + soft - soft.detach()).where(tokens.valid, 0.0)
    num = tokens.counts.clamp_min(1)
    penalty = ratio_weight * (mask.sum(1) / num - counts / num).square().mean()
    return Relaxation(tokens.features, let=hard.where(tokens.valid, 0.0).detach(), retention=mask, penalty=penalty)
