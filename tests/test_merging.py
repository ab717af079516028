"""Merging: the path moves the content of removed tokens into survivors, as a naive loop over tokens does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Keep, Share, top
from diffprune.core.pruner import Pruner
from diffprune.core.site import ENCODED, PROJECTED, Cut, Site, Stage
from diffprune.core.tokens import Selection, VisualTokens, means
from diffprune.core.vlm import Shape
from tests.test_families import FAMILIES, Features, batch, close


class Nearest(Pruner):
    """Keeps what a fixed score ranks first; every other token goes into the most similar survivor, some go nowhere."""

    label = "Nearest"

    def __init__(self, weighted: bool = False, sites: tuple[Site, ...] = (ENCODED,)) -> None:
        self.weighted, self.sites = weighted, sites

    def cuts(self, budget: Keep, shape: Shape) -> tuple[Cut, ...]:  # type: ignore[override]
        return tuple(Cut(site, Keep(budget.num * 2**i)) for i, site in zip(range(len(self.sites))[::-1], self.sites, strict=True))

    def groups(self, tokens: VisualTokens, cut: Cut) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(keep, into, weight) of `means`."""
        score = Features().score(tokens)
        keep = top(score, tokens.valid, tokens.counts.clamp_max(cut.budget.num))  # type: ignore[union-attr]
        likeness = (tokens.features @ tokens.features.transpose(1, 2)).masked_fill(~keep[:, None], -torch.inf)
        into = likeness.argmax(-1).masked_fill(score < -1, -1)
        return keep, into, score.abs() if self.weighted else None

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        keep, into, weight = self.groups(tokens, cut)
        return Selection(keep, means(tokens, keep, into, weight))


@pytest.fixture(autouse=True)
def no_gradient() -> Iterator[None]:
    with torch.inference_mode():
        yield


def by_loop(tokens: VisualTokens, keep: torch.Tensor, into: torch.Tensor, weight: torch.Tensor | None) -> VisualTokens:
    """Oracle: token by token, in double precision."""
    features, size = tokens.features.clone(), torch.ones(tokens.valid.shape) if tokens.size is None else tokens.size.clone()
    deepstack = None if tokens.deepstack is None else tokens.deepstack.clone()
    before, weight = size.clone(), size.clone() if weight is None else weight
    for b in range(len(tokens)):
        for i in keep[b].nonzero().flatten().tolist():
            gone = [j for j in range(len(size[b])) if tokens.valid[b, j] and not keep[b, j] and into[b, j] == i]
            group = [i, *gone]
            if gone:
                w = weight[b, group].double()[:, None]
                features[b, i] = ((w * tokens.features[b, group].double()).sum(0) / w.sum()).to(features.dtype)
                if deepstack is not None:
                    deepstack[b, i] = ((w * tokens.deepstack[b, group].double()).sum(0) / w.sum()).to(deepstack.dtype)  # type: ignore[index]
            size[b, i] = before[b, group].sum()
    return replace(tokens, features=features, deepstack=deepstack, size=size, valid=keep)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_equals_a_naive_loop(family: str, weighted: bool) -> None:
    vlm, prompts, _, tokens = batch(family)
    method = Nearest(weighted)
    left = pruning.select(vlm, prompts, tokens, method, Keep(5))
    wanted = by_loop(tokens, *method.groups(tokens, Cut(ENCODED, Keep(5))))
    assert torch.equal(left.valid, wanted.valid) and left.size is not None and wanted.size is not None
    close(left.features[left.valid], wanted.features[left.valid])
    close(left.size[left.valid], wanted.size[left.valid])
    alone = left.valid & (left.size == 1)
    assert torch.equal(left.features[alone], tokens.features[alone]), "survivors that nothing goes into stay as they are"
    assert not torch.equal(left.features[left.valid], tokens.features[left.valid]), "something was merged"
    if tokens.deepstack is not None:
        assert left.deepstack is not None and wanted.deepstack is not None
        close(left.deepstack[left.valid], wanted.deepstack[left.valid])


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_rows_run_and_count_as_pruned_ones_do(family: str) -> None:
    vlm, prompts, _, tokens = batch(family)
    merged, pruned = (pruning.shrink(vlm, prompts, tokens, method, Keep(5)) for method in (Nearest(), Features()))
    for name in ("input_ids", "attention_mask", "position_ids", "slots"):
        assert torch.equal(getattr(merged.prompts, name), getattr(pruned.prompts, name)), name
    logits = [pruning.forward(vlm, packed, logits_to_keep=1).logits for packed in (merged, pruned)]
    assert torch.isfinite(logits[0]).all() and not torch.equal(*logits)


def test_sizes_add_up_over_cuts_and_weigh_the_next_mean() -> None:
    vlm, prompts, _, tokens = batch("llava")
    method = Nearest(sites=(ENCODED, PROJECTED))
    left, wanted = pruning.select(vlm, prompts, tokens, method, Keep(3)), tokens
    first, second = method.cuts(Keep(3), vlm.shape)
    assert (first.budget, second.budget) == (Keep(6), Keep(3))
    wanted = by_loop(tokens, *method.groups(tokens, first))
    wanted = replace(wanted, features=vlm.project(wanted.features), projected=True)
    wanted = by_loop(wanted, *method.groups(wanted, second))
    assert left.size is not None and wanted.size is not None
    close(left.features[left.valid], wanted.features[left.valid])
    assert torch.equal(left.size[left.valid], wanted.size[left.valid]) and float(left.size[left.valid].max()) > 2


def test_padding_and_weights_of_nothing_leave_survivors_alone() -> None:
    nan = float("nan")
    tokens = VisualTokens(torch.tensor([[[1.0], [3.0], [nan]]]), torch.tensor([[True, True, False]]))
    keep, into = torch.tensor([[True, False, False]]), torch.tensor([[-1, 0, 0]])

    def first(weight: torch.Tensor | None = None) -> float:
        return float(pruning.merged(tokens, keep, means(tokens, keep, into, weight)).features[0, 0])

    assert first() == 2.0, "padding is never merged"
    assert first(torch.tensor([[1.0, 3.0, nan]])) == 2.5
    assert first(torch.zeros(1, 3)) == 1.0


def test_bfloat16_is_averaged_in_float32_and_kept() -> None:
    values = torch.full((1, 300, 1), 1.0, dtype=torch.bfloat16)
    values[0, 0] = 2.0
    keep = torch.zeros(1, 300, dtype=torch.bool)
    keep[0, 0] = True
    tokens = VisualTokens(values, torch.ones_like(keep))
    merged = pruning.merged(tokens, keep, means(tokens, keep, torch.zeros(1, 300, dtype=torch.long)))
    assert merged.features.dtype == torch.bfloat16 and float(merged.features[0, 0]) == pytest.approx(301 / 300, abs=0.004)


def test_a_token_may_go_into_several_survivors_and_sums_need_be_no_means() -> None:
    """Oracle: the sums written out; images with fewer survivors than others keep theirs."""
    features, valid = torch.randn(2, 4, 3), torch.tensor([[True] * 4, [True, True, False, False]])
    tokens = VisualTokens(features, valid, deepstack=torch.randn(2, 4, 2))
    keep = torch.tensor([[True, False, True, False], [False, True, False, False]])
    mix = torch.zeros(2, 2, 4)
    mix[0, 0, :2], mix[0, 1, 1:], mix[1, 0, :2] = torch.tensor([1.0, 0.5]), torch.tensor([1.5, 2.0, 1.0]), torch.tensor([0.0, 1.0])
    mix[1, 1], mix[1, 0, 3] = 7.0, 7.0  # behind the last survivor, and at padding: not read
    found = pruning.merged(tokens, keep, mix)
    for name in ("features", "deepstack"):
        before, after = getattr(tokens, name), getattr(found, name)
        close(after[0, 0], before[0, 0] + before[0, 1] / 2)
        close(after[0, 2], 1.5 * before[0, 1] + 2 * before[0, 2] + before[0, 3])
        assert torch.equal(after[1], before[1])
    assert found.size is not None
    close(found.size[0, [0, 2]], torch.tensor([1.25, 2.75]))  # a quarter of the second token went into the first
    assert float(found.size[1, 1]) == 1.0


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen3_vl"])
def test_merging_inside_the_decoder_equals_a_naive_loop_over_hidden_states(family: str) -> None:
    vlm, prompts, _, tokens = batch(family)
    layer, states = vlm.model.get_decoder().layers[1], []
    hook = layer.input_layernorm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    try:
        plain = pruning.shrink(vlm, prompts, tokens, registry.load("pruners", "unpruned"), Share(1))
        pruning.forward(vlm, plain)
        method = Nearest(sites=(Site(Stage.DECODER, 1),))
        packed = pruning.shrink(vlm, prompts, tokens, method, Keep(3))
        with pruning.running(vlm, packed) as cuts:
            vlm.model(
                **(made := pruning.decoder_inputs(vlm, packed)) | {"position_ids": made["position_ids"] + vlm.position_offset}
            )
    finally:
        hook.remove()
    features = states[0].new_zeros(*tokens.valid.shape, states[0].shape[2])
    features[tokens.present] = states[0][plain.prompts.slots]
    seen = replace(tokens, features=features, projected=True)
    wanted = by_loop(seen, *method.groups(seen, method.cuts(Keep(3), vlm.shape)[0]))
    assert cuts is not None and cuts.left is not None and torch.equal(cuts.left.valid, wanted.valid)
    found = states[1][cuts.stages[1].prompts.slots]
    close(found, wanted.features[wanted.present])
    assert not torch.equal(found, features[wanted.present]), "something was merged"
