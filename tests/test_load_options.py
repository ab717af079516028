"""Options of `load` and `wrap`: where and how a model runs, frames and image modes, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import diffprune
from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Keep
from diffprune.vlm import load as loading
from diffprune.vlm.load import EMBEDDED, load, model_spec, wrap
from diffprune.vlm.processor import Absent, Parts
from tests.test_families import FAMILIES, QUESTIONS, Features, batch, own, pictures, tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Checkpoints of tiny instances as the hub lays them out, saved when first asked for."""

    def folder(family: str) -> Path:
        where = tmp_path_factory.getbasetemp() / "checkpoints" / family
        if not where.exists():
            vlm = registry.find("models", family).tiny()
            for part in (vlm.model, vlm.processor.image_processor, vlm.processor.tokenizer):
                part.save_pretrained(where)
        return where

    return folder


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_a_saved_checkpoint_answers_as_the_model_it_was(family: str, folders: Any) -> None:
    """Qwen's own processor needs torchvision for videos; without it the parts for images serve."""
    vlm, before = load(str(folders(family))), tiny(family)
    assert vlm.weights_hash == before.weights_hash and vlm.name == family
    assert not vlm.model.training and not any(p.requires_grad for p in vlm.model.parameters())
    images = [pictures()[:2], pictures()[2], pictures()[3]]
    given: dict[str, Any] = {"pruner": Features(), "budget": Keep(4), "max_new_tokens": 5}
    assert pruning.generate(vlm, images, QUESTIONS, **given) == pruning.generate(before, images, QUESTIONS, **given)


def test_weights_in_another_type(folders: Any) -> None:
    folder = str(folders("llava"))
    for dtype in ("bfloat16", torch.bfloat16):
        vlm = load(folder, dtype=dtype, attention="eager", device="cpu")
        assert vlm.model.dtype == torch.bfloat16 and vlm.model.config.text_config._attn_implementation == "eager"
    assert load(folder).model.dtype == torch.float32 and load(folder).model.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"trust_remote_code": True}, "trust_remote_code is refused"),
        ({"dtype": "int8"}, "no dtype 'int8'"),
        ({"dtype": "float33"}, "no dtype 'float33'"),
        ({"device": "tpu9"}, "no device 'tpu9'"),
        ({"device": "cuda:77"}, "no device 'cuda:77': this machine has"),
        ({"attention": "spda"}, "did you mean 'sdpa'"),
        ({"revision": "v2"}, "revision 'v2' exists for hub checkpoints only"),
        ({"device": "cpu", "device_map": "auto"}, "give one of them"),
        ({"image_mood": "pad"}, "no option 'image_mood': did you mean 'image_mode'"),
        ({"image_mode": "squash"}, "llava knows pad and crop"),
        ({"frame": "vicuna"}, "llava knows template and vicuna_v1"),
    ],
)
def test_options_that_cannot_be_served(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load("embedded", **options)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(ValueError, match="needs the package flash-attn and a CUDA GPU; use 'sdpa'"):
        load("embedded", attention="flash_attention_2")
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="device_map needs accelerate"):
        load("embedded", device_map="auto")


def test_a_device_map_reaches_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call, without accelerate: the map is handed on, the model is not moved, and weights left behind are refused."""
    seen: dict[str, Any] = {}

    def from_pretrained(source: Any, **options: Any) -> Any:
        seen.update(options)
        return torch.nn.Linear(1, 1, device="meta"), {"missing_keys": [], "mismatched_keys": []}

    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(loading.AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="not all weights fit the devices"):
        load("embedded", device_map={"": 0})
    assert seen["device_map"] == {"": 0} and seen["dtype"] == "auto" and not seen["trust_remote_code"]


# -- names and families ------------------------------------------------------------------------------------------------


def test_options_behind_a_name_are_its_spelling() -> None:
    vlm: Any = load("embedded(image_mode='pad', frame='vicuna_v1')")
    assert vlm.name == "embedded(frame='vicuna_v1', image_mode='pad')" == load("embedded", frame="vicuna_v1", image_mode="pad").name
    assert (vlm.image_mode, vlm.framing) == ("pad", "vicuna_v1")
    assert load(vlm.name).name == vlm.name and load("embedded").name == "embedded"
    Path("odd (1)").mkdir()
    assert str(model_spec("odd (1)")) == "odd (1)", "a folder may be called so"
    with pytest.raises(ValueError, match="options with names"):
        load("embedded('pad')")


def config_of(folder: Path, **changes: Any) -> str:
    """A copy of the embedded model with another config."""
    shutil.copytree(EMBEDDED, folder)
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**found, **changes}))
    return str(folder)


def test_models_of_no_family_here(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'bert' is no vision-language model; families here are"):
        load(config_of(tmp_path / "a", model_type="bert"))
    with pytest.raises(ValueError, match=r"'blip-2', which nobody has added yet: write diffprune/models/blip-2\.py"):
        load(config_of(tmp_path / "b", model_type="blip-2"))
    with pytest.raises(ValueError, match="code lies in its checkpoint"):
        load(config_of(tmp_path / "c", model_type="mine", auto_map={"AutoModel": "modeling.Mine"}))
    with pytest.raises(ValueError, match="have no option 'image_mode': they take none"):
        load(config_of(tmp_path / "d", model_type="qwen2_vl"), image_mode="pad")


def test_a_checkpoint_without_its_processor(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder)
    for path in folder.iterdir():
        if not path.name.startswith(("config", "model", "generation")):
            path.unlink()
    with pytest.raises(ValueError, match=r"no .*processor .*can be read"):
        load(str(folder))


# -- wrap --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrapped_model_reads_rows_and_is_left_as_it_is(family: str) -> None:
    before, prompts, pixels, _ = batch(family)
    model = registry.find("models", family).tiny().model.train()
    vlm = wrap(model)
    assert model.training and vlm.model is model and vlm.name == family
    with torch.inference_mode():
        rows = vlm.read(own(before, prompts, pixels))[1]
    assert torch.equal(rows.position_ids, prompts.position_ids) and torch.equal(rows.slots, prompts.slots)
    with pytest.raises(ValueError, match=r"wrap\(model, processor\)"):
        pruning.generate(vlm, pictures()[:1], ["what?"], pruner=Features(), budget=Keep(1))


class Adapted(torch.nn.Module):
    """What PEFT puts around a model: its attributes are the model's own, `model` the model itself."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return self.base_model if name == "model" else getattr(self.base_model, name)

    def get_base_model(self) -> Any:
        return self.base_model


def test_a_model_with_adapters_is_the_model_inside() -> None:
    vlm, prompts, pixels, _ = batch("llava")
    adapted, given = Adapted(vlm.model), own(vlm, prompts, pixels)
    assert wrap(adapted).model is vlm.model and wrap(torch.compile(adapted, backend="eager")).model is vlm.model
    with torch.inference_mode():
        with diffprune.pruned(vlm.model, Features(), Keep(4)):
            wanted = vlm.model(**given).logits
        with diffprune.pruned(adapted, Features(), Keep(4)):
            assert torch.equal(adapted.get_base_model()(**given).logits, wanted)


def test_what_cannot_be_wrapped() -> None:
    vlm: Any = tiny("llava")
    for foreign in (torch.nn.Linear(1, 1), vlm.model.model, vlm.model.model.language_model, "llava"):
        with pytest.raises(ValueError, match="is no vision-language model that generates"):
            wrap(foreign)
    with pytest.raises(ValueError, match="is no processor of images and text"):
        wrap(vlm.model, vlm.processor.tokenizer)
    assert wrap(vlm.model, vlm.processor, "mine", image_mode="pad").name == "mine(image_mode='pad')"
    assert not Absent() and not hasattr(Absent(), "__deepcopy__")


# -- llava's frames and image modes ------------------------------------------------------------------------------------


def test_image_modes_are_llavas() -> None:
    """Oracle: the library's own padding, which LLaVA's processor knows as `do_pad`; and its default without it."""
    plain: Any = tiny("llava")
    images = pictures()
    processor = plain.processor.image_processor
    for mode, pad in (("pad", True), ("crop", False)):
        vlm = type(plain)(plain.model, plain.processor, "x", image_mode=mode)
        wanted = processor(images=images, return_tensors="pt", do_pad=pad)["pixel_values"]
        assert torch.equal(vlm.pixels(images)["pixel_values"], wanted), mode
    wide = np.zeros((16, 32, 3), np.uint8)
    padded = Image.fromarray(wide)
    found = type(plain)(plain.model, plain.processor, "x", image_mode="pad").pixels([padded])["pixel_values"][0]
    assert found[:, 0].abs().max() < 0.02 and found[:, 16].max() < -1, "the mean colour above and below, black between"


def test_the_vicuna_frame_is_llavas_sentence() -> None:
    plain: Any = tiny("llava")
    vlm = wrap(plain.model, Parts(plain.processor.image_processor, plain.processor.tokenizer), frame="vicuna_v1")
    start = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
        "answers to the user's questions. USER: "
    )
    assert vlm.chat_prompt("Is it {red}?") == start + "<image>\nIs it {red}? ASSISTANT:"
    assert vlm.chat_prompt("a", images=2) == start + "<image>\n<image>\na ASSISTANT:"
    row = vlm.prompts(["Is it red?"], [16]).input_ids[0].tolist()
    encode = plain.processor.tokenizer
    wanted = [*encode(start)["input_ids"], *[3] * 16, *encode("\nIs it red? ASSISTANT:")["input_ids"]]
    assert row == wanted
    assert type(plain)(plain.model, plain.processor, "x", frame="template").chat_prompt("a") == plain.chat_prompt("a")
