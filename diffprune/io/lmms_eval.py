"""Adapter to lmms-eval, an optional extra: the one file that imports it, with what its tasks and its model interface share.

`pip install 'diffprune[lmms-eval]'`. Nothing here costs anything until one of its names is used: without lmms-eval, `need` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from PIL import Image

from diffprune.core.errors import with_class
from diffprune.io.image import open_image

try:
    from lmms_eval.api.model import lmms
    from lmms_eval.api.registry import get_aggregation, get_metric_aggregation
    from lmms_eval.tasks import TaskManager, get_task_dict
    from lmms_eval.utils import load_yaml_config
except Exception as error:  # not only where it is missing: with a torchvision of another build its import fails in many ways
    broken: Exception | None = error
    lmms = object
    get_aggregation = get_metric_aggregation = TaskManager = get_task_dict = load_yaml_config = None
else:
    broken = None

__all__ = ["TaskManager", "get_aggregation", "get_metric_aggregation", "get_task_dict", "lmms", "load_yaml_config"]

MODEL = "diffprune"  # what tasks with prompts per model are told; none knows it, so theirs called `default` is used
NEW_TOKENS = 1024  # where a task sets none, as in lmms-eval's own LLaVA model


def need(what: str) -> None:
    """Refuse `what` where lmms-eval cannot be used.

    Raises:
        ValueError: it is not installed, or its import fails; says why.
    """
    if broken is None:
        return
    if isinstance(broken, ModuleNotFoundError) and (broken.name or "").partition(".")[0] == "lmms_eval":
        raise ValueError(f"{what} needs lmms-eval: pip install 'diffprune[lmms-eval]'")
    raise ValueError(f"{what} needs lmms-eval, which cannot be imported here ({with_class(broken)})")


def installed() -> str:
    """Version of lmms-eval, empty where it is not installed."""
    try:
        return version("lmms-eval")
    except PackageNotFoundError:
        return ""


def new_tokens(asked: Mapping[str, Any], where: str) -> int:
    """The most tokens of an answer by a task's `generation_kwargs`. Stop strings do not count: as in its LLaVA model, only the
    end token ends an answer.

    Raises:
        ValueError: the task wants sampling or beams; our answers are greedy.
    """
    sampled = asked.get("do_sample") and float(asked.get("temperature") or 1) > 0
    if sampled or int(asked.get("num_beams") or 1) > 1:
        raise ValueError(
            f"{where} wants sampled answers or several beams: ours are greedy, so its figure would mean something else"
        )
    return int(asked.get("max_new_tokens") or NEW_TOKENS)


def one_image(visuals: Sequence[Any] | None, where: str) -> Image.Image:
    """The picture a question is about.

    Raises:
        ValueError: none, several, or one that cannot be opened.
    """
    if not visuals or len(visuals) != 1:
        raise ValueError(f"{where} shows {len(visuals or ())} images: a question is asked about exactly one")
    return open_image(visuals[0], name=where)
