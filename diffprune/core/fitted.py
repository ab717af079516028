"""The contract of a method that is fitted before it selects: calibrated from a few images, or trained through its own objective.

Either way it ends as one artefact: a folder with weights, configuration and card, and one hash. What fitting may use is a run,
which the training verb gives; the method never knows whether it runs alone or on a cluster.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from diffprune.core.budget import Budget
from diffprune.core.evidence import QUESTION, Question
from diffprune.core.noise import Noise
from diffprune.core.pruner import Kind, Pruner, ScorePruner
from diffprune.core.site import ENCODED, Cut, Plan, Stage
from diffprune.core.spec import Spec
from diffprune.core.tokens import Relaxation, VisualTokens
from diffprune.core.vlm import VLM, Prompts

CALIBRATION_IMAGES = 64  # that a method without gradients is fitted to


@dataclass(frozen=True)
class Artifact:
    """What fitting leaves: folder with weights, configuration and card; weights_sha256: of the weights, 20 digits."""

    folder: Path
    weights_sha256: str


@dataclass(frozen=True)
class Progress:
    """How far a training is: `step` of `steps`, counted from 0."""

    step: int
    steps: int


@dataclass(frozen=True)
class Annealing:
    """Temperatures a recipe asks for: from `start` to `end` over this `share` of the steps."""

    start: float
    end: float
    share: float


@dataclass(frozen=True)
class Loss:
    """What an objective finds of one part of a batch.

    total: scalar with a gradient. Gradients of parts add up and those of workers are averaged, so it is scaled by
           `TrainingRun.per_answer` or `TrainingRun.per_row`.
    terms: scalars for the step record, summed over parts and workers: "nll" (sum over answer tokens, nats), "penalty", "kept",
           "score_sd" and "overlap" (per row). One that is not given of every part is not recorded, nor is any other.
    """

    total: Tensor
    terms: Mapping[str, Tensor]


class Batch(Protocol):
    """I images and B rows of text about them: encoder inputs, [M] the images that the rows show, full-length rows with labels."""

    pixels: dict[str, Tensor]
    image: Tensor
    prompts: Prompts
    images: int


class TrainingRun(Protocol):
    """What an objective may use while one part of a batch is trained on."""

    @property
    def vlm(self) -> VLM:
        """The frozen model."""

    @property
    def annealing(self) -> Annealing:
        """Temperatures of the recipe."""

    def tokens(self, batch: Any) -> tuple[VisualTokens, Tensor]:
        """Encoded images with the method's evidence, and [M] int: those that the rows of the batch show, row after row.

        Each image once, or once per row where the method reads the question.
        """

    def answer_nll(self, batch: Any, tokens: VisualTokens, relaxed: Relaxation, image: Tensor) -> Tensor:
        """Negative log likelihood of the answers, summed over their tokens, nats, with relaxed visual tokens."""

    def softened_nll(
        self, batch: Any, tokens: VisualTokens, image: Tensor, cuts: Plan, soften: Callable[[VisualTokens, Cut, Tensor], Tensor]
    ) -> Tensor:
        """`answer_nll` where tokens are weakened at cuts inside the decoder, from which on each is a key of the weight [I N] that
        `soften(tokens, cut, weights so far)` gives. Of the attention "masked_softmax"."""

    def per_answer(self, total: Tensor) -> Tensor:
        """A sum over answer tokens, scaled so that parts and workers make the mean over all answer tokens of the step."""

    def per_row(self, mean: Tensor | float, rows: int) -> Tensor:
        """A mean over `rows` images or questions, scaled so that parts make the mean over all rows of this worker."""


class FittingRun(Protocol):
    """What `fit` may use. seed: of everything random."""

    vlm: VLM
    seed: int

    def calibration(self, pruner: Pruner, images: int) -> VisualTokens:
        """Encoded images of the calibration data, with the method's evidence; never those of a test."""

    def train(self, pruner: TrainablePruner) -> Artifact:
        """The training loop: the steps of the recipe through the method's `objective`, then its artefact."""

    def save(self, pruner: FittedPruner, **facts: Any) -> Artifact:
        """Write the artefact; `facts` go into configuration and card, beside those of the run."""


OF_A_USE = ("other_model",)  # options that say how a method is used, not what was learnt


def of_the_artefact(spec: Spec) -> Spec:
    """A method as what was saved is called: without options that belong to one use of it, nor where its files lie."""
    kept = tuple((key, value) for key, value in spec.options if key not in OF_A_USE)
    return replace(spec, options=kept, places=())


def _saving(save: Callable[..., None]) -> Callable[..., None]:
    """A class's `save_pretrained` that writes the method `of_the_artefact`, and refuses random weights."""

    @wraps(save)
    def saved(self: FittedPruner, folder: Path | str, **facts: Any) -> None:
        if getattr(self, "untrained", False):
            raise ValueError(f"{self.label} has random weights (untrained=True), so nothing was learnt that could be saved")
        asked = self.spec
        object.__setattr__(self, "spec", of_the_artefact(asked))
        try:
            save(self, folder, **facts)
        finally:
            object.__setattr__(self, "spec", asked)

    return saved


class FittedPruner(Pruner):
    """A method that learns something from data before it selects; a constructor option `weights` names what was learnt.

    `save_pretrained` of any class below writes no `other_model` (whoever loads an artefact says anew that it may serve another
    model) and raises ValueError for random weights.
    """

    kind = Kind.CALIBRATED

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "save_pretrained" in vars(cls):
            cls.save_pretrained = _saving(cls.save_pretrained)  # type: ignore[method-assign]

    @property
    def ready(self) -> bool:
        """Whether it has what it selects by."""
        return bool(self.weights_sha256)

    @property
    def lacking(self) -> str:
        """A clause for one that is not ready: what to write instead."""
        return f"train it (diffprune train, or train.pruners in a job), then write {self.spec.with_options(weights='folder')}"

    @abstractmethod
    def fit(self, run: FittingRun) -> Artifact:
        """Learn from the run's data and save what was learnt."""

    @abstractmethod
    def save_pretrained(self, folder: Path | str, **facts: Any) -> None:
        """Write config.json, model.safetensors and a card to `folder`; `facts` (recipe, figures) go into both texts."""


class TrainablePruner(FittedPruner):
    """A method whose networks are trained by gradients of its own `objective`; the model is frozen.

    attention_implementation: of the decoder while it trains, as its objective needs it; None is the model's own.
    recomputable: its decoder layers may be computed again in the backward pass (`Recipe.checkpointing`), as they may not where its
                  objective softens cuts inside the decoder (`TrainingRun.softened_nll`).
    searched: constructor options that a search of training settings chooses, such as a penalty's weight, and from which values.
    apart: sentences on how its training differs from that of a recipe's other methods, which see the same data, steps, seeds and
           budgets; the report prints them.
    networks: what `build` made, or the learnt ones; None before.

    untrained: random weights instead of learnt ones, always the same, and features as they come, since what standardises them is
               learnt too; a control.
    """

    kind = Kind.TRAINED
    attention_implementation: ClassVar[str | None] = None
    recomputable: ClassVar[bool] = True
    searched: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    apart: ClassVar[tuple[str, ...]] = ()
    shared_options = {"untrained": False}
    networks: torch.nn.ModuleDict | None = None
    _untrained = False
    _drawn = (0, 0)  # widths that random weights were drawn for

    @property
    def untrained(self) -> bool:
        """Whether random weights are asked for.

        Raises:
            ValueError: beside learnt ones, or by anything but True or False.
        """
        return self._untrained

    @untrained.setter
    def untrained(self, asked: bool) -> None:
        if not isinstance(asked, bool):
            raise ValueError(f"{self.label}: untrained is True or False, not {asked!r:.60}")
        if asked and self.weights_sha256:
            raise ValueError(f"{self.label} is asked for with weights and with untrained=True: give one of the two")
        self._untrained = asked
        self.kind = Kind.CONTROL if asked else type(self).kind  # type: ignore[misc]

    @property
    def ready(self) -> bool:
        return super().ready or self.untrained or self.networks is not None

    @property
    def lacking(self) -> str:
        return f"{super().lacking}, or, for random weights, {self.spec.with_options(untrained=True)}"

    def draw(self, features: int, text: int) -> None:
        """Random weights, from a fixed seed, for tokens and words of these widths, unless they are there.

        They are built on two tokens with a mean of 0 and a standard deviation of 1, so that standardising by these changes nothing.
        """
        if self._drawn == (features, text):
            return
        self._drawn = features, text
        pair = torch.tensor([0.5, -0.5]).div(0.5**0.5)[None, :, None].expand(1, 2, features)
        words = Question(torch.zeros(1, 1, text), torch.ones(1, 1, dtype=torch.bool))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.networks = self.build(VisualTokens(pair, torch.ones(1, 2, dtype=torch.bool), evidence={QUESTION: words}))
        self.networks.eval().requires_grad_(False)

    @abstractmethod
    def build(self, tokens: VisualTokens) -> torch.nn.ModuleDict:
        """Make `networks` for the widths of `tokens` and standardise on these calibration images; returns what trains."""

    @abstractmethod
    def outline(self, features: int, text: int | None = None) -> torch.nn.ModuleDict:
        """The networks for tokens (and words) of these widths, without values: torch's `meta` device."""

    @abstractmethod
    def objective(self, run: TrainingRun, batch: Any, budget: Budget, progress: Progress, noise: Noise) -> Loss:
        """Loss of one part of a batch, through which gradients reach the method's networks.

        noise: the only source of randomness, one stream for each image (or question, where it is read), so that a step can be
        repeated, and split over any number of workers.
        """

    def temperature(self, progress: Progress, annealing: Annealing) -> float:
        """Of the relaxation: half a cosine from start to end over the annealed steps, then constant (arXiv 2605.28051)."""
        done = min(progress.step / (annealing.share * progress.steps), 1.0)
        return annealing.end + (annealing.start - annealing.end) / 2 * (1 + math.cos(math.pi * done))

    def fit(self, run: FittingRun) -> Artifact:
        """The training loop."""
        return run.train(self)


class RelaxedPruner(TrainablePruner, ScorePruner):
    """A method that ranks tokens by learned scores, trained through a relaxation of removal and the model's loss on answers.

    `relax` keeps every token and lets gradients reach the scores; `select` removes. A loss of another kind overrides `objective`.
    """

    @abstractmethod
    def relax(self, tokens: VisualTokens, budget: Budget, temperature: float, noise: Noise) -> Relaxation:
        """Degrade each token according to its score so that the loss can teach the scorer.

        temperature: of the relaxation. noise: the only source of randomness, one stream for each row of `tokens`, so that a step
        can be repeated, and split over any number of workers.
        """

    def objective(self, run: TrainingRun, batch: Any, budget: Budget, progress: Progress, noise: Noise) -> Loss:
        """Loss of one part of a batch: the answers' negative log likelihood through `relax`, plus its penalty.

        Raises:
            ValueError: the method cuts inside the decoder, where this relaxation removes nothing.
        """
        if inside := [step.site for step in self.cuts(budget, run.vlm.shape) if step.site.stage is Stage.DECODER]:
            raise ValueError(
                f"{self.label} cuts {inside[0]}, but a relaxation of the encoder's tokens would train something else; such a "
                "method needs an `objective` of its own"
            )
        tokens, image = run.tokens(batch)
        relaxed = self.relax(tokens, budget, self.temperature(progress, run.annealing), noise)
        return self.summed(run, run.answer_nll(batch, tokens, relaxed, image), tokens, budget, relaxed)

    def summed(self, run: TrainingRun, nll: Tensor, tokens: VisualTokens, budget: Budget, relaxed: Relaxation) -> Loss:
        """The loss of answers, summed over their tokens, and a relaxation's penalty; with what the step's record says of it."""
        rows = len(relaxed.let)
        penalty = run.per_row(relaxed.penalty, rows)
        looked = {name: run.per_row(value, rows) for name, value in self.looked_at(tokens, budget, relaxed).items()}
        return Loss(run.per_answer(nll) + penalty, {"nll": nll, "penalty": penalty, **looked})

    @torch.no_grad()
    def looked_at(self, tokens: VisualTokens, budget: Budget, relaxed: Relaxation) -> dict[str, Tensor]:
        """What a step's record says of a draw, means over images: tokens let through, standard deviation of an image's scores, and
        which share of the tokens that selection would keep was let through (of DiffPrune: the retention weight on them)."""
        scores, valid, num = self.score(tokens).float(), tokens.valid, tokens.counts.clamp_min(1)
        mean = scores.where(valid, 0.0).sum(1, keepdim=True) / num[:, None]
        spread = ((scores - mean).square().where(valid, 0.0).sum(1) / num).sqrt()
        chosen = budget.pick(scores, valid) if self.by_score_alone else self.select(tokens, Cut(ENCODED, budget)).keep
        overlap = relaxed.let.where(chosen, 0.0).sum(1) / chosen.sum(1).clamp_min(1)
        return {"kept": relaxed.kept.mean(), "score_sd": spread.mean(), "overlap": overlap.mean()}
