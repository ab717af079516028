"""How often Python looks for garbage: for imports, and for work that makes millions of records and no cycles."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

SELDOM = (50_000, 20, 100)  # of `gc.set_threshold`: with Python's own, 30 % of a sweep's driver went into looking, 15 % of imports


@contextmanager
def looked_for_seldom() -> Iterator[None]:
    """For the length of a block, what is there already is not looked at, and what is made in it seldom."""
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    gc.freeze()
    gc.set_threshold(*SELDOM)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        if not frozen:  # else somebody further out wants it so
            gc.unfreeze()
