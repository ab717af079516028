"""Methods trained through cuts inside the decoder: ATP-LLaVA and Dynamic-LLaVA, their formulas, hard limits, gradients, files."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from diffprune import data as training
from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Above, Keep, Share
from diffprune.core.fitted import Annealing, Progress
from diffprune.core.site import Cut, Site, Stage, layer_average, staged, tokens_per_layer
from diffprune.core.tokens import VisualTokens
from diffprune.pruners.atp import AFTER, CROSS, SELF, Thresholds, coverage, logistic
from diffprune.pruners.dynamic_llava import Predictor
from diffprune.pruning.pretrained import from_pretrained
from diffprune.train import loop
from diffprune.train.checkpoints import read_steps
from diffprune.train.context import LocalContext
from diffprune.train.estimate import Assumed, estimate
from diffprune.train.loss import answer_nll
from diffprune.train.objective import BadObjective
from diffprune.train.recipe import Recipe
from diffprune.train.scorer_trainer import ScorerTrainer
from diffprune.vlm.load import load

NAMES = ("atp", "dynamic_llava")
SMALL: dict[str, Any] = {
    "steps": 3, "images": 2, "questions": 2, "questions_alone": 2, "workers": 1, "calibration_images": 4, "validation_images": 2,
    "checkpoint_every": 0, "validate_every": 3, "grad_cosine_every": 2, "budgets": (Share(0.1), Share(0.5)), "ease_share": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def vlm() -> Any:
    return load("embedded", device="cpu")


def arm(vlm: Any, spelling: str, spread: float = 0.0, **options: Any) -> ScorerTrainer:
    """In training, with weights far from where training starts if `spread`."""
    trainer = ScorerTrainer(LocalContext("run"), vlm, Recipe(**{**SMALL, **options}), registry.load("pruners", spelling), 0)
    torch.manual_seed(1)
    for parameter in trainer.parameters if spread else ():
        torch.nn.init.normal_(parameter, std=spread)
    return trainer


def at(number: int, budget: Any) -> Cut:
    return Cut(Site(Stage.DECODER, number + 1), budget, number, True)


def seen(grid: tuple[int, int] | None = (4, 5)) -> VisualTokens:
    chance = torch.Generator().manual_seed(3)
    valid = torch.ones(3, 20, dtype=torch.bool)
    valid[1, -5:] = False
    evidence = {SELF: 3 * torch.randn(3, 20, generator=chance), CROSS: torch.rand(3, 20, generator=chance)}
    return VisualTokens(torch.randn(3, 20, 8, generator=chance), valid, grid, evidence, projected=True)


def built(spelling: str, spread: float = 0.5) -> Any:
    pruner = registry.load("pruners", spelling)
    pruner.build(seen())
    torch.manual_seed(2)
    for parameter in pruner.networks.parameters():
        torch.nn.init.normal_(parameter, std=spread)
    return pruner


def standard(values: list[float], here: list[float]) -> list[float]:
    """Logistic of standard scores in plain numbers."""
    total = sum(here)
    middle = sum(v * h for v, h in zip(values, here, strict=True)) / total
    spread = math.sqrt(sum(h * (v - middle) ** 2 for v, h in zip(values, here, strict=True)) / total)
    return [1 / (1 + math.exp((middle - v) / spread)) for v in values]


def on_grid(place: int) -> float:
    """The spatial score on a raster of 4 x 5, one place at a time."""
    row, column = divmod(place, 5)
    strides = [s for s in (2, 3, 4, 5, 6) if row % s == s // 2 and column % s == s // 2]
    return 1 - 3 / max(strides) ** 2 if strides else 0.0


@pytest.mark.parametrize("budget", [Share(0.3), Keep(6)], ids=str)
def test_thresholds_one_token_at_a_time(budget: Any) -> None:
    """S_r, S_s and both thresholds written out, with tokens that are there in part; and the soft comparison."""
    tokens, pruner = seen(), built("atp")
    here = torch.rand(3, 20, generator=torch.Generator().manual_seed(8)).where(tokens.valid, 0.0)
    net, cut = pruner.networks["scorer"], at(1, budget)
    over, soft = (found.detach() for found in (pruner.over(tokens, cut, here), pruner.soft(tokens, cut, here)))
    for row in range(3):
        live = tokens.valid[row].nonzero()[:, 0].tolist()
        there = here[row, live].tolist()
        own, cross = (tokens.given(key)[row, live].tolist() for key in (SELF, CROSS))
        means = [sum(v * h for v, h in zip(values, there, strict=True)) / sum(there) for values in (own, cross)]
        told = torch.tensor([means[0], means[1] * sum(there), math.log(0.3 if budget == Share(0.3) else 6 / len(live))])
        matter, space = net.heads[1](net.inlets[1](told)).sigmoid().tolist()
        for i, a, b in zip(live, standard(own, there), standard(cross, there), strict=True):
            assert float(over[row, i]) == pytest.approx(max((a + b) / 2 - matter, on_grid(i) - space), abs=1e-4)
            gates = [1 / (1 + math.exp(-10 * x)) for x in ((a + b) / 2 - matter, on_grid(i) - space)]
            assert float(soft[row, i]) == pytest.approx(max(gates), abs=1e-3)
    assert not soft[~tokens.valid].any()
    for place, score in enumerate(coverage(seen(None))[0].tolist()):
        rates = [s**2 for s in (2, 3, 4, 5, 6) if place % s**2 == s**2 // 2]
        assert score == pytest.approx(1 - 3 / max(rates) if rates else 0.0)


def test_tokens_of_equal_attention_matter_half() -> None:
    """As the only token of an image does: there is no deviation to divide by."""
    for here in ([1.0] * 5, [1.0, 0, 0, 0, 0], [0.5, 0.25, 0, 1, 0]):
        assert logistic(torch.full((1, 5), 3.0), torch.tensor([here])).tolist() == [[0.5] * 5]
    tokens, pruner = seen(), built("atp(slack=1e9)", spread=9.0)
    assert pruner.select(tokens, at(0, Keep(20))).keep.equal(tokens.valid), "a full budget keeps what exceeds no threshold, too"
    assert not pruner.select(tokens, at(0, Keep(19))).keep[0].all()


def test_counts_are_each_images_own_within_the_guards() -> None:
    tokens, pruner = seen(), built("atp(slack=1e9)")
    over = pruner.over(tokens, at(0, Keep(5)), tokens.valid.float())
    keep = pruner.select(tokens, at(0, Keep(5))).keep
    assert torch.equal(keep, (over > 0) & tokens.valid) and len(set(keep.sum(1).tolist())) > 1
    for number, shift, counts in ((1, -50.0, [8, 8, 8]), (2, 50.0, [2, 2, 2])):  # thresholds of 0 and of 1
        pruner.slack = 2.0
        torch.nn.init.constant_(pruner.networks["scorer"].heads[number].bias, shift)
        assert pruner.select(tokens, at(number, Keep(4))).keep.sum(1).tolist() == counts
    exact = built("atp(slack=1.0)")
    assert exact.select(tokens, at(0, Keep(4))).keep.sum(1).tolist() == [4, 4, 4]
    with pytest.raises(ValueError, match="this method needs a count, as in Keep"):
        exact.select(tokens, at(0, Above(0.0)))


@pytest.mark.parametrize("budget", [Share(0.5), Keep(72)], ids=str)
def test_what_earlier_cuts_left_does_not_loosen_later_ones(vlm: Any, budget: Any) -> None:
    """Thresholds of 0 keep as many as they may: twice the plan's count at every cut, of a share as of a count."""
    wanted = tokens_per_layer(staged(Keep(72), vlm.shape.layers, (1, 2, 3)), 144, vlm.shape.layers)
    trainer = arm(vlm, "atp(slack=2.0)", spread=0.1)
    for head in trainer.pruner.networks["scorer"].heads:
        torch.nn.init.constant_(head.bias, -50.0)
    batch = training.validation(vlm, "world", images=2, questions=1)
    with torch.no_grad():
        packed = pruning.shrink(vlm, batch.prompts, trainer.encode(batch)[batch.image], trainer.pruner, budget)
        with pruning.running(vlm, packed):
            vlm.model(**pruning.decoder_inputs(vlm, packed), use_cache=False)
    most = [144, *(min(144, 2 * count) for count in wanted[1:])]
    assert [list(row) for row in packed.per_layer(vlm.shape.layers)] == [most, most]


def test_the_plan_is_the_papers_and_counts_are_known_afterwards(vlm: Any) -> None:
    plan = registry.load("pruners", "atp").cuts(Share(0.5), vlm.shape)
    assert [(cut.site.layer, cut.number, cut.adaptive) for cut in plan] == [(1, 0, True), (2, 1, True), (3, 2, True)]
    with pytest.raises(ValueError, match="keeps a different number of tokens per image, which is known after"):
        tokens_per_layer(plan, 144, vlm.shape.layers)
    exact = registry.load("pruners", "atp(slack=1.0)").cuts(Share(0.5), vlm.shape)
    assert abs(fmean(tokens_per_layer(exact, 144, vlm.shape.layers)) - 72) <= 0.5
    trainer = arm(vlm, "atp(slack=3.0)", spread=0.6)
    batch = training.validation(vlm, "world", images=3, questions=1)
    tokens = trainer.encode(batch)[batch.image]
    with torch.no_grad():
        packed = pruning.shrink(vlm, batch.prompts, tokens, trainer.pruner, Share(0.5))
        with pytest.raises(ValueError, match="known after"):
            packed.averages(vlm.shape.layers)
        with pruning.running(vlm, packed) as cuts:
            vlm.model(**pruning.decoder_inputs(vlm, packed), use_cache=False)
            assert cuts is not None
            wanted = [[144, *(int(cuts.stages[n].tokens.valid[i].sum()) for n in (1, 2, 3))] for i in range(3)]
    assert [list(row) for row in packed.per_layer(vlm.shape.layers)] == wanted
    assert packed.averages(vlm.shape.layers) == pytest.approx([fmean(row) for row in wanted])


@pytest.mark.parametrize(("spelling", "spread"), [("atp(slack=1e9)", 0.4), ("dynamic_llava", 0.2)])
def test_the_hard_limit_of_training_is_the_cut(spelling: str, spread: float, vlm: Any) -> None:
    """Oracle: the loss of answers with the tokens removed that `select` removes, layer by layer."""
    trainer = arm(vlm, spelling, spread)
    pruner: Any = trainer.pruner
    batch = training.validation(vlm, "world", images=3, questions=2)
    run, plan = trainer.run(batch, batch.num_labels), pruner.cuts(Share(0.6), vlm.shape)
    tokens, image = run.tokens(batch)

    def soften(shown: VisualTokens, cut: Cut, before: torch.Tensor) -> torch.Tensor:
        if spelling == "dynamic_llava":
            return pruner.select(shown, cut).keep.float()
        pruner.sharpness = 1e7
        return pruner.soft(shown, cut, before).round()

    with torch.no_grad():
        soft = run.softened_nll(batch, tokens, image, plan, soften)
        packed = pruning.shrink(vlm, batch.prompts, tokens[image], pruner, Share(0.6))
        hard = answer_nll(vlm, packed)
    kept = [row[-1] for row in packed.per_layer(vlm.shape.layers)]
    assert min(kept) > 0 and max(kept) < 144 and (spelling == "dynamic_llava" or len(set(kept)) > 1)
    torch.testing.assert_close(soft, hard, rtol=1e-4, atol=1e-4)


def test_the_predictor_of_dynamic_llava_is_its_layers_with_half_of_the_channels_averaged() -> None:
    """Image by image without padding, the last layers token by token."""
    torch.manual_seed(4)
    net, gelu = Predictor(24, 16), torch.nn.functional.gelu
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    z, valid = torch.randn(3, 6, 24), torch.ones(3, 6, dtype=torch.bool)
    valid[0, 4:], valid[2, 1:] = False, False
    with torch.no_grad():
        found = net(z, valid)
        for row in range(3):
            x = gelu(net.inlet(net.norm(z[row, valid[row]])))
            for block in net.blocks:
                (x,) = block(x[None], None)
            middle = sum(token[8:] for token in x) / len(x)
            for i, token in zip(valid[row].nonzero()[:, 0].tolist(), x, strict=True):
                told = gelu(net.out[1](gelu(net.out[0](torch.cat([token[:8], middle])))))
                torch.testing.assert_close(found[row, i], net.head(told), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("asked", "last"), [(Share(0.2), 29), (Share(0.97), 140)], ids=["more than asked", "fewer"])
def test_the_loss_of_atp_is_its_formula(vlm: Any, asked: Any, last: int) -> None:
    trainer = arm(vlm, "atp(target_weight=0.3)", spread=0.4)
    pruner: Any = trainer.pruner
    batch = next(training.batches(vlm, "world", seed=0, images=2, questions=2, packed=False))
    run = trainer.run(batch, batch.num_labels)
    masks: list[torch.Tensor] = []
    plain = pruner.soft
    pruner.soft = lambda *given: masks.append(plain(*given)) or masks[-1]
    loss = pruner.objective(run, batch, asked, Progress(0, 3), trainer.noise(batch, 0))
    share = (last / 144) ** (1 / 3)
    nested = [masks[0], masks[0] * masks[1], masks[0] * masks[1] * masks[2]]
    kept = [[float(mask[row].sum().detach()) for mask in nested] for row in range(4)]
    deep = fmean(sum(layer * 8 * num / 144 for layer, num in zip((1, 2, 3), row, strict=True)) for row in kept)
    average = fmean((144 + sum(row)) / 4 for row in kept)
    beyond = average - 144 * layer_average(share, 4, (1, 2, 3))
    assert (beyond > 0) == (last == 29)
    wanted = 0.05 * deep + 0.3 * abs(beyond)
    assert float(loss.terms["penalty"].detach()) == pytest.approx(wanted, rel=1e-4)
    assert float(loss.terms["kept"].detach()) == pytest.approx(average, rel=1e-4)
    torch.testing.assert_close(loss.total, loss.terms["nll"] / batch.num_labels + loss.terms["penalty"])


def test_dropped_tokens_are_hidden_behind_the_second_thirty_second_of_the_decoder(vlm: Any) -> None:
    trainer = arm(vlm, "dynamic_llava", spread=0.2)
    pruner: Any = trainer.pruner
    batch = next(training.batches(vlm, "world", seed=0, images=2, questions=2, packed=False))
    run = trainer.run(batch, batch.num_labels)
    loss = pruner.objective(run, batch, Share(0.3), Progress(0, 3), trainer.noise(batch, 0))
    made: list[Any] = []
    relax = pruner.relax
    pruner.relax = lambda *given: made.append(relax(*given)) or made[-1]
    again = pruner.objective(run, batch, Share(0.3), Progress(0, 3), trainer.noise(batch, 0))
    torch.testing.assert_close(again.total, loss.total)  # the same noise, the same loss
    share = made[0].let.mean(1)
    wanted = 100 * float((share - 43 / 144).square().mean())
    assert float(loss.terms["penalty"].detach()) == pytest.approx(wanted, rel=1e-4) and 0 < float(share.mean()) < 1
    annealing = Annealing(2.0, 0.1, 0.5)
    assert [pruner.temperature(Progress(t, 3), annealing) for t in range(3)] == pytest.approx([1.0, 0.1**0.5, 0.1])
    wide = registry.load("pruners", "dynamic_llava").outline(1024, 4096)
    assert wide["scorer"].inlet.in_features == 4096 and wide["scorer"].inlet.out_features == 512


@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_train_it_and_its_folder_selects_alike(name: str, vlm: Any) -> None:
    (folder,) = loop.train(Recipe(**SMALL, pruners=(name,)), LocalContext("run"), lambda _: vlm)
    (rows,) = read_steps(Path("run")).values()
    assert all(row.grad_norm > 0 and math.isfinite(row.loss) and 0 < row.kept <= 144 for row in rows)
    assert math.isfinite(rows[-1].validation_hard) and math.isfinite(rows[-1].validation_soft), (
        "budgets it cannot meet are left out"
    )
    pruner, batch = from_pretrained(folder), training.validation(vlm, "world", images=3, questions=1)
    pruner.save_pretrained("again")  # type: ignore[attr-defined]
    again = registry.load("pruners", f"{name}(weights='again')")
    tokens = vlm.encode(batch.pixels)[batch.image]
    left = []
    with torch.no_grad():
        for method in (pruner, again):
            with pruning.running(vlm, pruning.shrink(vlm, batch.prompts, tokens, method, Share(0.5))) as cuts:
                packed = pruning.shrink(vlm, batch.prompts, tokens, method, Share(0.5))
                vlm.model(**pruning.decoder_inputs(vlm, packed), use_cache=False)
                assert cuts is not None and cuts.left is not None
                left.append(cuts.left.valid)
    assert torch.equal(*left) and pruner.weights_sha256 == again.weights_sha256 != ""


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_is_refused_in_a_sentence(name: str, vlm: Any) -> None:
    batch = training.validation(vlm, "world", images=1, questions=1)
    tokens = vlm.encode(batch.pixels)[batch.image]
    with pytest.raises(ValueError, match=f"{name} is not trained: train it"), torch.no_grad():
        answer_nll(vlm, pruning.shrink(vlm, batch.prompts, tokens, registry.load("pruners", name), Share(0.5)))
    with pytest.raises(ValueError, match="this method needs a count, as in Keep"):
        registry.load("pruners", name).cuts(Above(0.5), vlm.shape)
    with pytest.raises(BadObjective, match=rf"^{name}, seed 0, step 0: .* trains through cuts .* needs checkpointing=False$"):
        trainer = arm(vlm, name, checkpointing=True)
        trainer.step(next(training.batches(vlm, "world", seed=0, images=2, questions=2, packed=False)))
    with pytest.raises(ValueError, match=rf"{name} trains through cuts inside the decoder.*methods=\(\{{'pruner': '{name}', 'chec"):
        Recipe(pruners=(name, "diffprune"), checkpointing=True)
    alone = {"pruner": name, "checkpointing": False, "micro_images": 1}
    recipe = Recipe(pruners=(name, "diffprune"), checkpointing=True, micro_images=8, methods=(alone,))
    own, other = map(recipe.of, recipe.pruners)
    assert (own.checkpointing, own.micro_images, other.checkpointing, other.micro_images) == (False, 1, True, 8)
    assert recipe.key(recipe.pruners[0]) == Recipe(pruners=(name,)).key(recipe.pruners[0]), "it shapes nothing"
    with pytest.raises(ValueError, match=r"can meet none of the recipe's budgets: .*cannot be met by a cut"):
        arm(vlm, name, budgets=(Share(0.1),)).validate()


@pytest.mark.parametrize(
    "spelling", ["atp(slack=0.5)", "atp(target_weight=-1.0)", "dynamic_llava(after=-1)", "dynamic_llava(ratio_weight=-1.0)"]
)
def test_options_out_of_range_are_refused(spelling: str) -> None:
    with pytest.raises(ValueError, match=spelling.partition("(")[0]):
        registry.load("pruners", spelling)


def test_an_estimate_counts_their_networks(vlm: Any) -> None:
    config = {**vlm.model.config.to_dict(), "model_type": "llava"}
    atp, dynamic = estimate(Recipe(**SMALL, pruners=NAMES), config, Assumed(text=20, answer=4))
    assert atp.trained == sum(p.numel() for p in Thresholds().parameters()) == 3 * (12 + 8) == 20 * len(AFTER)
    assert dynamic.trained == sum(p.numel() for p in Predictor(160, 80).parameters())
    assert atp.image.rows == dynamic.image.rows == 2, "a row for every question"
