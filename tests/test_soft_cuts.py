"""Training through cuts inside the decoder: weights of 0 and 1 are the cut, others a bias of attention; evidence counts them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffprune import pruning
from diffprune.core.budget import Keep, Share
from diffprune.core.evidence import Evidence, decoder_attention
from diffprune.core.site import Cut
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.data.batch import batch as batch_of
from diffprune.pruning.soft_cuts import columns
from diffprune.train.loss import answer_nll, softened_nll
from diffprune.vlm.activation_checkpointing import decoder_layers
from diffprune.vlm.attention import decoder_attention as attending
from tests.test_decoder_cuts import Staged, _after, deep
from tests.test_families import FAMILIES
from tests.test_families_train import drawn

CUTS = (_after(1, Share(0.6)), _after(3, Share(0.5)))
SCORES = decoder_attention(queries="image", raw=True)
LOOKS = (SCORES, decoder_attention(queries="text"), decoder_attention())


class Looking(Staged):
    """Notes what it is shown at every cut."""

    needs = frozenset(LOOKS)

    def __init__(self) -> None:
        super().__init__(CUTS)
        self.shown: list[VisualTokens] = []

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        self.shown.append(tokens)
        return super().select(tokens, cut)

    def weigh(self, tokens: VisualTokens, cut: Cut, before: torch.Tensor) -> torch.Tensor:
        """What `select` keeps of the tokens that are there."""
        return self.select(replace(tokens, valid=before > 0), cut).keep.float()


def rows(family: str) -> tuple[Any, Any, VisualTokens]:
    vlm = deep(family)
    batch = batch_of(vlm, drawn(), False)
    return vlm, batch.prompts, vlm.encode(batch.pixels)[batch.image]


def test_a_separator_weighs_what_the_heaviest_token_of_its_row_does() -> None:
    """Two rows of two tokens with their separators behind an overview, and padding; gradients go to the heaviest."""
    valid, row_id = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 0, 0]]).bool(), torch.tensor([[1, 1, -1, 2, 2, -2, 0, 3, -3]])
    tokens = VisualTokens(torch.zeros(1, 9, 4), valid, row_id=row_id)
    weight = torch.tensor([[0.25, 0.5, 1, 0, 0, 1, 1, 1, 1]], requires_grad=True)
    prompts = SimpleNamespace(slots=torch.tensor([[False, *[True] * 7]]))
    found = columns(prompts, tokens, weight)  # type: ignore[arg-type]
    assert found.tolist() == [[1, 0.25, 0.5, 0.5, 0, 0, 0, 1]]
    found[0, 3].backward()
    assert weight.grad is not None and weight.grad.tolist() == [[0, 1, 0, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_0_and_1_are_the_cut_and_show_the_same(family: str) -> None:
    with torch.no_grad():
        vlm, prompts, tokens = rows(family)
        removing, weighing = Looking(), Looking()
        hard = answer_nll(vlm, pruning.shrink(vlm, prompts, tokens, removing, Keep(1)))
        with attending(vlm.model, "masked_softmax"):
            soft = softened_nll(vlm, prompts, tokens, weighing, CUTS, weighing.weigh)
    torch.testing.assert_close(soft, hard, rtol=2e-4, atol=2e-4)
    for one, other in zip(removing.shown, weighing.shown, strict=True):
        assert torch.equal(one.valid, other.valid), "the second cut chooses among the same tokens"
        torch.testing.assert_close(one.features[one.valid], other.features[one.valid], rtol=1e-3, atol=1e-4)
        for key in LOOKS:
            torch.testing.assert_close(one.given(key)[one.valid], other.given(key)[one.valid], rtol=1e-3, atol=1e-4, msg=str(key))
    assert int(removing.shown[1].counts.sum()) < int(removing.shown[0].counts.sum())


def test_weights_between_are_a_bias_of_attention_to_others() -> None:
    """Oracle: eager attention under a mask that has log weight in the columns of visual tokens, the diagonal left out."""
    with torch.no_grad():
        vlm, prompts, tokens = rows("llava")
        chance = torch.Generator().manual_seed(2)
        weights = [torch.rand(tokens.valid.shape, generator=chance) for _ in CUTS]
        given = iter(weights)
        with attending(vlm.model, "masked_softmax"):
            soft = softened_nll(vlm, prompts, tokens, Staged(CUTS), CUTS, lambda seen, cut, before: next(given))
        wanted = _biased(vlm, prompts, tokens, {1: weights[0], 3: weights[0] * weights[1]})
    torch.testing.assert_close(soft, wanted, rtol=1e-4, atol=1e-4)


def _biased(vlm: Any, prompts: Any, tokens: VisualTokens, weights: dict[int, torch.Tensor]) -> torch.Tensor:
    def hook(weight: torch.Tensor) -> Any:
        bias = torch.zeros(prompts.slots.shape).masked_scatter(prompts.slots, weight[tokens.present].log())[:, None, None]
        bias = bias * (1 - torch.eye(bias.shape[-1]))

        def before(_: Any, args: Any, given: dict[str, Any]) -> Any:
            return args, {**given, "attention_mask": given["attention_mask"] + bias}

        return before

    with ExitStack() as stack, attending(vlm.model, "eager"):
        for number, layer in enumerate(decoder_layers(vlm.model)):
            if made := [at for at in weights if at <= number]:
                handle = layer.register_forward_pre_hook(hook(weights[max(made)]), with_kwargs=True, prepend=True)
                stack.callback(handle.remove)
        whole = pruning.Packed(prompts, pruning.embeddings(vlm, tokens), tokens.counts, tokens.counts)
        return answer_nll(vlm, whole)


class Watching(Staged):
    needs: frozenset[Evidence] = frozenset({SCORES})


def test_scores_are_those_of_the_layers_own_queries_and_keys() -> None:
    """Oracle: query and key of every visual token of one image by the layer's own weights and rotary embedding, pair by pair."""
    with torch.no_grad():
        vlm, prompts, tokens = rows("llava")
        caught: dict[str, Any] = {}
        layer = decoder_layers(vlm.model)[0]
        handle = layer.register_forward_pre_hook(lambda _, args, given: caught.update(given, states=args[0]), with_kwargs=True)
        seen: list[VisualTokens] = []
        chance = torch.rand(tokens.valid.shape, generator=torch.Generator().manual_seed(1))
        weights = iter([chance, torch.ones_like(chance)])

        def weigh(shown: VisualTokens, cut: Cut, before: torch.Tensor) -> torch.Tensor:
            seen.append(shown)
            return next(weights)

        cuts = (_after(1, Share(0.5)), _after(2, Share(0.5)))
        pruner = Watching(cuts)
        with attending(vlm.model, "masked_softmax"):
            softened_nll(vlm, prompts, tokens, pruner, cuts, weigh)
        handle.remove()
        attention, states = layer.self_attn, layer.input_layernorm(caught["states"])
        cos, sin = caught["position_embeddings"]
        heads, size = vlm.shape.heads, vlm.shape.head_dim
        image = 1
        (slots,) = prompts.slots[image].nonzero(as_tuple=True)

        def turned(made: torch.Tensor, place: int) -> torch.Tensor:
            vector = made[image, place].view(-1, size)
            half = torch.cat([-vector[:, size // 2 :], vector[:, : size // 2]], 1)
            row = image if len(cos) > 1 else 0
            return vector * cos[row, place] + half * sin[row, place]

        query, key = attention.q_proj(states), attention.k_proj(states)
        for i in slots.tolist()[:5]:
            total = 0.0
            for j in slots.tolist():
                asks, is_asked = turned(query, j), turned(key, i)
                total += sum(float(asks[h] @ is_asked[h * len(is_asked) // heads]) for h in range(heads)) / heads
            wanted = total / len(slots) / size**0.5
            assert float(seen[0].given(SCORES)[image, slots.tolist().index(i)]) == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert not torch.allclose(seen[0].given(SCORES), seen[1].given(SCORES))
