"""Trials of Ray Tune over numbers; a callback hears what they report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from ray import tune as ray_tune

from diffprune.distributed.cluster import private_folder


def failures(trial: Callable[..., None], num: int, teller: Any, resources: Mapping[str, float], **options: Any) -> tuple[int, str]:
    """Run `trial` with {"index": i} for each i below `num`; returns how many failed, and the last line of the first one's reason.

    teller: the callback, which alone keeps anything. resources: of one trial. options: of `ray.tune.TuneConfig`.
    """
    # Ctrl-C stays ours: Ray's handler ends the trials as if they were done, and then swallows one more.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    with private_folder() as folder:
        results = ray_tune.Tuner(
            ray_tune.with_resources(trial, dict(resources)),
            param_space={"index": ray_tune.grid_search(list(range(num)))},
            tune_config=ray_tune.TuneConfig(reuse_actors=True, **options),
            run_config=ray_tune.RunConfig(name="trials", storage_path=folder, callbacks=[teller], verbose=0),
        ).fit()
    reason = (str(results.errors[0]).strip().splitlines() or [""])[-1] if results.errors else ""
    return results.num_errors, reason
