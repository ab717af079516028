"""Held-out splits by image hash, and the shuffled row order of an epoch as a function of (seed, epoch) alone."""

from __future__ import annotations

import hashlib

import numpy as np

from diffprune.data.sources import CALIBRATION, TRAIN, VALIDATION

WINDOW = 1024  # rows shuffled together; what a reader keeps in memory where rows cannot be read one by one
EPOCH = 3  # stream of random numbers, beside those of `sources.py`
HELD_SHARE, HELD_MOST = 16, 1024


def fingerprint(image_id: str) -> int:
    """64-bit hash of an image's id."""
    return int.from_bytes(hashlib.blake2b(image_id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


BROKEN = 2**64 - 1  # stands for the picture of a row that names none that can be used: never held out, counted when it is drawn


def split(images: np.ndarray) -> np.ndarray:
    """Fingerprints of the rows' images, uint64 [n] -> the stream each row belongs to, int8 [n].

    The images of smallest fingerprint are for validation, the next for calibration, a sixteenth each (1 to 1024 images); the
    rest is for training. So all rows about an image fall together, and nothing depends on the order of the rows.

    Raises:
        ValueError: fewer than three images.
    """
    distinct = np.unique(images[images != BROKEN])
    if len(distinct) < 3:
        raise ValueError(f"found {len(distinct)} images; training, calibration and validation need one each at least")
    held = min(max(len(distinct) // HELD_SHARE, 1), HELD_MOST)
    found = np.full(len(images), TRAIN, np.int8)
    found[images < distinct[2 * held]] = CALIBRATION
    found[images < distinct[held]] = VALIDATION
    return found


class Order:
    """Endless epochs over rows, each row once per epoch.

    rows:   [n] row numbers, ascending.
    blocks: [n] the block each of them lies in, ascending, where whole blocks are read at once (a row group of Parquet); None where
            any row is read alone. Blocks are shuffled, then the rows of some blocks together, so that only those are in memory.
    """

    def __init__(self, rows: np.ndarray, blocks: np.ndarray | None = None) -> None:
        self.rows, self.made = rows, (0, -1)
        self.blocks = None if blocks is None else np.split(rows, np.flatnonzero(np.diff(blocks)) + 1)
        self.permuted, self.starts = rows, np.zeros(1, np.int64)

    def at(self, seed: int, position: int) -> int:
        """The row at a position, counted on over the epochs."""
        self._make(seed, position // len(self.rows))
        return int(self.permuted[position % len(self.rows)])

    def near(self, seed: int, position: int, random: np.random.Generator) -> int:
        """Some row that is shuffled together with the one at a position."""
        self._make(seed, position // len(self.rows))
        window = np.searchsorted(self.starts, position % len(self.rows), "right") - 1
        stop = self.starts[window + 1] if window + 1 < len(self.starts) else len(self.rows)
        return int(self.permuted[random.integers(self.starts[window], stop)])

    def _make(self, seed: int, epoch: int) -> None:
        if self.made == (seed, epoch):
            return
        random = np.random.default_rng([seed, EPOCH, epoch])
        if self.blocks is None:
            self.permuted, self.starts = random.permutation(self.rows), np.arange(0, len(self.rows), WINDOW)
        else:
            windows = [
                random.permutation(rows) for rows in _windows([self.blocks[b] for b in random.permutation(len(self.blocks))])
            ]
            self.permuted = np.concatenate(windows)
            self.starts = np.cumsum([0, *(len(rows) for rows in windows[:-1])])
        self.made = (seed, epoch)


def _windows(blocks: list[np.ndarray]) -> list[np.ndarray]:
    """Neighbouring blocks put together until each part has WINDOW rows; the last may have fewer."""
    found: list[list[np.ndarray]] = [[]]
    size = 0
    for rows in blocks:
        if size >= WINDOW:
            found.append([])
            size = 0
        found[-1].append(rows)
        size += len(rows)
    return [np.concatenate(parts) for parts in found]
