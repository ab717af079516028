"""OC-VTP: slot attention and the area weights written out, its selection, what its error teaches, and its training."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from diffprune import data as training
from diffprune.core import registry
from diffprune.core.budget import Above, Keep, Share
from diffprune.core.evidence import encoder_attention
from diffprune.core.noise import Noise
from diffprune.core.site import ENCODED, Cut
from diffprune.core.tokens import VisualTokens
from diffprune.pruners._slot_attention import Rebuild, places
from diffprune.pruners.ocvtp import FEW, by_area, drawn_slots, shown
from diffprune.pruning.pretrained import from_pretrained
from diffprune.train import loop
from diffprune.train.checkpoints import read_steps
from diffprune.train.context import LocalContext
from diffprune.train.estimate import scorer_bytes, scorer_flops
from diffprune.train.recipe import Recipe
from diffprune.train.scorer_trainer import ScorerTrainer
from diffprune.vlm.load import load

SMALL: dict[str, Any] = {
    "steps": 3, "images": 2, "questions": 2, "workers": 1, "calibration_images": 4, "validation_images": 2, "checkpoint_every": 0,
    "validate_every": 3, "grad_cosine_every": 2, "budgets": (Share(0.25),), "ease_share": 0.0,
}  # fmt: skip


def tokens(batch: int = 3, num: int = 20, width: int = 24) -> VisualTokens:
    torch.manual_seed(0)
    valid = torch.ones(batch, num, dtype=torch.bool)
    valid[0, -4:] = False
    return VisualTokens(3 + 2 * torch.randn(batch, num, width), valid, evidence={encoder_attention(): torch.rand(batch, num)})


def made(seen: VisualTokens, spelling: str = "ocvtp", spread: float = 0.4) -> Any:
    pruner = registry.load("pruners", spelling)
    pruner.build(seen)
    torch.manual_seed(1)
    for parameter in pruner.networks.parameters():
        torch.nn.init.normal_(parameter, std=spread)
    return pruner


@pytest.fixture(scope="module")
def vlm() -> Any:
    return load("embedded", device="cpu")


def claims(net: Any, z: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """[K T] of one image without padding: three iterations, slot by slot and token by token."""
    x = functional.layer_norm(z, z.shape[1:], net.entering.weight, net.entering.bias)
    x = functional.gelu(x @ net.inlet.weight.T + net.inlet.bias) @ net.narrow.weight.T + net.narrow.bias
    x = functional.layer_norm(x, x.shape[1:], net.norm.weight, net.norm.bias)
    slots = [net.mean + net.log_deviation.exp() * one for one in draws]
    for _ in range(3):
        asked = [net.query(net.asking(slot)) for slot in slots]
        claim = torch.zeros(len(slots), len(x))
        for t, token in enumerate(x):
            likeness = torch.stack([q @ net.key(token) / math.sqrt(len(q)) for q in asked])
            claim[:, t] = likeness.exp() / likeness.exp().sum()
        for k in range(len(slots)):
            update = sum(claim[k, t] * net.value(token) for t, token in enumerate(x)) / claim[k].sum()
            new = net.update(update[None], slots[k][None])[0]
            slots[k] = new + net.feed(net.fed(new))
    return claim


@pytest.mark.parametrize("budget", [Keep(1), Keep(6), Share(0.4)], ids=str)
def test_the_choice_is_each_slots_strongest_claim_then_attention(budget: Any) -> None:
    seen = tokens()
    pruner = made(seen, "ocvtp(seed=3)")
    with torch.no_grad():
        keep = pruner.select(seen, Cut(ENCODED, budget)).keep
        for row in range(3):
            live = seen.valid[row].nonzero()[:, 0].tolist()
            count = budget.count(len(live))
            draws = torch.stack(
                [Noise("slots", 3, rows=[k]).normal(torch.ones(1, 1, dtype=torch.bool), 12)[0, 0] for k in range(count)]
            )
            claim = claims(pruner.networks["scorer"], pruner.standardised(seen.features)[row, live], draws)
            chosen = {live[int(claim[k].argmax())] for k in range(count)}
            rest = sorted(set(live) - chosen, key=lambda i: -float(seen.given(encoder_attention())[row, i]))
            assert set(keep[row].nonzero()[:, 0].tolist()) == chosen | set(rest[: count - len(chosen)])


def test_claims_are_those_of_slots_and_tokens_that_are_there() -> None:
    """The numbers themselves, which weigh the error: a choice would be the same of sharper ones."""
    seen = tokens()
    pruner, draws, live = made(seen), torch.randn(3, 5, 12), torch.arange(5) < torch.tensor([3, 5, 1])[:, None]
    z = pruner.standardised(seen.features)
    with torch.no_grad():
        found = pruner.networks["scorer"](z, seen.valid, draws, live)[1]
        for row, slots in enumerate((3, 5, 1)):
            wanted = claims(pruner.networks["scorer"], z[row, seen.valid[row]], draws[row, :slots])
            torch.testing.assert_close(found[row, :slots][:, seen.valid[row]], wanted, rtol=1e-3, atol=1e-4)
            assert not found[row, slots:].any() and not found[row][:, ~seen.valid[row]].any()


@pytest.mark.parametrize("width", [8, 7])
def test_places_are_sines_and_cosines_of_falling_frequency(width: int) -> None:
    found = places(9, width, torch.device("cpu"))
    for place in range(9):
        wanted = [(math.cos if channel % 2 else math.sin)(place / 10_000 ** (channel // 2 * 2 / width)) for channel in range(width)]
        assert found[place].tolist() == pytest.approx(wanted, abs=1e-5)


def test_the_seed_alone_says_what_slots_start_from() -> None:
    seen = tokens()
    first = made(seen).select(seen, Cut(ENCODED, Keep(8))).keep
    torch.manual_seed(99)
    assert torch.equal(made(seen).select(seen, Cut(ENCODED, Keep(8))).keep, first)
    assert not torch.equal(made(seen, "ocvtp(seed=1)").select(seen, Cut(ENCODED, Keep(8))).keep, first)
    few, many = (drawn_slots(0, num, 12, torch.device("cpu")) for num in (5, 40))
    assert torch.equal(many[:5], few) and float(many.std()) == pytest.approx(1, abs=0.1)


def test_area_weights_one_slot_at_a_time() -> None:
    torch.manual_seed(3)
    valid, live = torch.ones(2, 200, dtype=torch.bool), torch.ones(2, 40, dtype=torch.bool)
    valid[0, 150:], live[0, 30:] = False, False
    likeness = 3 * torch.randn(2, 40, 200) + torch.where(torch.arange(40) == 0, 9.0, 0.0)[:, None]  # one slot has nearly all tokens
    claim = likeness.masked_fill(~live[..., None], -torch.inf).softmax(1).where(valid[:, None], 0.0)
    found = by_area(claim, valid, live)
    for row, (slots, size) in enumerate(((30, 150), (40, 200))):
        owner = [max(range(slots), key=lambda k: float(claim[row, k, t])) for t in range(size)]
        weight = [(max(1, owner.count(k)) / size) ** -0.5 for k in range(slots)]
        weight = [min(10.0, w / (sum(weight) / slots)) for w in weight]
        wanted = [sum(weight[k] * float(claim[row, k, t]) for k in range(slots)) for t in range(size)]
        torch.testing.assert_close(found[row, :size], torch.tensor(wanted), rtol=1e-4, atol=1e-5)
    assert not found[0, 150:].any()


def test_the_error_is_a_weighted_mean_and_teaches_slots_and_decoder() -> None:
    seen = tokens()
    pruner, counts = made(seen, spread=0.2), torch.tensor([4, 5, 5])
    error = pruner.rebuilding(seen, counts, Noise(0, rows=range(3)))
    error.mean().backward()
    gone = [name for name, p in pruner.networks.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not gone and seen.features.grad is None
    found = [p.grad.clone() for p in pruner.networks.parameters()]
    pruner.networks.zero_grad()
    z, live, noise = pruner.seen(seen), torch.arange(5) < counts[:, None], Noise(0, rows=range(3))
    slots, claim = pruner.networks["scorer"](z, seen.valid, noise.normal(live, 12), live)
    rebuilt = pruner.networks["decoder"](slots, live, z, seen.valid, shown(seen.valid, noise))
    weight, wanted = by_area(claim, seen.valid, live).tolist(), []  # numbers: claims do not learn to weigh less
    for row in range(3):
        valid = seen.valid[row].nonzero()[:, 0].tolist()
        parts = [(weight[row][t], (rebuilt[row, t] - z[row, t]).square().mean()) for t in valid]
        wanted.append(sum(w * e for w, e in parts) / sum(w for w, _ in parts))
        assert float(error[row].detach()) == pytest.approx(float(wanted[row].detach()), rel=1e-4)
    (sum(wanted) / 3).backward()
    for one, parameter in zip(found, pruner.networks.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-3, atol=1e-4)


def attended(net: Any, asking: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Attention without biases, head by head: [N D] to [M D]."""
    query, key, value = net.in_proj_weight.chunk(3)
    heads = []
    for i in range(net.num_heads):
        part = slice(i * net.head_dim, (i + 1) * net.head_dim)
        likeness = (asking @ query[part].T) @ (asked @ key[part].T).T / net.head_dim**0.5
        heads.append(likeness.softmax(1) @ (asked @ value[part].T))
    return torch.cat(heads, 1) @ net.out_proj.weight.T


def test_the_decoder_is_the_releases() -> None:
    """Projections with a norm and no bias; the first norm before the first layer's sum; GELU; nothing behind the last layer."""
    net, (slots, z) = made(tokens(1, 20)).networks["decoder"], (torch.randn(3, 12), torch.randn(20, 24))
    visible = torch.arange(20) % 3 == 0
    with torch.no_grad():
        found = net(slots[None], torch.ones(1, 3, dtype=torch.bool), z[None], torch.ones(1, 20, dtype=torch.bool), visible[None])[0]
        known, memory = (
            functional.layer_norm(x @ linear.weight.T, (24,), norm.weight, norm.bias)
            for x, (linear, norm) in ((z, net.inlet), (slots, net.memory))
        )
        x = torch.where(visible[:, None], known, net.hidden) + places(20, 24, z.device)
        x = functional.layer_norm(x, (24,), net.first.weight)
        for number, layer in enumerate(net.layers.layers):
            inside = layer.norm1(x) if number else x
            x = x + attended(layer.self_attn, inside, inside)
            x = x + attended(layer.multihead_attn, layer.norm2(x), memory)
            x = x + functional.gelu(layer.norm3(x) @ layer.linear1.weight.T) @ layer.linear2.weight.T
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in net.parameters()) == (24 + 12) * 24 + 4 * 24 + 24 + 4 * (8 * 24**2 + 8 * 24**2) + 12 * 24


def test_the_decoder_rebuilds_tokens_of_any_width() -> None:
    """Its own is a multiple of its heads, at least as wide."""
    valid = torch.ones(1, 20, dtype=torch.bool)
    found = Rebuild(26, 12, 2)(torch.randn(1, 3, 12), valid[:, :3], torch.randn(1, 20, 26), valid, valid)
    assert found.shape == (1, 20, 26) and found.isfinite().all()


def test_gradients_pass_through_the_last_iteration_and_straight_to_the_start() -> None:
    """The start's own gradient is that of the slots which enter the last iteration."""
    seen = tokens(1, 20)
    net, live = made(seen).networks["scorer"], torch.ones(1, 3, dtype=torch.bool)
    z, draws = torch.randn(1, 20, 24), torch.randn(1, 3, 12)
    slots, _ = net(z, seen.valid | True, draws, live)
    (slots * torch.arange(36.0).view(1, 3, 12)).sum().backward()
    inside = net.norm(net.narrow(functional.gelu(net.inlet(net.entering(z)))))
    key, value, hidden = net.key(inside), net.value(inside), ~live[..., None]
    with torch.no_grad():
        before = net.mean + net.log_deviation.exp() * draws
        for _ in range(2):
            before = net._iterate(before, key, value, seen.valid | True, hidden)[0]
    before.requires_grad_()
    last = net._iterate(before, key, value, seen.valid | True, hidden)[0]
    (gradient,) = torch.autograd.grad((last * torch.arange(36.0).view(1, 3, 12)).sum(), before)
    torch.testing.assert_close(net.mean.grad, gradient.sum((0, 1)), rtol=1e-4, atol=1e-3)


def test_the_decoder_sees_few_or_any_number_of_tokens() -> None:
    valid = torch.ones(400, 96, dtype=torch.bool)
    valid[:, 90:] = False
    found = shown(valid, Noise(5, rows=range(400)))
    counts = found.sum(1)
    few = int(90 * FEW)
    assert not (found & ~valid).any() and 0.4 < float((counts == few).float().mean()) < 0.6
    assert len(set(counts[counts != few].tolist())) > 50 and 30 < float(counts[counts != few].float().mean()) < 60
    paper = shown(torch.ones(20, 576, dtype=torch.bool), Noise(5, rows=range(20))).sum(1).tolist()
    assert paper.count(24) > 4, "24 of 576"


def test_padding_and_the_split_of_a_batch_change_no_error() -> None:
    seen = tokens()
    pruner, counts = made(seen), torch.tensor([3, 5, 4])
    loud = replace(seen, features=seen.features.where(seen.valid[..., None], 1e3))
    whole = pruner.rebuilding(loud, counts, Noise(0, rows=range(3)))
    alone = [pruner.rebuilding(seen[torch.tensor([i])], counts[i : i + 1], Noise(0, rows=[i])) for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_it_learns_by_the_ordinary_trainer_and_its_folder_selects_alike(vlm: Any) -> None:
    (folder,) = loop.train(Recipe(**SMALL, pruners=("ocvtp",)), LocalContext("run"), lambda _: vlm)
    (rows,) = read_steps(Path("run")).values()
    assert [row.kept for row in rows] == pytest.approx([36.0] * 3), "a quarter of 144 tokens"
    assert all(row.grad_norm > 0 and math.isfinite(row.loss) and row.penalty == 0 for row in rows)
    assert math.isfinite(rows[-1].validation_hard) and not any(p.requires_grad for p in vlm.model.parameters())
    pruner = from_pretrained(folder)
    seen = vlm.encode(training.validation(vlm, "world", images=3, questions=1).pixels, pruner.needs)
    pruner.save_pretrained("again")  # type: ignore[attr-defined]
    again = registry.load("pruners", "ocvtp(weights='again')")
    keep = [method.select(seen, Cut(ENCODED, Keep(9))).keep for method in (pruner, again)]
    assert torch.equal(*keep) and keep[0].sum(1).tolist() == [9, 9, 9]
    assert pruner.weights_sha256 == again.weights_sha256 != "" and pruner.trained_on is not None


def test_the_error_falls(vlm: Any) -> None:
    recipe = Recipe(**{**SMALL, "steps": 30, "images": 4, "validate_every": 0, "grad_cosine_every": 0}, pruners=("ocvtp",))
    trainer = ScorerTrainer(LocalContext("run"), vlm, recipe, registry.load("pruners", "ocvtp"), 0)
    batch = next(training.batches(vlm, "world", seed=0, images=4, questions=1))
    losses = [trainer.step(batch).loss for _ in range(30)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_what_it_refuses_and_what_an_estimate_asks() -> None:
    seen = tokens()
    with pytest.raises(ValueError, match="this method needs a count, as in Keep"):
        made(seen).select(seen, Cut(ENCODED, Above(0.0)))
    with pytest.raises(ValueError, match="ocvtp has no weights yet"):
        registry.load("pruners", "ocvtp").select(seen, Cut(ENCODED, Keep(3)))
    with pytest.raises(ValueError, match=r"ocvtp\(seed=-1\)"):
        registry.load("pruners", "ocvtp(seed=-1)")
    networks = registry.load("pruners", "ocvtp").outline(1024)
    assert scorer_bytes(networks, 576) > 0 and scorer_flops(networks, 576) > 0
    size = sum(p.numel() for p in networks["scorer"].parameters())
    assert size == pytest.approx(7.6e6, rel=0.05), "7.6 million parameters on CLIP-L"
    gru, mlp = 2 * (3 * 512**2 + 3 * 512), 1024 * 2048 + 2048 + 2048 * 512 + 512
    feed, norms = 2 * 512 * 2048 + 2048 + 512, 2 * 1024 + 3 * 2 * 512
    assert size == mlp + 3 * 512**2 + gru + feed + norms + 2 * 512, "no bias of keys, values and queries; the start's two vectors"
