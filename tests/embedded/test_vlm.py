"""The shipped folder loads offline with the ordinary classes, and packing asks what single prompts ask."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from diffprune.embedded import benchmarks, pretrain, questions, vlm, world


@pytest.fixture(scope="module")
def model():
    return LlavaForConditionalGeneration.from_pretrained(vlm.checkpoint(), local_files_only=True).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(vlm.checkpoint(), local_files_only=True)


def test_size(model):
    assert 0.9e6 < sum(p.numel() for p in model.parameters()) < 1.6e6
    assert (vlm.checkpoint() / "model.safetensors").stat().st_size < 8e6
    assert (vlm.checkpoint() / "README.md").stat().st_size > 1000


def test_processor_gives_the_training_frame(processor):
    scene, question = world.scene(world.SPLITS["test"][0]), "is there a red ring"
    got = processor(text=vlm.prompt(question), images=Image.fromarray(scene.image), return_tensors="pt")
    packed = vlm.pack([[(question, "yes")]])
    assert got["input_ids"][0].tolist() == packed.ids[0, :-2].tolist()
    assert torch.equal(got["pixel_values"], vlm.pixels([scene.image]))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    assert processor.apply_chat_template(chat) == vlm.prompt(question)


@torch.no_grad()
def test_packed_equals_single(model):
    scene = world.scene(world.SPLITS["test"][1])
    asked = [q[1:] for q in questions.draw(scene, np.random.default_rng(0), 5)]
    image = model.model.multi_modal_projector(pretrain.features(model, [scene]))

    def logits(packed):
        hidden = model.model.language_model(
            inputs_embeds=vlm.embed(model, packed, image), attention_mask=packed.mask(), position_ids=packed.positions
        )
        return model.lm_head(hidden.last_hidden_state)[0]

    together = vlm.pack([asked])
    all_logits = logits(together)
    for k, pair in enumerate(asked):
        alone = logits(vlm.pack([[pair]]))[vlm.IMAGE_END :]
        torch.testing.assert_close(all_logits[together.segments[0] == k + 1], alone, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_hidden_is_removed(model):
    scene = world.scene(world.SPLITS["test"][2])
    packed = vlm.pack([[("is there a red ring", "yes")]])
    image = model.model.multi_modal_projector(pretrain.features(model, [scene]))
    keep = torch.from_numpy(world.oracle_mask(scene))[None]
    embeds = vlm.embed(model, packed, image)
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=packed.mask(keep), position_ids=packed.positions
    ).last_hidden_state
    left = torch.ones_like(packed.ids, dtype=torch.bool)
    left[:, vlm.IMAGE_START : vlm.IMAGE_END] = keep
    removed = model.model.language_model(
        inputs_embeds=embeds[left][None], position_ids=packed.positions[left][None]
    ).last_hidden_state
    torch.testing.assert_close(hidden[left], removed[0], atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_it_can_see(model, processor):
    """Greedy generate on 200 held-out questions: well above any blind answer (31 %)."""
    right = []
    rows = [row for name in benchmarks.NAMES for row in benchmarks.rows(name, "test", 20)]
    for start in range(0, len(rows), 50):
        part = rows[start : start + 50]
        images = [Image.fromarray(world.scene(row["image_seed"]).image) for row in part]
        inputs = processor(text=[vlm.prompt(row["question"]) for row in part], images=images, padding=True, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        said = processor.batch_decode(out, skip_special_tokens=True)
        right += [answer.strip() == row["answer"] for answer, row in zip(said, part, strict=True)]
    assert np.mean(right) > 0.85


def test_text_only_questions_do_not_see_the_picture():
    packed = vlm.pack([[("is there a red ring", "yes")]], [[("is there a red ring", "no")]])
    mask, image = packed.mask()[0, 0], slice(vlm.IMAGE_START, vlm.IMAGE_END)
    asking, blind = packed.segments[0] == 1, packed.segments[0] == -2
    assert mask[asking][:, image].all() and not mask[blind][:, image].any()
    assert mask[blind][:, : vlm.IMAGE_START].all() and not mask[blind][:, asking].any()
