"""Methods that cut inside a decoder whose layers are spread over several GPUs, as by a `device_map`, on a machine that has none.

Tensors of the second half of the layers are told to lie on another GPU, and operations over both places fail as they would there.
What is on which device is accelerate's: it moves the arguments of a layer when its `forward` begins, after pre-hooks have run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

import diffprune
from diffprune.core.budget import Share
from diffprune.core.vlm import VLM
from diffprune.vlm import tiny as parts
from diffprune.vlm.activation_checkpointing import decoder_layers
from tests.test_decoder_cuts import deep
from tests.test_families import own, pictures

HOME, AWAY = torch.device("cpu"), torch.device("cuda:1")


class Away(torch.Tensor):
    """A tensor on the other GPU."""


def is_away(value: torch.Tensor) -> bool:
    return isinstance(value, Away) or getattr(value, "away", False)


def at(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor at one of the two places."""
    return value.as_subclass(Away if device == AWAY else torch.Tensor)


class TwoDevices(TorchFunctionMode):
    """Tensors know their place, and no operation mixes both; numbers, tensors without axes, may be anywhere."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return AWAY if is_away(args[0]) else HOME
        asked = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.device)]
        if func is torch.Tensor.to:
            like = [AWAY if is_away(value) else HOME for value in args[1:] if isinstance(value, torch.Tensor)]
            at_home = [HOME if isinstance(value, torch.device) else value for value in args[1:]]
            moved = func(args[0], *at_home, **{name: HOME if name == "device" else value for name, value in kwargs.items()})
            return at(moved, [*asked, *like, AWAY if is_away(args[0]) else HOME][0])
        if asked:  # made there
            made = func(*args, **{name: HOME if name == "device" else value for name, value in kwargs.items()})
            return at(made, asked[0])
        found = {is_away(value) for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor) and value.ndim}
        if len(found) > 1:
            raise RuntimeError(f"{func.__name__}: expected all tensors to be on the same device, found two")
        return func(*args, **kwargs)


@contextmanager
def spread(vlm: VLM) -> Iterator[None]:
    """Inside, the second half of the decoder's layers is on the other GPU."""
    layers = decoder_layers(vlm.model)
    there = list(layers[len(layers) // 2 :])
    parameters = [parameter for layer in there for parameter in layer.parameters()]
    for module, device in [*((layer, AWAY) for layer in there), (vlm.model.get_decoder().norm, HOME)]:
        module.forward = moving(module.forward, device)
    for parameter in parameters:
        parameter.away = True  # type: ignore[attr-defined]
    try:
        with TwoDevices():
            yield
    finally:
        for parameter in parameters:
            del parameter.away  # type: ignore[attr-defined]
        for module in (*there, vlm.model.get_decoder().norm):
            del module.forward


def moving(forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """A forward that moves its arguments to its device first."""

    def moved(*args: Any, **given: Any) -> Any:
        args, given = tree_map_only(torch.Tensor, lambda value: at(value, device), (args, given))
        return forward(*args, **given)

    return moved


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "name", ["fastv", "sparsevlm", "dart", "pyramiddrop", "dynamic_llava(untrained=True)", "atp(untrained=True)"]
)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_cuts_inside_spread_layers_are_those_of_one_device(family: str, name: str, attention: str) -> None:
    vlm, before = deep(family), deep(family).model.config._attn_implementation
    with torch.inference_mode():
        pixels = vlm.pixels(pictures()[:2])
        tokens = vlm.encode(pixels)
        prompts = vlm.prompts(["what?", "how many things are there?"], tokens.present.sum(1).tolist(), tokens.layout)
        given = own(vlm, prompts, pixels)
        asked: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [parts.IMAGE]}
        vlm.model.set_attn_implementation(attention)
        try:
            with diffprune.pruned(vlm.model, name, Share(0.6)):
                wanted, logits = vlm.model.generate(**given, **asked), vlm.model(**given).logits
            with spread(vlm), diffprune.pruned(vlm.model, name, Share(0.6)):
                found, ours = vlm.model.generate(**given, **asked), vlm.model(**given).logits
        finally:
            vlm.model.set_attn_implementation(before)
    assert torch.equal(found, wanted) and torch.equal(ours, logits)
