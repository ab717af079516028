"""Removing equals hiding in decoders with sliding windows, whose rows are longer than the window."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedConfig,
)

import diffprune
from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Keep, Share
from diffprune.core.vlm import VLM
from diffprune.data.batch import packed_rows, rows
from diffprune.models.llava import Llava
from diffprune.models.llava_next import LlavaNext
from diffprune.models.paligemma import PaliGemma
from diffprune.timing import cuda_graph, eager
from diffprune.timing.clock import Clock
from diffprune.timing.measured_cost import cost_of
from diffprune.vlm import tiny as parts
from diffprune.vlm.windows import window_of
from tests.test_families import IMAGES, QUESTIONS, Features, close, hidden, own, pictures, tiny

WINDOW = 12  # shorter than any row and than most pictures


def _mistral(text: Any) -> PreTrainedConfig:
    return MistralConfig(**parts.decoder(text), head_dim=16, sliding_window=WINDOW)


def _llava() -> VLM:
    like = tiny("llava")
    config = copy.deepcopy(like.model.config)
    made = LlavaConfig(
        vision_config=config.vision_config, text_config=_mistral(like.processor.tokenizer), image_token_id=parts.IMAGE
    )
    return Llava(parts.build(LlavaForConditionalGeneration, made, 0), like.processor, "llava, windows")


def _llava_next() -> VLM:
    like = tiny("llava_next")
    made = copy.deepcopy(like.model.config)
    made.text_config = _mistral(like.processor.tokenizer)
    return LlavaNext(parts.build(LlavaNextForConditionalGeneration, made, 0), like.processor, "llava_next, windows")


def _narrow(family: str, **changes: Any) -> VLM:
    like = tiny(family)
    made = copy.deepcopy(like.model.config)
    for name, value in {"sliding_window": WINDOW, **changes}.items():
        setattr(made.get_text_config(), name, value)
    return type(like)(parts.build(type(like.model), made, 0), like.processor, f"{family}, windows")  # type: ignore[call-arg]


def _paligemma2() -> VLM:
    like = tiny("paligemma")
    text = Gemma2Config(
        head_dim=16, **parts.decoder(like.processor.tokenizer), sliding_window=WINDOW, query_pre_attn_scalar=16,
        attn_logit_softcapping=None,
    )  # fmt: skip
    made = PaliGemmaConfig(
        vision_config=like.model.config.vision_config, text_config=text, image_token_id=parts.IMAGE, projection_dim=64,
        hidden_size=64,
    )  # fmt: skip
    return PaliGemma(parts.build(PaliGemmaForConditionalGeneration, made, 0), like.processor, "paligemma 2")


MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
MAKERS = {
    "llava": _llava,
    "llava_next": _llava_next,
    "mistral3": lambda: _narrow("mistral3"),
    "qwen2_vl": lambda: _narrow("qwen2_vl", use_sliding_window=True, **MIXED),
    "qwen2_5_vl": lambda: _narrow("qwen2_5_vl", use_sliding_window=True, **MIXED),
    "llava_onevision": lambda: _narrow("llava_onevision", use_sliding_window=True, **MIXED),
    "internvl": lambda: _narrow("internvl", use_sliding_window=True, **MIXED),
    "gemma3": lambda: _narrow("gemma3"),
    "paligemma": _paligemma2,
}


@pytest.fixture(autouse=True)
def no_gradient() -> Iterator[None]:
    with torch.inference_mode():
        yield


@cache
def batch(name: str) -> tuple[VLM, Any, Any, Any]:
    with torch.inference_mode():
        vlm = MAKERS[name]()
        pixels = vlm.pixels(pictures())
        tokens = vlm.encode(pixels)
        prompts = vlm.prompts(QUESTIONS, tokens.present.sum(1).tolist(), tokens.layout, IMAGES)
    assert window_of(vlm.model) == WINDOW
    return vlm, prompts, pixels, tokens


@pytest.mark.parametrize(
    ("name", "attention"), [(name, kind) for name in MAKERS for kind in ("sdpa", "eager") if (name, kind) != ("paligemma", "sdpa")]
)
def test_removing_equals_hiding_beyond_the_window(name: str, attention: str) -> None:
    vlm, prompts, _, tokens = batch(name)
    before = vlm.model.config.text_config._attn_implementation
    vlm.model.set_attn_implementation({"text_config": attention})
    try:
        for budget in (Keep(1), Keep(5), Share(1 / 3), Share(1)):
            packed = pruning.shrink(vlm, prompts, tokens, Features(), budget)
            close(pruning.forward(vlm, packed, logits_to_keep=1).logits[:, -1], hidden(vlm, prompts, tokens, budget))
    finally:
        vlm.model.set_attn_implementation({"text_config": before})


@pytest.mark.parametrize("name", MAKERS)
def test_bytes_of_keys_and_values_are_those_that_a_window_leaves_in_the_cache(name: str) -> None:
    vlm, clock = batch(name)[0], Clock()
    inputs = eager.prepare(vlm, pictures()[:1], QUESTIONS[:1], frozenset())
    full = eager.native(vlm, inputs, inputs.tokens.counts.tolist())
    for ready in (full, eager.shrink(vlm, inputs, Features(), Keep(3), clock)[0]):
        found = cost_of(vlm, "pruned", ready, inputs.pixels, clock, eager)
        assert ready.sequence > WINDOW and found.kv_bytes == found.kv_measured_bytes


MODES = {"greedy": {}, "beams": {"num_beams": 2}, "no cache": {"use_cache": False}}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MAKERS)
def test_generate_inside_equals_hiding_beyond_the_window(name: str, mode: str) -> None:
    vlm, prompts, pixels, tokens = batch(name)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": [parts.IMAGE], **MODES[mode]}
    with diffprune.pruned(vlm.model, Features(), Keep(4)):
        found = vlm.model.generate(**own(vlm, prompts, pixels), **options)
    left = pruning.select(vlm, prompts, tokens, Features(), Keep(4)).present[tokens.present]
    mask = prompts.attention_mask.clone()
    mask[prompts.slots] = left.long()
    full = pruning.shrink(vlm, prompts, tokens, registry.load("pruners", "unpruned"), Share(1))
    where = pruning.decoder_inputs(vlm, full)["position_ids"]
    wanted = vlm.model.generate(**own(vlm, prompts, pixels) | {"attention_mask": mask, "position_ids": where}, **options)
    assert torch.equal(found, wanted)
    assert not any(layer._forward_pre_hooks for layer in vlm.model.get_decoder().layers), "nothing stays behind"


@pytest.mark.parametrize("name", MAKERS)
def test_answers_equal_those_of_hidden_rows(name: str) -> None:
    """Our own path with a cache that holds a window by index, against full rows whose removed tokens are hidden."""
    vlm, prompts, _, tokens = batch(name)
    packed = pruning.shrink(vlm, prompts, tokens, Features(), Keep(4))
    texts, _ = pruning.answer(vlm, packed, 5)
    full = pruning.shrink(vlm, prompts, tokens, registry.load("pruners", "unpruned"), Share(1))
    mask = full.prompts.attention_mask.clone()
    mask[full.prompts.slots] = pruning.select(vlm, prompts, tokens, Features(), Keep(4)).present[tokens.present].long()
    wanted, _ = pruning.answer(vlm, replace(full, prompts=replace(full.prompts, attention_mask=mask)), 5)
    assert texts == wanted


def test_renumbered_rows_are_the_models_own() -> None:
    """Compact positions mean that nothing was ever there: windows count what stands."""
    vlm, prompts, _, tokens = batch("llava")
    packed = pruning.shrink(vlm, prompts, tokens, Features(), Keep(5), "compact")
    assert packed.prompts.index is None
    given = pruning.decoder_inputs(vlm, packed)
    close(pruning.forward(vlm, packed).logits[:, -1], vlm.model(**given).logits[:, -1])


def test_a_timed_prefill_is_the_same_forward() -> None:
    vlm, prompts, _, tokens = batch("llava")
    packed = pruning.shrink(vlm, prompts, tokens, Features(), Keep(5))
    output = eager.prefill(vlm, eager.Ready(packed, pruning.decoder_inputs(vlm, packed)), Clock()).output
    close(output.logits[:, -1], hidden(vlm, prompts, tokens, Keep(5)))


def test_mode_graph_refuses_decoders_with_windows() -> None:
    vlm = batch("llava")[0]
    with pytest.raises(ValueError, match="sliding windows, which mode graph does not serve"):
        cuda_graph.refuse_family(vlm)
    cuda_graph.refuse_family(tiny("llava"))


def test_flash_attention_is_refused_beyond_the_window_only(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, prompts, _, tokens = batch("llava")
    packed = pruning.shrink(vlm, prompts, tokens, Features(), Keep(5))
    monkeypatch.setattr(vlm.model.config.text_config, "_attn_implementation_internal", "flash_attention_2")
    with (
        pytest.raises(ValueError, match="longer than the decoder's sliding window of 12"),
        pruning.running(vlm, packed),
    ):
        pass
    within = replace(packed, prompts=replace(packed.prompts, index=torch.zeros_like(packed.prompts.input_ids)))
    with pruning.running(vlm, within):
        pass


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_packed_training_rows_keep_the_window(name: str) -> None:
    """Every segment of a packed row scores as its own row would: one question per row, padded, is the oracle."""
    vlm = batch(name)[0]
    pixels = vlm.pixels(pictures()[1:2])
    qa = [[("what is in the picture?", "a cat"), ("how many?", "two of them")]]
    tokens = vlm.encode(pixels)
    nothing = registry.load("pruners", "unpruned")
    packed = packed_rows(vlm, qa, pixels)
    single = rows(vlm, qa, pixels)
    together = pruning.Packed(packed, pruning.embeddings(vlm, tokens), tokens.counts, tokens.counts)
    both = tokens[torch.tensor([0, 0])]
    apart = pruning.shrink(vlm, single, both, nothing, Share(1))
    found = pruning.forward(vlm, together, use_cache=False).logits[packed.labels != -100]
    wanted = pruning.forward(vlm, apart, use_cache=False).logits[apart.prompts.labels != -100]
    close(found, wanted)
