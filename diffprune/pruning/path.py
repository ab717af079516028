"""The path from a batch to logits, one for every method and every family.

    encode -> select (merge, project) -> cut -> the model's own forward / generate

A pruner answers with a mask over the visual tokens of its image, and with where the others go. Here, and only here, tokens are
merged and the sequence gets shorter: token ids, mask, positions, features and DeepStack features are cut by the same mask.
Survivors keep their original positions unless asked otherwise. A row may show several images; each has its own budget.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from diffprune.core.budget import Budget
from diffprune.core.evidence import QUESTION, Question
from diffprune.core.pruner import Pruner
from diffprune.core.site import Plan, Stage, in_order, tokens_per_layer
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.core.vlm import VLM, Prompts
from diffprune.io.image import open_image
from diffprune.pruning._arguments import budget_of, pruner_of, rows_of_questions
from diffprune.pruning.decoder_cuts import DecoderCuts, Inside
from diffprune.pruning.pretrained import make_ready
from diffprune.pruning.rows import cut, embedded_question, rows_of_images
from diffprune.pruning.selection import applied, chosen
from diffprune.vlm.windows import Windows, packed_mask

NOTHING_LEFT = "the method kept no visual token of an image; every image keeps at least one"


@dataclass(frozen=True)
class Packed:
    """Rows ready for the decoder: `prompts` at the length that is left, `features` [M D_text] of all survivors in slot order.

    kept, total: [I] int, visual tokens of each image that enter the decoder, and before any cut; separators are counted apart.
    lengths:     [I] int, `sizes` where there are separators; None where they are the kept.
    deepstack:  [M C], DeepStack features of each row of `features`.
    selection:  what the pruner left of each image.
    inside:     cuts that are still to come, inside the decoder; None where there are none.
    """

    prompts: Prompts
    features: Tensor
    kept: Tensor
    total: Tensor
    lengths: Tensor | None = None
    deepstack: Tensor | None = None
    selection: Selection | None = None
    inside: Inside | None = None

    @property
    def sizes(self) -> Tensor:
        """[I] int: rows of `features` that belong to each image, separators included."""
        return self.kept if self.lengths is None else self.lengths

    def per_layer(self, layers: int) -> list[tuple[int, ...]]:
        """Of each image, visual tokens entering each of the decoder's layers: those that a forward pass left where there has been
        one (`running`), else from the plan alone.

        Raises:
            ValueError: a cut by threshold inside the decoder, or an adaptive one, whose count differs from image to image.
        """
        cuts = () if self.inside is None else self.inside.cuts
        if self.inside is not None and (left := self.inside.left):
            return _entering(self.kept, {number: valid.sum(1) for number, valid in left.items()}, layers)
        return [tokens_per_layer(cuts, num, layers) for num in self.kept.tolist()]

    def separators(self, layers: int) -> list[tuple[int, ...]]:
        """Of each image, separators entering each of the decoder's layers. Which leave inside depends on the choice: before a
        forward pass (`running`) they are as many as enter the first."""
        return _entering(self.sizes - self.kept, {} if self.inside is None else self.inside.beside, layers)

    def averages(self, layers: int) -> list[float]:
        """Of each image, the mean of `per_layer`: what a budget means."""
        return [fmean(seen) for seen in self.per_layer(layers)]


def _entering(first: Tensor, behind: Mapping[int, Tensor], layers: int) -> list[tuple[int, ...]]:
    """Of each image, what enters each layer: `first` [I] of the first, and `behind` [I] by the first layer behind each cut."""
    counts = {0: first} | dict(behind)
    entering = [counts[max(at for at in counts if at <= number)].cpu() for number in range(layers)]
    return [tuple(row) for row in torch.stack(entering, 1).tolist()]


def with_question(vlm: VLM, prompts: Prompts, tokens: VisualTokens) -> VisualTokens:
    """`tokens` with the question of its row beside each image."""
    question, owner = (
        embedded_question(vlm, prompts),
        rows_of_images(prompts, tokens),
    )  # as many images as rows need not be one each
    question = Question(question.embedding[owner], question.valid[owner])
    return replace(tokens, evidence={**tokens.evidence, QUESTION: question})


def plan_of(vlm: VLM, pruner: Pruner, budget: Budget) -> Plan:
    """The cuts of a method in order.

    Raises:
        ValueError: a budget that the method cannot meet, a cut behind the decoder's last layer, or one that looks at a layer which
            comes later.
    """
    plan, layers = in_order(pruner.cuts(budget, vlm.shape)), vlm.shape.layers
    for step in plan:
        if step.site.layer >= layers:
            raise ValueError(f"{pruner.label} cuts {step.site}, which saves nothing in a decoder of {layers} layers")
        late = [key for key in pruner.needs if key.from_decoder and key.layer is not None and step.site.layer]
        for key in late:
            assert key.layer is not None
            if not -step.site.layer <= key.layer < step.site.layer:
                raise ValueError(f"{pruner.label} cuts {step.site} by {key}, which is not known there: cut later or look earlier")
    return plan


def inside_decoder(plan: Plan) -> Plan:
    """The cuts of a plan that happen inside the decoder."""
    return tuple(step for step in plan if step.site.stage is Stage.DECODER)


def select(vlm: VLM, prompts: Prompts, tokens: VisualTokens, pruner: Pruner, budget: Budget) -> VisualTokens:
    """Run the pruner's plan up to the decoder: the tokens with `valid` reduced to the survivors, projected if a cut needed it.

    tokens: of the rows' images in order (`VisualTokens.__getitem__` repeats shared encodings).

    Raises:
        ValueError: a budget or a cut that `plan_of` refuses, or a method that `make_ready` refuses.
    """
    make_ready(pruner, vlm)
    if QUESTION in pruner.needs:
        tokens = with_question(vlm, prompts, tokens)
    for step in plan_of(vlm, pruner, budget):
        if step.site.stage is Stage.DECODER:
            break
        if step.site.stage is Stage.PROJECTED and not tokens.projected:
            tokens = _projected(vlm, tokens)
        tokens = applied(tokens, chosen(pruner, tokens, step))
    return tokens


def _projected(vlm: VLM, tokens: VisualTokens) -> VisualTokens:
    """Project the survivors only; other positions are zero-filled."""
    kept = vlm.project(tokens.features[tokens.valid])
    features = kept.new_zeros(*tokens.valid.shape, kept.shape[-1])
    features[tokens.valid] = kept
    return replace(tokens, features=features, projected=True)


def embeddings(vlm: VLM, tokens: VisualTokens) -> Tensor:
    """[M D_text]: what stands in the slots of the tokens that are present, in order; separators have their own embedding."""
    rows = tokens.features[tokens.valid]
    rows = rows if tokens.projected else vlm.project(rows)
    if tokens.row_id is None:
        return rows
    present = tokens.present
    found = vlm.separator().to(rows.dtype).repeat(int(present.sum()), 1)
    return found.masked_scatter(tokens.valid[present][:, None], rows)


def shrink(vlm: VLM, prompts: Prompts, tokens: VisualTokens, pruner: Pruner, budget: Budget, positions: str = "original") -> Packed:
    """From full-length rows and encoded images to rows at the length the pruner leaves, with its cuts inside the decoder."""
    left = select(vlm, prompts, tokens, pruner, budget)
    return shortened(vlm, prompts, tokens, left, positions, Inside.of(pruner, inside_decoder(plan_of(vlm, pruner, budget)), left))


def shortened(
    vlm: VLM,
    prompts: Prompts,
    tokens: VisualTokens,
    left: VisualTokens,
    positions: str = "original",
    inside: Inside | None = None,
) -> Packed:
    """Full-length rows cut to the tokens that are `left` of their images' `tokens`.

    Raises:
        ValueError: cuts `inside` the decoder of rows that are renumbered before it, or that hold many questions each; or nothing is
            left of any image.
    """
    if inside is not None:
        inside.check(prompts, positions)
    before, after = tokens.present, left.present
    live = prompts.attention_mask.bool().masked_scatter(prompts.slots, after.masked_select(before))
    features = embeddings(vlm, left)
    if not len(features):
        raise ValueError(NOTHING_LEFT)
    return Packed(
        prompts=cut(prompts, live, positions=positions),
        features=features,
        kept=left.counts,
        total=tokens.counts,
        lengths=None if left.row_id is None else after.sum(1),
        deepstack=None if left.deepstack is None else left.deepstack[after],
        selection=Selection(left.valid, grid=left.grid),
        inside=inside,
    )


def blind(prompts: Prompts) -> Packed:
    """Rows without any visual token: what the model knows from the text alone."""
    none = torch.zeros(len(prompts), dtype=torch.long, device=prompts.slots.device)
    live = prompts.attention_mask.bool() & ~prompts.slots
    return Packed(cut(prompts, live), torch.zeros(0, 1, device=live.device), none, prompts.slots.sum(1))


def decoder_inputs(vlm: VLM, packed: Packed) -> dict[str, Any]:
    """Keyword arguments of the model's own forward for packed rows.

    Raises:
        ValueError: an image of which nothing is left, beside others.
    """
    prompts, where = packed.prompts, packed.prompts.position_ids
    inputs = {
        "input_ids": prompts.input_ids,
        "attention_mask": prompts.attention_mask if prompts.attention_mask.ndim == 2 else packed_mask(vlm.model, prompts),
        "position_ids": where if where.ndim == 2 else where.permute(2, 0, 1).contiguous(),
        **vlm.token_inputs(prompts),
    }
    if not len(packed.features):
        return inputs
    sizes = packed.sizes.tolist()
    if not all(sizes):
        raise ValueError(NOTHING_LEFT)
    deepstack = None if packed.deepstack is None else packed.deepstack.split(sizes)
    return inputs | vlm.image_inputs(packed.features.split(sizes), deepstack)


def forward(vlm: VLM, packed: Packed, **options: Any) -> Any:
    """The model's own forward at the shorter length; `options` go to it (`logits_to_keep`, `use_cache`, `labels` ...)."""
    inputs = decoder_inputs(vlm, packed)
    with running(vlm, packed):
        return vlm.model(**inputs | {"position_ids": inputs["position_ids"] + vlm.position_offset}, **options)


@contextmanager
def running(
    vlm: VLM, packed: Packed, around: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Iterator[DecoderCuts | None]:
    """Inside, the model's own forward and generate on these rows cut what is to be cut inside the decoder, and measure sliding
    windows in the full rows that `packed` was cut from. Most rows need neither.

    around: a context for what a method adds to the decoder's own work.
    """
    windows, inside = Windows(vlm), packed.inside
    if windows.window is not None:
        windows.measure_by(packed.prompts.index, vlm.token_inputs(packed.prompts))
    with windows.hooked():
        if inside is None:
            yield None
            return
        cuts = DecoderCuts(vlm, inside.pruner, inside.cuts, windows, around)
        cuts.expect(packed.prompts, inside.tokens)
        with cuts.hooked():
            yield cuts
        for noted in (inside.left, inside.beside):
            noted.clear()
        inside.left.update({number: stage.tokens.valid for number, stage in cuts.stages.items()})
        if inside.tokens.row_id is not None:  # else there are no separators, and nothing to count in a timed request
            beside = {number: stage.tokens.present.sum(1) - stage.tokens.counts for number, stage in cuts.stages.items()}
            inside.beside.update(beside)


GREEDY = {
    "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False, "use_cache": True,
    **dict.fromkeys(
        (
            "penalty_alpha", "dola_layers", "prompt_lookup_num_tokens", "assistant_early_exit", "prefill_chunk_size",
            "cache_implementation", "is_assistant", "token_healing", "max_time",
        )
    ),
}  # what a checkpoint's generation configuration may not change: one greedy answer a row, the same in any batch  # fmt: skip


@contextmanager
def _greedy(model: Any) -> Iterator[None]:
    """Inside, the model's generation configuration is a copy with `GREEDY` in place."""
    own = model.generation_config
    model.generation_config = copy.deepcopy(own)
    for name, value in GREEDY.items():
        setattr(model.generation_config, name, value)
    try:
        yield
    finally:
        model.generation_config = own


@torch.inference_mode()
def answer(vlm: VLM, packed: Packed, max_new_tokens: int, **options: Any) -> tuple[list[str], list[int]]:
    """Greedy answers of packed rows, one beam: (texts, tokens generated per row, the end token included).

    What the checkpoint's generation configuration says about tokens stays in force, as in the family's own generate: penalties,
    end tokens, stop strings.
    """
    tokenizer = vlm.processor.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    with running(vlm, packed), _greedy(vlm.model):
        made = vlm.model.generate(
            **decoder_inputs(vlm, packed), max_new_tokens=max_new_tokens, pad_token_id=pad, tokenizer=tokenizer, **options
        )
    made = made[:, packed.prompts.input_ids.shape[1] :]
    texts = [text.strip() for text in tokenizer.batch_decode(made, skip_special_tokens=True)]
    return texts, _lengths(made, vlm.model.generation_config.eos_token_id, pad).tolist()


def _lengths(made: Tensor, end: int | Sequence[int] | None, pad: int) -> Tensor:
    """[B] int: tokens of each row up to its first end token or, where it has none, without the padding behind its last."""
    ends = torch.tensor([] if end is None else [end] if isinstance(end, int) else list(end), device=made.device)
    done = torch.isin(made, ends)
    padding = (made != pad).flip(1).cumsum(1).eq(0).sum(1)
    return torch.where(done.any(1), done.int().argmax(1) + 1, made.shape[1] - padding)


@torch.inference_mode()
def generate(
    vlm: VLM,
    images: Any,
    questions: str | Sequence[str],
    *,
    pruner: Pruner | str,
    budget: Budget | int | float | str,
    max_new_tokens: int = 32,
    positions: str = "original",
) -> list[str]:
    """Answer one question about each image (or each list of images) with pruned visual tokens.

    images: PIL images of any mode, or paths; they are read safely and made RGB. One question alone may come with one image alone.
    pruner: a method or its spelling. budget: a budget or its spelling; a whole number is a count of tokens.

    Raises:
        ValueError: an image that cannot be read, different numbers of images and questions, a question without an image, an
            argument of another kind, or a method that is not trained, or on another model.
    """
    if not isinstance(vlm, VLM):
        raise ValueError(f"generate takes a model as diffprune.load gives it, not {type(vlm).__name__}")
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}; it is a whole number of at least 1")
    pruner, budget = pruner_of(pruner), budget_of(budget)
    shown, asked = rows_of_questions(images, questions)
    make_ready(pruner, vlm)
    tokens = vlm.encode(vlm.pixels([open_image(image) for row in shown for image in row]), pruner.needs)
    prompts = vlm.prompts(asked, tokens.present.sum(1).tolist(), tokens.layout, [len(row) for row in shown])
    return answer(vlm, shrink(vlm, prompts, tokens, pruner, budget, positions), max_new_tokens)[0]
