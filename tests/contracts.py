"""Contracts of every pruner: one function each, given how a pruner is made; `test_contracts.py` holds every pruner to them.

Tokens are random images of up to 20 tokens with all evidence there is. Whatever is no contract's own business is kept out of it:
padding is looked at by two, the global generator by one, full budgets by one, so that a fault breaks the contract that names it.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffprune import data as training
from diffprune.core import registry
from diffprune.core.budget import Above, Budget, Keep, Share
from diffprune.core.evidence import (
    IDENTITY,
    QUESTION,
    Evidence,
    Question,
    decoder_attention,
    decoder_features,
    decoder_keys,
    encoder_attention,
    encoder_keys,
)
from diffprune.core.fitted import Artifact, FittedPruner, Progress, RelaxedPruner, TrainablePruner
from diffprune.core.noise import Noise
from diffprune.core.pruner import Kind, Pruner, Reference
from diffprune.core.site import ENCODED, PROJECTED, Cut, Site
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.core.vlm import VLM, Shape
from diffprune.pruning import merged
from diffprune.pruning.selection import applied
from diffprune.train.context import LocalContext
from diffprune.train.recipe import Recipe
from diffprune.train.scorer_trainer import ScorerTrainer
from diffprune.vlm.load import load

ROWS, COLUMNS, WIDTH = 4, 5, 16
NUM = ROWS * COLUMNS
SHAPE = Shape(
    layers=4, width=32, heads=4, kv_heads=4, head_dim=8, ffn=64, vocabulary=99, vision_layers=3, vision_width=16, vision_ffn=32,
    patches=20, patch_inputs=12, visual_tokens=20,
)  # fmt: skip
COUNTS = (Keep(1), Keep(7), Keep(13), Share(1 / 9), Share(0.5))  # less than any image has
INSIDE = ("attention", "fastv", "tome", "diffprune")  # what a wrapper may hold: before and in the decoder, merging, learnt
FILLS = {"diversity": 0.0, "sinks": 0}  # options that only choose when tokens are removed, out of the way of what was trained
Make = Callable[[], Pruner]


# --- tokens ----------------------------------------------------------------------------------------------------------


def tokens(
    num_images: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32, padded: bool = True, projected: bool = False
) -> VisualTokens:
    """Random images of up to 20 tokens with everything a pruner can ask for; image i lacks its last 3i tokens."""
    chance = torch.Generator().manual_seed(seed)

    def uniform(*more: int) -> Tensor:
        return torch.rand(num_images, NUM, *more, generator=chance).to(dtype)

    def normal(*more: int) -> Tensor:
        return torch.randn(num_images, NUM, *more, generator=chance).to(dtype)

    def words(width: int) -> Question:
        made = torch.randn(num_images, 6, width, generator=chance).to(dtype)
        return Question(made, torch.tensor([[False] + [True] * 5] * num_images))

    valid = torch.ones(num_images, NUM, dtype=torch.bool)
    for i in range(num_images if padded else 0):
        valid[i, NUM - 3 * i :] = i == 0
    return VisualTokens(
        features=normal(2 * WIDTH if projected else WIDTH),
        valid=valid,
        grid=(ROWS, COLUMNS),
        evidence={
            encoder_attention(): uniform(),
            encoder_attention(-1, joint=True): uniform(),
            encoder_keys(): normal(2, 8),
            encoder_keys(-1): normal(2, 8),
            QUESTION: words(2 * WIDTH),
            IDENTITY: torch.arange(num_images) + 100 * seed,
            decoder_attention(-1): uniform(),
            decoder_attention(None): uniform(),
            decoder_attention(-1, "text"): uniform(),
            decoder_attention(-1, "each"): uniform(6),
            decoder_attention(raw=True): normal(),
            decoder_attention(queries="image", raw=True): normal(),
            decoder_keys(): normal(8),
            decoder_keys(-1, "text"): words(8),
            decoder_features(): normal(2 * WIDTH),
            **{decoder_features(i): normal(2 * WIDTH) for i in range(SHAPE.layers)},
            decoder_features(None, "text"): words(2 * WIDTH),
        },
        projected=projected,
    )


def loud(seen: VisualTokens) -> VisualTokens:
    """The same tokens with large values in the padding of features and evidence."""

    def filled(values: Tensor) -> Tensor:
        return values.where(seen.valid.view(*seen.valid.shape, *[1] * (values.ndim - 2)), 1e3)

    evidence = {key: filled(seen.given(key)) if key.per_token else value for key, value in seen.evidence.items()}
    return replace(seen, features=filled(seen.features), evidence=evidence)


# --- pruners ---------------------------------------------------------------------------------------------------------


@cache
def spellings() -> dict[str, tuple[str, ...]]:
    """How every plug-in is asked for: by its name; a wrapper around each method it takes, of those in `INSIDE`."""
    found = {}
    for name in registry.names("pruners"):
        parameters = inspect.signature(registry.find("pruners", name)).parameters.values()
        wraps = any("Pruner" in str(parameter.annotation) for parameter in parameters)
        found[name] = tuple(f"{name}({inner})" for inner in INSIDE if _taken(name, inner)) if wraps else (name,)
        assert found[name], f"{name} wraps none of {', '.join(INSIDE)}: add what it takes"
    return found


def _taken(name: str, inner: str) -> bool:
    try:
        registry.load("pruners", f"{name}({inner})")
    except ValueError:
        return False
    return True


def site(pruner: Pruner) -> Site:
    """Where it cuts first."""
    plan = pruner.cuts(Share(0.6), SHAPE)
    return plan[0].site if plan else ENCODED


def made(spelling: str) -> Pruner:
    """A pruner ready to select: what is trained has random networks, of a fixed seed, built on other images."""
    pruner: Pruner = registry.load("pruners", spelling)
    inside: Pruner | None = pruner
    while inside is not None:
        if isinstance(inside, TrainablePruner):
            built(inside, site(inside))
        elif isinstance(inside, FittedPruner):
            inside.fit(Calibration())
        inside = inside.inner
    return pruner


def built(pruner: TrainablePruner, where: Site, spread: float = 0.0, seed: int = 0) -> None:
    """Random networks; matrices of a standard deviation of `spread`, where it is given, so that scores differ."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        networks = pruner.networks = pruner.build(tokens(8, seed=7, padded=False, projected=where >= PROJECTED)).eval()
        for parameter in networks.parameters() if spread else ():
            torch.nn.init.normal_(parameter, std=spread)


def learnt(pruner: Pruner | None) -> Iterator[torch.nn.Module]:
    """Networks of a pruner and of what it wraps."""
    while pruner is not None:
        if isinstance(pruner, TrainablePruner) and pruner.networks is not None:
            yield pruner.networks
        pruner = pruner.inner


class Calibration:
    """A run that fits on other images."""

    vlm: Any = SimpleNamespace(shape=SHAPE)
    seed = 0

    def calibration(self, pruner: Pruner, images: int) -> VisualTokens:
        return tokens(8, seed=7, projected=site(pruner) >= PROJECTED)

    def train(self, pruner: TrainablePruner) -> Artifact:
        raise AssertionError("a calibrated method takes no steps")

    def save(self, pruner: FittedPruner, **facts: Any) -> Artifact:
        return Artifact(Path(), "")


def shown(pruner: Pruner, dtype: torch.dtype = torch.float32) -> VisualTokens:
    """The tokens as they are where a pruner cuts first."""
    return tokens(dtype=dtype, projected=site(pruner) >= PROJECTED)


def chosen(pruner: Pruner, seen: VisualTokens, budget: Budget, seed: int = 0) -> Selection:
    """The selection of its first cut. seed: of the global generator, which should not matter."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        return pruner.select(seen, Cut(site(pruner), budget))


def kept(pruner: Pruner, seen: VisualTokens, budget: Budget) -> Tensor:
    """[B N] bool: valid tokens that are kept."""
    return chosen(pruner, seen, budget).keep.bool() & seen.valid


def same_mix(one: Selection, other: Selection, index: Tensor, num: int = NUM) -> bool:
    """Whether the images `index` of one are merged as those of the other are, as far as `num` columns, and rows that both have."""
    if one.mix is None or other.mix is None:
        return one.mix is other.mix
    rows = min(one.mix.shape[1], other.mix.shape[1])
    mixes = (mix[:, :rows, :num] for mix in (other.mix, one.mix[index]))
    return torch.allclose(*mixes, rtol=1e-4, atol=1e-6, equal_nan=True)


# --- contracts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contract:
    """holds: raises AssertionError where a pruner breaks it; of: the classes it is about."""

    holds: Callable[[Make], None]
    of: type[Pruner]


CONTRACTS: dict[str, Contract] = {}


def contract(of: type[Pruner] = Pruner) -> Callable[[Callable[[Make], None]], Callable[[Make], None]]:
    """Enter a function as the contract of its name."""

    def entered(holds: Callable[[Make], None]) -> Callable[[Make], None]:
        CONTRACTS[holds.__name__] = Contract(holds, of)
        return holds

    return entered


def of(name: str) -> Iterator[tuple[str, str]]:
    """(contract, spelling) of all contracts that are about a plug-in."""
    plugin = registry.find("pruners", name)
    for title, one in CONTRACTS.items():
        if issubclass(plugin, one.of):
            yield from ((title, spelling) for spelling in spellings()[name])


@contract()
def description(make: Make) -> None:
    """A plug-in says of itself what tables, keys and --help need."""
    pruner = make()
    assert inspect.getdoc(type(pruner)), "tables and --help print the first line"
    assert all(isinstance(evidence, Evidence) for evidence in pruner.needs)
    assert pruner.label and isinstance(pruner.kind, Kind) and isinstance(pruner.reference, Reference)
    own = registry.signature(type(pruner)).parameters
    inner = registry.signature(type(pruner.inner)).parameters if pruner.inner else {}
    assert {*pruner.option_labels, *pruner.replicate_options} <= {*own, *inner}


@contract()
def budget(make: Make) -> None:
    """Exactly as many tokens as asked for, or adaptive and within its guards; a bound and a diagnostic keep all."""
    pruner = make()
    seen = shown(pruner)
    all_of_them = pruner.kind in (Kind.BOUND, Kind.DIAGNOSTIC)
    for asked in COUNTS:
        for left, num in zip(kept(pruner, seen, asked).sum(1).tolist(), seen.counts.tolist(), strict=True):
            wanted = asked.num if isinstance(asked, Keep) else max(1, math.floor(asked.share * num + 0.5))
            if all_of_them:
                assert left == num
            else:
                assert wanted / pruner.slack <= left <= wanted * pruner.slack and 1 <= left <= num, f"{asked}: {left} of {num}"


@contract()
def full_budget(make: Make) -> None:
    """As many tokens as there are, or more, change nothing, in images of every size."""
    pruner = make()
    seen = shown(pruner)
    for asked in (Keep(NUM - 4), Keep(NUM), Keep(99), Share(1.0)):
        whole = torch.tensor([asked.count(num) >= num for num in seen.counts.tolist()])
        left = chosen(pruner, seen, asked)
        assert torch.equal((left.keep.bool() & seen.valid)[whole], seen.valid[whole]), asked
        if left.mix is not None:
            after = merged(seen, left.keep.bool(), left.mix)
            assert torch.equal(after.features[whole], seen.features[whole]), asked


@contract()
def threshold(make: Make) -> None:
    """A threshold keeps at least one token of every image, or is refused in a sentence."""
    pruner = make()
    seen = shown(pruner)
    for asked in (-99.0, 0.0, 99.0):
        try:
            left = kept(pruner, seen, Above(asked))
        except ValueError as error:
            assert "needs a count" in str(error)
        else:
            assert (left.sum(1) >= 1).all()


@contract()
def padding(make: Make) -> None:
    """Padding is never selected."""
    pruner = make()
    seen = shown(pruner)
    for asked in (*COUNTS, Share(1.0)):
        assert not (chosen(pruner, seen, asked).keep.bool() & ~seen.valid).any(), asked


@contract()
def padding_unseen(make: Make) -> None:
    """Neither the values in padding nor its length change a choice."""
    pruner = make()
    seen = shown(pruner)
    for asked, (i, num) in itertools.product((Keep(5), Share(0.7)), enumerate(seen.counts.tolist())):
        alone, first = seen[torch.tensor([i])], torch.tensor([0])
        quiet, noisy, short = (chosen(pruner, one, asked) for one in (alone, loud(alone), alone.padded(num)))
        for other in (noisy, short):
            same = torch.equal(other.keep[:, :num], quiet.keep[:, :num])
            assert same and same_mix(quiet, other, first, num), f"image {i}, {asked}"


@contract()
def order_of_rows(make: Make) -> None:
    """The order of the images in a batch does not matter."""
    pruner = make()
    seen, order = shown(pruner), torch.tensor([2, 0, 1])
    first, second = chosen(pruner, seen, Keep(5)), chosen(pruner, seen[order], Keep(5))
    assert torch.equal(second.keep, first.keep[order]) and same_mix(first, second, order)


@contract()
def one_by_one(make: Make) -> None:
    """A batch is its images one by one."""
    pruner = make()
    seen = shown(pruner)
    together = chosen(pruner, seen, Keep(5))
    for i in range(len(seen)):
        index = torch.tensor([i])
        alone = chosen(pruner, seen[index], Keep(5))
        assert torch.equal(alone.keep, together.keep[index]) and same_mix(together, alone, index), f"image {i}"


@contract()
def deterministic(make: Make) -> None:
    """The same tokens give the same answer, by this pruner and by another one, whatever the global generator has drawn."""
    answers = []
    with torch.random.fork_rng():
        for seed in (1, 2):
            torch.default_generator.manual_seed(seed)
            pruner = make()
            answers += [chosen(pruner, shown(pruner), Keep(5), seed=10 * seed + turn) for turn in range(2)]
    for other in answers[1:]:
        assert torch.equal(other.keep, answers[0].keep)
        assert same_mix(answers[0], other, torch.arange(len(other.keep)))


@contract()
def dtype_and_device(make: Make) -> None:
    """Masks are bool and lie where the tokens do; tokens stay of their type, in both that models run in, on all devices here."""
    pruner = make()
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for device, dtype in itertools.product(devices, (torch.float32, torch.bfloat16)):
        for networks in learnt(pruner):
            networks.to(device)
        seen = shown(pruner, dtype).map(lambda value, device=device: value.to(device))  # type: ignore[misc]
        left = chosen(pruner, seen, Keep(5))
        assert (left.keep.dtype, left.keep.device) == (torch.bool, seen.valid.device)
        after = applied(seen, left).features
        assert (after.dtype, after.device) == (dtype, seen.features.device)


@contract()
def survivors(make: Make) -> None:
    """What survives stays as it is, unless the method merges, and says so; the tokens that were given stay as they were."""
    pruner = make()
    seen = shown(pruner)
    before = seen.features.clone()
    left = chosen(pruner, seen, Keep(5))
    assert torch.equal(seen.features, before), "the input was changed in place"
    if pruner.kind is Kind.DIAGNOSTIC:
        assert left.features is not None and left.mix is None
        return
    assert left.features is None, "features are changed by the path, from where tokens go"
    keep = left.keep.bool() & seen.valid
    assert torch.equal(applied(seen, left).features[keep], before[keep]) == (left.mix is None)


@contract()
def merging(make: Make) -> None:
    """What merges has a finite sum of real tokens for every survivor."""
    pruner = make()
    seen = shown(pruner)
    left = chosen(pruner, seen, Keep(5))
    if left.mix is None:
        return
    assert left.mix.shape[1] >= int(left.keep.sum(1).max()) and torch.isfinite(left.mix).all()
    silent = replace(seen, features=seen.features.where(seen.valid[..., None], float("nan")))
    after, other = (merged(each, left.keep, left.mix).features[left.keep] for each in (seen, silent))
    assert torch.isfinite(after).all() and torch.equal(after, other), "padding is never merged"


@contract(FittedPruner)
def saved(make: Make) -> None:
    """What was learnt, saved and loaded, selects alike."""
    pruner: Any = make()
    pruner.save_pretrained("saved")
    again: Any = registry.make("pruners", pruner.spec.at(weights=Path("saved").absolute()))
    assert again.weights_sha256 == pruner.weights_sha256 != "" and again.ready
    seen = shown(pruner)
    for asked in (Keep(5), Share(0.7)):
        one, other = chosen(pruner, seen, asked), chosen(again, seen, asked)
        assert torch.equal(one.keep, other.keep) and same_mix(one, other, torch.arange(len(seen)))


class Silence(Noise):
    """Noise without effect: normal numbers are 0, and uniform ones those whose Gumbel number, -log(-log(u)), is 0."""

    def __init__(self, rows: int) -> None:
        super().__init__("silence", rows=range(rows))

    def normal(self, valid: Tensor, width: int) -> Tensor:
        return torch.zeros(*valid.shape, width)

    def uniform(self, valid: Tensor, width: int = 1) -> Tensor:
        return torch.full((*valid.shape, width), math.exp(-1))


@contract(RelaxedPruner)
def hard_limit(make: Make) -> None:
    """What training lets through, as its temperature goes to 0 and its noise with it, is what `select` keeps of as many tokens."""
    pruner: Any = make()
    options = {key: value for key, value in FILLS.items() if key in registry.signature(type(pruner)).parameters}
    pruner, told = registry.make("pruners", pruner.spec.with_options(**options)), 0
    for seed, asked in itertools.product(range(6), (Keep(5), Share(0.5))):
        built(pruner, site(pruner), spread=0.3, seed=seed)
        seen = shown(pruner)
        with torch.no_grad():
            let = pruner.relax(seen, asked, 1e-6, Silence(len(seen))).let
        through = (let > 0.5) & seen.valid
        torch.testing.assert_close(let.where(seen.valid, 0.0), through.float(), rtol=0, atol=1e-3)
        for i, num in enumerate(through.sum(1).tolist()):
            if 0 < num < int(seen.counts[i]):  # some training only meets a budget on average, and not with these weights
                index, told = torch.tensor([i]), told + 1
                assert torch.equal(kept(pruner, seen[index], Keep(num)), through[index]), f"seed {seed}, image {i}"
    assert told, "nothing was let through, or all of it"


@cache
def embedded() -> VLM:
    """The model that gradients go through."""
    return load("embedded", device="cpu")


SMALL: dict[str, Any] = {
    "steps": 3, "images": 2, "questions": 2, "questions_alone": 2, "workers": 1, "calibration_images": 4, "validate_every": 0,
    "checkpoint_every": 0, "grad_cosine_every": 0, "budgets": (Share(0.5),), "ease_share": 0.0,
}  # fmt: skip


@contract(TrainablePruner)
def gradient(make: Make) -> None:
    """The gradient of one step, of the answers where they teach, reaches every matrix of the scorer and nothing of the model."""
    vlm, pruner = embedded(), make()
    assert isinstance(pruner, TrainablePruner)
    trainer = ScorerTrainer(LocalContext("run"), vlm, Recipe(**SMALL), pruner, 0)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(1)
        for parameter in trainer.parameters:
            torch.nn.init.normal_(parameter, std=0.2)
    batch = next(training.batches(vlm, "world", seed=0, images=2, questions=2, packed=vlm.packs and not trainer.aware))
    run = trainer.run(batch, batch.num_labels)
    loss = pruner.objective(run, batch, Share(0.5), Progress(0, 3), trainer.noise(batch, 0))
    taught = loss.terms.get("nll", loss.total)
    assert taught.requires_grad, "the loss does not depend on the scorer"
    taught.backward()
    scorer = dict(trainer.networks.items()).get("scorer", trainer.networks)
    still = [name for name, p in scorer.named_parameters() if p.ndim >= 2 and (p.grad is None or not p.grad.abs().sum() > 0)]
    assert not still, f"no gradient reaches {', '.join(still)}"
    touched = [name for name, p in vlm.model.named_parameters() if p.requires_grad or p.grad is not None]
    vlm.model.requires_grad_(False).zero_grad(set_to_none=True)
    assert not touched, f"the model is frozen, but not {touched[0]}"
