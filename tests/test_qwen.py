"""Qwen-VL: prompts and positions against the families' own processor and generate; grids, identities, parts, and no state."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLProcessor, Qwen2VLProcessor, Qwen3VLProcessor

from diffprune import pruning
from diffprune.core.budget import Keep
from diffprune.core.evidence import IDENTITY
from diffprune.core.vlm import Prompts
from diffprune.data import batch as batches
from diffprune.data.sources import Example
from tests.test_families import IMAGES, QUESTIONS, Features, batch, close, own, pictures, tiny

PROCESSORS = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}
FAMILIES = tuple(PROCESSORS)


@pytest.fixture(autouse=True)
def no_gradient() -> Any:
    with torch.inference_mode():
        yield


@cache
def processor(family: str) -> Any:
    """The family's own processor around the tiny parts; its video part exists with torchvision only and stays out."""

    class Pictures(PROCESSORS[family]):  # type: ignore[misc]
        def check_argument_for_proper_class(self, name: str, part: Any) -> Any:
            return None

    parts = tiny(family).processor
    parts.tokenizer.image_token, parts.tokenizer.video_token = "<image>", "<|video_pad|>"
    return Pictures(parts.image_processor, parts.tokenizer, None, chat_template=parts.tokenizer.chat_template)


def processed(family: str) -> dict[str, Any]:
    """What a user's code hands to the model: three prompts over four images, by the family's own processor."""
    texts = [tiny(family).chat_prompt(question, count) for question, count in zip(QUESTIONS, IMAGES, strict=True)]
    made = processor(family)(text=texts, images=pictures(), return_tensors="pt", padding=True)
    return dict(made)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_what_the_familys_own_processor_writes(family: str) -> None:
    vlm, prompts, pixels, _ = batch(family)
    wanted = processed(family)
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(getattr(prompts, name), wanted[name])
    assert torch.equal(vlm.token_inputs(prompts)["mm_token_type_ids"], wanted["mm_token_type_ids"])
    assert torch.equal(pixels["pixel_values"], wanted["pixel_values"])
    assert torch.equal(vlm.read(wanted)[1].position_ids, prompts.position_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_those_of_the_familys_own_generate(family: str) -> None:
    vlm, prompts, pixels, _ = batch(family)
    inputs = own(vlm, prompts, pixels)
    wanted = vlm.model._prepare_position_ids_for_generation(inputs["input_ids"], inputs).permute(1, 2, 0)
    assert torch.equal(prompts.position_ids, wanted)
    assert prompts.position_ids.shape[-1] == 4 and len(prompts.position_ids[0, :, 2].unique()) > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_leave_no_state_behind(family: str) -> None:
    """`rope_deltas` of one call must not move the positions of the next, whichever of the two is pruned."""
    vlm, prompts, pixels, tokens = batch(family)

    def unpruned() -> torch.Tensor:
        return vlm.model.generate(**own(vlm, prompts, pixels), max_new_tokens=4, do_sample=False)

    def pruned(rows: slice, images: slice) -> list[list[int]]:
        few = Prompts(*(getattr(prompts, n)[rows] for n in ("input_ids", "attention_mask", "position_ids", "slots", "question")))
        packed = pruning.shrink(vlm, few, tokens[torch.arange(4)[images]], Features(), Keep(3))
        made = vlm.model.generate(**pruning.decoder_inputs(vlm, packed), max_new_tokens=4, do_sample=False)
        return made[:, -4:].tolist()

    first = pruned(slice(1, 3), slice(2, 4))
    whole = unpruned()
    assert pruned(slice(1, 3), slice(2, 4)) == first, "after an unpruned call of another batch size"
    assert torch.equal(unpruned(), whole), "after a pruned call of another batch size"


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_without_padding_keep_their_gaps(family: str) -> None:
    """`generate` drops a mask of ones, and transformers then takes gaps in positions for the border of another text."""
    vlm, _, _, tokens = batch(family)
    one = vlm.prompts(QUESTIONS[1:2], [int(tokens.counts[2])], tokens.layout[2:3])
    packed = pruning.shrink(vlm, one, tokens[torch.tensor([2])], Features(), Keep(3))
    assert bool(packed.prompts.attention_mask.all())
    forward = pruning.forward(vlm, packed, logits_to_keep=1).logits[:, -1]
    bare = {k: v for k, v in pruning.decoder_inputs(vlm, packed).items() if k != "attention_mask"}
    close(vlm.model(**bare, logits_to_keep=1).logits[:, -1], forward)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_and_identities_are_of_each_image_alone(family: str) -> None:
    vlm = tiny(family)
    images = [*pictures()[:2], pictures()[0]]
    pixels = vlm.pixels(images)
    assert len(pixels["image_grid_thw"].unique(dim=0)) == 2, "images of two grids"
    tokens = vlm.encode(pixels, frozenset({IDENTITY}))
    first, second, third = tokens.given(IDENTITY).tolist()[:3]
    assert first == third != second
    for i, image in enumerate(images):
        alone, part = vlm.pixels([image]), vlm.part(pixels, i, i + 1)
        assert all(torch.equal(alone[name], part[name]) for name in alone)
        seen = vlm.encode(part, frozenset({IDENTITY}))
        assert torch.equal(seen.given(IDENTITY), tokens.given(IDENTITY)[i : i + 1])
        rows, columns = seen.grid or (0, 0)
        assert rows * columns == int(tokens.counts[i]) and (rows, columns) == (image.height // 8, image.width // 8)
    assert tokens.grid is None, "no common raster"


@pytest.mark.parametrize("family", FAMILIES)
def test_another_grid_of_the_same_patches_is_another_image(family: str) -> None:
    vlm = tiny(family)
    grey = vlm.pixels([Image.new("RGB", size, "grey") for size in ((32, 64), (64, 32))])
    halves = grey["pixel_values"].chunk(2)
    assert torch.equal(halves[0], halves[1])
    identity = vlm.encode(grey, frozenset({IDENTITY})).given(IDENTITY)
    assert identity[0] != identity[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_is_the_four_patches_under_it(family: str) -> None:
    """Oracle: paint one group of 8 x 8 px; of all tokens its own changes most."""
    vlm = tiny(family)
    plain = np.full((32, 64, 3), 128, np.uint8)
    painted = plain.copy()
    painted[16:24, 40:48] = np.random.default_rng(1).integers(0, 255, (8, 8, 3))
    before, after = (vlm.encode(vlm.pixels([Image.fromarray(picture)])).features[0] for picture in (plain, painted))
    assert int((after - before).norm(dim=-1).argmax()) == 2 * 8 + 5, "row 2, column 5 of 8 columns"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_of_the_default_size_has_the_tokens_the_family_states(family: str) -> None:
    vlm = tiny(family)
    picture = Image.new("RGB", (64, 64), "grey")
    assert vlm.encode(vlm.pixels([picture])).counts.tolist() == [vlm.num_visual_tokens] and vlm.num_visual_tokens == 64
    assert vlm.shape.patches == 4 * 64 and vlm.shape.patch_inputs == 3 * 2 * 4 * 4
    asked = vlm.prompts(["what?"], [64])
    wanted = vlm.prompts(["what?"], [64], torch.tensor([[1, 16, 16]]))
    assert torch.equal(asked.position_ids, wanted.position_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_families_refuse(family: str) -> None:
    vlm, prompts, pixels, _ = batch(family)
    inputs = own(vlm, prompts, pixels)
    with pytest.raises(ValueError, match="images, not videos"):
        vlm.read(inputs | {"pixel_values_videos": torch.zeros(1)})
    with pytest.raises(ValueError, match="needs image_grid_thw"):
        vlm.read({k: v for k, v in inputs.items() if k != "image_grid_thw"})
    with pytest.raises(ValueError, match="puts no separators"):
        vlm.separator()
    with pytest.raises(ValueError, match=r"lengths \[3\], the images need \[64\]"):
        vlm.prompts(["what?"], [3])
    adjacent = torch.tensor([[5] + [3] * 32 + [6]])
    with pytest.raises(ValueError, match=r"lengths \[32\], the images need \[16, 16\].*told apart by the text between"):
        vlm._prompts(adjacent, torch.ones_like(adjacent), adjacent == 0, torch.tensor([[1, 8, 8]] * 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_training_rows_score_answers_as_rows_of_their_own(family: str) -> None:
    """Many questions behind one image, told apart by the mask alone, with M-RoPE positions that start anew in each."""
    vlm = tiny(family)
    asked = [[("what?", "a cat"), ("which one is it?", "no")], [("how many?", "two")]]
    found: list[torch.Tensor] = []
    for packed in (False, True):
        made = batches.batch(vlm, [Example([one], pairs) for one, pairs in zip(pictures(), asked, strict=False)], packed)
        tokens = vlm.encode(made.pixels)[made.image]
        split = tokens.counts.tolist()
        deepstack = None if tokens.deepstack is None else tokens.deepstack[tokens.valid].split(split)
        logits = vlm.model(
            input_ids=made.prompts.input_ids,
            attention_mask=made.prompts.attention_mask,
            position_ids=made.prompts.position_ids.permute(2, 0, 1),
            **vlm.token_inputs(made.prompts),
            **vlm.image_inputs(pruning.embeddings(vlm, tokens).split(split), deepstack),
        ).logits
        assert made.prompts.labels is not None
        found.append(logits[:, :-1][made.prompts.labels[:, 1:] >= 0])
    assert len(found[0]) == len("a cat" + "no" + "two") + 3
    close(found[1], found[0])
