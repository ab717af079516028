"""Whether the methods of a job can run on its model: one question through encoder, selection and cut before it starts."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from diffprune import pruning
from diffprune.core import registry
from diffprune.core.benchmark import Benchmark
from diffprune.core.budget import Above, Budget, CountNeeded
from diffprune.core.cell import Questions, describe
from diffprune.core.errors import with_class
from diffprune.core.fitted import FittedPruner
from diffprune.core.pruner import Kind, Pruner
from diffprune.core.site import for_images
from diffprune.core.spec import Spec
from diffprune.core.vlm import VLM


def check(vlm: VLM, methods: Sequence[Spec], asked: Questions, budgets: Sequence[Budget], leave_out: bool = False) -> None:
    """Try every method on the first question that is asked, at the first budget and at every threshold. Of one that is not
    trained yet only what it needs beside the features is looked at.

    leave_out: of the budgets, look at those that a method can meet in this model.

    Raises:
        ValueError: a method cannot run on this model, with the reason, and how the job does without it; or a threshold is asked
            of one that needs a count.
    """
    shown = _first_question(asked)
    if shown is None:  # data that cannot be opened are told by whoever asks them
        return
    for pruner in [registry.make("pruners", spec) for spec in methods]:
        try:
            if pruner.kind is not Kind.BOUND:
                _try(vlm, pruner, shown, _met(vlm, pruner, budgets) if leave_out else budgets)
        except CountNeeded as error:
            raise ValueError(
                f"{describe(pruner).label} cannot meet a budget of the job: {error}; or do without the method"
            ) from None
        except Exception as error:  # whatever a method or a model raises is the reason
            said = " ".join((str(error) if isinstance(error, ValueError) else with_class(error)).split()).rstrip(".")
            hint = "do without it: name the others as the job's baselines, or with --pruner"
            raise ValueError(f"{describe(pruner).label} cannot run on {vlm.name}: {said}; {hint}") from error


def _met(vlm: VLM, pruner: Pruner, budgets: Sequence[Budget]) -> list[Budget]:
    """The budgets that a method can meet in this model."""
    found = []
    for budget in budgets:
        with contextlib.suppress(ValueError):
            for_images(pruner.cuts(budget, vlm.shape), [vlm.shape.visual_tokens])
            found.append(budget)
    return found


def _first_question(asked: Questions) -> tuple[list[Any], str] | None:
    """(pictures, text) of the first question; None where it cannot be opened."""
    benchmark: Benchmark = registry.make("benchmarks", asked.benchmark)
    try:
        sample = benchmark.samples(asked.split, 1, asked.protocol)[0]
        return benchmark.images(sample), sample.question
    except (ValueError, OSError, IndexError):
        return None


def _waits(pruner: Pruner) -> bool:
    """Whether a method, or one inside it, is still to learn what it selects by."""
    return (isinstance(pruner, FittedPruner) and not pruner.ready) or (pruner.inner is not None and _waits(pruner.inner))


@torch.inference_mode()
def _try(vlm: VLM, pruner: Pruner, shown: tuple[list[Any], str], budgets: Sequence[Budget]) -> None:
    images, question = shown
    tokens = vlm.encode(vlm.pixels(images), pruner.needs)
    prompts = vlm.prompts([question], tokens.present.sum(1).tolist(), tokens.layout, [len(images)])
    if _waits(pruner):
        return
    thresholds = [budget for budget in budgets[1:] if isinstance(budget, Above)]  # which a method that needs a count cannot meet
    for budget in [*budgets[:1], *thresholds]:
        packed = pruning.shrink(vlm, prompts, tokens, pruner, budget)
        if packed.inside is not None:
            pruning.forward(vlm, packed, logits_to_keep=1)
