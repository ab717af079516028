"""What goes on in a vision encoder: attention and keys, as its own code hands them to the attention function; outputs of layers.

An encoder with a summary token is read at that token's row: the attention it pays to each patch. One without is read by columns:
the attention each patch receives, mean over the queries that may look at it (VisionZip, arXiv 2412.04467). Both are means over
heads. While the encoder runs, queries, keys and outputs of the layers asked for are kept; what is asked of them is computed
afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from diffprune.core.evidence import Evidence, EvidenceKind

NAME = "kept_queries_and_keys"
AT_ONCE = 2**26  # attention scores in memory at a time
SUMMARY = ("class_embedding", "cls_token")  # names of the parameter that is an encoder's summary token


class Kept(NamedTuple):
    """One call of the attention function: query and key [B H N d], mask as it takes it, factor of the scores."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float


class Recorder:
    """Calls of the attention function by layer, of the layers asked for; layers are counted in the order they run."""

    def __init__(self, layers: Collection[int]) -> None:
        self.layers = frozenset(layers)
        self.seen: dict[int, int] = {}  # identity of an attention module -> its layer
        self.calls: dict[int, list[Kept]] = {layer: [] for layer in layers}

    def keep(self, module: torch.nn.Module, call: Kept) -> None:
        layer = self.seen.setdefault(id(module), len(self.seen))
        if layer in self.layers:
            self.calls[layer].append(call)


class _Recorders(threading.local):
    """Those of the encoders that run in this thread, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[Recorder] = []


_recorders = _Recorders()


def keeping(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    """torch's fused attention; the recorder of this thread's encoder keeps queries and keys."""
    if _recorders.stack:
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        _recorders.stack[-1].keep(module, Kept(query, key, attention_mask, scaling))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(NAME, keeping)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def kept_by_encoder(model: Any, layers: Collection[int]) -> Iterator[Recorder]:
    """While the block runs, what the attention function of the vision encoder is given in `layers` (from 0) is kept."""
    recorder = Recorder(layers)
    if not layers:
        yield recorder
        return
    before = model.config.vision_config._attn_implementation
    _recorders.stack.append(recorder)
    model.set_attn_implementation({"vision_config": NAME})
    try:
        yield recorder
    finally:
        model.set_attn_implementation({"vision_config": before})
        _recorders.stack.remove(recorder)


@contextmanager
def outputs_of(tower: torch.nn.Module, num: int, layers: Collection[int]) -> Iterator[dict[int, list[Tensor]]]:
    """While the block runs, outputs [B N D] or [N D] of the encoder's `layers` (from 0, of `num`), call by call, in this thread."""
    heard: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    thread = threading.get_ident()
    lists = (m for m in tower.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == num)
    with ExitStack() as hooks:
        if blocks := next(lists, None) if layers else None:
            for layer, found in heard.items():

                def keep(_: Any, __: Any, output: Any, found: list[Tensor] = found) -> None:
                    if threading.get_ident() == thread:
                        found.append(output if isinstance(output, Tensor) else output[0])

                hooks.callback(blocks[layer].register_forward_hook(keep).remove)
        yield heard


def read(evidence: Evidence, call: Kept, summary: bool) -> Tensor:
    """[B N C] of a call: the keys of all heads side by side, or attention, C = 1; summary: the encoder's first token sums it up."""
    if evidence.kind is EvidenceKind.ENCODER_KEYS:
        return call.key.transpose(1, 2).flatten(2)
    call = joint(call) if evidence.joint else call
    return (summary_row(call) if summary else received(call))[..., None]


def joint(call: Kept) -> Kept:
    """The call with one head as wide as all of them together, its scores divided by the root of that width."""
    query, key = (values.transpose(1, 2).flatten(2)[:, None] for values in (call.query, call.key))
    return Kept(query, key, call.mask, query.shape[-1] ** -0.5)


def has_summary(tower: torch.nn.Module) -> bool:
    """Whether the first token of an encoder is a summary token."""
    return any(name.rpartition(".")[2] in SUMMARY for name, _ in tower.named_parameters())


def summary_row(call: Kept) -> Tensor:
    """[B N]: attention the first token pays to every token, itself included, mean over heads."""
    scores = (call.query[:, :, :1] @ call.key.transpose(2, 3)).float() * call.scaling
    return _softmax(scores, call.mask, 0, 1).mean(1)[:, 0]


def received(call: Kept) -> Tensor:
    """[B N]: attention each token receives, mean over heads and over the queries that may look at it; padding asks nothing."""
    batch, heads, length, _ = call.query.shape
    may = _allowed(call.mask)
    total = call.key.new_zeros(batch, call.key.shape[2], dtype=torch.float32)
    asking = torch.zeros_like(total)
    step = max(1, AT_ONCE // (batch * heads * call.key.shape[2]))
    for start in range(0, length, step):
        stop = min(length, start + step)
        scores = (call.query[:, :, start:stop] @ call.key.transpose(2, 3)).float() * call.scaling
        weights = _softmax(scores, call.mask, start, stop).mean(1)
        if may is None:
            total += weights.sum(1)
            asking += stop - start
            continue
        rows = _rows(may, start, stop)[:, 0].expand_as(weights)
        own = rows[:, torch.arange(stop - start), torch.arange(start, stop)]  # padding may not look at itself
        total += (weights * own[..., None]).sum(1)
        asking += (rows & own[..., None]).sum(1)
    return total / asking.clamp_min(1)


def _softmax(scores: Tensor, mask: Tensor | None, start: int, stop: int) -> Tensor:
    """Of the queries start..stop under their mask."""
    if mask is not None:
        rows = _rows(mask, start, stop)
        scores = scores.masked_fill(~rows, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + rows
    return scores.softmax(-1)


def _rows(mask: Tensor, start: int, stop: int) -> Tensor:
    """The rows start..stop of a mask [B 1 N N], or [B 1 1 N] for all queries alike."""
    return mask if mask.shape[2] == 1 else mask[:, :, start:stop]


def _allowed(mask: Tensor | None) -> Tensor | None:
    """[B 1 N N] bool: who may look at whom."""
    return mask if mask is None or mask.dtype == torch.bool else mask > -1
