"""What to train and how: the recipe and its schedules."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, field_validator, model_validator

from diffprune import data as training
from diffprune.config.fields import MOST, MOST_WORKERS, TEXT, BudgetValue, ModelSpec, PrunerSpec, Real, Seed, Whole
from diffprune.core import registry
from diffprune.core.budget import Budget, Eased, Keep, Share
from diffprune.core.fitted import FittedPruner, TrainablePruner
from diffprune.core.noise import generator
from diffprune.core.spec import Spec
from diffprune.vlm.load import fingerprint

DRAW, NOISE, PROBE, CHECK = range(4)  # streams of random numbers that never meet


class MethodSettings(BaseModel):
    """Settings in which the training of one method differs from its recipe's, such as a search's winners; None: it does not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pruner: PrunerSpec
    steps: Whole | None = None
    images: Whole | None = None
    learning_rate: Real | None = None
    warmup_share: Real | None = None
    weight_decay: Real | None = None
    clip: Real | None = None
    temperature_start: Real | None = None
    temperature_end: Real | None = None
    anneal_share: Real | None = None
    ease_share: Real | None = None
    ease_start: Real | None = None
    micro_images: Whole | None = None
    checkpointing: bool | None = None


SHAPE_NOTHING = (  # settings that shape no scorer, or say which of them are trained
    "pruners", "methods", "seeds", "workers", "min_workers", "checkpoint_every", "validate_every", "grad_cosine_every",
    "validation_images", "micro_images", "checkpointing", "shard", "max_broken_share",
)  # fmt: skip


class Recipe(BaseModel):
    """What to train and how. The defaults fit the embedded model.

    model:      what is pruned, as the job's.
    pruners:    methods to train, as spelled; each is trained with every seed on the same batches and budgets.
    seeds:      of the scorers: one scorer per method and seed.
    steps:      of every scorer.
    images:     per step, over all workers.
    questions:  per image, packed in one row.
    questions_alone: per image for question-aware arms, whose tokens depend on the question, so each has a row of its own.
    learning_rate, weight_decay: of AdamW.
    warmup_share: of the steps, over which the learning rate grows; it falls along a cosine then.
    clip:       of the gradient's norm.
    budgets:    one is drawn per step, the same for the whole batch, so that one scorer serves all.
    ease_share, ease_start: a budget that keeps K of N tokens lets N^(1 - g) K^g through, g rising from `ease_start` to 1 over
                `ease_share` of the training, as what few noisy tokens cannot show is learnt while many are let through; with an
                `ease_share` of 0 nothing is eased.
    temperature_start, temperature_end, anneal_share: of the relaxation, over that share of the steps, then constant. A method may
                make of them what it wants (`TrainablePruner.temperature`).
    calibration_images: by which a scorer standardises its features.
    validation_images: held out, looked at every `validate_every` steps.
    max_skips:  steps of a scorer that may be skipped because the loss was not finite.
    data:       what to train on, such as "world" or "jsonl('chats.jsonl', images='pictures')" (`data/catalog.py`).
    max_broken_share: of the rows a worker draws that may be broken; they are skipped and counted.
    checkpoint_every, validate_every, grad_cosine_every: in steps; 0 never (a state is always saved at the end).
    dtype:      of the frozen weights, "auto" as `load` has it, or "bfloat16" ...; scorer, relaxation and loss are float32 always.
    micro_images: per worker that are in memory at once; a step adds up gradients over such parts, 0: all of its share at once.
    checkpointing: decoder layers are computed again in the backward pass instead of stored.
    shard:      the frozen decoder's layers are spread over the workers and gathered one by one; for models too large for one.
    workers:    processes; they share out whole scorers where there are enough (`split`), else the images of every step. "1-4" sets
                both numbers: training runs with as many of them as there are at the time, and what it finds is the same.
    min_workers: with how few it starts, and goes on where others are lost, until they are back; None: with `workers` alone.
    methods:    settings in which single methods differ; those of methods that are not trained have no effect.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelSpec = Spec("embedded")
    pruners: tuple[PrunerSpec, ...] = (Spec("diffprune"), Spec("gumbel_topk"), Spec("gumbel_keepdrop"))
    seeds: tuple[Seed, ...] = (0,)
    data: Annotated[Spec, BeforeValidator(training.source_spec), TEXT] = Spec("world")
    steps: Whole = 200
    images: Whole = 12
    questions: Whole = 10
    questions_alone: Whole = 3
    learning_rate: Real = 3e-3
    warmup_share: Real = 0.03
    weight_decay: Real = 0.01
    clip: Real = 1.0
    temperature_start: Real = 2.0
    temperature_end: Real = 0.1
    anneal_share: Real = 0.9
    budgets: tuple[BudgetValue, ...] = (Share(1 / 3), Share(2 / 9), Share(1 / 9), Share(1 / 20))
    ease_share: Real = 0.75
    ease_start: Real = 0.25
    calibration_images: Whole = 64
    validation_images: Whole = 12
    max_skips: Whole = 3
    max_broken_share: Real = 0.01
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    micro_images: Whole = 0
    checkpointing: bool = False
    shard: bool = False
    checkpoint_every: Whole = 50
    validate_every: Whole = 50
    grad_cosine_every: Whole = 50
    workers: Whole = 2
    min_workers: Whole | None = None
    methods: tuple[MethodSettings, ...] = ()

    def __init__(self, **options: Any) -> None:
        """Raises ValueError: one sentence on the first thing that is wrong."""
        for key in options.keys() - Recipe.model_fields.keys():
            raise ValueError(f"a recipe has no field {key!r}: {registry.nearest(key, Recipe.model_fields)}")
        try:
            super().__init__(**options)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            reason = str(first.get("ctx", {}).get("error", first["msg"]))
            raise ValueError(f"recipe, {where}: {reason}" if where else f"recipe: {reason}") from None

    @model_validator(mode="before")
    @classmethod
    def _range(cls, given: Any) -> Any:
        """`workers="1-4"` as two numbers."""
        asked = given.get("workers") if isinstance(given, dict) else None
        if not isinstance(asked, str) or asked.isdecimal():
            return given
        low, dash, high = asked.partition("-")
        if not (dash and low.isdecimal() and high.isdecimal()):
            raise ValueError(f"workers is {asked!r:.40}, but must be a number, or the fewest and the most, as in 1-4")
        return {**given, "min_workers": int(low), "workers": int(high)}

    @field_validator("pruners")
    @classmethod
    def _trainable(cls, found: tuple[Spec, ...]) -> tuple[Spec, ...]:
        for spec in found:
            if not issubclass(registry.find("pruners", spec.name), FittedPruner):
                raise ValueError(f"{str(spec)!r} learns nothing and cannot be trained; 'diffprune' can")
            if getattr(registry.make("pruners", spec), "untrained", False):
                raise ValueError(f"{spec} cannot be trained: untrained=True says that it stays as it is; leave it out")
        return found

    @field_validator("budgets")
    @classmethod
    def _counts(cls, found: tuple[Budget, ...]) -> tuple[Budget, ...]:
        for budget in found:
            budget.count(10**6)  # a threshold keeps a different number of every image and refuses
        return found

    @field_validator("data")
    @classmethod
    def _known(cls, found: Spec) -> Spec:
        training.source(found)  # refuses what no source can be; looks at no file
        return found

    @model_validator(mode="after")
    def _ranges(self) -> Recipe:
        for name in ("pruners", "seeds", "budgets"):
            given = getattr(self, name)
            if not given or len(set(given)) != len(given):
                raise ValueError(f"{name} must be given, and each once; got {', '.join(map(str, given)) or 'none'}")
        for name in ("steps", "images", "questions", "questions_alone", "workers", "calibration_images", "validation_images"):
            most = MOST_WORKERS if name == "workers" else MOST
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1 and at most {most:,}")
        for name in ("checkpoint_every", "validate_every", "grad_cosine_every", "max_skips", "weight_decay", "micro_images"):
            if not 0 <= getattr(self, name) <= MOST:
                raise ValueError(f"{name} is {getattr(self, name)}, but must not be negative, and at most {MOST:,}")
        for name in ("learning_rate", "clip", "temperature_start", "temperature_end"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be a positive number")
        if not (0 <= self.warmup_share < 1 and 0 < self.anneal_share <= 1):
            raise ValueError(
                f"warmup_share is {self.warmup_share} and anneal_share {self.anneal_share}, but they must lie in [0, 1) and (0, 1]"
            )
        if not (0 <= self.ease_share <= 1 and 0 <= self.ease_start <= 1):
            raise ValueError(f"ease_share is {self.ease_share} and ease_start {self.ease_start}, but both must lie in [0, 1]")
        if not 0 <= self.max_broken_share < 1:
            raise ValueError(f"max_broken_share is {self.max_broken_share}, but must lie in [0, 1)")
        for name in ("images", "validation_images"):
            if getattr(self, name) < self.workers:
                raise ValueError(f"{name}={getattr(self, name)}, but each of the {self.workers} workers needs one")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise ValueError(f"min_workers is {self.min_workers}, but must be at least 1 and at most workers={self.workers}")
        if self.shard and self.fewest < 2:
            raise ValueError("shard=True spreads a model over workers; give workers=2 or more, or shard=False")
        if self.shard and self.dtype == "auto":
            raise ValueError("shard=True loads the model on the CPU first, so its type must be said: dtype='bfloat16'")
        given = [own.pruner for own in self.methods]
        if len(set(given)) != len(given):
            raise ValueError(f"methods must name each method once; got {', '.join(map(str, given))}")
        for pruner in given:
            self.of(pruner)
        for spec in self.pruners:
            plugin = registry.find("pruners", spec.name)
            if issubclass(plugin, TrainablePruner) and not plugin.recomputable and self.of(spec).checkpointing:
                raise ValueError(
                    f"{spec} trains through cuts inside the decoder, whose layers cannot be computed again: give "
                    f"checkpointing=False for it alone, as in methods=({{'pruner': '{spec}', 'checkpointing': False}},), or for all"
                )
        return self

    @property
    def fewest(self) -> int:
        """Workers without which training waits."""
        return self.workers if self.min_workers is None else self.min_workers

    def of(self, pruner: Spec) -> Recipe:
        """The recipe of one method alone, with the settings in which it differs.

        Raises:
            ValueError: one of them is out of its range.
        """
        own = next((own for own in self.methods if own.pruner == pruner), None)
        changed = own.model_dump(exclude={"pruner"}, exclude_none=True) if own else {}
        alone = self.model_copy(update={"pruners": (pruner,), "methods": ()})
        return Recipe(**{name: getattr(alone, name) for name in Recipe.model_fields} | changed) if changed else alone

    def key(self, pruner: Spec) -> str:
        """20 hexadecimal digits of all that shapes one method's scorers, its code too, seeds aside: not the other methods, how
        often to look, or what is in memory at once. Of models and data in files their contents count, not where they lie.

        Raises:
            ValueError: those files cannot be read here.
        """
        silent = {*SHAPE_NOTHING, *(["dtype"] if self.dtype == "auto" else [])}
        dump = self.of(pruner).model_dump(mode="json", exclude=silent)
        read = {"data": training.source(self.data).identity or str(self.data), "model": [str(self.model), fingerprint(self.model)]}
        text = json.dumps({**dump, **read, "pruner": registry.sourced("pruners", pruner).identity}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up over a share of the steps, then a cosine to 0."""
    warmup = max(1, round(recipe.warmup_share * recipe.steps))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    return recipe.learning_rate / 2 * (1 + math.cos(math.pi * (step - warmup) / max(1, recipe.steps - warmup)))


def drawn_budget(recipe: Recipe, seed: int, step: int) -> Budget:
    """The budget of a step: the same on all workers and for all methods of a seed."""
    index = torch.randint(len(recipe.budgets), (), generator=generator(DRAW, seed, step))
    return recipe.budgets[int(index)]


def eased(recipe: Recipe, budget: Budget, step: int) -> Budget:
    """What a drawn budget lets through at a step: N^(1 - g) K^g tokens, g rising linearly to 1 over the eased steps."""
    done = step / (recipe.ease_share * recipe.steps) if recipe.ease_share else 1.0
    if done >= 1 or not isinstance(budget, Keep | Share):
        return budget
    return Eased(budget, recipe.ease_start + (1 - recipe.ease_start) * done)
