"""What no tuning can find, refused before anything is timed: speedups that pruning does not give, questions that are not there."""

from __future__ import annotations

import math

from diffprune.core.vlm import VLM
from diffprune.timing.flops import prefill_flops
from diffprune.tune.cells import benchmarks, calibration_split
from diffprune.tune.options import Tuning

TEXT = 1  # text tokens of the shortest prompt: the fewer, the more pruning saves


def check(vlm: VLM, options: Tuning) -> None:
    """Refuse targets that cannot be met and splits that have no question to hold out.

    Raises:
        ValueError: names the setting, and what would be right.
    """
    shape = vlm.shape
    left = [[count] * shape.layers for count in (vlm.num_visual_tokens, 1)]
    mutual = [[] if vlm.packs else [count + TEXT for count in counts] for counts in left]
    whole, least = (prefill_flops(shape, counts, TEXT, both) for counts, both in zip(left, mutual, strict=True))
    for target in options.targets:
        if target <= 1:
            raise ValueError(f"tune.targets: {target:g} is no speedup, as keeping all tokens has 1: give numbers above 1")
        if target > whole / least:
            raise ValueError(
                f"tune.targets: {target:g} cannot be reached, as prefill with one of {vlm.num_visual_tokens} visual tokens left "
                f"still does 1/{whole / least:.3g} of the work: give numbers below that"
            )
    asked = [(benchmark, calibration_split(benchmark, options)) for benchmark in benchmarks(options)]
    share = math.ceil(options.calibration / len(asked))
    every = options.calibration + options.held_out
    used = {s.image_id for b, split in asked for s in b.samples(split, share, options.protocol)}
    found = {s.image_id for b, split in asked for s in b.samples(split, every, options.protocol)}
    if not found - used:
        raise ValueError(
            f"tune.calibration is {options.calibration:,} and takes all {len(used):,} pictures of split {asked[0][1]}, so "
            f"none is left to hold out: lower it, as in --set tune.calibration={max(1, len(used) // 2)}"
        )
