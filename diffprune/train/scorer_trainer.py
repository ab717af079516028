"""One arm in training: what a step, a validation and a state of one learned pruner with one seed are.

The VLM is frozen; what trains is a scorer (and a denoiser) per arm and seed. The loss is the answer's negative log
likelihood and nothing else, plus the penalty of methods whose budget is not exact (METHODS 2.6, 2.8, 3). Every random draw
comes from a generator keyed by (seed, step, rank), so a step can be redone and a resumed run repeats the loss curve.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffprune import data as training
from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Budget
from diffprune.core.pruner import Need
from diffprune.core.records import Step
from diffprune.core.spec import Spec
from diffprune.core.tokens import Relaxation, VisualTokens
from diffprune.core.vlm import VLM
from diffprune.data import TrainBatch
from diffprune.train.context import Context
from diffprune.train.loss import Throttled, answer_nll, throttled_nll
from diffprune.train.recipe import CHECK, NOISE, PROBE, Recipe, drawn_budget, generator, learning_rate, temperature
from diffprune.vlm.activation_checkpointing import recomputed
from diffprune.vlm.attention import decoder_attention


class Diverged(RuntimeError):
    """The loss kept being NaN or infinite; trying again gives the same."""


class BadData(ValueError):
    """Training data cannot be read on some worker, or too much of it is broken; trying again gives the same."""


def drawn(context: Context, draw: Callable[[], TrainBatch]) -> TrainBatch:
    """What `draw` gives on this worker, once all workers have theirs: nobody is left waiting for one that has failed.

    Raises:
        BadData: on every worker, when one of them cannot draw.
    """
    reason, found = "", None
    try:
        found = draw()
    except ValueError as error:
        reason = str(error)
    failed = context.sum(torch.tensor(float(found is None), device=context.device))
    if found is None or failed > 0:
        raise BadData(reason or "the training data cannot be read on another worker")
    return found


def name(pruner: Spec, seed: int) -> str:
    """Folder name of a scorer: `diffprune(question_aware=True)`, 0 -> `diffprune-question_aware-true-0`."""
    return f"{re.sub(r'[^a-z0-9_.]+', '-', str(pruner).lower()).strip('-')}-{seed}"


class Arm:
    """One learned pruner in training with one seed."""

    def __init__(self, context: Context, vlm: VLM, recipe: Recipe, spec: Spec, seed: int) -> None:
        self.context, self.vlm, self.recipe, self.spec, self.seed = context, vlm, recipe, spec, seed
        self.pruner = registry.make("pruners", spec)
        self.aware = Need.TEXT in self.pruner.needs
        self.name, self.tally = name(spec, seed), training.BrokenRows(recipe.max_broken_share)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            networks = self.pruner.build(self._calibration())
        self.networks = networks.train()
        self.module = context.wrap(Throttled(self.pruner, networks))
        self.parameters = [p for p in networks.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        self.done, self.skips = 0, 0
        self.batch = drawn(context, lambda: training.validation(
            vlm, recipe.data, images=recipe.validation_images, rank=context.rank, world=context.world, tally=self.tally,
        )) if recipe.validate_every else None  # fmt: skip

    def _calibration(self) -> VisualTokens:
        recipe = self.recipe
        batch = drawn(self.context, lambda: training.calibration(self.vlm, recipe.data, recipe.calibration_images, self.tally))
        tokens = self._encode(batch)
        return pruning.with_question(self.vlm, batch.prompts, tokens[batch.image]) if self.aware else tokens

    def temperature(self, step: int) -> float:
        """Of the relaxation at a step, on the method's own schedule."""
        return temperature(self.recipe, step, getattr(self.pruner, "schedule", "cosine"))

    @torch.no_grad()
    def _encode(self, batch: TrainBatch) -> VisualTokens:
        return self.vlm.encode(batch.pixels, self.pruner.needs)

    def _attention(self) -> contextlib.AbstractContextManager[None]:
        """The decoder attention this method trains under; the deployed path always runs the model's own."""
        wanted = getattr(self.pruner, "attention_implementation", None)
        return decoder_attention(self.vlm.model, wanted) if wanted else contextlib.nullcontext()

    @contextlib.contextmanager
    def _differentiated(self) -> Iterator[None]:
        """Around forward *and* backward passes: layers that are computed again must be computed as they were."""
        with self._attention(), recomputed(self.vlm.model) if self.recipe.checkpointing else contextlib.nullcontext():
            yield

    def _parts(self, batch: TrainBatch) -> list[TrainBatch]:
        """A batch in parts of `micro_images`."""
        size = self.recipe.micro_images or batch.images
        if size >= batch.images:
            return [batch]
        return [batch.part(self.vlm, i, min(i + size, batch.images)) for i in range(0, batch.images, size)]

    def nll(
        self, batch: TrainBatch, budget: Budget, temperature: float, source: torch.Generator, module: nn.Module | None = None
    ) -> tuple[Tensor, Relaxation]:
        """(summed NLL of a batch's answers in nats, a scalar; their throttle). module: in place of the wrapped one."""
        tokens, image = self._encode(batch), batch.image
        if self.aware:  # the question is part of what is scored, so each row is throttled by itself
            tokens = pruning.with_question(self.vlm, batch.prompts, tokens[image])
            image = torch.arange(len(image), device=image.device)
        throttle = (module or self.module)(tokens, budget, temperature, source)
        with self._attention():
            return throttled_nll(self.vlm, batch.prompts, tokens, throttle, image), throttle

    def step(self, batch: TrainBatch) -> Step:
        """One update from this worker's share of a batch; skipped on every worker when loss or gradient is not finite.

        Raises:
            Diverged: that happened more than `max_skips` times.
        """
        started, t, recipe = time.perf_counter(), self.done, self.recipe
        budget, tau = drawn_budget(recipe, self.seed, t), self.temperature(t)
        total = self.context.sum(torch.tensor(float(batch.num_labels), device=self.vlm.device))
        found = self._backward(batch, budget, tau, total)
        norm = nn.utils.clip_grad_norm_(self.parameters, recipe.clip)
        found = self.context.sum(torch.cat([found, norm[None]]))
        nll_sum, penalty_sum, kept_sum, norm_sum = found.tolist()
        world = self.context.world
        finite = math.isfinite(sum(found.tolist()))
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(recipe, t)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        step_ms = 1000 * (time.perf_counter() - started)
        if not finite:
            self._skip(t)
        self.done += 1
        return Step(
            step=t, loss=nll_sum / float(total), penalty=penalty_sum / world, temperature=tau,
            drawn_budget=str(budget), kept=kept_sum / world, grad_norm=norm_sum / world, grad_cosine=math.nan, step_ms=step_ms,
            workers=world, validation_soft=math.nan, validation_hard=math.nan,
        )  # fmt: skip

    def _backward(self, batch: TrainBatch, budget: Budget, temperature: float, total: Tensor) -> Tensor:
        """Gradients of this worker's share, part by part; returns [3]: summed NLL, mean penalty, mean tokens kept.

        One stream of noise runs through the parts: they see what the whole share would have seen, so nothing but rounding differs
        (as long as N is the same in all parts).
        """
        source, parts = generator(NOISE, self.seed, self.done, self.context.rank), self._parts(batch)
        rows = len(batch.image) if self.aware else batch.images  # that are throttled one by one
        found = torch.zeros(3, device=self.vlm.device)
        for number, part in enumerate(parts, 1):
            # Workers exchange gradients once, with the last part.
            quiet = contextlib.nullcontext if number == len(parts) else getattr(self.module, "no_sync", contextlib.nullcontext)
            with quiet(), self._differentiated():
                nll, throttle = self.nll(part, budget, temperature, source)
                share = len(throttle.kept) / rows
                penalty = torch.as_tensor(throttle.penalty, device=nll.device) * share
                # Gradients are averaged over workers, so this is the mean over all answer tokens wherever they are.
                (nll * self.context.world / total + penalty).backward()
            found += torch.stack([nll.detach(), penalty.detach().float(), throttle.kept.detach().mean() * share])
        return found

    def _skip(self, step: int) -> None:
        self.skips += 1
        if self.skips > self.recipe.max_skips:
            raise Diverged(
                f"{self.spec}, seed {self.seed}: loss or gradient was NaN or infinite at {self.skips} steps, last at step "
                f"{step}; lower the learning rate ({self.recipe.learning_rate:g}) or check the data"
            )

    def grad_cosine(self, batch: TrainBatch, step: int, parts: int = 4) -> float:
        """Mean pairwise cosine of scorer gradients on `parts` disjoint sets of images, one noise draw each (METHODS 2.12).

        With unit vectors g, |mean g|^2 = 1/M + (1 - 1/M) C. NaN when there are fewer than two sets.
        """
        images = batch.images
        mine = max(1, min(images, parts // self.context.world))
        budget, tau = drawn_budget(self.recipe, self.seed, step), self.temperature(step)
        scorer = list(self.networks["scorer"].parameters())
        total: Tensor | float = 0.0
        for m in range(mine):
            piece = batch.part(self.vlm, m * images // mine, (m + 1) * images // mine)
            source = generator(PROBE, self.seed, step, self.context.rank, m)
            with self._differentiated():
                nll, throttle = self.nll(piece, budget, tau, source, module=Throttled(self.pruner, self.networks))
                grads = torch.autograd.grad(nll / max(piece.num_labels, 1) + throttle.penalty, scorer, allow_unused=True)
            flat = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(scorer, grads, strict=True)])
            total = total + functional.normalize(flat, dim=0)
        num = mine * self.context.world
        assert isinstance(total, Tensor)
        mean = self.context.sum(total) / num
        return (float(mean.square().sum()) - 1 / num) / (1 - 1 / num) if num > 1 else math.nan

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """NLL per answer token on held-out images, mean over the budgets: (through the throttle, with tokens removed)."""
        assert self.batch is not None
        tau = self.temperature(max(self.done - 1, 0))
        sums = torch.zeros(3, device=self.vlm.device)
        self.networks.eval()
        tried = [(budget, generator(CHECK, i, self.context.rank)) for i, budget in enumerate(self.recipe.budgets)]
        for part in self._parts(self.batch):
            tokens = self._encode(part)[part.image]
            for budget, source in tried:
                soft, _ = self.nll(part, budget, tau, source, module=Throttled(self.pruner, self.networks))
                hard = answer_nll(self.vlm, pruning.shrink(self.vlm, part.prompts, tokens, self.pruner, budget))
                sums += torch.stack([soft, hard, torch.tensor(float(part.num_labels), device=soft.device)])
        self.networks.train()
        soft_sum, hard_sum, total = self.context.sum(sums).tolist()
        return soft_sum / total, hard_sum / total

    def state(self) -> dict[str, Any]:
        """What goes on after a failure. Randomness needs no state: it is a function of seed, step and rank."""
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
