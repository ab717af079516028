"""Points spread evenly over a raster, line by line."""

from __future__ import annotations

from itertools import pairwise


def per_line(count: int, lines: int) -> list[int]:
    """`count` points shared out over `lines` lines, as evenly as whole numbers allow."""
    edges = [r * (count % lines) // lines for r in range(lines + 1)]
    return [count // lines + after - before for before, after in pairwise(edges)]
