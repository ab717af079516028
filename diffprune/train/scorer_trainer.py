"""One learned pruner in training with one seed: its steps, its validation and the state that it resumes from.

The VLM is frozen; what trains are the networks of the method, by its own objective. Every random number comes from a stream keyed
by (seed, step, image), so a step can be redone, a resumed run repeats the loss curve, and any number of workers trains the same
scorer up to rounding.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffprune import data as training
from diffprune import pruning
from diffprune.core.budget import Budget
from diffprune.core.evidence import QUESTION
from diffprune.core.fitted import Annealing, Progress, TrainablePruner
from diffprune.core.noise import Noise
from diffprune.core.pruner import Pruner
from diffprune.core.records import Step
from diffprune.core.site import Plan, for_images
from diffprune.core.spec import Spec
from diffprune.core.tokens import Relaxation, VisualTokens
from diffprune.core.vlm import VLM
from diffprune.data import TrainBatch
from diffprune.pruning.first_cut import seen_at_first_cut
from diffprune.pruning.soft_cuts import Soften
from diffprune.timing.clock import Marks, clocks
from diffprune.train.ahead import drawn
from diffprune.train.context import Context
from diffprune.train.drawn_batches import DrawnBatches
from diffprune.train.exchange import alike, begun
from diffprune.train.loss import answer_nll, relaxed_nll, softened_nll
from diffprune.train.objective import BadObjective, checked, read, recorded, told
from diffprune.train.recipe import CHECK, NOISE, PROBE, Recipe, drawn_budget, eased, learning_rate
from diffprune.vlm.activation_checkpointing import recomputed
from diffprune.vlm.attention import decoder_attention

ROWS_AT_ONCE = 8  # calibration images that go through the decoder together


class Diverged(RuntimeError):
    """The loss kept being NaN or infinite; trying again gives the same."""


def name(pruner: Spec, seed: int) -> str:
    """Folder name of a scorer: `diffprune(question_aware=True)`, 0 -> `diffprune-question_aware-true-0`."""
    return f"{re.sub(r'[^a-z0-9_.]+', '-', str(pruner).lower()).strip('-')}-{seed}"


@dataclass(frozen=True)
class PartRun:
    """What an objective may use while one part of a batch is trained on: `core.fitted.TrainingRun`.

    answers: tokens of all answers that a mean is taken over, on all `world` workers.
    rows: images or questions that are relaxed, each by itself, on all workers, divided by their number.
    """

    trainer: ScorerTrainer
    answers: Tensor | int
    rows: float
    world: int = 1

    @property
    def vlm(self) -> VLM:
        """The frozen model."""
        return self.trainer.vlm

    @property
    def annealing(self) -> Annealing:
        """Temperatures of the recipe."""
        return self.trainer.annealing

    def tokens(self, batch: TrainBatch) -> tuple[VisualTokens, Tensor]:
        """Encoded images, and those that the rows show; with a question every image that a row shows has tokens of its own."""
        tokens, image = self.trainer.encode(batch), batch.image
        if not self.trainer.aware:
            return tokens, image
        return pruning.with_question(self.vlm, batch.prompts, tokens[image]), torch.arange(len(image), device=image.device)

    def answer_nll(self, batch: TrainBatch, tokens: VisualTokens, relaxed: Relaxation, image: Tensor) -> Tensor:
        """Summed over answer tokens, under the decoder attention that the relaxation needs."""
        with self.trainer.attention():
            return relaxed_nll(self.vlm, batch.prompts, tokens, relaxed, image)

    def softened_nll(self, batch: TrainBatch, tokens: VisualTokens, image: Tensor, cuts: Plan, soften: Soften) -> Tensor:
        """Summed over answer tokens, under the decoder attention that weights of keys need.

        Raises:
            ValueError: layers are to be computed again in the backward pass, by when the cuts are no longer there.
        """
        if self.trainer.recipe.checkpointing:
            raise ValueError(f"{self.trainer.pruner.label} trains through cuts inside the decoder, which needs checkpointing=False")
        with self.trainer.attention():
            return softened_nll(self.vlm, batch.prompts, tokens[image], self.trainer.pruner, cuts, soften)

    def per_answer(self, total: Tensor) -> Tensor:
        """Gradients are averaged over workers, so this makes the mean over all answer tokens wherever they are."""
        return total * self.world / self.answers

    def per_row(self, mean: Tensor | float, rows: int) -> Tensor:
        """Weighted by its share of the rows; as gradients are averaged over workers, this makes the mean over all rows."""
        return torch.as_tensor(mean, device=self.vlm.device) * (rows / self.rows)


def calibration_tokens(
    context: Context, vlm: VLM, recipe: Recipe, pruner: Pruner, images: int, tally: training.BrokenRows
) -> VisualTokens:
    """Encoded calibration images of a recipe, with the evidence of a method.

    Raises:
        BadData: on every worker, when one of them cannot read them.
    """
    batch = drawn(context, lambda: training.calibration(vlm, recipe.data, images, tally))
    with torch.no_grad():
        if any(evidence.from_decoder for evidence in pruner.needs):
            parts = [batch.part(vlm, i, min(i + ROWS_AT_ONCE, batch.examples)) for i in range(0, batch.examples, ROWS_AT_ONCE)]
            encoded = [vlm.encode(part.pixels, pruner.needs)[part.image] for part in parts]
            seen = [seen_at_first_cut(vlm, p.prompts, tokens, pruner) for p, tokens in zip(parts, encoded, strict=True)]
            return VisualTokens.cat(seen)
        tokens = vlm.encode(batch.pixels, pruner.needs)
        return pruning.with_question(vlm, batch.prompts, tokens[batch.image]) if QUESTION in pruner.needs else tokens


class ScorerTrainer:
    """One learned pruner in training with one seed."""

    def __init__(
        self, context: Context, vlm: VLM, recipe: Recipe, pruner: TrainablePruner, seed: int, known: DrawnBatches | None = None
    ) -> None:
        self.known = known or DrawnBatches(0)
        self.context, self.vlm, self.recipe, self.pruner, self.seed = context, vlm, recipe, pruner, seed
        self.spec, self.aware = pruner.spec.without_places(), pruner.reads_question
        self.annealing = Annealing(recipe.temperature_start, recipe.temperature_end, recipe.anneal_share)
        self.name, self.tally = name(self.spec, seed), training.BrokenRows(recipe.max_broken_share)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            seen = calibration_tokens(context, vlm, recipe, pruner, recipe.calibration_images, self.tally)
            networks = pruner.networks = pruner.build(seen)
        self.width = seen.features.shape[-1]
        self.networks = networks.train()
        alike(context, networks)
        self.clock = clocks(vlm.device)[0]
        self.parameters = [p for p in networks.parameters() if p.requires_grad]
        if not self.parameters:
            raise BadObjective(f"{self.spec}: its networks have no parameter that trains")
        self.optimizer = torch.optim.AdamW(self.parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        self.done, self.skips, self._alike = 0, 0, context.world == 1
        self.batch = drawn(context, lambda: training.validation(
            vlm, recipe.data, images=recipe.validation_images, rank=context.rank, world=context.world, tally=self.tally,
        )) if recipe.validate_every else None  # fmt: skip

    def progress(self, step: int) -> Progress:
        """How far the training is at a step."""
        return Progress(step, self.recipe.steps)

    @torch.no_grad()
    def encode(self, batch: TrainBatch) -> VisualTokens:
        """The images of a batch through the frozen encoder; once, however often the batch is used."""
        if self.pruner.needs not in batch.encoded:
            batch.encoded[self.pruner.needs] = self.vlm.encode(batch.pixels, self.pruner.needs)
        return batch.encoded[self.pruner.needs]

    def rows(self, batch: TrainBatch) -> int:
        """Rows of a batch that are relaxed, each by itself: images, or those that questions show where they are read."""
        return len(batch.image) if self.aware else batch.images

    def run(self, batch: TrainBatch, answers: Tensor | int, world: int = 1, rows: float | None = None) -> PartRun:
        """What the objective may use on parts of this batch. answers, rows: of `PartRun`; rows are the batch's if not given."""
        return PartRun(self, answers, self.rows(batch) if rows is None else rows, world)

    def noise(self, batch: TrainBatch, *key: int) -> Noise:
        """Random numbers for the rows that are relaxed: one stream for each image, or for each question where it is read."""
        return Noise(*key, rows=batch.row_names() if self.aware else batch.image_names())

    def attention(self) -> contextlib.AbstractContextManager[None]:
        """The decoder attention this method trains under; the deployed path always runs the model's own."""
        wanted = self.pruner.attention_implementation
        return decoder_attention(self.vlm.model, wanted) if wanted else contextlib.nullcontext()

    @contextlib.contextmanager
    def _differentiated(self) -> Iterator[None]:
        """Around forward *and* backward passes: layers that are computed again must be computed as they were."""
        with self.attention(), recomputed(self.vlm.model) if self.recipe.checkpointing else contextlib.nullcontext():
            yield

    def _parts(self, batch: TrainBatch) -> list[TrainBatch]:
        """A batch in parts of `micro_images`."""
        size = self.recipe.micro_images or batch.examples
        if size >= batch.examples:
            return [batch]
        return [batch.part(self.vlm, i, min(i + size, batch.examples)) for i in range(0, batch.examples, size)]

    def count(self, batch: TrainBatch) -> tuple[float, float]:
        """Labels of a share, and its rows that are relaxed."""
        return float(batch.num_labels), float(self.rows(batch))

    def step(self, batch: TrainBatch, counted: Tensor | None = None, meanwhile: Callable[[], object] = lambda: None) -> Step:
        """One update from this worker's share of a batch; skipped on every worker when loss or gradient is not finite.

        counted [2]: `count`, added up over the workers; asked now where it is not given.
        meanwhile: done while gradients are computed on a GPU, and travel; the time of a step is without it.

        Raises:
            Diverged: that happened more than `max_skips` times. BadObjective: on this worker, the method's own code fails.
        """
        t, recipe, world, marks = self.done, self.recipe, self.context.world, Marks(self.clock)
        budget = drawn_budget(recipe, self.seed, t)
        with marks.span("step"):
            if counted is None:
                counted = self.context.sum(torch.tensor(self.count(batch), device=self.vlm.device))
            total, rows = counted
            with self._own_numbers_told():
                mine = self._backward(batch, eased(recipe, budget, t), total, float(rows) / world)
        arrived = begun(self.context, self.parameters, mine)
        meanwhile()
        with marks.span("step"):
            everyone = arrived()
            norm = nn.utils.clip_grad_norm_(self.parameters, recipe.clip)
            *sums, length = torch.cat([everyone, norm.to(everyone).reshape(1)]).tolist()
            values = {**read(sums), "norm": length}
            finite = math.isfinite(sum(values.values()))
            if finite:
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(recipe, t)
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        step_ms = marks.totals()["step"]
        if not finite:
            self._skip(t)
        self.done += 1
        loss = values["nll"] / float(total) if "nll" in values else values["total"] / world
        return Step(
            step=t, loss=loss, penalty=values.get("penalty", 0.0) / world,
            temperature=self.pruner.temperature(self.progress(t), self.annealing), drawn_budget=str(budget),
            kept=values.get("kept", math.nan) / world, grad_norm=values["norm"],
            clipped=values["norm"] > recipe.clip, score_sd=values.get("score_sd", math.nan) / world,
            overlap=values.get("overlap", math.nan) / world, grad_cosine=math.nan, step_ms=step_ms,
            workers=world, validation_soft=math.nan, validation_hard=math.nan,
        )  # fmt: skip

    def _backward(self, batch: TrainBatch, budget: Budget, total: Tensor, rows: float) -> Tensor:
        """Gradients of this worker's share, part by part; returns what is `recorded` of it.

        Every image has noise of its own, so parts see what the whole share would have seen: nothing but rounding differs.
        """
        run, progress, sums = self.run(batch, total, self.context.world, rows), self.progress(self.done), list[Tensor]()
        for part in self._parts(batch):
            with self._mistakes_told(), self._differentiated():
                loss = checked(self.pruner.objective(run, part, budget, progress, self.noise(part, NOISE, self.seed, self.done)))
                loss.total.backward()
            sums.append(recorded(loss))
        return torch.stack(sums).sum(0)

    @contextlib.contextmanager
    def _own_numbers_told(self) -> Iterator[None]:
        """Around the first step on several workers, whose networks must stay alike.

        Raises:
            BadObjective: the networks keep numbers of the images that they have seen, as batch norm does.
        """
        before = {} if self._alike else {name: value.clone() for name, value in self.networks.named_buffers()}
        yield
        self._alike = True
        if moved := [name for name, value in self.networks.named_buffers() if name in before and not value.equal(before[name])]:
            raise BadObjective(
                f"{self.spec}: its networks keep {moved[0]} from batch to batch, and each worker sees other images: train it "
                "with one worker (train.workers=1)"
            )

    def _mistakes_told(self) -> contextlib.AbstractContextManager[None]:
        return told(f"{self.spec}, seed {self.seed}, step {self.done}", others=self.recipe.shard and self.context.world > 1)

    def _skip(self, step: int) -> None:
        self.skips += 1
        if self.skips > self.recipe.max_skips:
            raise Diverged(
                f"{self.spec}, seed {self.seed}: loss or gradient was NaN or infinite at {self.skips} steps, last at step "
                f"{step}; lower the learning rate ({self.recipe.learning_rate:g}) or check the data"
            )

    def grad_cosine(self, batch: TrainBatch, step: int, parts: int = 4) -> float:
        """Mean pairwise cosine of scorer gradients on `parts` disjoint sets of images, one noise draw each.

        With unit vectors g, |mean g|^2 = 1/M + (1 - 1/M) C. NaN when there are fewer than two sets.
        """
        examples = batch.examples
        mine = max(1, min(examples, parts // self.context.world))
        budget, progress = eased(self.recipe, drawn_budget(self.recipe, self.seed, step), step), self.progress(step)
        scorer = list(self.networks["scorer"].parameters() if "scorer" in self.networks else self.networks.parameters())
        total: Tensor | float = 0.0
        for m in range(mine):
            piece = batch.part(self.vlm, m * examples // mine, (m + 1) * examples // mine)
            noise, run = self.noise(piece, PROBE, self.seed, step), self.run(piece, max(piece.num_labels, 1))
            with self._mistakes_told(), self._differentiated():
                loss = checked(self.pruner.objective(run, piece, budget, progress, noise))
                grads = torch.autograd.grad(loss.total, scorer, allow_unused=True)
            flat = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(scorer, grads, strict=True)])
            total = total + functional.normalize(flat, dim=0)
        assert isinstance(total, Tensor)
        summed, sets = self.context.sum(torch.cat([total, total.new_tensor([float(mine)])])).split([len(total), 1])
        num = int(sets)  # workers with fewer images have fewer sets
        mean = summed / num
        return (float(mean.square().sum()) - 1 / num) / (1 - 1 / num) if num > 1 else math.nan

    @torch.no_grad()
    def validate(self, soft: bool = True) -> tuple[float, float]:
        """Loss per answer token on held-out images, mean over the budgets: (of the objective, NLL with tokens removed).

        soft: False leaves the first out, nan, which takes most of the time.
        """
        assert self.batch is not None
        progress = self.progress(max(self.done - 1, 0))
        sums = torch.zeros(3, device=self.vlm.device)
        self.networks.eval()
        for part in self._parts(self.batch):
            tokens, labels = self.encode(part)[part.image], part.num_labels
            for i, budget in self._met():
                relaxed = torch.tensor(math.nan)
                if soft:
                    loss = self.pruner.objective(self.run(part, labels), part, budget, progress, self.noise(part, CHECK, i))
                    relaxed = loss.terms["nll"] if "nll" in loss.terms else loss.total * labels
                hard = answer_nll(self.vlm, pruning.shrink(self.vlm, part.prompts, tokens, self.pruner, budget))
                sums += torch.stack([relaxed.to(hard), hard, torch.tensor(float(labels), device=hard.device)])
        self.networks.train()
        soft_sum, hard_sum, total = self.context.sum(sums).tolist()
        return soft_sum / total, hard_sum / total

    def _met(self) -> list[tuple[int, Budget]]:
        """The recipe's budgets that the method can meet when tokens are removed, numbered: not all, where it cuts late.

        Raises:
            ValueError: none of them.
        """
        found, why = [], ""
        for i, budget in enumerate(self.recipe.budgets):
            try:
                for_images(pruning.plan_of(self.vlm, self.pruner, budget), [self.vlm.shape.visual_tokens])
            except ValueError as error:
                why = str(error)
            else:
                found.append((i, budget))
        if not found:
            raise ValueError(f"{self.pruner.label} can meet none of the recipe's budgets: {why}")
        return found

    def state(self) -> dict[str, Any]:
        """Checkpoint contents for resume. Randomness needs no state: it is a function of seed, step and image."""
        return {
            "key": self.recipe.key(self.spec), "model_hash": self.vlm.weights_hash,
            "step": self.done, "skips": self.skips,
            "networks": self.networks.state_dict(), "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip

    def resume(self) -> None:
        """Go on from the newest state of this recipe and model, if there is one.

        Raises:
            RuntimeError: workers see different states (the folder is not shared, or lags).
        """
        state, wanted = self.context.load(self.name), self.networks.state_dict()
        fits = (
            state is not None
            and (state["key"], state["model_hash"]) == (self.recipe.key(self.spec), self.vlm.weights_hash)
            and {k: v.shape for k, v in state["networks"].items()}
            == {k: v.shape for k, v in wanted.items()}  # other code, other shapes
        )
        if state is not None and fits:
            self.networks.load_state_dict(state["networks"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.done, self.skips = state["step"], state["skips"]
        done = torch.tensor([self.done, self.done**2], dtype=torch.float64, device=self.vlm.device)
        mean, square = (self.context.sum(done) / self.context.world).tolist()
        if square != mean**2:
            raise RuntimeError(f"{self.name}: workers found states of different steps; all of them must share the run's folder")
