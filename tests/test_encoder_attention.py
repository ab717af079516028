"""What is read from the vision encoder of every family: oracle is what the encoder's own eager forward returns or hands on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.masking_utils import eager_mask

from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Keep
from diffprune.core.evidence import encoder_attention, encoder_features, encoder_keys
from diffprune.core.pruner import ScorePruner
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import VLM
from diffprune.models.llava import Llava
from diffprune.vlm import encoder_attention as reading
from diffprune.vlm import tiny as parts
from tests.test_families import FAMILIES, Features, batch, pictures, tiny


@pytest.fixture(autouse=True)
def no_gradient() -> Iterator[None]:
    with torch.inference_mode():
        yield


def textbook(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Eager attention over all queries at once, whose weights are laid aside."""
    scores = query @ key.transpose(2, 3) * options.get("scaling", query.shape[-1] ** -0.5)
    weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
    SEEN.append(Seen(module, query, key, attention_mask, weights))
    return (weights @ value).transpose(1, 2).contiguous(), None


class Seen(NamedTuple):
    """One call of the attention function, and its weights [B H N N]."""

    module: Any
    query: Tensor
    key: Tensor
    mask: Tensor | None
    weights: Tensor


SEEN: list[Seen] = []
AttentionInterface.register("textbook", textbook)
AttentionMaskInterface.register("textbook", eager_mask)


def calls_of_layer(vlm: VLM, pixels: dict[str, Tensor], layer: int) -> list[Seen]:
    """Every call in a layer; layers in the order they run."""
    SEEN.clear()
    before = vlm.model.config.vision_config._attn_implementation
    vlm.model.set_attn_implementation({"vision_config": "textbook"})
    try:
        vlm.encode(pixels)
    finally:
        vlm.model.set_attn_implementation({"vision_config": before})
    order = list(dict.fromkeys(id(call.module) for call in SEEN))
    return [call for call in SEEN if id(call.module) == order[layer]]


def weights_of_layer(vlm: VLM, pixels: dict[str, Tensor], layer: int) -> list[Tensor]:
    return [call.weights for call in calls_of_layer(vlm, pixels, layer)]


def joint_weights(call: Seen) -> Tensor:
    """[B 1 N N], heads side by side, written out."""
    query, key = (torch.cat(list(values.unbind(1)), -1) for values in (call.query, call.key))
    scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    return (scores if call.mask is None else scores + call.mask[:, 0]).softmax(-1)[:, None]


WITH_SUMMARY = ("llava", "llava_next", "internvl")


def wanted_per_patch(vlm: VLM, all_weights: list[Tensor]) -> list[Tensor]:
    """Of each sequence of the encoder, [n]: the [CLS] row without itself, or the mean over the queries that look there."""
    found = []
    for weights in all_weights:
        for one in weights.mean(1):  # [N N] of each sequence
            if vlm.family in WITH_SUMMARY:
                found.append(one[0, 1:])
                continue
            asking = (one > 0).sum(0)  # in an encoder that packs pictures, those of the same picture
            found.append(one.sum(0) / asking)
    return found


def wanted(vlm: VLM, pixels: dict[str, Tensor], patches: list[Tensor]) -> list[Tensor]:
    """Per visual token of each image: means over the patches of a token, written out family by family."""
    match vlm.family:
        case "llava" | "paligemma":
            return patches
        case "gemma3":
            side = int(len(patches[0]) ** 0.5)
            return [functional.avg_pool2d(p.view(1, 1, side, side), side // 4).flatten() for p in patches]
        case "qwen2_vl" | "qwen3_vl":  # patches of a token follow each other
            return list(torch.cat(patches).view(-1, 4).mean(1).split(vlm.slots(pixels)))
        case "mistral3":
            sizes = (pixels["image_sizes"] // 4).tolist()
            rasters = torch.cat(patches).split([rows * columns for rows, columns in sizes])
            return [
                r.view(rows // 2, 2, columns // 2, 2).mean((1, 3)).flatten()
                for r, (rows, columns) in zip(rasters, sizes, strict=True)
            ]
        case "idefics3" | "smolvlm" | "internvl":  # 4 x 4 patches a tile, 2 x 2 a token
            tiles = [p.view(2, 2, 2, 2).mean((1, 3)).flatten() for p in patches]
            return list(torch.cat(tiles).split(vlm.slots(pixels)))
    raise AssertionError(f"write here which patches a visual token of {vlm.family} is made of")


PLAIN = [family for family in FAMILIES if family not in ("llava_next", "llava_onevision", "qwen2_5_vl")]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("family", PLAIN)
def test_attention_is_that_of_the_encoders_eager_weights(family: str, layer: int) -> None:
    vlm, _, pixels, _ = batch(family)
    evidence = encoder_attention(layer)
    tokens = vlm.encode(pixels, frozenset({evidence}))
    oracles = wanted(vlm, pixels, wanted_per_patch(vlm, weights_of_layer(vlm, pixels, layer)))
    for found, valid, oracle in zip(tokens.given(evidence), tokens.valid, oracles, strict=True):
        torch.testing.assert_close(found[valid], oracle, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", PLAIN)
def test_keys_joint_attention_and_features_are_the_encoders_own(family: str) -> None:
    """A few heads and channels, pooled as attention is; features are heard at the layers that own the attention."""
    vlm, _, pixels, _ = batch(family)
    layer, heads = vlm.shape.vision_layers - 1, 4
    keys, joint, features = encoder_keys(-1), encoder_attention(-1, joint=True), encoder_features(0)
    tokens = vlm.encode(pixels, frozenset({keys, joint, features}))
    first = int(vlm.family in WITH_SUMMARY)

    def compare(found: Tensor, patches: list[Tensor]) -> None:
        for own, valid, oracle in zip(found, tokens.valid, wanted(vlm, pixels, patches), strict=True):
            torch.testing.assert_close(own[valid], oracle, rtol=0, atol=1e-5)

    calls = calls_of_layer(vlm, pixels, layer)
    assert tokens.given(keys).shape[2:] == (heads, 8)
    for head, channel in ((0, 3), (1, 0), (3, 7)):
        compare(tokens.given(keys)[..., head, channel], [own[head, first:, channel] for call in calls for own in call.key])
    compare(tokens.given(joint), wanted_per_patch(vlm, [joint_weights(call) for call in calls]))

    owner = next(name for name, m in vlm.model.named_modules() if m is calls_of_layer(vlm, pixels, 0)[0].module)
    heard: list[Tensor] = []
    block = vlm.model.get_submodule(owner.rpartition(".")[0])
    hook = block.register_forward_hook(lambda _, __, out: heard.append(out if isinstance(out, Tensor) else out[0]))
    vlm.encode(pixels)
    hook.remove()
    whole = [out if out.ndim == 3 else out[None] for out in heard]
    assert tokens.given(features).shape[2] == whole[0].shape[2]
    for channel in (0, 5):
        compare(tokens.given(features)[..., channel], [own[first:, channel] for out in whole for own in out])


@pytest.mark.parametrize("family", FAMILIES)
def test_it_belongs_to_the_token_beside_it(family: str) -> None:
    """A picture whose encoder runs alone, and the same one in a batch; features are untouched by the reading."""
    vlm, _, pixels, tokens = batch(family)
    evidence = encoder_attention()
    together = vlm.encode(pixels, frozenset({evidence}))
    torch.testing.assert_close(together.features, tokens.features, rtol=0, atol=0)
    assert vlm.model.config.vision_config._attn_implementation == "sdpa" and not reading._recorders.stack
    for i in (2, 3):
        alone = vlm.encode(vlm.part(pixels, i, i + 1), frozenset({evidence}))
        torch.testing.assert_close(
            alone.given(evidence)[alone.valid], together.given(evidence)[i][together.valid[i]], rtol=0, atol=1e-6
        )


class Sums(ScorePruner):
    """Looks at the attention of two layers."""

    needs = frozenset({encoder_attention(), encoder_attention(0)})

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.given(encoder_attention()) + tokens.given(encoder_attention(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rule_runs_on_every_family(family: str) -> None:
    vlm = tiny(family)
    for method in ("attention", Sums()):
        made = pruning.generate(vlm, pictures()[:2], ["what?", "how?"], pruner=method, budget=Keep(3), max_new_tokens=2)
        assert len(made) == 2
    with pytest.raises(
        ValueError, match=f"{family} cannot give attention in the vision encoder, layer 9: its encoder has the layers 0 to"
    ):
        vlm.encode(vlm.pixels(pictures()[:1]), frozenset({encoder_attention(9)}))


def test_windows_of_qwen2_5_are_put_back_in_raster_order() -> None:
    """The encoder works window by window; oracle: which group stands where is found by its features."""
    vlm, _, pixels, _ = batch("qwen2_5_vl")
    evidence = encoder_attention(0)
    calls = [one.mean(1) for one in weights_of_layer(vlm, pixels, 0)]
    received = torch.cat([w[0].mean(0) for w in calls]).view(-1, 4).mean(1)
    merged: list[Tensor] = []
    hook = vlm.model.model.visual.merger.register_forward_pre_hook(lambda _, args: merged.append(args[0]))
    tokens = vlm.encode(pixels, frozenset({evidence}))
    hook.remove()
    groups = merged[-1].reshape(len(received), -1)
    where = {tuple(row): i for i, row in enumerate(groups[:, :6].tolist())}
    for features, valid, found in zip(tokens.features, tokens.valid, tokens.given(evidence), strict=True):
        index = [where[tuple(row)] for row in features[valid][:, :6].tolist()]
        torch.testing.assert_close(found[valid], received[index], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_tiles_keep_their_tokens_attention(family: str) -> None:
    """Oracle: which token of which tile stands where is found by its features, as no two are alike."""
    vlm, _, pixels, _ = batch(family)
    evidence = encoder_attention()
    heard: list[Tensor] = []
    hook = vlm.model.model.multi_modal_projector.register_forward_hook(
        lambda _, args, out: heard.append(args[0] if family == "llava_next" else out)
    )
    tokens = vlm.encode(pixels, frozenset({evidence, encoder_keys()}))
    hook.remove()
    layer = vlm.encoder_layers(frozenset({evidence}))[evidence]  # type: ignore[attr-defined]
    calls = calls_of_layer(vlm, pixels, layer)
    per_tile = torch.cat(wanted_per_patch(vlm, [call.weights for call in calls]))
    key_per_tile = torch.cat([own[1, len(own[1]) - 16 :, 3] for call in calls for own in call.key])  # 16 patches a tile
    where = {tuple(row): i for i, row in enumerate(heard[0].flatten(0, 1)[:, :6].tolist())}
    known = 0
    both = tokens.given(evidence), tokens.given(encoder_keys())[..., 1, 3]
    for features, valid, found, keys in zip(tokens.features, tokens.valid, *both, strict=True):
        for row, value, key in zip(features[valid][:, :6].tolist(), found[valid], keys[valid], strict=True):
            if tuple(row) in where:  # others are mixtures of several, where the family resizes
                known += 1
                assert abs(float(value - per_tile[where[tuple(row)]])) < 1e-5
                assert abs(float(key - key_per_tile[where[tuple(row)]])) < 1e-5
    assert known >= int(tokens.counts.sum()) // 3


# -- LLaVA with other encoders -----------------------------------------------------------------------------------------


def llava(vision: Any, strategy: str, layer: int = -2) -> VLM:
    text = parts.tokenizer()
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**parts.decoder(text)), image_token_id=parts.IMAGE,
        vision_feature_select_strategy=strategy, vision_feature_layer=layer,
    )  # fmt: skip
    processor = tiny("llava").processor
    return Llava(parts.build(LlavaForConditionalGeneration, config, 0), processor, "llava of other parts")


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.mark.parametrize(
    ("vision", "strategy", "num"),
    [(SiglipVisionConfig(**SIZES, vision_use_head=False), "full", 16), (CLIPVisionConfig(**SIZES, projection_dim=32), "full", 17)],
    ids=["siglip", "clip, every token"],
)
def test_llava_of_other_encoders(vision: Any, strategy: str, num: int) -> None:
    vlm = llava(vision, strategy)
    assert vlm.num_visual_tokens == num
    pixels, evidence = vlm.pixels(pictures()[:2]), encoder_attention()
    tokens = vlm.encode(pixels, frozenset({evidence}))
    weights = torch.cat(weights_of_layer(vlm, pixels, 1)).mean(1)
    oracle = weights[:, 0] if num == 17 else weights.mean(1)
    torch.testing.assert_close(tokens.given(evidence), oracle, rtol=0, atol=1e-5)
    prompts = vlm.prompts(["what?", "how?"], tokens.counts.tolist(), tokens.layout)
    packed = pruning.shrink(vlm, prompts, tokens, registry.load("pruners", "unpruned"), Keep(1))
    own = vlm.model(input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, **pixels).logits[:, -1]
    torch.testing.assert_close(pruning.forward(vlm, packed).logits[:, -1], own, rtol=0, atol=1e-5)
    assert len(pruning.generate(vlm, pictures()[:1], ["what?"], pruner="attention", budget=4, max_new_tokens=2)) == 1


def test_llava_with_a_pixtral_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="Pixtral encoder is not supported"):
        llava({**SIZES, "model_type": "pixtral"}, "full", -1)


def test_long_sequences_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = (torch.randn(2, 3, 7, 4, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    padded = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    padded[1, :, :, 5:] = False
    whole = reading.received(reading.Kept(query, key, padded, 0.5))
    monkeypatch.setattr(reading, "AT_ONCE", 2 * 3 * 7 * 2)
    torch.testing.assert_close(reading.received(reading.Kept(query, key, padded, 0.5)), whole)
    alone = reading.received(reading.Kept(query[1:, :, :5], key[1:, :, :5], None, 0.5))
    torch.testing.assert_close(whole[1:, :5], alone)
    assert torch.equal(whole[1, 5:], torch.zeros(2)), "padding receives nothing and asks nothing"


def test_features_beside_attention_choose_as_without_it() -> None:
    vlm, prompts, pixels, tokens = batch("mistral3")
    seen = vlm.encode(pixels, frozenset({encoder_attention()}))
    plain = pruning.select(vlm, prompts, tokens, Features(), Keep(3)).valid
    assert torch.equal(pruning.select(vlm, prompts, seen, Features(), Keep(3)).valid, plain)
