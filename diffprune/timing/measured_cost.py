"""Cost of one image beside time: FLOPs by formula and by counter, bytes of KV cache and memory."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffprune import pruning
from diffprune.core.records import Cost
from diffprune.core.vlm import VLM
from diffprune.timing import eager, flops
from diffprune.timing.clock import Clock
from diffprune.timing.eager import Mode, Ready
from diffprune.vlm.windows import held_by


@torch.inference_mode()
def counted_flops(vlm: VLM, ready: Ready) -> float:
    """torch's own counter over one prefill. Attention runs in its unfused form, which the counter knows on every device, so it
    is counted in full: `flops.causal_half` above the formula."""
    with pruning.running(vlm, ready.packed), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        vlm.model(**ready.keywords, use_cache=True, logits_to_keep=1)
    return float(counter.get_total_flops())


@torch.inference_mode()
def counted_encoder_flops(vlm: VLM, pixels: dict[str, Tensor]) -> float:
    """torch's own counter over the encoder's pass of one picture: all its tiles or windows, and what joins patches to tokens."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        vlm.encode(pixels)
    return float(counter.get_total_flops())


def _mutual(vlm: VLM, packed: pruning.Packed, visual: Sequence[float], others: Sequence[float]) -> Sequence[float]:
    """Tokens in each layer that see each other both ways: none, the picture's, or the whole prompt where that is one block."""
    if vlm.packs:
        return ()
    whole = vlm.blocks(vlm.token_inputs(packed.prompts)) is not None
    return [seen + other for seen, other in zip(visual, others, strict=True)] if whole else visual


@torch.inference_mode()
def cost_of(vlm: VLM, arm: str, ready: Ready, pixels: dict[str, Tensor], clock: Clock, mode: Mode) -> Cost:
    """Cost of one image (batch 1), with the proof that its tokens were removed; a graph has its memory beforehand.

    Separators between rows of an image count as text of the layers that they enter: inside the decoder they leave with their row.
    In a graph, which does not say when, they stay to the end, so that FLOPs and bytes by formula are a little too high there.
    """
    shape = vlm.shape
    cuda = vlm.device.type == "cuda" and mode is eager
    if cuda:
        clock.wait()
        torch.cuda.reset_peak_memory_stats(vlm.device)
    before = torch.cuda.memory_allocated(vlm.device) if cuda else 0
    output = mode.prefill(vlm, ready, clock).output
    packed = ready.packed
    visual, beside = packed.per_layer(shape.layers)[0], packed.separators(shape.layers)[0]
    text = int(packed.prompts.attention_mask.sum()) - visual[0]
    others = [text - beside[0] + there for there in beside]
    peak = float(torch.cuda.max_memory_allocated(vlm.device) - before) if cuda else float("nan")
    return Cost(
        arm=arm, visual_kept=fmean(visual), text_tokens=text,
        prefill_flops=flops.prefill_flops(shape, visual, others, _mutual(vlm, packed, visual, others)),
        encoder_flops=counted_encoder_flops(vlm, pixels),
        counted_flops=counted_flops(vlm, ready) if ready.keywords else float("nan"),
        kv_bytes=flops.kv_bytes(shape, visual, others, vlm.model.dtype.itemsize, held_by(vlm.model)),
        kv_measured_bytes=mode.prove_removed(ready, output), peak_bytes=peak,
    )  # fmt: skip
