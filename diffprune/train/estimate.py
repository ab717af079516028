"""Estimate of a training: memory, FLOPs and time of a recipe, from a model configuration alone.

Parameters are counted on a model without weights (`vlm/meta_model.py`), so they are exact. What autograd keeps for the backward
pass through a *frozen* model is less than in ordinary training: a frozen matrix needs no stored input. Per image, with S the
positions of its rows together, e bytes per element of the frozen model, d, q, f the decoder's width, query width and FFN width:

    a layer             S (2 x 4 d + e (4 q + 3 f))   inputs of two norms in float32; q, k, v and output; gate, its activation, up
    decoder, stored     L layers
    decoder, recomputed L S d e, and one layer at a time
    around it           4 S d (last norm) + 2 e sum of squares of the rows' lengths (masks) + 4 A V (A answer tokens)
    scorer, denoiser    4 N (16 D + w (16 blocks + 2))   float32; D, w widths of features and scorer; 16 D without denoiser: 4 D

At the peak the head holds 6 A V more (logits, and again in float32). Trained parameters take 16 bytes: value, gradient, two
moments of AdamW. The frozen encoder keeps nothing, but LLaVA asks for the outputs of all its layers, which counts when all
calibration images pass at once. Allocator fragments, CUDA context and communication buffers are left out: leave a tenth free.

FLOPs (`timing/flops.py`, causal attention): encoder 1 x; projector 2 x; decoder 2 x, as its weights have no gradient, and 3 x
where it is recomputed, plus one more for attention, whose two inputs both have one; scorer 3 x. Time is FLOPs at `SHARE` of a GPU's
dense bfloat16 peak, the data being read in time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from diffprune import data as training
from diffprune.config.fields import Whole
from diffprune.core import registry
from diffprune.core.fitted import TrainablePruner
from diffprune.core.spec import Spec
from diffprune.core.vlm import VLM, Shape
from diffprune.timing import flops
from diffprune.train.recipe import Recipe
from diffprune.vlm.meta_model import outline, projector_input_width

GPUS = {"H200": 989e12, "A100": 312e12, "RTX A6000": 155e12}  # dense bfloat16 FLOP/s as their makers state them
SHARE = 0.4
WORKING = 8  # times the width that an encoder layer needs for its input, q, k, v, output and FFN at work
GIB = 2**30
TEXT, ANSWER = 96, 32  # tokens


class Assumed(BaseModel):
    """What the data will be like. Where nothing is given, as their first example is; where that, or the model's processor, is not
    here, questions have TEXT tokens, answers ANSWER, and images the model's default size.

    text:   tokens of one question with its frame and its answer.
    answer: tokens of the answer alone.
    visual: tokens of the images of one example.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: Whole = Field(0, ge=0)
    answer: Whole = Field(0, ge=0)
    visual: Whole = Field(0, ge=0)


@dataclass(frozen=True)
class Rows:
    """One image in training: N visual tokens in each of `rows` rows of `length` positions, `answers` of which are predicted.

    seen: they are those of the first example, not assumed.
    """

    visual: int
    rows: int
    length: int
    answers: int
    seen: bool = False

    @property
    def positions(self) -> int:
        """S, over all rows."""
        return self.rows * self.length


@dataclass(frozen=True)
class Estimate:
    """One method of a recipe on one model; bytes per GPU, FLOPs over all workers.

    frozen, trained: parameters; weights: bytes of the frozen ones on one GPU; optimizer: of values, gradients and moments trained.
    stored, recomputed: activations of one image, with the decoder's layers stored or computed again; image: rows of one.
    """

    pruner: str
    frozen: int
    trained: int
    weights: float
    optimizer: float
    stored: float
    recomputed: float
    peak: float
    step_flops: float
    image: Rows


def layer_bytes(shape: Shape, positions: int, element: int) -> float:
    """What one decoder layer keeps of so many positions for its backward pass."""
    return positions * (2 * 4 * shape.width + element * (4 * shape.heads * shape.head_dim + 3 * shape.ffn))


def image_bytes(shape: Shape, image: Rows, scorer: float, element: int, recomputed: bool) -> float:
    """What autograd keeps of one image (the formulas above). scorer: bytes that `scorer_bytes` says."""
    layers = image.positions * shape.width * element if recomputed else layer_bytes(shape, image.positions, element)
    around = 4 * image.positions * shape.width + 2 * element * image.rows * image.length**2
    return shape.layers * layers + around + 4 * image.answers * shape.vocabulary + scorer


def scorer_bytes(networks: nn.ModuleDict, visual: int) -> float:
    """What scorer, relaxation and denoiser keep of one image's tokens."""
    scorer: Any = networks["scorer"]
    denoiser = (19 if getattr(networks["denoiser"], "match", None) else 16) if "denoiser" in networks else 4
    features, width = scorer.inlet.in_features, scorer.inlet.out_features
    blocks = sum(11 if block.mix is None else 16 for block in scorer.blocks)
    return 4 * visual * (denoiser * features + width * (blocks + 2))


def decoder_flops(shape: Shape, image: Rows, recomputed: bool) -> float:
    """Forward and backward of one image through the frozen decoder and its head."""
    length = image.length
    linear = 2 * length * flops.layer_weights(shape) * shape.layers
    attention = 2 * shape.heads * shape.head_dim * length * (length + 1) * shape.layers
    passes = 3 if recomputed else 2
    return image.rows * (passes * linear + (passes + 1) * attention) + 4 * image.answers * shape.width * shape.vocabulary


def scorer_flops(networks: nn.ModuleDict, visual: int) -> float:
    """Forward and backward of one image's tokens through scorer and denoiser."""
    scorer: Any = networks["scorer"]
    beside = sum(p.numel() for name, part in networks.items() if name != "scorer" for p in part.parameters() if p.ndim == 2)
    forward: float = scorer.flops(visual) + 2 * visual * beside
    return 3 * forward


def estimate(recipe: Recipe, config: Mapping[str, Any], assumed: Assumed | None = None) -> list[Estimate]:
    """One estimate per method that is trained; what is calibrated takes no steps. config: what the model's config.json says.

    Raises:
        ValueError: no such configuration.
    """
    assumed = assumed or Assumed()
    vlm = outline(config, recipe.model if assumed == Assumed() else None)
    trained = [spec for spec in recipe.pruners if issubclass(registry.find("pruners", spec.name), TrainablePruner)]
    return [_scorer(recipe.of(spec), vlm, assumed, spec) for spec in trained]


def _scorer(recipe: Recipe, vlm: VLM, assumed: Assumed, spec: Spec) -> Estimate:
    usual, pruner = vlm.num_visual_tokens, registry.make("pruners", spec)
    aware = pruner.reads_question
    image = _first(recipe, vlm, aware) or rows(recipe, assumed, assumed.visual or usual, vlm.packs and not aware, aware)
    visual = image.visual
    shape = replace(vlm.shape, patches=round(vlm.shape.patches * visual / usual))
    networks = pruner.outline(projector_input_width(vlm), shape.width)
    element = _element(recipe, vlm)
    scored = image.rows if aware else 1
    scorer = scored * scorer_bytes(networks, visual)
    stored, recomputed = (image_bytes(shape, image, scorer, element, again) for again in (False, True))
    frozen, trained = (sum(p.numel() for p in m.parameters()) for m in (vlm.model, networks))
    weights, optimizer = _weights(recipe, vlm, element), 16.0 * trained
    layer = layer_bytes(shape, image.positions, element) if recipe.checkpointing else 0
    training = _at_once(recipe) * ((recomputed if recipe.checkpointing else stored) + layer + 6 * image.answers * shape.vocabulary)
    outputs = shape.vision_layers + 1 if hasattr(vlm.model.config, "vision_feature_layer") else WORKING
    encoder = outputs * element * shape.tiles * shape.patches * shape.vision_width
    peak = weights + optimizer + max(training, recipe.calibration_images * encoder)
    step = flops.encoder_flops(shape) + scored * (2 * flops.projector_flops(shape, visual) + scorer_flops(networks, visual))
    step += decoder_flops(shape, image, recipe.checkpointing)
    return Estimate(str(spec), frozen, trained, weights, optimizer, stored, recomputed, peak, recipe.images * step, image)


def rows(recipe: Recipe, assumed: Assumed, visual: int, packed: bool, aware: bool) -> Rows:
    """What training makes of one image: all questions in one row, or a row for each."""
    questions, text, answer = _questions(recipe, aware), assumed.text or TEXT, assumed.answer or ANSWER
    if packed:
        return Rows(visual, 1, visual + questions * text, questions * answer)
    return Rows(visual, questions, visual + text, questions * answer)


def _questions(recipe: Recipe, aware: bool) -> int:
    return recipe.questions_alone if aware else recipe.questions


def _first(recipe: Recipe, vlm: VLM, aware: bool) -> Rows | None:
    """What training makes of the first example; None where the model's processor or the data are not here."""
    if not vlm.processor:
        return None
    try:
        given = training.first_batch(vlm, recipe.data, _questions(recipe, aware), packed=vlm.packs and not aware)
    except (ValueError, OSError):
        return None
    prompts = given.prompts
    return Rows(int(prompts.slots[0].sum()), len(prompts), prompts.input_ids.shape[1], given.num_labels, seen=True)


def _at_once(recipe: Recipe) -> int:
    """Images of one worker that are in memory together; of a whole step where each trains scorers of its own."""
    apart = not recipe.shard and len(recipe.pruners) * len(recipe.seeds) >= recipe.workers
    return min(recipe.micro_images or recipe.images, recipe.images // (1 if apart else recipe.workers))


def _element(recipe: Recipe, vlm: VLM) -> int:
    """Bytes of one frozen weight; "auto" is what the configuration names, else two bytes."""
    kind = vlm.model.config.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    return (kind or torch.bfloat16).itemsize


def _weights(recipe: Recipe, vlm: VLM, element: int) -> float:
    """Bytes of frozen weights on one GPU; of decoder layers that are spread, its share and two that are gathered."""
    frozen = sum(p.numel() for p in vlm.model.parameters())
    if not recipe.shard:
        return element * frozen
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in vlm.model.get_decoder().layers]
    return element * (frozen - sum(sizes) + sum(sizes) / recipe.workers + 2 * max(sizes))


def lines(recipe: Recipe, found: Estimate) -> list[str]:
    """An estimate as the user reads it."""
    recipe = next(recipe.of(spec) for spec in recipe.pruners if str(spec) == found.pruner)
    image, total = found.image, recipe.images * found.image.positions
    kind = recipe.dtype if recipe.dtype != "auto" else "the checkpoint's type"
    how = f"{_at_once(recipe)} images at once" + (", layers computed again" if recipe.checkpointing else "")
    how += f", decoder spread over {recipe.workers} GPUs" if recipe.shard else ""
    said = [
        f"estimate for {found.pruner}, from the configuration alone (formulas: diffprune/train/estimate.py)",
        f"  frozen   {found.frozen:,} parameters, {found.weights / GIB:.1f} GiB in {kind} per GPU",
        f"  trained  {found.trained:,} parameters, {found.optimizer / GIB:.1f} GiB with gradients and AdamW in float32",
        f"  image    {image.rows} x {image.length} positions ({image.visual} visual; "
        + ("as the first example" if image.seen else "questions as assumed: --set assumed.text=N, train.questions=N")
        + "); "
        f"keeps {found.stored / GIB:.2f} GiB for the backward pass, {found.recomputed / GIB:.2f} GiB with checkpointing",
        f"  peak     {found.peak / GIB:.1f} GiB per GPU ({how})",
        f"  step     {recipe.images} images, {total:,} positions, {found.step_flops / 1e12:,.0f} TFLOP",
    ]
    for name, peak in GPUS.items():
        seconds = found.step_flops / (SHARE * peak * recipe.workers)
        hours = seconds * recipe.steps * len(recipe.seeds) / 3600
        said.append(
            f"  {recipe.workers} x {name:9s}  {seconds:.2f} s per step, {total / seconds:,.0f} positions/s, {hours:.1f} h for "
            f"{len(recipe.seeds)} x {recipe.steps} steps at {SHARE:.0%} of {peak / 1e12:.0f} TFLOP/s"
        )
    return said
