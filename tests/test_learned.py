"""Learned methods: what relaxations do to tokens and gradients, and what their files promise."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffprune.core import registry
from diffprune.core.budget import Eased, Keep, Share, parse
from diffprune.core.evidence import QUESTION, Question
from diffprune.core.fitted import Annealing, Progress
from diffprune.core.noise import Noise, generator
from diffprune.core.site import ENCODED, Cut
from diffprune.core.tokens import VisualTokens
from diffprune.pruners._logistic_topk import logistic_offset
from diffprune.pruners._scorer import CrossAttention, Scorer
from diffprune.pruners._soft_topk import soft_top_k

SPELLINGS = (
    "diffprune", "diffprune(scale='free')", "diffprune(throttle='gate')", "diffprune(throttle='additive')",
    "diffprune(throttle='removal')", "diffprune(total='penalty')", "diffprune(attention=False)", "diffprune(denoiser=False)",
    "diffprune(question_aware=True)", "diffprune(question_aware='cross')", "diffprune(depth=0)",
    "diffprune(depth=2)", "diffprune(denoiser='global')", "gumbel_topk",
    "gumbel_topk(backward='identity', filler='noise')", "gumbel_keepdrop", "gumbel_keepdrop(offset=True)",
)  # fmt: skip


def tokens(batch: int = 3, num: int = 20, width: int = 48, dead: int = 4) -> VisualTokens:
    torch.manual_seed(0)
    valid = torch.ones(batch, num, dtype=torch.bool)
    valid[0, num - dead :] = False
    return VisualTokens(
        3 + 2 * torch.randn(batch, num, width),
        valid,
        evidence={QUESTION: Question(torch.randn(batch, 6, 24), torch.ones(batch, 6, dtype=torch.bool))},
    )


def made(spelling: str, seen: VisualTokens):
    pruner = registry.load("pruners", spelling)
    torch.manual_seed(1)
    pruner.build(seen)
    return pruner


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_relaxation_keeps_shapes_and_teaches_the_scorer(spelling: str) -> None:
    seen = tokens()
    pruner = made(spelling, seen)
    out = pruner.relax(seen, Share(0.25), 0.7, Noise(0, rows=range(len(seen))))
    weight = torch.randn_like(out.features)
    loss = (out.features * weight).sum() + out.penalty
    loss = loss + (0 if out.retention is None else (out.retention * torch.randn(3, 20)).sum())
    loss.backward()
    assert out.features.shape == seen.features.shape and out.kept.shape == (3,)
    gradients = [p.grad for p in pruner.networks["scorer"].parameters()]
    assert all(g is None or torch.isfinite(g).all() for g in gradients)
    assert sum(float(g.abs().sum()) for g in gradients if g is not None) > 0


@pytest.mark.parametrize("spelling", ["diffprune", "gumbel_topk"])
def test_the_budget_is_exact_per_image(spelling: str) -> None:
    seen = tokens()
    out = made(spelling, seen).relax(seen, Keep(7), 0.3, Noise(0, rows=range(len(seen))))
    torch.testing.assert_close(out.kept, torch.full((3,), 7.0), rtol=0, atol=1e-4)


def test_channels_are_standardised_by_the_tokens_that_are_there() -> None:
    """Mean and deviation over all images' tokens, n - 1 below; a channel that never varies becomes 0; padding is full of NaN."""
    seen = tokens()
    features = seen.features.where(seen.valid[..., None], torch.nan)
    features[..., 5] = features[..., 5].clamp(2.0, 2.0)
    pruner = made("diffprune", replace(seen, features=features))
    there = [features[row, i].tolist() for row, i in seen.valid.nonzero().tolist()]
    for channel, values in enumerate(zip(*there, strict=True)):
        assert float(pruner.mean[channel]) == pytest.approx(statistics.fmean(values), rel=1e-4)
        assert float(pruner.spread[channel]) == pytest.approx(max(1e-6, statistics.stdev(values)), rel=1e-4)
    z = pruner.standardised(features)[seen.valid]
    wanted = [[(x - float(m)) / float(s) for x, m, s in zip(row, pruner.mean, pruner.spread, strict=True)] for row in there]
    torch.testing.assert_close(z, torch.tensor(wanted), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pruner.restored(z, features.half()), features[seen.valid].half())
    assert not z[:, 5].any()


@pytest.mark.parametrize("scale", ["unit", "free"])
def test_diffprune_is_the_papers_formula(scale: str) -> None:
    """Eq. 2-5 written out: x~ = mean + std (sqrt(a) z + sqrt(1 - a) noise), with the denoiser still the identity."""
    seen = tokens(dead=0)
    pruner = made(f"diffprune(scale={scale!r})", seen)
    out = pruner.relax(seen, Keep(5), 0.5, Noise(3, rows=range(len(seen)))).features
    flat = seen.features.reshape(-1, 48)
    z = (seen.features - flat.mean(0)) / flat.std(0)
    scores = pruner.score(seen)
    if scale == "unit":
        scores = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True, unbiased=False)
    alpha = soft_top_k(scores, seen.valid, torch.full((3,), 5.0), 0.5)[..., None]
    noise = torch.stack([torch.randn(z.shape[1:], generator=generator(3, row)) for row in range(3)])
    torch.testing.assert_close(
        out, flat.mean(0) + flat.std(0) * (alpha.sqrt() * z + (1 - alpha).sqrt() * noise), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("throttle", ["gate", "additive", "removal"])
def test_other_throttles_are_their_formulas(throttle: str) -> None:
    """Token by token, from alpha and the noise that Eq. 4 would mix in."""
    seen = tokens()
    pruner = made(f"diffprune(throttle={throttle!r}, denoiser=False)", seen)
    assert list(pruner.networks) == ["scorer"]
    out = pruner.relax(seen, Keep(5), 0.5, Noise(3, rows=range(len(seen))))
    z = pruner.standardised(seen.features)
    noise = Noise(3, rows=range(len(seen))).normal(seen.valid, 48)
    for row, token in seen.valid.nonzero().tolist():
        a = float(out.let[row, token])
        wanted = {
            "gate": a * z[row, token],
            "additive": z[row, token] + min(10.0, ((1 - a) / a) ** 0.5) * noise[row, token],
            "removal": a**0.5 * z[row, token] + (1 - a) ** 0.5 * noise[row, token],
        }[throttle]
        torch.testing.assert_close(out.features[row, token], pruner.mean + pruner.spread * wanted, rtol=1e-3, atol=1e-3)
    if throttle == "removal":
        assert torch.equal(out.retention.detach(), out.let) and pruner.attention_implementation == "masked_softmax"
    else:
        assert out.retention is None and pruner.attention_implementation is None


@pytest.mark.parametrize("spelling", ["diffprune", "diffprune(throttle='gate')", "gumbel_topk"])
def test_the_denoiser_is_given_what_was_noised_and_gives_what_the_model_sees(spelling: str) -> None:
    seen = tokens()
    pruner = made(spelling, seen)
    for parameter in pruner.networks["denoiser"].parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        found, denoiser = pruner.relax(seen, Keep(5), 0.5, Noise(3, rows=range(3))).features, pruner.networks.pop("denoiser")
        noised = pruner.relax(seen, Keep(5), 0.5, Noise(3, rows=range(3))).features
        wanted = pruner.mean + pruner.spread * denoiser(pruner.standardised(noised), seen.valid)
    torch.testing.assert_close(found[seen.valid], wanted[seen.valid], rtol=1e-3, atol=1e-3)
    assert float((found - noised)[seen.valid].abs().max()) > 0.1


def test_a_penalty_in_place_of_the_exact_total() -> None:
    seen = tokens()
    pruner = made("diffprune(total='penalty')", seen)
    torch.nn.init.normal_(pruner.networks["scorer"].head.weight, std=0.5)
    out, scores = pruner.relax(seen, Keep(5), 0.5, Noise(3, rows=range(len(seen)))), pruner.score(seen).detach() / 0.5
    apart = []
    for row in range(3):
        live = seen.valid[row].nonzero()[:, 0].tolist()
        alpha = [0.5 * math.exp(s) if s <= 0 else 1 - 0.5 * math.exp(-s) for s in scores[row, live].tolist()]
        torch.testing.assert_close(out.let[row, live], torch.tensor(alpha))
        apart.append((sum(alpha) - 5) / len(live))
    assert float(out.penalty.detach()) == pytest.approx(100 * sum(x**2 for x in apart) / 3, rel=1e-4)


@pytest.mark.parametrize("offset", [False, True])
def test_keep_or_drop_is_a_draw_between_two_logits(offset: bool) -> None:
    """Token by token, with Gumbel noise -log(-log u); gradients are those of the softmax of two."""
    seen, count, tau = tokens(), 5, 0.7
    pruner = made(f"gumbel_keepdrop(ratio_weight=7.0, offset={offset})", seen)
    logits = torch.randn(3, 20, 2, requires_grad=True)
    pruner.logits = lambda _: logits
    out = pruner.relax(seen, Keep(count), tau, Noise(3, rows=range(3)))
    draws, weight = Noise(3, rows=range(3)).uniform(seen.valid, 2), torch.randn(3, 20)
    (gradient,) = torch.autograd.grad((out.retention * weight).sum(), logits, retain_graph=True)
    apart = []
    for row in range(3):
        live = seen.valid[row].nonzero()[:, 0].tolist()
        gap = {i: keep - drop for i, (keep, drop) in enumerate(logits[row].tolist()) if i in live}
        low, high = -50.0, 50.0
        for _ in range(100 * offset):
            middle = (low + high) / 2
            more = sum(1 / (1 + math.exp(middle - g)) for g in gap.values()) > count
            low, high = (middle, high) if more else (low, middle)
        shift = (low + high) / 2
        for i in live:
            keep, drop = (-math.log(-math.log(float(u))) for u in draws[row, i])
            soft = 1 / (1 + math.exp(-(gap[i] - shift + keep - drop) / tau))
            assert float(out.let[row, i]) == (soft > 0.5) == pytest.approx(float(out.retention[row, i].detach()), abs=1e-6)
            if not offset:
                slope = float(weight[row, i]) * soft * (1 - soft) / tau
                assert gradient[row, i].tolist() == pytest.approx([slope, -slope], abs=1e-5)
        assert not out.let[row, ~seen.valid[row]].any() and not out.retention[row, ~seen.valid[row]].any()
        apart.append((float(out.let[row].sum()) - count) / len(live))
    assert float(out.penalty.detach()) == pytest.approx(7 * sum(x**2 for x in apart) / 3, rel=1e-5)
    assert out.features is seen.features and 0 < float(out.let.sum()) < 50


@pytest.mark.parametrize("filler", ["noise", "mean"])
@pytest.mark.parametrize("backward", ["relaxed", "identity"])
def test_gumbel_top_k_is_its_formula(backward: str, filler: str) -> None:
    """The best of perturbed scores as they are, the others' fillers; a gradient as if the mask were scores, or their soft top-K."""
    seen, tau = tokens(), 0.7
    pruner = made(f"gumbel_topk(backward={backward!r}, filler={filler!r}, denoiser=False)", seen)
    scores = torch.randn(3, 20, requires_grad=True)
    pruner.logits = lambda _: scores
    out, again = pruner.relax(seen, Keep(5), tau, Noise(3, rows=range(3))), Noise(3, rows=range(3))
    perturbed = scores - (-again.uniform(seen.valid)[..., 0].log()).log()
    fill = again.normal(seen.valid, 48) if filler == "noise" else torch.zeros(3, 20, 48)
    z, weight = pruner.standardised(seen.features), torch.randn(3, 20, 48)
    for row in range(3):
        live = seen.valid[row].nonzero()[:, 0].tolist()
        ranked = perturbed[row].argsort(descending=True).tolist()
        best = [i for i in ranked if i in live][:5]
        assert out.let[row].nonzero()[:, 0].tolist() == sorted(best)
        for i in live:
            wanted = pruner.mean + pruner.spread * (z if i in best else fill)[row, i]
            torch.testing.assert_close(out.features[row, i], wanted, rtol=1e-4, atol=1e-4)
    weight[~seen.valid] = 0.0
    (gradient,) = torch.autograd.grad((out.features * weight).sum(), scores)
    along = (weight * pruner.spread * (z - fill)).sum(-1)
    if backward == "relaxed":
        (along,) = torch.autograd.grad(soft_top_k(perturbed, seen.valid, torch.full((3,), 5.0), tau), scores, along)
    torch.testing.assert_close(gradient, along, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spelling", ["diffprune", "diffprune(diversity=0.5)"])
def test_what_a_step_tells_of_a_draw_is_of_tokens_that_are_there(spelling: str) -> None:
    """Means over images of what each one's own tokens give, one by one."""
    seen, pruner = tokens(), made(spelling, tokens())
    relaxed = pruner.relax(seen, Keep(5), 0.7, Noise(0, rows=range(3)))
    relaxed = replace(relaxed, let=torch.rand(3, 20).where(seen.valid, 0.0))
    told, spreads, shares = pruner.looked_at(seen, Keep(5), relaxed), [], []
    for row in range(3):
        alone = VisualTokens(seen.features[row, seen.valid[row]][None], torch.ones(1, int(seen.valid[row].sum()), dtype=torch.bool))
        scores = pruner.score(alone)[0].tolist()
        spreads.append(statistics.pstdev(scores))
        keep, let = pruner.select(alone, Cut(ENCODED, Keep(5))).keep[0].tolist(), relaxed.let[row, seen.valid[row]].tolist()
        shares.append(sum(share for share, kept in zip(let, keep, strict=True) if kept) / 5)
    assert float(told["score_sd"]) == pytest.approx(statistics.fmean(spreads), rel=1e-4)
    assert float(told["overlap"]) == pytest.approx(statistics.fmean(shares), rel=1e-4)
    assert float(told["kept"]) == pytest.approx(float(relaxed.let.sum()) / 3, rel=1e-5)


def test_a_share_of_its_own_and_a_last_temperature_of_its_own() -> None:
    pruner, asked = registry.load("pruners", "diffprune(trained_share=0.25, temperature_end=0.3)"), []
    pruner.relax = lambda tokens, budget, temperature, noise: asked.append((budget, temperature)) or sys.exit()
    run = SimpleNamespace(
        vlm=SimpleNamespace(shape=None), annealing=Annealing(2.0, 0.1, 0.5), tokens=lambda _: (tokens(), torch.arange(3))
    )
    for budget in (Keep(3), Eased(Keep(3), 0.5)):
        with pytest.raises(SystemExit):
            pruner.objective(run, None, budget, Progress(9, 10), None)
    assert asked == [(Share(0.25), pytest.approx(0.3)), (Eased(Share(0.25), 0.5), pytest.approx(0.3))]


@pytest.mark.parametrize("option", ["throttle='mist'", "total='about'", "trained_share=1.5", "temperature_end=-1.0", "scale='one'"])
def test_parts_that_do_not_exist_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"diffprune: .*{option.partition('=')[0]}"):
        registry.load("pruners", f"diffprune({option})")


@pytest.mark.parametrize(("depth", "linear"), [(0, True), (1, False), (2, False)])
def test_a_scorer_without_blocks_is_linear(depth: int, linear: bool) -> None:
    """A linear function of a token moves as far wherever the token is: second differences are 0."""
    seen = tokens(dead=0)
    pruner = made(f"diffprune(depth={depth})", seen)
    torch.nn.init.normal_(pruner.networks["scorer"].head.weight, std=1.0)
    step = torch.randn(48)
    with torch.no_grad():
        here, there, beyond = (pruner.score(replace(seen, features=seen.features + k * step)) for k in range(3))
    assert len(pruner.networks["scorer"].blocks) == depth == pruner.dims["depth"]
    assert float((there - here).abs().max()) > 0.1 and ((beyond - 2 * there + here).abs().max() < 1e-4) == linear


def test_the_default_depth_is_the_papers_shape_scaled() -> None:
    assert [made("diffprune", tokens(width=width)).dims["depth"] for width in (48, 512)] == [1, 2]
    assert made("diffprune(depth=0)", tokens(width=512)).options["attention"] is False  # no block is there to look
    small, large, wide = (made("diffprune", tokens(width=width)) for width in (160, 512, 1040))
    assert (small.dims["width"], small.options["attention"], small.networks["scorer"].blocks[0].mix) == (80, False, None)
    assert (large.dims["width"], large.options["attention"], large.networks["scorer"].blocks[0].mix is None) == (512, True, False)
    assert wide.dims["width"] == 1024 and made("diffprune", tokens(width=24)).dims["width"] == 16


@pytest.mark.parametrize("option", ["denoiser='some'", "denoiser=None", "question_aware=1", "attention='cross'"])
def test_options_have_the_values_they_are_said_to_have(option: str) -> None:
    with pytest.raises(ValueError, match=f"DiffPrune: {option.partition('=')[0]} is one of True, False"):
        registry.load("pruners", f"diffprune({option})")


@pytest.mark.parametrize("option", ["depth=-1", "depth=True", "depth='deep'", "width=-2", "depth=0, attention=True"])
def test_a_scorer_of_no_shape_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"DiffPrune: {option.partition('=')[0]}"):
        registry.load("pruners", f"diffprune({option})")


def test_a_scorer_of_another_shape_than_asked_is_refused_and_one_written_before_depth_0_was_linear_loads(tmp_path: Path) -> None:
    seen = tokens()
    pruner = made("diffprune(depth=2)", seen)
    pruner.save_pretrained(tmp_path)
    for asked, why in (("depth=1", "trained with depth=2, not 1"), ("depth=0", "depth=2"), ("width=32", "width=16, not 32")):
        with pytest.raises(ValueError, match=why):
            registry.load("pruners", f"diffprune({asked}, weights='{tmp_path}')")
    config = json.loads((tmp_path / "config.json").read_text())
    config["options"]["depth"] = 0  # as the paper's shape was written
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = registry.load("pruners", f"diffprune(weights='{tmp_path}')")
    assert again.dims["depth"] == 2 and again.options["depth"] is None
    with torch.no_grad():
        torch.testing.assert_close(again.score(seen), pruner.score(seen))


def test_the_relaxation_preserves_variance() -> None:
    torch.manual_seed(4)
    seen = VisualTokens(5 + 3 * torch.randn(8, 400, 48), torch.ones(8, 400, dtype=torch.bool))
    out = made("diffprune", seen).relax(seen, Share(0.2), 1.0, Noise(0, rows=range(len(seen)))).features
    assert float(out.detach().std()) == pytest.approx(float(seen.features.std()), rel=0.02)


def test_the_denoiser_never_sees_a_neighbour() -> None:
    denoiser = made("diffprune", tokens()).networks["denoiser"]
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    z, valid = torch.randn(1, 6, 48), torch.ones(1, 6, dtype=torch.bool)
    changed = z.clone()
    changed[0, 2] += 1
    same = (denoiser(z, valid) == denoiser(changed, valid)).all(-1)[0]
    assert same.tolist() == [True, True, False, True, True, True]


def test_a_global_denoiser_is_a_block_of_attention_over_an_images_tokens() -> None:
    """Token by token and head by head; at first the identity, as the local one is."""
    seen = tokens()
    denoiser = made("diffprune(denoiser='global')", seen).networks["denoiser"]
    z, valid = torch.randn(3, 20, 48), seen.valid
    torch.testing.assert_close(denoiser(z, valid), z)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    norm, own, out = denoiser.attend
    with torch.no_grad():
        found, wanted = denoiser(z, valid), z.clone()
        for row in range(3):
            live = norm(z[row, valid[row]])
            (query, key), value = denoiser.match(live).split(48, -1), own(live)
            heads = []
            for head in (slice(16 * h, 16 * h + 16) for h in range(3)):
                heads.append((query[:, head] @ key[:, head].T / 4).softmax(1) @ value[:, head])
            mid = z[row, valid[row]] + out(torch.cat(heads, 1))
            wanted[row, valid[row]] = mid + denoiser.feed(mid)
    torch.testing.assert_close(found[valid], wanted[valid], rtol=1e-4, atol=1e-4)


def test_cross_attention_is_attention_of_tokens_over_words() -> None:
    """Word by word, for one head and token; padded words weigh nothing, and a question without words adds nothing."""
    torch.manual_seed(3)
    cross = CrossAttention(24, 48)
    x, text, valid = torch.randn(2, 5, 48), torch.randn(2, 6, 24), torch.ones(2, 6, dtype=torch.bool)
    valid[0, 4:] = False
    with torch.no_grad():
        found, _ = cross(x, x, text, valid)
        words = cross.key_value(cross.words(text))
        for row, token in ((0, 1), (1, 4)):
            query, mixed = cross.query(cross.norm(x[row, token])), torch.zeros(48)
            for head in (slice(16 * h, 16 * h + 16) for h in range(3)):
                logits = [math.exp(float(query[head] @ word[:48][head]) / 4) for word in words[row, valid[row]]]
                for share, word in zip(logits, words[row, valid[row]], strict=True):
                    mixed[head] += share / sum(logits) * word[48:][head]
            torch.testing.assert_close(found[row, token], x[row, token] + cross.out(mixed), rtol=1e-4, atol=1e-4)
        valid[1] = False
        assert torch.equal(cross(x, x, text, valid)[0][1], x[1])


@pytest.mark.parametrize("attention", [True, False])
def test_a_score_is_its_formula(attention: bool) -> None:
    """Image by image without padding, token by token and head by head: late interaction, two blocks, head, match."""
    torch.manual_seed(5)
    scorer = Scorer(24, 32, 2, 2, attention=attention, text=8)
    for parameter in scorer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    z, text = torch.randn(2, 6, 24), torch.randn(2, 5, 8)
    valid, said = torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    valid[0, 4:], said[1, :2] = False, False
    with torch.no_grad():
        found, asked = scorer(z, valid, text, said), scorer.question
        for row in range(2):
            own, words = z[row, valid[row]], asked.norm(text[row, said[row]])
            x = scorer.inlet(own) + sum(asked.gist(word) for word in words) / len(words) ** 0.5
            for block in scorer.blocks:
                mixed = torch.zeros_like(x)
                if attention:
                    query, key, value = block.mix["qkv"](block.mix["norm"](x)).split(32, -1)
                    for head in (slice(0, 16), slice(16, 32)):
                        for i in range(len(x)):
                            weights = [math.exp(float(query[i, head] @ other) / 4) for other in key[:, head]]
                            mixed[i, head] = sum(w / sum(weights) * v for w, v in zip(weights, value[:, head], strict=True))
                    x = x + block.mix["out"](mixed)
                hidden = block.feed["up"](block.feed["norm"](x))
                x = x + block.feed["down"](hidden * hidden.sigmoid())
            for i, token in zip(valid[row].nonzero()[:, 0].tolist(), range(len(x)), strict=True):
                gated = [
                    float(torch.cosine_similarity(own[token], asked.word(word), dim=0)) * float(asked.gate(word).sigmoid())
                    for word in words
                ]
                wanted = float(scorer.head(scorer.norm(x[token]))) + float(asked.strength) * max(gated)
                assert float(found[row, i]) == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_a_question_aware_scorer_reads_the_question_and_not_its_padding() -> None:
    for how in ("True", "'cross'"):
        seen = tokens()
        pruner = made(f"diffprune(question_aware={how})", seen)
        torch.nn.init.normal_(pruner.networks["scorer"].head.weight, std=0.5)
        asked = seen.evidence[QUESTION]
        asked.valid[0, 4:] = False
        with torch.no_grad():
            before = pruner.score(seen)
            hidden, shown = (asked.embedding.clone() for _ in range(2))
            hidden[0, 5], shown[0, 2] = 9.0, 9.0
            same, other = (pruner.score(replace(seen, evidence={QUESTION: Question(e, asked.valid)})) for e in (hidden, shown))
        torch.testing.assert_close(same[seen.valid], before[seen.valid])
        order = (other - before)[0, seen.valid[0]]
        assert float(order.max() - order.min()) > 1e-3, "not the same for all tokens, which would choose nothing"


def test_words_that_match_a_token_speak_for_keeping_it_alone() -> None:
    """A match that is added to the logits of keep and drop alike says nothing, and never trains."""
    seen = tokens()
    pruner = made("gumbel_keepdrop(question_aware=True)", seen)
    score = pruner.score(seen)[seen.valid]
    (score * torch.arange(float(len(score)))).sum().backward()
    question = pruner.networks["scorer"].question
    assert all(float(p.grad.abs().max()) > 1e-3 for p in (question.word.weight, question.gate.weight, question.strength))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_scores_ignore_padding(spelling: str) -> None:
    seen = tokens()
    pruner = made(spelling, seen)
    with torch.no_grad():
        before = pruner.score(seen)
        noisy = seen.features.clone()
        noisy[0, 16:] = 50.0
        after = pruner.score(replace(seen, features=noisy))
    torch.testing.assert_close(before[seen.valid], after[seen.valid], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_saved_weights_come_back_and_say_what_they_are(spelling: str, tmp_path: Path) -> None:
    seen = tokens()
    pruner = made(spelling, seen)
    pruner.save_pretrained(tmp_path / "scorer", model="embedded", accuracy=0.5)
    options = {k: v for k, v in pruner.options.items() if k in ("question_aware", "attention") and v != (k == "attention")}
    options |= {"denoiser": pruner.options["denoiser"]} if "denoiser=" in spelling else {}
    text = ", ".join(f"{k}={v!r}" for k, v in options.items())
    again = registry.load("pruners", f"{spelling.split('(')[0]}({text}{', ' if text else ''}weights='{tmp_path / 'scorer'}')")
    with torch.no_grad():
        torch.testing.assert_close(again.score(seen), pruner.score(seen))
    assert again.weights_sha256 == pruner.weights_sha256 and len(again.weights_sha256) == 20
    assert "accuracy: 0.5" in (tmp_path / "scorer" / "README.md").read_text()
    assert not again.networks.training and not any(p.requires_grad for p in again.networks.parameters())
    again.save_pretrained(tmp_path / "again", accuracy=0.75)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["facts"] == {"model": "embedded", "accuracy": 0.75}


def test_an_untrained_method_says_so() -> None:
    with pytest.raises(ValueError, match="no weights yet"):
        registry.load("pruners", "diffprune").select(tokens(), Cut(ENCODED, parse("4")))


def test_damaged_or_foreign_weights_are_refused_with_file_and_reason(tmp_path: Path) -> None:
    pruner = made("diffprune", tokens())
    folder = tmp_path / "scorer"
    file = folder / "model.safetensors"

    def refused(reason: str, spelling: str = "diffprune") -> None:
        with pytest.raises(ValueError, match=reason):
            registry.load("pruners", f"{spelling}(weights='{folder}')")

    refused("give a folder with config.json")
    pruner.save_pretrained(folder)
    whole = file.read_bytes()
    refused("belong to 'diffprune'", "gumbel_keepdrop")
    flipped = bytearray(whole)
    flipped[-5] ^= 4
    file.write_bytes(bytes(flipped))
    refused("sha256 differs")
    file.write_bytes(whole[: len(whole) // 2])
    refused("sha256 differs")
    file.unlink()
    refused("weights file is missing")

    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"weights_sha256"', '"no_checksum"'))
    file.write_bytes(whole[: len(whole) // 2])
    refused("not a complete safetensors file")
    file.write_bytes(whole)
    values = load_file(file)
    save_file({**values, "scorer.head.weight": values["scorer.head.weight"] * float("nan")}, file)
    refused("holds NaN")
    save_file({**values, "scorer.head.weight": torch.zeros(1, 3)}, file)
    refused("'scorer.head.weight' has shape")
    save_file({k: v for k, v in values.items() if k != "scorer.head.weight"}, file)
    refused("'scorer.head.weight' is missing")


def test_options_must_match_the_weights(tmp_path: Path) -> None:
    made("diffprune(question_aware=True)", tokens()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="question_aware=True"):
        registry.load("pruners", f"diffprune(weights='{tmp_path}')")


def test_features_of_another_width_are_refused(tmp_path: Path) -> None:
    pruner = made("diffprune", tokens())
    with pytest.raises(ValueError, match="width 48, the model gives 40"):
        pruner.score(tokens(width=40))


def test_the_noise_of_a_row_is_its_own_however_the_rows_are_split_and_padded() -> None:
    """Oracle: each row drawn alone, with its own generator; a second call goes on in every stream."""
    valid = torch.tensor([[True, True, True, False], [True, False, True, True], [True, True, False, False]])
    whole = Noise("step", 5, rows=[7, 8, 9])
    first, second = whole.normal(valid, 40), whole.uniform(valid)
    for row, name in enumerate((7, 8, 9)):
        stream, live = generator("step", 5, name), valid[row]
        torch.testing.assert_close(first[row][live], torch.randn(int(live.sum()), 40, generator=stream), rtol=0, atol=0)
        torch.testing.assert_close(second[row][live], torch.rand(int(live.sum()), 1, generator=stream), rtol=0, atol=2e-6)
        assert not first[row][~live].any() and (second[row][~live] == 0.5).all()
    wider = torch.cat([valid, torch.zeros(3, 2, dtype=torch.bool)], 1)[1:]
    assert Noise("step", 5, rows=[8, 9]).normal(wider, 40)[:, :4].equal(first[1:])
    assert not Noise("step", 6, rows=[7]).normal(valid[:1], 40).equal(first[:1])


def test_the_offset_of_keep_and_drop_meets_the_budget_and_has_its_gradient() -> None:
    """Oracles: the sum it must meet; finite differences in float64 of a bisection."""
    torch.manual_seed(3)
    keep, valid = 3 * torch.randn(4, 30, dtype=torch.float64), torch.ones(4, 30, dtype=torch.bool)
    valid[0, 20:] = False
    budget = torch.tensor([5.0, 1.0, 29.0, 30.0])
    b = logistic_offset(keep, valid, budget).double()
    met = (keep - b).sigmoid().where(valid, 0.0).sum(1)
    torch.testing.assert_close(met, torch.tensor([5.0, 1.0, 29.0, 29.999], dtype=torch.float64), rtol=0, atol=1e-4)
    asked = keep.clone().requires_grad_()
    logistic_offset(asked, valid, budget)[:3].sum().backward()
    assert asked.grad is not None
    for row, token in ((0, 3), (1, 17), (2, 29)):
        step = torch.zeros_like(keep)
        step[row, token] = 1e-2
        up, down = (logistic_offset(keep + sign * step, valid, budget)[row] for sign in (1, -1))
        assert float(asked.grad[row, token]) == pytest.approx(float(up - down) / 2e-2, abs=2e-3)


def test_a_generator_starts_at_the_first_63_bits_of_its_keys_digest() -> None:
    """Published scorers are trained again with the numbers they were trained with."""
    for key in (("slots", 3, 0), (0, "x")):
        digest = hashlib.sha256(repr(key).encode()).hexdigest()
        assert generator(*key).initial_seed() == int(bin(int("1" + digest, 16))[3:66], 2)


def test_uniform_noise_is_never_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both can be drawn, and their Gumbel numbers are infinite."""
    monkeypatch.setattr(torch, "rand", lambda num, width, generator: torch.tensor([0.0, 0.5, 1.0])[:num, None].expand(num, width))
    found = Noise(0, rows=[0]).uniform(torch.ones(1, 3, dtype=torch.bool), 2)
    assert (
        found[0, :, 1].tolist() == pytest.approx([1e-6, 0.5, 1 - 1e-6], abs=2e-8, rel=0)
        and (-(-found.log()).log()).isfinite().all()
    )
