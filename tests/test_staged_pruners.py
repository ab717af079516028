"""Methods that cut inside the decoder: their plans, their choices against slow loops, and their budgets as layer averages."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from PIL import Image
from torch.nn import functional

import diffprune
from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Above, Budget, Keep, Share
from diffprune.core.evidence import QUESTION, Question, decoder_attention, decoder_features, decoder_keys
from diffprune.core.site import Cut, Site, Stage, for_images, tokens_per_layer
from diffprune.core.tokens import VisualTokens, means
from diffprune.pruners import sparsevlm
from tests.contracts import site, spellings
from tests.test_cost import QWEN, SEVEN
from tests.test_decoder_cuts import MODES, batch, deep, entering, generate, whole
from tests.test_families import own

LLAVA = replace(SEVEN, visual_tokens=576)
STAGED = ("fastv", "pyramiddrop", "sparsevlm", "dart")  # ready as they are
PLANNED = tuple(
    name for name in registry.names("pruners") if spellings()[name] == (name,) and site(registry.load("pruners", name)).layer
)  # fmt: skip


def plan(spelling: str, budget: Budget) -> list[tuple[int, Budget]]:
    cuts = for_images(registry.load("pruners", spelling).cuts(budget, LLAVA), [LLAVA.visual_tokens])
    return [(cut.site.layer, cut.budget) for cut in cuts]


def test_plans_of_the_papers() -> None:
    assert plan("fastv", Keep(96)) == [(2, Keep(64))] and plan("dart", Keep(96)) == [(2, Keep(64))]
    for name in ("fastv", "dart", "dynamic_llava"):
        assert plan(f"{name}(after=8)", Keep(300)) == [(8, Keep(208))]
    assert plan("pyramiddrop", Keep(270)) == [(8, Keep(288)), (16, Keep(144)), (24, Keep(72))]
    assert [layer for layer, _ in plan("sparsevlm", Keep(192))] == [3, 7, 16], "as 3 x 576, 4 x 300, 9 x 200, 16 x 110"
    assert [layer for layer, _ in plan("atp", Keep(192))] == [4, 14, 24]
    assert plan("dynamic_llava", Keep(96)) == [(2, Keep(64))]
    halving = Share((3 * 576 + 3 * 288 + 8 * 144 + 8 * 48 + 10 * 1) / 32 / 576)  # an average of 129.3
    found = plan("btp", halving)
    assert [layer for layer, _ in found] == [3, 6, 14, 22]
    assert [cut.share for _, cut in found if isinstance(cut, Share)] == pytest.approx([1 / 2, 1 / 2, 1 / 3, 1 / 48], rel=1e-5)
    shallow = replace(LLAVA, layers=4, visual_tokens=144)
    found = {name: [c.site.layer for c in registry.load("pruners", name).cuts(Keep(72), shallow)] for name in (*STAGED, "btp")}
    assert found == {"fastv": [1], "pyramiddrop": [1, 2, 3], "sparsevlm": [1, 2], "dart": [1], "btp": [1, 2, 3]}


@pytest.mark.parametrize("shape", [LLAVA, replace(QWEN, visual_tokens=1280), replace(LLAVA, layers=4, visual_tokens=144)])
@pytest.mark.parametrize("name", PLANNED)
def test_a_budget_is_the_average_over_layers(name: str, shape: object) -> None:
    total = shape.visual_tokens  # type: ignore[attr-defined]
    for budget in (Keep(total // 2), Share(0.4), Share(0.9), Keep(total)):
        plan = registry.load("pruners", name).cuts(budget, shape)
        cuts = [replace(cut, adaptive=False) for cut in plan]  # of an adaptive one, what images keep on average
        seen = tokens_per_layer(cuts, total, shape.layers)  # type: ignore[attr-defined]
        wanted = budget.num if isinstance(budget, Keep) else budget.share * total
        assert abs(fmean(seen) - wanted) <= 0.5 * len(cuts), (budget, seen)  # each cut's count is rounded


@pytest.mark.parametrize("name", PLANNED)
def test_budgets_that_cannot_be_met_are_refused(name: str) -> None:
    vlm, method = deep("llava"), registry.load("pruners", name)
    with pytest.raises(ValueError, match="this method needs a count, as in Keep"):
        pruning.plan_of(vlm, method, Above(0.5))
    with pytest.raises(ValueError, match=r"cannot be met by a cut after layer 1, as the layers before it alone make 25\.0%"):
        pruning.plan_of(vlm, method, Share(0.1))


@pytest.mark.parametrize("text", ["fastv(after=-1)", "pyramiddrop(stages=0)", "dart(image=0)", "dart(text=-1)"])
def test_options_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"=-?\d"):
        registry.load("pruners", text)


@pytest.mark.parametrize(("name", "ahead"), [("fastv", 0), ("pyramiddrop", 1)])
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "gemma3"])
def test_choices_are_the_largest_attentions_of_an_eager_run(family: str, name: str, ahead: int) -> None:
    with torch.inference_mode():
        vlm, prompts, _, tokens = batch(family)
        packed = pruning.shrink(vlm, prompts, tokens, registry.load("pruners", name), Share(0.5))
        with pruning.running(vlm, packed) as cuts:
            given = pruning.decoder_inputs(vlm, packed)
            vlm.model(**given | {"position_ids": given["position_ids"] + vlm.position_offset})
        inputs = whole(vlm, prompts, tokens)
        vlm.model.set_attn_implementation({"text_config": "eager"})
        try:
            told, _ = entering(vlm, inputs | {"position_ids": inputs["position_ids"] + vlm.position_offset})
        finally:
            vlm.model.set_attn_implementation({"text_config": "sdpa"})
    assert cuts is not None
    left, rows = cuts.stages[1].tokens, told.attentions[ahead].mean(1)[:, -1]
    scores = iter(torch.cat([row[slots] for row, slots in zip(rows, prompts.slots, strict=True)]).tolist())
    for image in range(len(tokens)):
        own_scores = {place: next(scores) for place in tokens.present[image].nonzero().flatten().tolist()}
        kept, valid = left.valid[image].nonzero().flatten().tolist(), tokens.valid[image].nonzero().flatten().tolist()
        best = sorted(valid, key=lambda place: -own_scores[place])[: len(kept)]
        assert sorted(best) == kept and len(kept) == packed.inside.cuts[0].budget.count(len(valid))


@pytest.mark.parametrize("name", [*STAGED, "replaced(fastv)"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_it_generates_inside_the_models_own_calls(family: str, name: str) -> None:
    vlm, prompts, pixels, _ = batch(family)
    with torch.inference_mode(), diffprune.pruned(vlm.model, name, Share(0.5)) as session:
        made = generate(vlm, own(vlm, prompts, pixels), **MODES["greedy"])
        assert session.selection is not None
        total = session.selection.keep.sum(1)
        assert torch.equal(generate(vlm, own(vlm, prompts, pixels), **MODES["no cache"]), made)
        assert torch.equal(session.selection.keep.sum(1), total)


@pytest.mark.parametrize("name", STAGED)
@torch.inference_mode()
def test_a_count_is_the_average_of_every_picture_whatever_its_size(name: str) -> None:
    """A picture of 4 tokens beside one of 20, more than one of the default size has; with its processor and without."""
    vlm = deep("internvl")
    pictures = [Image.effect_noise((side, side), 90).convert("RGB") for side in (16, 64)]
    pixels = vlm.pixels(pictures)
    tokens = vlm.encode(pixels, registry.load("pruners", name).needs)
    prompts = vlm.prompts(["what?", "what?"], tokens.present.sum(1).tolist(), tokens.layout)
    assert tokens.counts.tolist() == [4, 20] and vlm.shape.visual_tokens == 4
    for count in (10, 16, 100):
        packed = pruning.shrink(vlm, prompts, tokens, registry.load("pruners", name), Keep(count))
        pruning.forward(vlm, packed)
        for seen, total in zip(packed.averages(vlm.shape.layers), (4, 20), strict=True):
            assert abs(seen - min(count, total)) <= 0.5 * len(packed.inside.cuts), (count, total, seen)
        large = tokens[torch.tensor([1])]
        alone = pruning.shrink(vlm, vlm.prompts(["what?"], [20], large.layout), large, registry.load("pruners", name), Keep(count))
        pruning.forward(vlm, alone)
        assert alone.per_layer(vlm.shape.layers)[0] == packed.per_layer(vlm.shape.layers)[1]
    with pytest.raises(ValueError, match=r"^Keep\(2\) with an image of 20 tokens: 10\.0% of the tokens .* cannot be met"):
        pruning.forward(vlm, pruning.shrink(vlm, prompts, tokens, registry.load("pruners", name), Keep(2)))


# --- choices against loops --------------------------------------------------------------------------------------------


def seen(num: int = 30, words: int = 7) -> VisualTokens:
    """Two images, the second with six tokens less; the second question is two words shorter."""
    chance = torch.Generator().manual_seed(4)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=chance)

    said = torch.ones(2, words, dtype=torch.bool)
    said[1, :2] = False
    valid = torch.ones(2, num, dtype=torch.bool)
    valid[1, -6:] = False
    return VisualTokens(
        random(2, num, 12),
        valid,
        evidence={
            QUESTION: Question(random(2, words, 12), said),
            decoder_attention(queries="each"): random(2, num, words).sigmoid(),
            decoder_features(0): random(2, num, 12),
            decoder_keys(): random(2, num, 8),
            decoder_keys(queries="text"): Question(random(2, words, 8), said),
            decoder_features(queries="text"): Question(random(2, words, 12), said),
        },
        projected=True,
    )


def at(layer: int, count: int) -> Cut:
    return Cut(Site(Stage.DECODER, layer), Keep(count))


@pytest.mark.parametrize("count", [1, 3, 4, 13, 24])
@pytest.mark.parametrize(("image", "text"), [(4, 4), (2, 9), (3, 0)])
def test_dart_equals_a_loop(image: int, text: int, count: int) -> None:
    tokens = seen()
    method = registry.load("pruners", "dart" if image == text else f"dart(image={image}, text={text})")
    keep = method.select(tokens, at(2, count)).keep
    keys, words = tokens.given(decoder_keys()), tokens.evidence[decoder_features(queries="text")]
    word_keys = tokens.evidence[decoder_keys(queries="text")]
    for i in range(2):
        places = tokens.valid[i].nonzero().flatten().tolist()
        real = words.valid[i].nonzero().flatten().tolist()
        first = sorted(places, key=lambda p: -float(keys[i, p].abs().sum()))[: min(image, count)]
        said = sorted(real, key=lambda p: -float(word_keys.embedding[i, p].abs().sum()))[:text]
        chosen, pivots = list(first), [tokens.features[i, p] for p in first] + [words.embedding[i, p] for p in said]
        left = count - len(first)
        for number, pivot in enumerate(pivots):
            take = left // len(pivots) + (number < left % len(pivots))
            rest = [p for p in places if p not in chosen]
            rest.sort(key=lambda p: float(functional.cosine_similarity(tokens.features[i, p], pivot, dim=0)))
            chosen += rest[:take]
        assert sorted(chosen) == keep[i].nonzero().flatten().tolist()


def test_raters_equal_a_loop() -> None:
    tokens = seen()
    question, visual = tokens.evidence[QUESTION], tokens.given(decoder_features(0))
    found = sparsevlm.raters(visual, tokens.valid, question)
    for i in range(2):
        words = question.valid[i].nonzero().flatten().tolist()
        total = torch.zeros(len(words))
        for place in tokens.valid[i].nonzero().flatten().tolist():
            total += torch.stack([visual[i, place] @ question.embedding[i, word] for word in words]).softmax(0)
        wanted = [word for word, value in zip(words, total.tolist(), strict=True) if value > float(total.mean())]
        assert found[i].nonzero().flatten().tolist() == wanted


@pytest.mark.parametrize("count", [2, 6, 15])
def test_sparsevlm_keeps_the_best_and_means_of_clusters(count: int) -> None:
    tokens = seen()
    method, plain = registry.load("pruners", "sparsevlm"), registry.load("pruners", "sparsevlm(recycle=False)")
    left, scored = method.select(tokens, at(2, count)), plain.select(tokens, at(2, count))
    assert scored.mix is None and left.mix is not None
    rate = sparsevlm.raters(tokens.given(decoder_features(0)), tokens.valid, tokens.evidence[QUESTION])
    for i in range(2):
        scores = {p: float(tokens.given(decoder_attention(queries="each"))[i, p][rate[i]].sum()) for p in range(30)}
        order = sorted(tokens.valid[i].nonzero().flatten().tolist(), key=lambda p: -scores[p])
        assert sorted(order[:count]) == scored.keep[i].nonzero().flatten().tolist()
        pool, clusters = sparsevlm.recycled(count, len(order))
        assert clusters >= 1 and {*order[: count - clusters]} <= {*left.keep[i].nonzero().flatten().tolist()}
        group = sorted(order[count - clusters : count - clusters + pool])
        centres = [p for p in group if left.keep[i, p]]
        assert len(centres) == clusters
        after = pruning.merged(tokens, left.keep, left.mix).features
        joined = {p: min(centres, key=lambda c: float((tokens.features[i, p] - tokens.features[i, c]).norm())) for p in group}
        for centre in centres:
            mean = torch.stack([tokens.features[i, p] for p in group if joined[p] == centre]).mean(0)
            torch.testing.assert_close(after[i, centre], mean)


@pytest.mark.parametrize(("plain", "total"), [(300, 576), (200, 309), (66, 576), (30, 82), (30, 72)])
def test_sparsevlm_clusters_as_many_as_the_authors_for_what_they_keep(plain: int, total: int) -> None:
    pool = int((total - plain) * 0.3) + 1  # the authors' code, which adds the clusters to what is kept
    clusters = int(pool / 10) + 1
    assert sparsevlm.recycled(plain + clusters, total) == (pool, clusters)


def test_sparsevlm_clusters_fewer_where_that_leaves_no_token_as_it_is() -> None:
    assert [sparsevlm.recycled(count, 576)[1] for count in (1, 2, 3, 576)] == [0, 1, 2, 0]
    assert sparsevlm.recycled(1, 576) == sparsevlm.recycled(576, 576) == (0, 0)


def test_sparsevlm_merges_into_the_first_token_as_into_any_other() -> None:
    tokens = seen()[torch.tensor([0])]
    falling = torch.linspace(1, 0, 30)
    falling[1] = 2.0  # one token is kept as it is; the first one begins the cluster
    tokens = replace(
        tokens, evidence={**tokens.evidence, decoder_attention(queries="each"): falling[None, :, None].expand(1, 30, 7)}
    )
    left = registry.load("pruners", "sparsevlm").select(tokens, at(2, 2))
    pool, clusters = sparsevlm.recycled(2, 30)
    assert clusters == 1 and left.keep[0].nonzero().flatten().tolist() == [0, 1] and left.mix is not None
    after = pruning.merged(tokens, left.keep, left.mix).features[0]
    torch.testing.assert_close(after[0], tokens.features[0, [0, *range(2, pool + 1)]].mean(0))


def test_density_peaks_of_two_clusters_are_not_the_nearest_pair() -> None:
    """Two points that are each other's nearest have one density where it is of two points; only one of them is a peak."""
    for seed in range(50):
        points = torch.randn(15, 2, generator=torch.Generator().manual_seed(seed))
        points[12:] += 12
        centre, member = sparsevlm.density_peaks(points, 2)
        assert sorted((centre >= 12).tolist()) == [False, True], "one centre in each of two groups that are far apart"
        assert torch.equal(centre[member] >= 12, torch.arange(15) >= 12)


@pytest.mark.parametrize("clusters", [2, 3, 5])
def test_density_peaks_equal_a_loop(clusters: int) -> None:
    """Points of unlike spread, one by one: density of the nearest, itself among them, times distance to the nearest denser one."""
    for seed in range(6):
        torch.manual_seed(seed)
        points = 3 * torch.randn(14, 9) * torch.rand(14, 1)
        apart = [[math.dist(a, b) / 9**0.5 for b in points.tolist()] for a in points.tolist()]
        density = [math.exp(-sum(x**2 for x in sorted(row)[:clusters]) / clusters) for row in apart]
        height = [
            min((apart[i][j] for j in range(14) if (density[j], -j) > (density[i], -i)), default=max(map(max, apart)))
            for i in range(14)
        ]
        wanted = sorted(range(14), key=lambda i, d=density, h=height: -d[i] * h[i])[:clusters]
        centre, member = sparsevlm.density_peaks(points, clusters)
        assert centre.tolist() == wanted
        assert [wanted[k] for k in member.tolist()] == [min(wanted, key=lambda c, row=row: row[c]) for row in apart]


def test_density_peaks_find_clusters_that_are_far_apart() -> None:
    chance = torch.Generator().manual_seed(1)
    middles = torch.tensor([[0.0, 0.0], [30.0, 0.0], [0.0, 30.0]])
    label = torch.arange(24) % 3
    points = middles[label] + torch.randn(24, 2, generator=chance)
    centre, member = sparsevlm.density_peaks(points, 3)
    assert sorted(label[centre].tolist()) == [0, 1, 2]
    assert torch.equal(label[centre][member], label), "everybody is with the centre of its own cluster"
    keep = torch.zeros(1, 24, dtype=torch.bool)
    keep[0, centre] = True
    assert means(VisualTokens(points[None], torch.ones_like(keep)), keep, centre[member][None]).shape == (1, 3, 24)
