"""Evidence: a pruner sees what it asks for and nothing else, and a family refuses what it cannot give."""

from __future__ import annotations

import pytest
import torch

from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Keep
from diffprune.core.evidence import (
    IDENTITY,
    QUESTION,
    Evidence,
    Question,
    decoder_attention,
    decoder_features,
    encoder_attention,
    encoder_features,
    encoder_keys,
)
from diffprune.core.pruner import ScorePruner
from diffprune.core.tokens import VisualTokens
from diffprune.evaluate.cache import Encodings
from tests.test_families import batch, pictures, tiny


class Sees(ScorePruner):
    """Notes what it is given."""

    def __init__(self, *needs: Evidence) -> None:
        self.needs = frozenset(needs)

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        self.seen = tokens.evidence
        return tokens.features.float().sum(-1)


def test_evidence_is_a_value() -> None:
    assert encoder_keys(11) == encoder_keys(11) != encoder_keys(12) and len({encoder_keys(), encoder_keys(), IDENTITY}) == 2
    assert str(encoder_attention(-1, joint=True)) == "attention in the vision encoder, the last layer, joint heads"
    assert str(decoder_attention(2, "text")) == "attention in the decoder, layer 2, from the question"
    assert str(decoder_attention(-1)) == "attention in the decoder, the layer before the cut, from the last token"
    assert str(decoder_features(None, "text")) == "hidden states of the decoder, the layer after the cut, of the question"
    assert [e.of_image for e in (QUESTION, IDENTITY, encoder_attention(), decoder_attention(2))] == [False, True, True, False]


def test_reading_the_question_follows_from_the_evidence() -> None:
    assert Sees(QUESTION).reads_question and Sees(decoder_attention(2)).reads_question
    assert not Sees(IDENTITY, encoder_attention(), encoder_features(3)).reads_question


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_attention_of_any_encoder_layer_is_that_of_the_encoder_itself(family: str) -> None:
    """Oracle: the attention weights of the encoder's own eager forward."""
    vlm = tiny(family)
    pixels = vlm.pixels(pictures()[:2])
    asked = {layer: encoder_attention(layer) for layer in (0, 1)}
    with torch.inference_mode():
        tokens = vlm.encode(pixels, frozenset(asked.values()))
        tower = vlm.model.model.vision_tower
        vlm.model.set_attn_implementation("eager")
        try:
            flat = pixels["pixel_values"].reshape(-1, *pixels["pixel_values"].shape[-3:])
            rows = tower(flat, output_attentions=True).attentions
        finally:
            vlm.model.set_attn_implementation("sdpa")
    for layer, evidence in asked.items():
        received = rows[layer].mean(1)[:, 0, 1:]
        if family == "llava":
            torch.testing.assert_close(tokens.given(evidence), received, rtol=0, atol=1e-5)
        else:  # tokens of tiles, in the decoder's order
            found = tokens.given(evidence)[tokens.valid]
            assert ((found[:, None] - received.flatten()).abs().amin(1) < 1e-5).all()
    with pytest.raises(
        ValueError, match=f"{family} cannot give attention in the vision encoder, layer 3: its encoder has the layers 0"
    ):
        vlm.encode(pixels, frozenset({encoder_attention(3)}))


def test_a_pruner_sees_what_it_asked_for_whoever_shares_the_encoding() -> None:
    vlm = tiny("llava")
    shared = Encodings(vlm, 64)
    pictures_ = [lambda p=p: p for p in pictures()[:2]]
    names = [("a",), ("b",)]
    both = shared.get(names, pictures_, frozenset({IDENTITY, encoder_attention()}))
    assert set(both.evidence) == {IDENTITY, encoder_attention()}
    one = shared.get(names, pictures_, frozenset({encoder_attention(), QUESTION}))
    assert set(one.evidence) == {encoder_attention()} and shared.encoded == 2, "nothing is encoded again"
    assert torch.equal(one.given(encoder_attention()), both.given(encoder_attention()))
    more = shared.get(names, pictures_, frozenset({encoder_attention(0)}))
    assert set(more.evidence) == {encoder_attention(0)} and shared.encoded == 4, "new evidence needs the encoder again"


def test_the_question_stands_beside_each_image() -> None:
    vlm, prompts, _, tokens = batch("llava")
    method = Sees(QUESTION)
    with torch.inference_mode():
        pruning.select(vlm, prompts, tokens, method, Keep(3))
        found = method.seen[QUESTION]
        assert isinstance(found, Question) and len(found.embedding) == len(tokens)
        assert torch.equal(found.embedding[0], found.embedding[1]), "two images of one prompt share its question"
        pruning.select(vlm, prompts, tokens, plain := Sees(), Keep(3))
    assert plain.seen == {}


def test_evidence_follows_the_images_it_belongs_to() -> None:
    valid = torch.ones(2, 3, dtype=torch.bool)
    question = Question(torch.randn(2, 4, 5), torch.ones(2, 4, dtype=torch.bool))
    tokens = VisualTokens(torch.randn(2, 3, 6), valid, evidence={encoder_attention(): torch.rand(2, 3), IDENTITY: torch.arange(2)})
    swapped = tokens[torch.tensor([1, 0])]
    assert swapped.given(IDENTITY).tolist() == [1, 0]
    longer = tokens.padded(5)
    assert longer.given(encoder_attention()).shape == (2, 5) and longer.given(IDENTITY).shape == (2,)
    assert torch.equal(
        VisualTokens.cat([tokens, longer])[torch.tensor([2])].given(encoder_attention())[:, :3],
        tokens.given(encoder_attention())[:1],
    )
    asked = VisualTokens(tokens.features, valid, evidence={QUESTION: question})[torch.tensor([1])].evidence[QUESTION]
    assert isinstance(asked, Question) and torch.equal(asked.embedding, question.embedding[1:])


def test_images_of_unlike_sizes_are_joined_with_padding_that_is_none_of_them() -> None:
    torch.manual_seed(0)
    short, long = (
        VisualTokens(torch.randn(1, n, 2), torch.ones(1, n, dtype=torch.bool), grid, row_id=torch.full((1, n), 7))
        for n, grid in ((2, (1, 2)), (5, (1, 5)))
    )
    for parts in ([short, long], [long, short]):
        both = VisualTokens.cat(parts)
        assert both.counts.tolist() == [one.valid.shape[1] for one in parts] and both.features.shape == (2, 5, 2)
        for row, one in enumerate(parts):
            own = both.valid[row]
            assert both.features[row, own].equal(one.features[0]) and both.row_id is not None and (both.row_id[row, own] == 7).all()
        assert both.grid is None
    assert VisualTokens.cat([long, long]).grid == (1, 5) and long.padded(5) is long


def test_every_pruner_runs_on_what_it_asks_for() -> None:
    vlm, prompts, pixels, _ = batch("llava")
    for name in ("random", "grid", "attention"):
        method = registry.load("pruners", name)
        with torch.inference_mode():
            tokens = vlm.encode(pixels, method.needs)
            assert set(tokens.evidence) == set(method.needs)
            assert pruning.select(vlm, prompts, tokens, method, Keep(2)).counts.tolist() == [2] * len(tokens)
