"""Greedy selections as batched tensor code: one step chooses a token in every image at once, without asking the device.

Steps are as many as the largest image could need. An image that needs fewer goes on choosing, and the surplus is not read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SPANNED = 1e4  # below every logarithm of a length: what is spanned comes last, by its score
EPSILON = 1e-5  # of a squared length: what is left of a vector below this share is rounding


def comparable(likeness: Tensor) -> Tensor:
    """The likeness of tokens itself, where it has an order.

    Raises:
        ValueError: it is NaN somewhere, as that of infinite or damaged features is.
    """
    asked = likeness.is_cpu or not torch.cuda.is_current_stream_capturing()  # a graph under capture cannot be asked for values
    if asked and math.isnan(likeness.sum().item()):
        raise ValueError(
            "tokens are infinite or NaN, so that they cannot be compared: the model overflows in this dtype, or its weights are "
            "damaged"
        )
    return likeness


def cosines(features: Tensor, valid: Tensor) -> Tensor:
    """[B N N] float32: cosine of every two tokens [B N D], of a token with itself exactly 1; 0 at padding.

    Raises:
        ValueError: see `comparable`.
    """
    unit = torch.nn.functional.normalize(features.float().masked_fill(~valid[..., None], 0.0), dim=-1)
    found = comparable(unit @ unit.transpose(1, 2))
    found.diagonal(dim1=1, dim2=2).copy_(valid)
    return found


def first(order: Tensor, counts: Tensor, num: int) -> Tensor:
    """Mask [B N] of the first `counts` [B] tokens of each row of `order` [B steps]; num: N."""
    taken = torch.arange(order.shape[1], device=order.device) < counts[:, None]
    return order.new_zeros(len(order), num).scatter_add_(1, order, taken.long()) > 0


def hidden(valid: Tensor) -> Tensor:
    """[B N] float32: 0, and infinity at padding; to add or take away, which is faster by far than filling a mask in."""
    return torch.zeros(valid.shape, device=valid.device).masked_fill_(~valid, math.inf)


def some(mask: Tensor) -> Tensor:
    """[B N]: `mask.any(2)` of a bool tensor [B N M], which on a CPU takes twenty times as long."""
    return mask.view(torch.uint8).amax(2) > 0


def max_min(likeness: Tensor, valid: Tensor, steps: int) -> Tensor:
    """[B steps] int: tokens in the order in which each is the farthest from all chosen before it.

    likeness: [B N N], overwritten; any measure that falls with distance. The first is the token whose nearest other is farthest.
    Ties go to the earlier token.
    """
    batch, num, _ = likeness.shape
    padding, own = hidden(valid), likeness.diagonal(dim1=1, dim2=2)
    if not valid.is_cpu or not bool(valid.all()):  # asked where that is cheap
        likeness -= padding[:, None]
    own.fill_(-math.inf)
    chosen = [(likeness.amax(2) + padding).argmin(1)]
    own.fill_(math.inf)  # nothing is nearer to a chosen token than itself
    rows, base = likeness.view(batch * num, num), torch.arange(batch, device=likeness.device) * num
    nearest = rows.index_select(0, chosen[0] + base).masked_fill_(~valid, math.inf)
    new = torch.empty_like(nearest)
    for _ in range(steps - 1):
        chosen.append(nearest.min(1).indices)  # a third faster than argmin on a CPU, and the first of equals, too
        torch.maximum(nearest, torch.index_select(rows, 0, chosen[-1] + base, out=new), out=nearest)
    return torch.stack(chosen, 1)


def most_volume(kernel: Tensor, valid: Tensor, steps: int, logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Greedy MAP inference of a determinantal point process (arXiv 1709.05135, Algorithm 1).

    Returns [B steps] int, tokens in the order in which they are taken, and [B steps N], what each token has of the direction that
    each step adds: rows of the Cholesky factor of the chosen.

    kernel: [B N N], positive semi-definite. Each step takes the token whose vector has most length orthogonal to those chosen; once
    they span all vectors, the earlier token.

    logits: [B N] float32, l of the kernel e^l_i kernel_ij e^l_j that is meant: it may be as steep as one likes without overflowing,
            because the choice needs log(what is left of the kernel) + 2 l alone. Once the chosen span all vectors, the largest l.
    """
    batch, num, _ = kernel.shape
    rows, base = kernel.reshape(batch * num, num), torch.arange(batch, device=kernel.device) * num
    left = kernel.diagonal(dim1=1, dim2=2).clone()  # squared length that is orthogonal to the chosen
    rounding, least = EPSILON * left, -hidden(valid)  # least: what it may fall to, -inf at padding and at chosen tokens
    left += least
    basis = kernel.new_zeros(batch, steps, num)
    chosen = []
    for step in range(steps):
        if logits is None:
            length, pick = left.max(1, keepdim=True)
        else:
            gain = torch.where(left > 0, left.log() + 2 * logits, least - SPANNED + logits)
            pick = gain.argmax(1, keepdim=True)
            length = left.gather(1, pick)
        chosen.append(pick[:, 0])
        own = basis[:, :step].gather(2, pick[:, None].expand(-1, step, -1))
        row = rows.index_select(0, chosen[-1] + base)
        new = torch.baddbmm(row[:, None], own.transpose(1, 2), basis[:, :step], alpha=-1)[:, 0]
        new *= length.masked_fill(length <= 0, math.inf).rsqrt()
        basis[:, step] = new
        least.scatter_(1, pick, -math.inf)
        left = torch.where(left.addcmul_(new, new, value=-1) > rounding, left, least)
    return torch.stack(chosen, 1), basis


def unsuppressed(conflict: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    """Mask [B N] that non-maximum suppression leaves: by falling score, each that conflicts with no better one that was left.

    conflict: [B N N] bool, symmetric. Ties go to the earlier token. In every round those without an undecided better rival are
    left and suppress theirs, so that rounds are as many as the longest chain of rivals, not as the tokens.
    """
    rank = scores.masked_fill(~valid, -math.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    rivals = conflict & (rank[:, None] < rank[:, :, None])  # [b i j]: j is better than i, and both cannot be left
    kept, undecided = torch.zeros_like(valid), valid.clone()
    while bool(undecided.any()):
        wins = undecided & ~some(rivals & undecided[:, None])
        kept |= wins
        undecided &= ~(wins | some(rivals & wins[:, None]))
    return kept


def farther(distance: Tensor, chosen: Tensor, valid: Tensor, counts: Tensor, steps: int | None = None) -> Tensor:
    """Mask [B N] of `counts` [B] tokens: those `chosen` [B N], and again and again the one that is farthest from all of them.

    distance: [B N N] or [N N], any measure that grows with distance. Where nothing is chosen the first valid token is; ties go to
    the earlier. steps: as many as some image may miss; without it the device is asked.
    """
    batch, num = valid.shape
    distance, rows = distance.expand(batch, num, num), torch.arange(batch, device=valid.device)
    missing, order = counts - chosen.sum(1), []
    left = distance.masked_fill(~chosen[:, None], math.inf).amin(2).masked_fill(chosen | ~valid, -math.inf)
    for _ in range(int(missing.max()) if steps is None else steps):
        order.append(left.argmax(1))
        left = torch.minimum(left, distance[rows, :, order[-1]])
        left[rows, order[-1]] = -math.inf
    return chosen | first(torch.stack(order, 1), missing, num) if order else chosen
