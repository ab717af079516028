"""Fitting methods: a loop over arms and seeds that knows a `Context`, not a cluster. Single steps: `scorer_trainer.py`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from diffprune import data as training
from diffprune.core import registry
from diffprune.core.errors import first_line
from diffprune.core.fitted import Artifact, FittedPruner, TrainablePruner
from diffprune.core.pruner import Pruner
from diffprune.core.records import Step
from diffprune.core.spec import Spec
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import VLM
from diffprune.data import TrainBatch
from diffprune.io import checkpoint
from diffprune.io.image import digest
from diffprune.train.ahead import Ahead, BadData
from diffprune.train.checkpoints import Files, read_steps
from diffprune.train.context import Context, Ended
from diffprune.train.drawn_batches import DrawnBatches
from diffprune.train.objective import BadObjective, mistake
from diffprune.train.recipe import Recipe
from diffprune.train.scorer_trainer import Diverged, ScorerTrainer, calibration_tokens, name

POLL_S = 0.2  # between looks at what the other workers have finished
LESS = "less is needed with smaller parts (micro_images), layers computed again (checkpointing=True), fewer calibration_images"
KEPT_MIB = 512  # of batches that are kept for the next method of a seed


class Unfitted(RuntimeError):
    """Some scorers cannot be trained; all that can be are there."""


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
            facts = checkpoint.read(place)[1].get("facts")
            if not isinstance(facts, dict):
                raise ValueError(f"{place}: nothing says how it was trained")
            registry.make("pruners", spec.at(weights=place))
        except ValueError:
            left.append((spec, seed))
            continue
        if (facts.get("recipe_key"), facts.get("seed")) != (recipe.key(spec), seed):
            raise ValueError(f"{place} was trained by another recipe or other code; choose another folder or remove it")
    return left


def train(recipe: Recipe, context: Context, load: Callable[..., VLM]) -> list[Path]:
    """Train what is missing of all methods and seeds; returns the scorers' folders in recipe order.

    A method that fails for a reason of its own keeps none of the others from being trained.

    Several workers first share out whole scorers, each as many, which costs no exchange of gradients; what is left over, or all of
    them where the decoder is spread over the workers, they train together, each with its share of the images of every step.

    load: gives the VLM by name (and `dtype`, where the recipe states one); not called when nothing is missing.

    Raises:
        Ended: it was asked to. ValueError: a folder holds another recipe's scorer. BadData: no batch.
        Unfitted: at the end; a method's own code fails, its loss stayed NaN or infinite, or it needs more memory than there is.
        Exception: of storage, devices and the like, or on this worker alone while others wait for it; for who starts all again.
    """
    folder, known = context.files.folder, DrawnBatches(KEPT_MIB)
    left = _agreed(recipe, context)
    options = {} if recipe.dtype == "auto" else {"dtype": recipe.dtype}
    vlm = load(recipe.model, **options) if left else None
    share = 0 if context.world == 1 or recipe.shard else len(left) // context.world
    own, rest = left[context.rank * share : (context.rank + 1) * share], left[context.world * share :]
    for spec, seed in own:
        assert vlm is not None
        _fit(Run(context.apart(), vlm, recipe, spec, seed, known))
    if share and not _others_done(recipe, context, left[: context.world * share]):
        return []
    for spec, seed in rest:
        assert vlm is not None
        _fit(Run(context, vlm, recipe, spec, seed, known))
    if told := unfitted(recipe, context.files):
        raise Unfitted(told)
    return list(scorers(recipe, folder).values())


def unfitted(recipe: Recipe, files: Files) -> str:
    """What an attempt could not train, with reasons; "" where there is nothing."""
    failed, num = files.failures(), len(recipe.pruners) * len(recipe.seeds)
    told = "; ".join(failed.values())
    return f"{len(failed)} of {num} scorers cannot be trained: {told}" if failed and num > 1 else told


def _fit(run: Run) -> None:
    """Fit a method, or note why it cannot be.

    Raises:
        Exception: what is not the method's own; or it is, and noted, but other workers wait for this one in the middle of a step.
    """
    try:
        registry.make("pruners", run.spec).fit(run)
    except Exception as error:
        if not (reason := _its_own(run, error)):
            raise
        run.context.files.fail(name(run.spec, run.seed), reason)
        if run.context.world > 1 and not isinstance(error, Diverged):  # which all workers see alike
            raise


def _its_own(run: Run, error: Exception) -> str:
    """Why a method cannot be trained though others may; "" of an error that is not its own."""
    about = f"{run.spec}, seed {run.seed}"
    if isinstance(error, Diverged | BadObjective):
        return str(error)
    if isinstance(error, Ended | BadData):
        return ""
    if isinstance(error, torch.OutOfMemoryError):
        if run.recipe.fewest < run.recipe.workers:  # more workers may come, and each have less of a step
            return ""
        return f"{about}: too large for memory; {LESS}: {first_line(error)}"
    said = mistake(error, others=run.context.world > 1, code="its code")
    return said and f"{about}: {said}"


def _agreed(recipe: Recipe, context: Context) -> list[tuple[Spec, int]]:
    """What all workers find missing: one that looks late may see what another has finished meanwhile."""
    failed = context.files.failures()  # before this group was started again
    every = list(scorers(recipe, context.files.folder))
    mine = [key for key in missing(recipe, context.files.folder) if name(*key) not in failed]
    seen = context.sum(torch.tensor([float(key in mine) for key in every], device=context.device)).tolist()
    return [key for key, times in zip(every, seen, strict=True) if times == context.world]


def _others_done(recipe: Recipe, context: Context, apart: list[tuple[Spec, int]]) -> bool:
    """Wait until every scorer that some worker trains by itself is there; False when one of them cannot go on.

    Through the folder they share, not by a collective operation: these give up after a time that one training may well exceed.
    """
    places = scorers(recipe, context.files.folder)
    while apart := [key for key in apart if not checkpoint.is_complete(places[key])]:
        failed = context.files.failures()
        if all(name(*key) in failed for key in apart):
            return True
        if context.files.stopped() or context.files.ending():
            return False
        time.sleep(POLL_S)
    return True


def _due(every: int, step: int, steps: int) -> bool:
    return every > 0 and ((step + 1) % every == 0 or step + 1 == steps)


class Run:
    """What fitting one method of a recipe with one seed may use: `core.fitted.FittingRun`."""

    def __init__(self, context: Context, vlm: VLM, recipe: Recipe, spec: Spec, seed: int, known: DrawnBatches) -> None:
        self.context, self.vlm, self.recipe, self.spec, self.seed, self.known = context, vlm, recipe.of(spec), spec, seed, known
        self.calibrated_on = 0  # draws; of few data some are the same

    def calibration(self, pruner: Pruner, images: int) -> VisualTokens:
        """The same images on every worker."""
        self.calibrated_on = images
        tally = training.BrokenRows(self.recipe.max_broken_share)
        return calibration_tokens(self.context, self.vlm, self.recipe, pruner, images, tally)

    def train(self, pruner: TrainablePruner) -> Artifact:
        """Train to the end, going on where an earlier run stopped, and save."""
        trainer = ScorerTrainer(self.context, self.vlm, self.recipe, pruner, self.seed, self.known)
        _steps(trainer)
        self.context.files.log.flush()
        broken = self.context.sum(torch.tensor(float(trainer.tally.broken), device=self.context.device))
        trainer.networks.eval()
        artifact = self.save(pruner, **_facts(trainer, int(broken)) if self.context.rank == 0 else {})
        self.context.discard(trainer.name)
        return artifact

    def save(self, pruner: FittedPruner, **facts: Any) -> Artifact:
        """Written by the first worker. config.json is written last, so half a folder is no artefact. `images` of `facts` are told
        as the different ones that were drawn."""
        recipe, folder = self.recipe, scorers(self.recipe, self.context.files.folder)[self.spec, self.seed]
        if self.context.rank == 0:
            if "images" in facts:
                drawn = training.calibration_pictures(recipe.data, self.calibrated_on)
                facts["images"] = len(set(map(digest, drawn)))
            made_with = {"recipe": recipe.model_dump(mode="json"), "recipe_key": recipe.key(self.spec)}
            about = {"model": self.vlm.name, "model_hash": self.vlm.weights_hash, "dtype": self.vlm.dtype, "seed": self.seed}
            self.context.files.check()
            pruner.save_pretrained(folder, **{**about, **facts, **made_with})
        return Artifact(folder, pruner.weights_sha256)


def _steps(trainer: ScorerTrainer) -> None:
    """Every step that is missing."""
    context, recipe = trainer.context, trainer.recipe
    trainer.resume()
    context.begin(trainer.name, trainer.done)
    ahead = Ahead(context, batches(trainer), recipe.steps - trainer.done, trainer.count)
    ending: Callable[[], bool] = bool

    def meanwhile() -> None:
        nonlocal ending
        ending = context.begin_ending()
        ahead.draw()

    while trainer.done < recipe.steps:
        (batch, counted), t = ahead.next(), trainer.done
        probe = trainer.grad_cosine(batch, t) if recipe.grad_cosine_every and t % recipe.grad_cosine_every == 0 else math.nan
        row = replace(trainer.step(batch, counted, meanwhile), grad_cosine=probe)
        if trainer.batch is not None and _due(recipe.validate_every, t, recipe.steps):
            soft, hard = trainer.validate()
            row = replace(row, validation_soft=soft, validation_hard=hard)
        context.report(trainer.name, row)
        context.progress(line(trainer.name, row, recipe.steps))
        if (end := ending()) or _due(recipe.checkpoint_every, t, recipe.steps):
            context.save(trainer.name, trainer.state())
        if end and trainer.done < recipe.steps:
            raise Ended


def batches(trainer: ScorerTrainer) -> Iterator[TrainBatch]:
    """What a scorer is trained on, from its next step on."""
    recipe, context = trainer.recipe, trainer.context
    return trainer.known.batches(
        trainer.vlm, recipe.data, seed=trainer.seed, images=recipe.images, rank=context.rank, world=context.world,
        start_step=trainer.done, questions=recipe.questions_alone if trainer.aware else recipe.questions,
        packed=trainer.vlm.packs and not trainer.aware, tally=trainer.tally,
    )  # fmt: skip


def _facts(trainer: ScorerTrainer, broken: int) -> dict[str, Any]:
    """Figures of a finished training, from its step log."""
    rows = read_steps(trainer.context.files.folder).get(trainer.name, [])
    last = next((r for r in reversed(rows) if math.isfinite(r.validation_hard)), None)
    return {
        "features": trainer.width, "steps": trainer.done, "skipped_steps": trainer.skips, "workers": trainer.context.world,
        "median_step_ms": round(median(r.step_ms for r in rows), 1),
        "validation_soft_nll": round(last.validation_soft, 4) if last else None,
        "validation_hard_nll": round(last.validation_hard, 4) if last else None,
        "broken_rows": broken, "first_broken": _placeless(trainer.tally.first, trainer.recipe.data),
    }  # fmt: skip  # broken: since the last (re)start; the first of this worker


def _placeless(text: str, data: Spec) -> str:
    """A message about training data without the folders they lie in: cards travel."""
    for folder in sorted({str(up) for _, place in data.places for up in (Path(place), Path(place).parent)}, key=len, reverse=True):
        text = text.replace(f"{folder}/", "")
    return text


def line(scorer: str, row: Step, steps: int) -> str:
    """One step as the user sees it."""
    shown = f"train {scorer}  step {row.step + 1}/{steps}  loss {row.loss:.3f}"
    checked = f"  validation {row.validation_hard:.3f}" if math.isfinite(row.validation_hard) else ""
    return f"{shown}  keep {row.kept:.0f}  tau {row.temperature:.2f}  {row.step_ms:.0f} ms{checked}"
