"""The path from a batch to logits, one for every method and every family.

    encode -> shrink -> project -> shrink -> pack -> the model's own forward / generate

A pruner only ever answers with a mask over the visual tokens of its image. Here, and only here, the sequence gets
shorter: token ids, mask, positions and features are cut by the same index. Survivors keep their original positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffprune.core.budget import Budget
from diffprune.core.pruner import Need, Pruner, Stage
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import VLM, Prompts


@dataclass(frozen=True)
class Packed:
    """Rows ready for the decoder: `prompts` at the length that is left, `features` [M D_text] of all survivors in slot order.

    kept, total: [B] int, visual tokens of each row after and before.
    """

    prompts: Prompts
    features: Tensor
    kept: Tensor
    total: Tensor


def question_tokens(vlm: VLM, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Embedded question of each row: ([B T D_text], [B T] bool), padded on the left to the longest."""
    longest = max(int(prompts.question.sum(1).max()), 1)
    order = prompts.question.int().argsort(dim=1, stable=True)[:, -longest:]
    return vlm.embed(prompts.input_ids.gather(1, order)), prompts.question.gather(1, order)


def with_question(vlm: VLM, prompts: Prompts, tokens: VisualTokens) -> VisualTokens:
    """`tokens` with the question of each row beside the image."""
    text, alive = question_tokens(vlm, prompts)
    return replace(tokens, text=text, text_alive=alive)


def select(vlm: VLM, prompts: Prompts, tokens: VisualTokens, pruner: Pruner, budget: Budget) -> VisualTokens:
    """Run the pruner's plan: the tokens with `alive` reduced to the survivors, features projected.

    tokens: of the rows' images, one per row (`VisualTokens.__getitem__` repeats shared encodings).
    """
    if Need.TEXT in pruner.needs:
        tokens = with_question(vlm, prompts, tokens)
    plan = pruner.plan(budget)
    for stage in Stage:
        if stage is Stage.PROJECTED:
            tokens = _projected(vlm, tokens)
        for cut in (c for c in plan if c.stage is stage):
            chosen = pruner.select(tokens, cut.budget)
            tokens = replace(tokens, features=chosen.features, alive=chosen.keep)
    return tokens


def _projected(vlm: VLM, tokens: VisualTokens) -> VisualTokens:
    """Project the survivors only; the others become zeros nobody reads."""
    kept = vlm.project(tokens.features[tokens.alive])
    features = kept.new_zeros(*tokens.alive.shape, kept.shape[-1])
    features[tokens.alive] = kept
    return replace(tokens, features=features)


def pack(prompts: Prompts, tokens: VisualTokens, before: Tensor, pad: int = 0) -> Packed:
    """Cut the rows to what is left, padding on the left.

    tokens: projected, `alive` marks the survivors; before: [B N] bool, the tokens that had slots.
    """
    live = prompts.attention_mask.bool()
    live[prompts.slots] = tokens.alive[before]
    length = int(live.sum(1).max())
    order = live.int().argsort(dim=1, stable=True)[:, -length:]
    rows = live.gather(1, order)

    def cut(values: Tensor, fill: int | bool) -> Tensor:
        return values.gather(1, order).masked_fill(~rows, fill)

    short = Prompts(
        input_ids=cut(prompts.input_ids, pad),
        attention_mask=rows.long(),
        position_ids=cut(prompts.position_ids, 0),
        slots=cut(prompts.slots, False),
        question=cut(prompts.question, False),
        labels=None if prompts.labels is None else cut(prompts.labels, -100),
    )
    return Packed(short, tokens.features[tokens.alive], tokens.alive.sum(1), before.sum(1))


def shrink(vlm: VLM, prompts: Prompts, tokens: VisualTokens, pruner: Pruner, budget: Budget) -> Packed:
    """From full-length rows and encoded images to rows at the length the pruner leaves."""
    return pack(prompts, select(vlm, prompts, tokens, pruner, budget), tokens.alive)


def blind(prompts: Prompts) -> Packed:
    """Rows without any visual token: what the model knows from the text alone."""
    empty = prompts.slots.new_zeros(len(prompts), int(prompts.slots.sum(1).max()))
    tokens = VisualTokens(torch.zeros(*empty.shape, 1, device=empty.device), empty)
    return pack(prompts, tokens, torch.ones_like(empty))


def decoder_inputs(vlm: VLM, packed: Packed) -> dict[str, Any]:
    """Keyword arguments of the model's own forward for packed rows."""
    features = packed.features.to(vlm.model.dtype)
    inputs = {n: getattr(packed.prompts, n) for n in ("input_ids", "attention_mask", "position_ids")}
    return inputs | (vlm.image_inputs(features.split(packed.kept.tolist())) if len(features) else {})


def forward(vlm: VLM, packed: Packed, **options: Any) -> Any:
    """The model's own forward at the shorter length; `options` go to it (`logits_to_keep`, `use_cache`, `labels` ...)."""
    return vlm.model(**decoder_inputs(vlm, packed), **options)


@torch.inference_mode()
def answer(vlm: VLM, packed: Packed, max_new_tokens: int, **options: Any) -> tuple[list[str], list[int]]:
    """Greedy answers of packed rows: (texts, tokens generated per row, the end token included)."""
    tokenizer = vlm.processor.tokenizer
    made = vlm.model.generate(
        **decoder_inputs(vlm, packed),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )[:, packed.prompts.input_ids.shape[1] :]
    end = vlm.model.generation_config.eos_token_id
    ends = torch.tensor(end if isinstance(end, list) else [end], device=made.device)
    done = torch.isin(made, ends)
    lengths = torch.where(done.any(1), done.int().argmax(1) + 1, made.shape[1])
    return [t.strip() for t in tokenizer.batch_decode(made, skip_special_tokens=True)], lengths.tolist()


@torch.inference_mode()
def generate(
    vlm: VLM, images: Sequence[Any], questions: Sequence[str], *, pruner: Pruner, budget: Budget, max_new_tokens: int = 32
) -> list[str]:
    """Answer one question about each PIL image with pruned visual tokens.

    Raises:
        ValueError: different numbers of images and questions, or a budget above what the model has.
    """
    if len(images) != len(questions):
        raise ValueError(f"{len(images)} images and {len(questions)} questions: give one question per image")
    tokens = vlm.encode(vlm.pixels(images), pruner.needs)
    budget.check(int(tokens.counts.min()))
    prompts = vlm.prompts(questions, tokens.counts.tolist())
    return answer(vlm, shrink(vlm, prompts, tokens, pruner, budget), max_new_tokens)[0]
