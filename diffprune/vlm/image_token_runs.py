"""Unbroken runs of image tokens in rows of token ids, and what stands behind them."""

from __future__ import annotations

from torch import Tensor


def runs(ids: Tensor, token: int | bool) -> list[list[tuple[int, int]]]:
    """[B S] -> of each row, (start, stop) of every unbroken run of `token`, in order; a mask of slots has runs of True."""
    here = (ids == token).int()
    edge = here.new_zeros(len(here), 1)
    found = []
    for change in here.diff(dim=1, prepend=edge, append=edge).cpu():
        starts, stops = ((change == sign).nonzero()[:, 0].tolist() for sign in (1, -1))
        found.append(list(zip(starts, stops, strict=True)))
    return found


def behind(slots: Tensor) -> Tensor:
    """[B S] bool: what stands behind the last visual token of each row; all of a row without any."""
    return (slots.flip(1).cumsum(1) == 0).flip(1)
