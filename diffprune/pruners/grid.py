"""Evenly spread tokens: what a lower resolution would keep (a control)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from diffprune.core.pruner import Pruner
from diffprune.core.site import Cut
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.pruners._lines import per_line


@lru_cache(maxsize=256)
def cells(rows: int, columns: int, count: int) -> tuple[int, ...]:
    """`count` distinct cells of a rows x columns raster, spread evenly; raster order.

    Raises:
        ValueError: more cells asked for than there are.
    """
    if count > rows * columns:
        raise ValueError(f"{count} cells do not fit a grid of {rows} x {columns}")
    lines = min(rows, max(math.ceil(count / columns), round(math.sqrt(count * rows / columns))), count)
    found = []
    for r, points in enumerate(per_line(count, lines)):
        row = int((r + 0.5) * rows / lines)
        found += [row * columns + int((j + 0.5) * columns / points) for j in range(points)]
    return tuple(found)


class Grid(Pruner):
    """Keeps a regular grid of tokens; looks at nothing."""

    label = "Grid"

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        keep, total, budget = torch.zeros_like(tokens.valid), tokens.valid.shape[1], cut.budget
        if tokens.grid and math.prod(tokens.grid) == total and bool(tokens.valid.all()):
            keep[:, list(cells(*tokens.grid, budget.count(total)))] = True
            return Selection(keep)
        for row, valid in enumerate(tokens.valid):  # some lack tokens: evenly along what is left
            index = valid.nonzero().squeeze(1)
            if not len(index):
                continue
            rows, columns = tokens.grid if tokens.grid and len(index) == math.prod(tokens.grid) else (1, len(index))
            keep[row, index[list(cells(rows, columns, budget.count(len(index))))]] = True
        return Selection(keep)
