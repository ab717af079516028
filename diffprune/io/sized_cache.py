"""LRU caches bounded by the size of what they hold: bytes or rows, not a number of entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cachetools import LRUCache


def sized_cache(most: int, size: Callable[[Any], int]) -> LRUCache[Any, Any]:
    """A cache whose values together are at most `most` large by `size`; a single larger one is held alone."""
    most = max(most, 1)
    return LRUCache(most, getsizeof=lambda value: min(size(value), most))
