"""Trials of Ray Tune over numbers; a callback hears what they report."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray import tune as ray_tune


def failures(
    trial: Callable[..., None], num: int, folder: Path, teller: Any, resources: Mapping[str, float], **options: Any
) -> tuple[int, str]:
    """Run `trial` with {"index": i} for each i below `num`; returns how many failed, and the last line of the first one's reason.

    folder: of Ray's files, which are removed; it ends in the number of the attempt, and those of earlier ones are removed, too.
    teller: the callback. resources: of one trial. options: of `ray.tune.TuneConfig`.
    """
    # Ctrl-C stays ours: Ray's handler ends the trials as if they were done, and then swallows one more.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    for left in folder.parent.glob(f"{glob.escape(folder.name.rpartition('-')[0])}-[0-9]*"):  # of earlier attempts, which are dead
        shutil.rmtree(left, ignore_errors=True)
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(trial, dict(resources)),
        param_space={"index": ray_tune.grid_search(list(range(num)))},
        tune_config=ray_tune.TuneConfig(reuse_actors=True, **options),
        run_config=ray_tune.RunConfig(name="trials", storage_path=str(folder), callbacks=[teller], verbose=0),
    )
    try:
        results = tuner.fit()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    reason = (str(results.errors[0]).strip().splitlines() or [""])[-1] if results.errors else ""
    return results.num_errors, reason
