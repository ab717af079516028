"""Single rows of a decoder layer's attention, from the queries and keys that its own code hands to the attention function.

While a layer that is watched runs, its attention implementation is one that shows queries and keys and then calls the layer's own
(torch's fused kernel, or eager), so rotary embeddings, normalised or grouped heads, scaling and soft caps are the family's. The
rows that are asked for are computed beside the kernel, which never writes its weights.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from diffprune.vlm.activation_checkpointing import decoder_layers
from diffprune.vlm.attention import masked_softmax


class Seen(NamedTuple):
    """One call of the attention function: query [B H S d], key [B G S d], mask as it takes it, factor and soft cap of scores, and
    weights of the keys [B S], where it takes any."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None
    retention: Tensor | None = None


class _Watch(threading.local):
    """Who is shown the next call in this thread; only: the call ends there."""

    show: Callable[[Seen], None] | None = None
    only = False


class _Enough(Exception):
    """Queries and keys have been seen; the layer need not go on."""


_watch = _Watch()


def _showing(own: Callable[[torch.nn.Module], Any]) -> Callable[..., Any]:
    """An attention function that shows its queries and keys and is otherwise the one that `own` finds for a module."""

    def attend(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Any:
        if _watch.show is not None:
            scaling = options.get("scaling")
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            _watch.show(Seen(query, key, attention_mask, scaling, options.get("softcap"), options.get("retention")))
            if _watch.only:
                raise _Enough
        return own(module)(module, query, key, value, attention_mask, **options)

    return attend


SHOWING = {name: f"{name}_with_rows" for name in ("sdpa", "eager", "masked_softmax")}  # implementations whose rows can be read
AttentionInterface.register(SHOWING["sdpa"], _showing(lambda _: sdpa_attention_forward))
AttentionInterface.register(SHOWING["eager"], _showing(lambda module: sys.modules[type(module).__module__].eager_attention_forward))
AttentionInterface.register(SHOWING["masked_softmax"], _showing(lambda _: masked_softmax))
AttentionMaskInterface.register(SHOWING["sdpa"], sdpa_mask)
AttentionMaskInterface.register(SHOWING["masked_softmax"], sdpa_mask)
AttentionMaskInterface.register(SHOWING["eager"], eager_mask)


@contextmanager
def _shown(layer: Any, show: Callable[[Seen], None], only: bool = False) -> Iterator[None]:
    """What the layer's attention function is given inside the block goes to `show` first."""
    config = layer.self_attn.config
    before = config._attn_implementation
    config._attn_implementation = SHOWING[before]
    _watch.show, _watch.only = show, only
    try:
        yield
    finally:
        _watch.show, _watch.only = None, False
        config._attn_implementation = before


@contextmanager
def watched(model: Any, layers: Collection[int], show: Callable[[int, Seen], None], asked: Callable[[], bool]) -> Iterator[None]:
    """In the block, `show(number, seen)` is called in those decoder layers (from 0) whenever they run while `asked()`."""
    running: dict[tuple[int, int], ExitStack] = {}  # by thread and layer

    def before(number: int) -> Callable[..., None]:
        def start(layer: Any, *_: Any) -> None:
            stack = ExitStack()
            if asked():
                stack.enter_context(_shown(layer, lambda seen: show(number, seen)))
            running[threading.get_ident(), number] = stack

        return start

    def after(number: int) -> Callable[..., None]:
        return lambda *_: running.pop((threading.get_ident(), number), ExitStack()).close()  # not begun where a hook before failed

    found = decoder_layers(model)
    with ExitStack() as hooks:
        for number in layers:
            hooks.callback(found[number].register_forward_pre_hook(before(number)).remove)
            hooks.callback(found[number].register_forward_hook(after(number), always_call=True).remove)
        yield


def ahead(layer: Any, states: Tensor, given: Mapping[str, Any]) -> Seen:
    """Queries and keys a decoder layer would have for hidden states [B S D]; `given`: its other arguments. Nothing is cached."""
    found, device = list[Seen](), next(layer.parameters()).device  # the first layer of a GPU is given what lies on another
    given = {name: _moved(value, device) for name, value in given.items()}
    with _shown(layer, found.append, only=True), contextlib.suppress(_Enough):
        layer.self_attn(**{**given, "hidden_states": layer.input_layernorm(states.to(device)), "past_key_values": None})
    return found[0]


def _moved(value: Any, device: torch.device) -> Any:
    """A tensor, or a tuple of them, on a device; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_moved(one, device) for one in value)
    return value.to(device) if isinstance(value, Tensor) else value


def attention_rows(seen: Seen, queries: Tensor, raw: bool = False) -> Tensor:
    """[B R S]: attention the `queries` [B R] (places in their rows) pay to every token, after the softmax, mean over heads.

    Keys count by their weights, those of the queries themselves being 1. raw: before soft cap, mask and softmax.
    """
    batch, heads, length, size = seen.query.shape
    groups = seen.key.shape[1]
    query = seen.query.gather(2, queries[:, None, :, None].expand(-1, heads, -1, size))
    grouped = query.reshape(batch, groups, -1, size) @ seen.key.transpose(2, 3)
    scores = grouped.view(batch, heads, -1, length) * seen.scaling
    if raw:
        return scores.float().mean(1)
    if seen.softcap is not None:
        scores = (scores / seen.softcap).tanh() * seen.softcap
    if seen.mask is None:
        scores = scores.masked_fill(torch.arange(length, device=scores.device) > queries[:, None, :, None], -torch.inf)
    else:
        where = torch.arange(batch, device=queries.device)[:, None]
        rows = seen.mask.expand(batch, -1, -1, -1)[where, 0, queries][:, None]
        scores = scores.masked_fill(~rows, torch.finfo(scores.dtype).min) if rows.dtype == torch.bool else scores + rows
    if seen.retention is not None:
        scores = scores + seen.retention.log()[:, None, None, :]
    return scores.float().softmax(-1).mean(1)
