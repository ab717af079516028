"""Average pooling of the grid: what a coarser encoder would give."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from diffprune.core.pruner import Pruner
from diffprune.core.site import Cut
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.pruners._lines import per_line

LONGEST = 2  # times as long as wide is what a window may be, else lines of unequal length serve better


class Pool(Pruner):
    """Means over even windows of the grid: adaptive average pooling to h x w = K, before the projector; looks at nothing.

    Of the factors h x w of the budget, those whose windows are nearest to square (64 = 8 x 8, 128 = 16 x 8, 192 = 16 x 12); a
    budget without good factors has lines of unequal length. A mean stands in the place of its window's middle token. Tokens that
    are no full grid (tiles, pictures of different size) are pooled along their sequence.
    """

    label = "Pooling"

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        keep, num = torch.zeros_like(tokens.valid), tokens.valid.shape[1]
        if tokens.grid and math.prod(tokens.grid) == num and bool(tokens.valid.all()):
            weights, middle = windows(*tokens.grid, cut.budget.count(num))
            keep[:, middle.to(keep.device)] = True
            return Selection(keep, weights.to(keep.device).expand(len(tokens), -1, -1))
        counts = [(n, cut.budget.count(n)) for n in tokens.counts.tolist()]
        mix = torch.zeros(len(tokens), max((k for _, k in counts), default=0), num, device=keep.device)
        for row, (total, count) in enumerate(counts):
            if not count:
                continue
            rows, columns = tokens.grid if tokens.grid and math.prod(tokens.grid) == total else (1, total)
            index, (weights, middle) = tokens.valid[row].nonzero()[:, 0], windows(rows, columns, count)
            keep[row, index[middle.to(index.device)]] = True
            mix[row, :count, index] = weights.to(mix.device)
        return Selection(keep, mix)


@lru_cache(maxsize=256)
def windows(rows: int, columns: int, count: int) -> tuple[Tensor, Tensor]:
    """(weights [count N] of the means over `count` windows of a raster, [count] int, the middle of each); raster order."""
    lines = pooled_lines(rows, columns, count)
    weights = torch.zeros(count, rows, columns)
    middle: list[int] = []
    for line, points in enumerate(per_line(count, lines)):
        up, down = line * rows // lines, -(-(line + 1) * rows // lines)
        for point in range(points):
            left, right = point * columns // points, -(-(point + 1) * columns // points)
            weights[len(middle), up:down, left:right] = 1 / ((down - up) * (right - left))
            middle.append(int((line + 0.5) * rows / lines) * columns + int((point + 0.5) * columns / points))
    return weights.flatten(1), torch.tensor(middle, dtype=torch.long)


def pooled_lines(rows: int, columns: int, count: int) -> int:
    """Lines of the pooled grid: a divisor of `count` where one gives windows that are about square, else the nearest number."""
    wanted = math.sqrt(count * rows / columns)
    fits = [h for h in range(1, min(rows, count) + 1) if count % h == 0 and count // h <= columns]
    shapes = {h: (h * columns, count // h * rows) for h in reversed(fits)}  # width and height of a window are in this ratio
    best = min(shapes, key=lambda h: max(shapes[h]) / min(shapes[h]), default=0)
    if best and max(shapes[best]) <= LONGEST * min(shapes[best]):
        return best
    return min(rows, max(math.ceil(count / columns), round(wanted)), count)
