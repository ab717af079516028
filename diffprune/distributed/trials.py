"""Trials of Ray Tune over numbers, and who hears what they report."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from diffprune.distributed.cluster import private_folder
from diffprune.distributed.liveness import watched


class Hearer(Protocol):
    """Who alone keeps anything of trials, which are told by their numbers."""

    def reported(self, index: int, result: dict[str, Any]) -> None:
        """A trial has reported this."""

    def ended(self, index: int) -> None:
        """A trial has come to its end."""


def failures(
    trial: Callable[..., None],
    num: int,
    given: Mapping[str, Any],
    hearer: Hearer,
    resources: Mapping[str, float],
    computing: bool = False,
    **options: Any,
) -> dict[int, str]:
    """Run `trial` with {"index": i} for each i below `num`; returns the numbers of those that failed, each with its reason.

    given: what every trial gets beside its number. resources: of one trial. computing: trials compute by themselves, so that one
    whose process does nothing for long hangs, and is killed, which is its failure. options: of `ray.tune.TuneConfig`.
    """
    from ray import tune as ray_tune  # to import it takes half a second, of which most commands have no use

    running: dict[int, Any] = {}
    failed: dict[int, Any] = {}

    class Callback(ray_tune.Callback):
        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            running[trial.config["index"]] = trial

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
            hearer.reported(trial.config["index"], result)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            running.pop(trial.config["index"], None)
            hearer.ended(trial.config["index"])

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            running.pop(trial.config["index"], None)
            failed[trial.config["index"]] = trial

    def working() -> list[Any]:
        actors = [trial.temporary_state.ray_actor for trial in list(running.values())] if computing else []
        return [actor for actor in actors if actor is not None]

    # Ctrl-C stays ours: Ray's handler ends the trials as if they were done, and then swallows one more.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # else it prints the traceback of every trial that fails
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new one has a heading that no verbosity keeps from the terminal
    with private_folder() as folder, watched(working):
        ray_tune.Tuner(
            ray_tune.with_resources(ray_tune.with_parameters(trial, **given), dict(resources)),
            param_space={"index": ray_tune.grid_search(list(range(num)))},
            tune_config=ray_tune.TuneConfig(reuse_actors=True, **options),
            run_config=ray_tune.RunConfig(name="trials", storage_path=folder, callbacks=[Callback()], verbose=0),
        ).fit()
        return {index: _reason(trial.get_error()) for index, trial in sorted(failed.items())}


def _reason(error: BaseException | None) -> str:
    """The last line of what a trial raised, which Ray gives with all tracebacks on the way, without the module of its class."""
    last = (str(error or "").strip().splitlines() or [""])[-1] or (type(error).__name__ if error else "no reason given")
    return re.sub(r"^(?:\w+\.)+(?=\w+(?::|$))", "", last)
