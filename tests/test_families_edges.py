"""Edges of every family: rows without pictures, small pictures, videos, token types, settings at the call, loading."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Gemma2Config, PaliGemmaConfig, PaliGemmaForConditionalGeneration

import diffprune
from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Above, Keep, Share
from diffprune.core.evidence import IDENTITY
from diffprune.core.vlm import VLM
from diffprune.models.paligemma import PaliGemma
from diffprune.vlm import tiny as parts
from diffprune.vlm.load import load
from diffprune.vlm.tokenize import left_pad
from tests.test_families import FAMILIES, Features, batch, close, own, pictures, tiny

UNPRUNED = "unpruned"


@pytest.fixture(autouse=True)
def no_gradient() -> Iterator[None]:
    with torch.inference_mode():
        yield


# -- rows without pictures ---------------------------------------------------------------------------------------------


def with_a_row_of_text(family: str, at: int) -> tuple[VLM, dict[str, Any], int]:
    """Two prompts about pictures and one of text alone at place `at`, as a processor hands them on."""
    vlm, _, _, _ = batch(family)
    pixels = vlm.pixels(pictures()[:2])
    tokens = vlm.encode(pixels)
    rows = vlm.prompts(["what?", "and how many of them"], tokens.present.sum(1).tolist(), tokens.layout)
    given = own(vlm, rows, pixels)
    words = torch.tensor([[20, 31, 42, 53, 64]])
    longest = rows.input_ids.shape[1]

    def joined(value: torch.Tensor, line: torch.Tensor) -> torch.Tensor:
        return torch.cat([value[:at], left_pad([line[0], torch.zeros(longest, dtype=line.dtype)], 0)[:1], value[at:]])

    for name, value in given.items():
        if isinstance(value, torch.Tensor) and value.shape[:2] == rows.input_ids.shape:
            line = {"input_ids": words, "attention_mask": torch.ones_like(words)}.get(name, torch.zeros_like(words))
            given[name] = joined(value, line.to(value.dtype))
    return vlm, given, at


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_without_a_picture_stands_among_others(family: str, at: int) -> None:
    """Oracle: the family's own forward, with every token kept; and the row of text alone."""
    vlm, given, _ = with_a_row_of_text(family, at)
    wanted = vlm.model(**given).logits[:, -1]
    with diffprune.pruned(vlm.model, UNPRUNED, Share(1)):
        close(vlm.model(**given).logits[:, -1], wanted)
    with diffprune.pruned(vlm.model, Features(), Keep(2)) as session:
        found = vlm.model(**given).logits[:, -1]
        assert session.selection is not None and session.selection.keep.sum(1).tolist() == [2, 2]
    close(found[at], wanted[at])


# -- budgets above what an image has -----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [Keep(10**6), Above(0.0, least=10**6)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_more_tokens_than_an_image_has_means_all_of_it(family: str, budget: Any) -> None:
    vlm, prompts, pixels, tokens = batch(family)
    with diffprune.pruned(vlm.model, Features(), budget) as session:
        found = vlm.model(**own(vlm, prompts, pixels)).logits[:, -1]
    close(found, vlm.model(**own(vlm, prompts, pixels)).logits[:, -1])
    assert session.selection is not None and session.selection.keep.sum(1).tolist() == tokens.counts.tolist()
    asked = {"max_new_tokens": 3, "pruner": Features()}
    some, every = (pruning.generate(vlm, pictures()[:2], ["what?", "how?"], budget=b, **asked) for b in (budget, Share(1)))
    assert some == every


def test_a_small_picture_beside_a_large_one_keeps_all() -> None:
    vlm = tiny("qwen2_vl")
    small, large = Image.new("RGB", (32, 32), "red"), pictures()[2].resize((96, 96))
    totals = vlm.encode(vlm.pixels([small, large])).counts.tolist()
    assert totals[0] < 20 < totals[1]
    with diffprune.pruned(vlm.model, Features(), 20) as session:
        pixels = vlm.pixels([small, large])
        tokens = vlm.encode(pixels)
        rows = vlm.prompts(["what?"] * 2, tokens.counts.tolist(), tokens.layout)
        vlm.model(**own(vlm, rows, pixels))
    assert session.selection is not None and session.selection.keep.sum(1).tolist() == [totals[0], 20]


@pytest.mark.parametrize("name", ["grid", "random", "attention"])
def test_every_rule_keeps_all_of_a_smaller_picture(name: str) -> None:
    vlm, prompts, pixels, _ = batch("llava")
    method = registry.load("pruners", name)
    seen = vlm.encode(pixels, method.needs)
    assert torch.equal(pruning.select(vlm, prompts, seen, method, Keep(99)).valid, seen.valid)


# -- videos ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_a_video_beside_an_image_is_refused(family: str) -> None:
    """As input of generate, which encodes it before the rows are seen, of a forward, alone, and read by us."""
    vlm, prompts, pixels, _ = batch(family)
    given = own(vlm, prompts, pixels)
    if family == "llava_onevision":
        video: dict[str, Any] = {"pixel_values_videos": torch.randn(1, 2, 3, 32, 32)}
    else:
        video = {"pixel_values_videos": pixels["pixel_values"], "video_grid_thw": pixels["image_grid_thw"]}
    text = {"input_ids": torch.tensor([[7, 8, 9]])}
    with diffprune.pruned(vlm.model, Features(), Keep(4)):
        for call in (
            lambda: vlm.model.generate(**given, **video, max_new_tokens=2),
            lambda: vlm.model(**given, **video),
            lambda: vlm.model(**text, **video),
            lambda: vlm.model.generate(**text, **video, max_new_tokens=2),
        ):
            with pytest.raises(ValueError, match=r"takes images, not videos \(.*give the frames as images"):
                call()
        vlm.model(**given)
    with pytest.raises(ValueError, match="takes images, not videos"):
        vlm.read(given | video)


# -- token types of PaliGemma ------------------------------------------------------------------------------------------


def with_a_suffix() -> tuple[VLM, dict[str, Any]]:
    """A prompt of one picture whose last five tokens are the answer by their type, none of which is a newline's."""
    vlm = tiny("paligemma")
    pixels = vlm.pixels(pictures()[:2])
    given = own(vlm, vlm.prompts(["which of the two?"], [16, 16], images=[2]), pixels)
    suffix = torch.tensor([[40, 41, 42, 43, 44]])
    for name, more in (
        ("input_ids", suffix),
        ("attention_mask", torch.ones_like(suffix)),
        ("token_type_ids", torch.ones_like(suffix)),
    ):
        given[name] = torch.cat([torch.zeros_like(given[name]) if name == "token_type_ids" else given[name], more], 1)
    given["input_ids"][0, -7] = 45  # a prefix that ends without a newline
    return vlm, given


@pytest.mark.parametrize("types", ["of the suffix", "none", "two of the prefix"])
def test_token_types_of_a_caller_are_kept(types: str) -> None:
    """Oracle: the model's own forward at every position, nothing removed; scoring an answer without labels."""
    vlm, given = with_a_suffix()
    if types == "none":
        del given["token_type_ids"]
    elif types == "two of the prefix":
        given["token_type_ids"][:, -7:-5] = 1
    wanted = vlm.model(**given).logits
    with diffprune.pruned(vlm.model, UNPRUNED, Share(1)):
        close(vlm.model(**given).logits, wanted)


def test_token_types_are_cut_with_their_tokens() -> None:
    """Oracle: the full row with the removed columns hidden."""
    vlm, given = with_a_suffix()
    pixels, rows = vlm.read(given)
    tokens = vlm.encode(pixels)
    left = pruning.select(vlm, rows, tokens, Features(), Keep(3))
    mask = given["attention_mask"].clone()
    mask[rows.slots] = left.present[tokens.present].long()
    wanted = vlm.model(**given | {"attention_mask": mask}, position_ids=rows.position_ids + 1).logits[:, -6:]
    with diffprune.pruned(vlm.model, Features(), Keep(3)):
        close(vlm.model(**given).logits[:, -6:], wanted)


@pytest.mark.parametrize("family", ["paligemma", "gemma3"])
def test_generation_without_a_cache_equals_that_with_one(family: str) -> None:
    """A generated token is no prefix, also where every step reads the row anew."""
    vlm, prompts, pixels, _ = batch(family)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "suppress_tokens": [parts.IMAGE]}
    with diffprune.pruned(vlm.model, Features(), Keep(4)):
        with_cache = vlm.model.generate(**own(vlm, prompts, pixels), **options)
        assert torch.equal(vlm.model.generate(**own(vlm, prompts, pixels), **options, use_cache=False), with_cache)


# -- encoder settings at the call --------------------------------------------------------------------------------------

SETTINGS = [
    ("llava", "vision_feature_layer", -1),
    ("llava", "vision_feature_select_strategy", "full"),
    ("llava_next", "vision_feature_layer", -1),
    ("llava_onevision", "vision_aspect_ratio", "anyres_max_9"),
    ("llava_onevision", "vision_feature_layer", 1),
    ("internvl", "vision_feature_layer", 1),
    ("mistral3", "vision_feature_layer", 1),
    ("gemma3", "interpolate_pos_encoding", True),
]


@pytest.mark.parametrize(("family", "name", "value"), SETTINGS)
def test_a_setting_of_the_encoder_at_the_call_is_refused_not_ignored(family: str, name: str, value: Any) -> None:
    vlm, prompts, pixels, _ = batch(family)
    given, usual = own(vlm, prompts, pixels), getattr(vlm.model.config, name, None)
    with diffprune.pruned(vlm.model, Features(), Keep(4)):
        with pytest.raises(ValueError, match=f"{name}={value!r} at this call: inside pruned"):
            vlm.model(**given, **{name: value})
        if name != "interpolate_pos_encoding" and family != "mistral3":  # whose forward does not name it: generate refuses itself
            with pytest.raises(ValueError, match=f"{name}={value!r} at this call: inside pruned"):
                vlm.model.generate(**given, **{name: value}, max_new_tokens=1)
        expected = vlm.model(**given).logits
        if usual is not None:
            close(vlm.model(**given, **{name: usual}).logits, expected)


# -- loading -----------------------------------------------------------------------------------------------------------


def saved(vlm: VLM, folder: Path) -> Path:
    vlm.model.save_pretrained(folder)
    vlm.processor.tokenizer.save_pretrained(folder)
    vlm.processor.image_processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma3"])  # whose processor wants named tokens
def test_a_saved_checkpoint_loads_without_torchvision(family: str, tmp_path: Path) -> None:
    vlm = load(str(saved(tiny(family), tmp_path / family)), device="cpu")
    assert vlm.family == family
    assert torch.equal(vlm.pixels(pictures()[:1])["pixel_values"], tiny(family).pixels(pictures()[:1])["pixel_values"])


def test_a_checkpoint_without_torchvision_asks_by_its_processors_template(tmp_path: Path) -> None:
    """As older releases have it: in chat_template.json, beside a tokenizer whose own template knows text only."""
    folder = saved(tiny("llava_onevision"), tmp_path / "older")
    (folder / "chat_template.jinja").rename(folder / "kept")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": (folder / "kept").read_text()}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load(str(folder), device="cpu").chat_prompt("what?") == tiny("llava_onevision").chat_prompt("what?")


def test_a_decoder_without_fused_attention_loads_by_default_and_is_named_otherwise(tmp_path: Path) -> None:
    like = tiny("paligemma")
    config = PaliGemmaConfig(
        vision_config=like.model.config.vision_config, image_token_id=parts.IMAGE, projection_dim=64, hidden_size=64,
        text_config=Gemma2Config(head_dim=16, **parts.decoder(like.processor.tokenizer)),
    )  # fmt: skip
    made = PaliGemma(parts.build(PaliGemmaForConditionalGeneration, config, 0), like.processor, "paligemma 2")
    folder = saved(made, tmp_path / "paligemma2")
    vlm = load(str(folder), device="cpu")
    assert vlm.model.config.text_config._attn_implementation == "eager"
    assert vlm.model.config.vision_config._attn_implementation == "sdpa"
    assert len(pruning.generate(vlm, pictures()[0], "what?", pruner="attention", budget=3, max_new_tokens=2)) == 1
    with pytest.raises(ValueError, match="a part of it has no attention 'sdpa'; with 'auto' such a part runs eager"):
        load(str(folder), device="cpu", attention="sdpa")


# -- a checkpoint's generation configuration ---------------------------------------------------------------------------

OTHERS: dict[str, Any] = {
    "return_dict_in_generate": True, "num_return_sequences": 2, "num_beams": 2, "do_sample": True, "use_cache": False,
    "penalty_alpha": 0.5, "dola_layers": "low", "prompt_lookup_num_tokens": 3, "prefill_chunk_size": 4,
    "cache_implementation": "static", "is_assistant": True, "token_healing": True, "assistant_early_exit": 1, "max_time": 1e-5,
    "eos_token_id": None, "stop_strings": ["never said"],
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoints_generation_configuration_does_not_change_answers(name: str) -> None:
    vlm = registry.find("models", "llava").tiny()  # type: ignore[attr-defined]
    ask = {"pruner": Features(), "budget": 4, "max_new_tokens": 4}
    vlm.model.generation_config.eos_token_id = None if name == "eos_token_id" else 2
    wanted = pruning.generate(vlm, pictures()[:2], ["what?", "how?"], **ask)
    setattr(vlm.model.generation_config, name, OTHERS[name])
    vlm.model.config.text_config.eos_token_id = None
    assert pruning.generate(vlm, pictures()[:2], ["what?", "how?"], **ask) == wanted


def test_stop_strings_stay_in_force_and_are_counted() -> None:
    vlm, prompts, _, tokens = batch("llava")
    packed = pruning.shrink(vlm, prompts, tokens, Features(), Keep(4))
    vlm = registry.find("models", "llava").tiny()  # type: ignore[attr-defined]
    letters = {vlm.processor.tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefgh"}
    vlm.model.generation_config.suppress_tokens = sorted(set(range(len(vlm.processor.tokenizer))) - letters)
    texts, lengths = pruning.answer(vlm, packed, 6)
    assert lengths == [6, 6, 6] == [len(text) for text in texts], "nothing ends early by itself"
    vlm.model.generation_config.stop_strings = [texts[0][1]]
    cut, lengths = pruning.answer(vlm, packed, 6)
    until = [text.find(texts[0][1]) + 1 or 6 for text in texts]
    assert min(until) < 6 and lengths == until and cut == [text[:n] for text, n in zip(texts, until, strict=True)]


def test_equal_pictures_have_a_budget_each() -> None:
    """Whatever the encoder: two equal pictures are two rows of tokens with one identity."""
    for family in FAMILIES:
        vlm = tiny(family)
        tokens = vlm.encode(vlm.pixels([pictures()[1]] * 2), frozenset({IDENTITY}))
        assert len(tokens) == 2 and len(set(tokens.given(IDENTITY).tolist())) == 1
