"""The path from a batch to logits, one for every method and every family.

    encode -> select (project) -> cut -> the model's own forward / generate

A pruner only ever answers with a mask over the visual tokens of its image. Here, and only here, the sequence gets
shorter: token ids, mask, positions, features and what travels with them are cut by the same mask. Survivors keep their original
positions unless asked otherwise. A row may show several images; each has its own budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffprune.core.budget import Budget
from diffprune.core.pruner import Need, Pruner, Stage
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.core.vlm import VLM, Prompts
from diffprune.io.image import open_image

POSITIONS = ("original", "compact")


@dataclass(frozen=True)
class Packed:
    """Rows ready for the decoder: `prompts` at the length that is left, `features` [M D_text] of all survivors in slot order.

    kept, total: [I] int, visual tokens of each image after and before; separators are counted apart.
    lengths:     [I] int, `sizes` where there are separators; None where they are the kept.
    deepstack:  [M C], what travels beside each row of `features`.
    selection:   what the pruner left of each image.
    """

    prompts: Prompts
    features: Tensor
    kept: Tensor
    total: Tensor
    lengths: Tensor | None = None
    deepstack: Tensor | None = None
    selection: Selection | None = None

    @property
    def sizes(self) -> Tensor:
        """[I] int: rows of `features` that belong to each image, separators included."""
        return self.kept if self.lengths is None else self.lengths


def rows_of_images(prompts: Prompts, tokens: VisualTokens) -> Tensor:
    """[I] int: the row each image stands in. Images come in the order of the rows' slots.

    Raises:
        ValueError: the rows have another number of slots than the images have tokens.
    """
    slots, sizes = prompts.slots.sum(1), tokens.present.sum(1)
    if int(slots.sum()) != int(sizes.sum()):
        raise ValueError(
            f"the prompts have {int(slots.sum())} places for visual tokens, the images have {int(sizes.sum())} of them"
        )
    return torch.searchsorted(slots.cumsum(0), sizes.cumsum(0) - sizes, right=True)


def question_tokens(vlm: VLM, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Embedded question of each row: ([B T D_text], [B T] bool), padded on the left to the longest."""
    longest = max(int(prompts.question.sum(1).max()), 1)
    order = prompts.question.int().argsort(dim=1, stable=True)[:, -longest:]
    return vlm.embed(prompts.input_ids.gather(1, order)), prompts.question.gather(1, order)


def with_question(vlm: VLM, prompts: Prompts, tokens: VisualTokens) -> VisualTokens:
    """`tokens` with the question of its row beside each image."""
    text, valid = question_tokens(vlm, prompts)
    if len(tokens) != len(prompts):
        owner = rows_of_images(prompts, tokens)
        text, valid = text[owner], valid[owner]
    return replace(tokens, text=text, text_valid=valid)


def select(vlm: VLM, prompts: Prompts, tokens: VisualTokens, pruner: Pruner, budget: Budget) -> VisualTokens:
    """Run the pruner's plan: the tokens with `valid` reduced to the survivors, projected if a cut looked at them so.

    tokens: of the rows' images in order (`VisualTokens.__getitem__` repeats shared encodings).
    """
    if Need.TEXT in pruner.needs:
        tokens = with_question(vlm, prompts, tokens)
    for cut in sorted(pruner.plan(budget), key=lambda cut: cut.stage.value):
        if cut.stage is Stage.PROJECTED and not tokens.projected:
            tokens = _projected(vlm, tokens)
        chosen = pruner.select(tokens, cut.budget)
        tokens = replace(tokens, features=chosen.features, valid=chosen.keep)
    return tokens


def _projected(vlm: VLM, tokens: VisualTokens) -> VisualTokens:
    """Project the survivors only; the others become zeros nobody reads."""
    kept = vlm.project(tokens.features[tokens.valid])
    features = kept.new_zeros(*tokens.valid.shape, kept.shape[-1])
    features[tokens.valid] = kept
    return replace(tokens, features=features, projected=True)


def embeddings(vlm: VLM, tokens: VisualTokens) -> Tensor:
    """[M D_text]: what stands in the slots of the tokens that are present, in order; separators have their own embedding."""
    rows = tokens.features[tokens.valid]
    rows = rows if tokens.projected else vlm.project(rows)
    if tokens.line is None:
        return rows
    present = tokens.present
    found = vlm.separator().to(rows.dtype).repeat(int(present.sum()), 1)
    return found.masked_scatter(tokens.valid[present][:, None], rows)


def cut(prompts: Prompts, live: Tensor, pad: int = 0, positions: str = "original") -> Prompts:
    """The rows at their living places [B S] bool, padded on the left.

    positions: "original" keeps those of the full row; "compact" counts what is left.

    Raises:
        ValueError: another word for `positions`.
    """
    if positions not in POSITIONS:
        raise ValueError(f"positions is {positions!r}; it is one of {', '.join(POSITIONS)}")
    length = int(live.sum(1).max())
    order = live.int().argsort(dim=1, stable=True)[:, -length:]
    rows = live.gather(1, order)
    dead = ~rows

    def at(values: Tensor, fill: int | bool) -> Tensor:
        return values.gather(1, order).masked_fill_(dead, fill)

    where = prompts.position_ids
    if positions == "compact" or where.ndim == 3:
        compact = (rows.cumsum(1) - 1).clamp_min(0)
    if positions == "compact":
        short = compact if where.ndim == 2 else compact[..., None].expand(-1, -1, where.shape[2])
    elif where.ndim == 2:
        short = at(where, 0)
    else:  # the text coordinate only tells sequences apart and must not have gaps
        short = torch.stack([compact, *(at(where[..., i], 0) for i in range(1, where.shape[2]))], -1)
    return Prompts(
        input_ids=at(prompts.input_ids, pad),
        attention_mask=rows.long(),
        position_ids=short,
        slots=at(prompts.slots, False),
        question=at(prompts.question, False),
        labels=None if prompts.labels is None else at(prompts.labels, -100),
    )


def shrink(vlm: VLM, prompts: Prompts, tokens: VisualTokens, pruner: Pruner, budget: Budget, positions: str = "original") -> Packed:
    """From full-length rows and encoded images to rows at the length the pruner leaves."""
    left = select(vlm, prompts, tokens, pruner, budget)
    before, after = tokens.present, left.present
    live = prompts.attention_mask.bool().masked_scatter(prompts.slots, after.masked_select(before))
    return Packed(
        prompts=cut(prompts, live, positions=positions),
        features=embeddings(vlm, left),
        kept=left.counts,
        total=tokens.counts,
        lengths=None if left.line is None else after.sum(1),
        deepstack=None if left.deepstack is None else left.deepstack[after],
        selection=Selection(left.valid, left.features, left.grid),
    )


def blind(prompts: Prompts) -> Packed:
    """Rows without any visual token: what the model knows from the text alone."""
    none = torch.zeros(len(prompts), dtype=torch.long, device=prompts.slots.device)
    live = prompts.attention_mask.bool() & ~prompts.slots
    return Packed(cut(prompts, live), torch.zeros(0, 1, device=live.device), none, prompts.slots.sum(1))


def decoder_inputs(vlm: VLM, packed: Packed) -> dict[str, Any]:
    """Keyword arguments of the model's own forward for packed rows."""
    prompts, where = packed.prompts, packed.prompts.position_ids
    inputs = {
        "input_ids": prompts.input_ids,
        "attention_mask": prompts.attention_mask,
        "position_ids": where if where.ndim == 2 else where.permute(2, 0, 1).contiguous(),
        **vlm.token_inputs(prompts),
    }
    if not len(packed.features):
        return inputs
    sizes = packed.sizes.tolist()
    deepstack = None if packed.deepstack is None else packed.deepstack.split(sizes)
    return inputs | vlm.image_inputs(packed.features.split(sizes), deepstack)


def forward(vlm: VLM, packed: Packed, **options: Any) -> Any:
    """The model's own forward at the shorter length; `options` go to it (`logits_to_keep`, `use_cache`, `labels` ...)."""
    inputs = decoder_inputs(vlm, packed)
    return vlm.model(**inputs | {"position_ids": inputs["position_ids"] + vlm.position_offset}, **options)


@torch.inference_mode()
def answer(vlm: VLM, packed: Packed, max_new_tokens: int, **options: Any) -> tuple[list[str], list[int]]:
    """Greedy answers of packed rows, one beam: (texts, tokens generated per row, the end token included).

    A penalty that the checkpoint's generation configuration sets stays in force, as in the family's own generate.
    """
    tokenizer = vlm.processor.tokenizer
    made = vlm.model.generate(
        **decoder_inputs(vlm, packed),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
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
    vlm: VLM,
    images: Sequence[Any],
    questions: Sequence[str],
    *,
    pruner: Pruner,
    budget: Budget,
    max_new_tokens: int = 32,
    positions: str = "original",
) -> list[str]:
    """Answer one question about each image (or each list of images) with pruned visual tokens.

    images: PIL images of any mode, or paths; they are read safely and made RGB.

    Raises:
        ValueError: an image that cannot be read, different numbers of images and questions, a question without an image, or a
            budget above what an image has.
    """
    if len(images) != len(questions):
        raise ValueError(
            f"{len(images)} images and {len(questions)} questions: give one image, or one list of images, per question"
        )
    shown = [list(image) if isinstance(image, (list, tuple)) else [image] for image in images]
    if not shown or not all(shown):
        raise ValueError("a question without an image: give every question at least one")
    tokens = vlm.encode(vlm.pixels([open_image(image) for row in shown for image in row]), pruner.needs)
    budget.check(int(tokens.counts.min()))
    prompts = vlm.prompts(questions, tokens.present.sum(1).tolist(), tokens.layout, [len(row) for row in shown])
    return answer(vlm, shrink(vlm, prompts, tokens, pruner, budget, positions), max_new_tokens)[0]
