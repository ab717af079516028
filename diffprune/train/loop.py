"""Training scorers: a loop over arms and seeds that knows a `Context`, not a cluster. One arm's step is in `arm.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from diffprune import data as training
from diffprune.core.records import Step
from diffprune.core.spec import Spec
from diffprune.core.vlm import VLM
from diffprune.data import TrainBatch
from diffprune.io import checkpoint
from diffprune.train.checkpoints import read_steps
from diffprune.train.context import Context
from diffprune.train.recipe import Recipe
from diffprune.train.scorer_trainer import Arm, drawn, name


def scorers(recipe: Recipe, folder: Path | str) -> dict[tuple[Spec, int], Path]:
    """Where the scorer of each method and seed is, or will be, saved."""
    return {(spec, seed): Path(folder) / "scorers" / name(spec, seed) for seed in recipe.seeds for spec in recipe.pruners}


def missing(recipe: Recipe, folder: Path | str) -> list[tuple[Spec, int]]:
    """The methods and seeds that `folder` does not hold yet, or holds damaged.

    Raises:
        ValueError: it holds one that another recipe made; training would silently replace it.
    """
    left = []
    for (spec, seed), place in scorers(recipe, folder).items():
        try:
            facts = checkpoint.read(place)[1].get("facts", {})
        except ValueError:
            left.append((spec, seed))
            continue
        if (facts.get("recipe_key"), facts.get("seed")) != (recipe.key(spec), seed):
            raise ValueError(f"{place} was trained by another recipe; choose another folder or remove it")
    return left


def train(recipe: Recipe, context: Context, load: Callable[..., VLM]) -> list[Path]:
    """Train what is missing of all arms and seeds, one after the other; returns the scorers' folders in recipe order.

    load: gives the VLM by name (and `dtype`, where the recipe states one); not called when nothing is missing.

    Raises:
        ValueError: a folder holds another recipe's scorer. Diverged: an arm's loss stayed NaN or infinite. BadData: no batch.
    """
    left = missing(recipe, context.files.folder)
    options = {} if recipe.dtype == "auto" else {"dtype": recipe.dtype}
    vlm = load(recipe.model, **options) if left else None
    for spec, seed in left:
        assert vlm is not None
        _fit(Arm(context, vlm, recipe, spec, seed))
    return list(scorers(recipe, context.files.folder).values())


def _due(every: int, step: int, steps: int) -> bool:
    return every > 0 and ((step + 1) % every == 0 or step + 1 == steps)


def _fit(arm: Arm) -> None:
    """Train one arm to the end and save it."""
    context, recipe = arm.context, arm.recipe
    arm.resume()
    context.begin(arm.name, arm.done)
    batches = _batches(arm)
    while arm.done < recipe.steps:
        batch, t = drawn(context, lambda: next(batches)), arm.done
        probe = arm.grad_cosine(batch, t) if recipe.grad_cosine_every and t % recipe.grad_cosine_every == 0 else math.nan
        row = replace(arm.step(batch), grad_cosine=probe)
        if arm.batch is not None and _due(recipe.validate_every, t, recipe.steps):
            soft, hard = arm.validate()
            row = replace(row, validation_soft=soft, validation_hard=hard)
        context.report(arm.name, row)
        context.progress(line(arm.name, row, recipe.steps))
        if _due(recipe.checkpoint_every, t, recipe.steps):
            context.save(arm.name, arm.state())
    _finish(arm)


def _batches(arm: Arm) -> Iterator[TrainBatch]:
    recipe, context = arm.recipe, arm.context
    return training.batches(
        arm.vlm, recipe.data, seed=arm.seed, images=recipe.images, rank=context.rank, world=context.world, start_step=arm.done,
        questions=recipe.questions_alone if arm.aware else recipe.questions, packed=arm.vlm.packs and not arm.aware,
        tally=arm.tally,
    )  # fmt: skip


def _finish(arm: Arm) -> None:
    """Save the scorer with what made it. config.json is written last, so half a folder is no scorer."""
    context, recipe = arm.context, arm.recipe
    broken = context.sum(torch.tensor(float(arm.tally.broken), device=context.device))
    if context.rank == 0:
        rows = read_steps(context.files.folder).get(arm.name, [])
        last = next((r for r in reversed(rows) if math.isfinite(r.validation_hard)), None)
        facts: dict[str, Any] = {
            "model": arm.vlm.name, "model_hash": arm.vlm.weights_hash, "dtype": arm.vlm.dtype,
            "features": arm.pruner.dims["features"],
            "seed": arm.seed, "steps": arm.done,
            "skipped_steps": arm.skips, "workers": context.world, "median_step_ms": round(median(r.step_ms for r in rows), 1),
            "validation_soft_nll": round(last.validation_soft, 4) if last else None,
            "validation_hard_nll": round(last.validation_hard, 4) if last else None,
            "broken_rows": int(broken), "first_broken": arm.tally.first,  # since the last (re)start; the first of this worker
            "recipe": recipe.model_dump(mode="json"), "recipe_key": recipe.key(arm.spec),
        }  # fmt: skip
        arm.networks.eval()
        context.files.check()
        arm.pruner.save_pretrained(scorers(recipe, context.files.folder)[arm.spec, arm.seed], **facts)
    context.discard(arm.name)


def line(scorer: str, row: Step, steps: int) -> str:
    """One step as the user sees it."""
    shown = f"train {scorer}  step {row.step + 1}/{steps}  loss {row.loss:.3f}"
    checked = f"  validation {row.validation_hard:.3f}" if math.isfinite(row.validation_hard) else ""
    return f"{shown}  keep {row.kept:.0f}  tau {row.temperature:.2f}  {row.step_ms:.0f} ms{checked}"
