"""Mentions of images and special tokens in a question: a mark at its start is taken out, others are text, for every family."""

from __future__ import annotations

import pytest
from PIL import Image

from diffprune.core import registry
from diffprune.core.budget import Share
from diffprune.core.vlm import VLM
from diffprune.pruning import generate

FAMILIES = registry.names("models")


@pytest.fixture(scope="module", params=FAMILIES)
def vlm(request: pytest.FixtureRequest) -> VLM:
    made: VLM = registry.find("models", request.param).tiny()  # type: ignore[attr-defined]
    return made


def asked(vlm: VLM, *questions: str, images: int = 1) -> list[list[int]]:
    made = vlm.prompts(questions, [vlm.num_visual_tokens] * images * len(questions), images=[images] * len(questions))
    return [ids[shown].tolist() for ids, shown in zip(made.input_ids, made.attention_mask.bool(), strict=True)]


def test_marks_at_the_start_are_taken_out(vlm: VLM) -> None:
    mark = vlm.image_placeholder  # type: ignore[attr-defined]
    wanted, *found = asked(vlm, "What?", "<image>\nWhat?", f"{mark}What?", f" {mark}\n What?")
    assert all(ids == wanted for ids in found)
    wanted, found_two = asked(vlm, "What?", "<image>\n<image>\nWhat?", images=2)
    assert found_two == wanted


def test_other_mentions_are_text_and_shift_nothing(vlm: VLM) -> None:
    tokenizer = vlm.processor.tokenizer
    special = dict.fromkeys([vlm.image_placeholder, "<image>", *tokenizer.all_special_tokens])  # type: ignore[attr-defined]
    plain, *rows = asked(vlm, "ab", *(f"a{token}b" for token in special))
    control = {tokenizer.convert_tokens_to_ids(token) for token in special}
    letters = len(tokenizer("ab", add_special_tokens=False)["input_ids"])
    for token, ids in zip(special, rows, strict=True):
        assert [i for i in ids if i in control] == [i for i in plain if i in control], f"{token} is no token of the model"
        assert len(ids) > len(plain) + len(token) - letters - 1, "its letters are all there"
        where = [i for i, token_id in enumerate(ids) if token_id == vlm.model.config.image_token_id]
        assert where == [i for i, token_id in enumerate(plain) if token_id == vlm.model.config.image_token_id], "the image's place"


def test_generate_takes_what_training_takes() -> None:
    vlm: VLM = registry.find("models", "llava").tiny()  # type: ignore[attr-defined]
    images = [Image.new("RGB", (32, 32), (9, 99, 0))] * 3
    pruner = registry.load("pruners", "random")
    questions = ["What?", "<image>\nWhat?", "What is <image>?"]
    found = generate(vlm, images, questions, pruner=pruner, budget=Share(1 / 2), max_new_tokens=3)
    assert found[0] == found[1] and len(found) == 3
