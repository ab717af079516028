"""Rows and pixels of families with tiles and of the Gemma families, against the family's own processor class for the same text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.paligemma.processing_paligemma import PaliGemmaProcessor
from transformers.models.smolvlm import processing_smolvlm

from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import parse
from diffprune.core.vlm import VLM

QUESTIONS = ["what?", "\nwhich of\nthe two?"]  # a newline after the picture, as Gemma's tokenizer would merge it
SIZES = ((48, 40), (40, 20), (36, 64))  # width, height; px
OWN = {
    "gemma3": Gemma3Processor,
    "idefics3": Idefics3Processor,
    "internvl": InternVLProcessor,
    "paligemma": PaliGemmaProcessor,
    "smolvlm": processing_smolvlm.SmolVLMProcessor,
}


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]


def named(text: Any, monkeypatch: pytest.MonkeyPatch, **tokens: str) -> None:
    """Names a checkpoint's tokenizer gives its special tokens."""
    for name, token in tokens.items():
        monkeypatch.setattr(type(text), name, token, raising=False)
        monkeypatch.setattr(type(text), f"{name}_id", text.convert_tokens_to_ids(token), raising=False)


def own_processor(family: str, vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The family's own processor class over the tiny parts; what it needs for videos alone is left out."""
    text, parts = vlm.processor.tokenizer, {"image_processor": vlm.processor.image_processor}
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    if family in ("internvl", "smolvlm"):
        monkeypatch.setattr(OWN[family], "check_argument_for_proper_class", lambda *_: None)
        parts |= {"video_processor": None}
    if family == "internvl":
        named(
            text,
            monkeypatch,
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<image>",
            video_token="<video>",
        )
    if family == "gemma3":
        named(text, monkeypatch, image_token="<image>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    if family == "paligemma":
        parts["image_processor"].image_seq_length = vlm.num_visual_tokens
        return OWN[family](tokenizer=text, **parts)
    name = "image_seq_len" if family in ("idefics3", "smolvlm") else "image_seq_length"
    return OWN[family](tokenizer=text, **parts, **{name: {"gemma3": 16}.get(family, 4)})


def user_text(family: str, vlm: VLM, question: str, images: int) -> str:
    """What a user hands to the family's own processor."""
    marker = "<start_of_image>" if family == "gemma3" else "<image>"
    return marker * images + question + ("" if family == "paligemma" else ":")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemmaProcessor's own
@pytest.mark.parametrize(("family", "split"), [*((family, True) for family in OWN), ("idefics3", False), ("smolvlm", False)])
def test_rows_and_pixels_are_those_of_the_familys_own_processor(family: str, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm: VLM = registry.find("models", family).tiny()
    if not split:
        vlm.processor.image_processor.do_image_splitting = False
    images, counts = pictures(), (2, 1)
    theirs = own_processor(family, vlm, monkeypatch)(
        images=[images[:2], images[2:]],
        text=[user_text(family, vlm, q, n) for q, n in zip(QUESTIONS, counts, strict=True)],
        return_tensors="pt",
        padding=True,
    )
    tokens = vlm.encode(vlm.pixels(images))
    ours = vlm.prompts(QUESTIONS, tokens.counts.tolist(), tokens.layout, counts)
    assert torch.equal(ours.input_ids, theirs["input_ids"])
    assert torch.equal(ours.attention_mask, theirs["attention_mask"])
    types = vlm.token_inputs(ours)
    assert set(types) == ({"token_type_ids"} if family in ("gemma3", "paligemma") else set())
    assert all(torch.equal(value, theirs[name]) for name, value in types.items())

    pixels, rows = vlm.read(theirs)
    again = vlm.encode(pixels)
    torch.testing.assert_close(again.features, tokens.features, rtol=0, atol=1e-6)
    assert torch.equal(again.valid, tokens.valid)
    assert torch.equal(rows.slots, ours.slots) and torch.equal(rows.question, ours.question)
    assert tokens.layout is None or (again.layout is not None and torch.equal(again.layout, tokens.layout))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_paligemma_reads_the_answer_causally(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the token types and the logits of the family's own call with a suffix, told from labels and from newlines."""
    vlm: VLM = registry.find("models", "paligemma").tiny()
    theirs = own_processor("paligemma", vlm, monkeypatch)(
        images=[[image] for image in pictures()[:2]],
        text=["<image>what?", "<image>which of\nthe two?"],
        suffix=["yes", "the first"],
        return_tensors="pt",
        padding=True,
    )
    assert set(theirs["token_type_ids"].unique().tolist()) == {0, 1}
    pixels, rows = vlm.read(theirs)
    for prompts in (rows, replace(rows, labels=theirs["labels"])):
        assert torch.equal(vlm.token_inputs(prompts)["token_type_ids"], theirs["token_type_ids"])
    with torch.inference_mode():
        packed = pruning.shrink(vlm, rows, vlm.encode(pixels), registry.load("pruners", "unpruned"), parse("Share(1)"))
        given = {name: value for name, value in theirs.items() if name != "labels"}
        found, wanted = pruning.forward(vlm, packed).logits, vlm.model(**given).logits
    where = theirs["attention_mask"].bool()
    torch.testing.assert_close(found[where], wanted[where], rtol=0, atol=1e-5)
