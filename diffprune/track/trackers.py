"""The trackers of a run together: one that fails is left out with a sentence, and the run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

from diffprune.core.errors import with_class
from diffprune.core.registry import nearest
from diffprune.track.mlflow import MLflow
from diffprune.track.tensorboard import TensorBoard
from diffprune.track.tracker import Scalars, Tracker
from diffprune.track.wandb import Wandb

EXTRAS: dict[str, Callable[[Path, str, Mapping[str, Any]], Tracker]] = {"wandb": Wandb, "mlflow": MLflow}


def checked(name: str) -> str:
    """`name`, if it is a tracker that is installed.

    Raises:
        ValueError: it is not; says what would be right.
    """
    if name not in EXTRAS:
        raise ValueError(f"no tracker {name!r:.60} beside TensorBoard, which is always told: {nearest(name, EXTRAS)}")
    if util.find_spec(name) is None:
        raise ValueError(f"the tracker {name!r} is not installed: pip install 'diffprune[{name}]'")
    return name


class Trackers:
    """TensorBoard and those a job names, opened for one run."""

    def __init__(self, folder: Path, run: str, names: Sequence[str], settings: Mapping[str, Any]) -> None:
        self._open: list[Tracker] = []
        self._guarded("TensorBoard", partial(self._start, TensorBoard, folder))
        for name in names:
            self._guarded(name, partial(self._start, EXTRAS[name], folder, run, settings))

    def _start(self, kind: Callable[..., Tracker], *given: Any) -> None:
        self._open.append(kind(*given))

    def log(self, rows: Iterable[Scalars]) -> None:
        """Tell every tracker."""
        told = list(rows)
        for one in list(self._open):
            if told and not self._guarded(one.name, partial(one.log, told)):
                self._open.remove(one)

    def close(self, failed: bool) -> None:
        """The run has ended."""
        for one in self._open:
            self._guarded(one.name, partial(one.close, failed))

    def _guarded(self, name: str, call: Callable[[], object]) -> bool:
        """Whether `call` succeeded; whatever a tracker raises, such as a network that is gone, is said once."""
        try:
            call()
        except Exception as error:
            why = " ".join((str(error) if isinstance(error, ValueError) else with_class(error)).split())[:300]
            print(f"{name} is told nothing more of this run, which goes on: {why}", flush=True)
            return False
        return True
