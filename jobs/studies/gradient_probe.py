"""How steady the gradients of a scorer are, and how rough its loss: DiffPrune against Gumbel keep/drop and top-K.

    python jobs/studies/gradient_probe.py --out reports/gradient_probe

The claim of arXiv 2605.28051 (section 3), whose definitions are not printed; these are ours. Every method trains with the settings
of jobs/compare_gumbel.py; before, halfway and after, with its parameters held, of a budget of a ninth:

* coherence: mean cosine of every two of M scorer gradients, C = (M |mean g|^2 - 1) / (M - 1) of unit gradients g; of the same
  images with M draws of noise, and of M disjoint sets of images with a draw each;
* roughness: mean |L(b') - L(b)| between neighbours b of 25 steps from -0.3 to 0.3 along a random direction in which every row of a
  matrix has the length of the scorer's own (filter normalisation, Li et al., arXiv 1712.09913), with the noise of one draw.

Images and seeds are the same for all methods. Several minutes on one core.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from diffprune import data as training
from diffprune.core import registry
from diffprune.core.budget import Share
from diffprune.core.cell import describe
from diffprune.core.noise import generator
from diffprune.core.vlm import VLM
from diffprune.data import TrainBatch
from diffprune.job.files import load_job
from diffprune.report.render.lines import Line, lines
from diffprune.store.provenance import collect
from diffprune.train.context import LocalContext
from diffprune.train.loop import batches
from diffprune.train.recipe import Recipe
from diffprune.train.scorer_trainer import ScorerTrainer
from diffprune.vlm.load import load

METHODS = ("diffprune", "gumbel_topk", "gumbel_keepdrop(offset=True)")
BUDGET, SETS, IMAGES, POINTS = Share(1 / 9), 4, 4, np.linspace(-0.3, 0.3, 25)
SEED_OF_IMAGES, DRAW = 10_000, 99  # images that no scorer of the study trains on; a stream of noise that no training uses


def scorer(trainer: ScorerTrainer) -> list[Tensor]:
    """The parameters that are looked at."""
    return [p for p in trainer.networks["scorer"].parameters() if p.requires_grad]


def loss(trainer: ScorerTrainer, batch: TrainBatch, draw: int) -> Tensor:
    """Of one batch at the parameters as they are, with the noise of one draw."""
    progress = trainer.progress(min(trainer.done, trainer.recipe.steps - 1))
    with trainer.attention():
        run = trainer.run(batch, batch.num_labels)
        return trainer.pruner.objective(run, batch, BUDGET, progress, trainer.noise(batch, DRAW, trainer.seed, draw)).total


def gradient(trainer: ScorerTrainer, batch: TrainBatch, draw: int) -> Tensor:
    """Of all the scorer's parameters, of length 1."""
    parameters = scorer(trainer)
    with trainer.attention():
        found = torch.autograd.grad(loss(trainer, batch, draw), parameters, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return functional.normalize(torch.cat([part.flatten() for part in parts]), dim=0)


def coherence(gradients: Sequence[Tensor]) -> float:
    """Mean cosine of every two of unit gradients, in one pass."""
    num = len(gradients)
    return float((num * torch.stack(list(gradients)).mean(0).square().sum() - 1) / (num - 1))


def direction(parameters: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Random, each row of a matrix as long as the parameter's own; nothing of what is no matrix."""
    stream, found = generator("direction", seed), []
    for p in parameters:
        drawn = torch.randn(p.shape, generator=stream)
        own = p.detach().norm(dim=-1, keepdim=True)
        found.append(drawn / drawn.norm(dim=-1, keepdim=True) * own if p.ndim > 1 else torch.zeros_like(p))
    return found


@torch.no_grad()
def along(trainer: ScorerTrainer, batch: TrainBatch) -> list[float]:
    """Loss at `POINTS` along a direction; the parameters are put back."""
    parameters = scorer(trainer)
    own, step = [p.clone() for p in parameters], direction(parameters, trainer.seed)
    found = []
    for point in POINTS.tolist():
        for p, at, to in zip(parameters, own, step, strict=True):
            p.copy_(at + point * to)
        found.append(float(loss(trainer, batch, 0)))
    for p, at in zip(parameters, own, strict=True):
        p.copy_(at)
    return found


def probed(trainer: ScorerTrainer, batch: TrainBatch) -> dict[str, Any]:
    """Everything of one scorer at one moment. batch: SETS x IMAGES pictures."""
    parts = [batch.part(trainer.vlm, i * IMAGES, (i + 1) * IMAGES) for i in range(SETS)]
    curve = along(trainer, parts[0])
    return {
        "coherence_draws": coherence([gradient(trainer, parts[0], draw) for draw in range(SETS)]),
        "coherence_images": coherence([gradient(trainer, part, draw) for draw, part in enumerate(parts)]),
        "roughness": float(np.abs(np.diff(curve)).mean()),
        "curve": curve,
    }


def rows(vlm: VLM, seeds: int, steps: int | None) -> Iterator[dict[str, Any]]:
    """What is found of every method and seed before, halfway and after its training. steps: instead of the methods' own."""
    asked = load_job("compare_gumbel").train
    assert asked, "the comparison trains"
    fixed = next(training.batches(vlm, asked.data, seed=SEED_OF_IMAGES, images=SETS * IMAGES, questions=asked.questions))
    for spelling in METHODS:
        spec = registry.spec("pruners", spelling)
        own = asked.of(spec)
        changed = {"workers": 1, "validate_every": 0, "steps": steps or own.steps}
        recipe = Recipe(**{name: getattr(own, name) for name in Recipe.model_fields} | changed)
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                trainer = ScorerTrainer(LocalContext(folder), vlm, recipe, registry.make("pruners", spec), seed)
                stream = batches(trainer)
                for share in (0.0, 0.5, 1.0):
                    while trainer.done < round(share * recipe.steps):
                        trainer.step(next(stream))
                    at = {"method": describe(trainer.pruner).label, "seed": seed, "trained": share, "step": trainer.done}
                    yield at | probed(trainer, fixed)


def figures(told: pd.DataFrame) -> dict[str, str]:
    """SVG text by name: coherence over training, mean and range over seeds; loss along the direction, first seed."""
    kinds = {"coherence_draws": "same images, other noise", "coherence_images": "other images and noise"}
    coherent: dict[str, list[Line]] = {title: [] for title in kinds.values()}
    curves: dict[str, list[Line]] = {}
    for method, own in told.groupby("method", sort=False):
        for column, title in kinds.items():
            found = own.groupby("trained")[column].agg(["mean", "min", "max"])
            x = (100 * found.index.to_numpy()).tolist()
            coherent[title].append(Line(str(method), x, *(found[of].tolist() for of in ("mean", "min", "max"))))
        for share, one in own[own["seed"] == 0].groupby("trained"):
            curve = np.asarray(one["curve"].iloc[0])
            title = f"{share:.0%} trained"
            curves.setdefault(title, []).append(Line(str(method), POINTS.tolist(), (curve - curve[len(curve) // 2]).tolist()))
    return {
        "coherence.svg": lines(coherent, "of the training, %", "mean cosine of two gradients"),
        "roughness.svg": lines(curves, "along the direction", "loss minus that at 0, nats"),
    }


def page(told: pd.DataFrame, origin: str) -> str:
    """The table as Markdown: means over seeds with their standard deviations, and the factors of DiffPrune over the others."""
    out = [
        "# Coherence of gradients, roughness of the loss", "", (__doc__ or "").split("\n\n", 2)[2].strip(), "", origin, "",
        "![coherence over training](coherence.svg)", "", "![loss along a direction](roughness.svg)", "",
        "| trained | method | coherence, other noise | other images and noise | roughness, nats |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for (share, method), own in told.groupby(["trained", "method"], sort=False):
        cells = [f"{own[c].mean():.3f} ± {own[c].std():.3f}" for c in ("coherence_draws", "coherence_images", "roughness")]
        out.append(f"| {share:.0%} | {method} | {' | '.join(cells)} |")
    return "\n".join([*out, "", f"Mean ± standard deviation over {told['seed'].nunique()} seeds."]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Probe every method; write table.csv, two figures and README.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of every training, instead of the methods' own")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = []
    for row in rows(load("embedded", device="cpu"), given.seeds, given.steps):
        found.append(row)
        shown = ", ".join(f"{name} {row[name]:.3f}" for name in ("coherence_draws", "coherence_images", "roughness"))
        print(f"{row['method']}, seed {row['seed']}, step {row['step']}: {shown}", flush=True)
    told, made = pd.DataFrame(found).sort_values("trained", kind="stable"), collect("gradient_probe", 1, 0)
    given.out.mkdir(parents=True, exist_ok=True)
    told.drop(columns="curve").to_csv(given.out / "table.csv", index=False, float_format="%.5f")
    for name, text in figures(told).items():
        (given.out / name).write_text(text, encoding="utf-8")
    origin = f"Commit {made.commit[:12]}{' (changed)' if made.dirty else ''}, {made.started}."
    (given.out / "README.md").write_text(page(told, origin), encoding="utf-8")


if __name__ == "__main__":
    main()
