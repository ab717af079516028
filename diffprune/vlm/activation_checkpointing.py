"""Activation checkpointing of a frozen decoder: its layers are computed again in the backward pass instead of stored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers of a model's decoder, in order."""
    return list(model.get_decoder().layers)


@contextmanager
def recomputed(model: Any) -> Iterator[None]:
    """Forward *and* backward passes inside store only what enters each decoder layer; losses and gradients stay what they were.

    transformers does so only for layers in training mode. Only the layers themselves are put into it, not what they consist of,
    so that no dropout wakes up; the vision encoder, which needs no gradient, is left alone. All is as before on exit.

    Raises:
        ValueError: the family's decoder layers cannot be computed again.
    """
    layers = decoder_layers(model)
    if not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
        raise ValueError(f"{model.config.model_type} cannot compute its decoder layers again; train with checkpointing=False")
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # no dropout, so no randomness to repeat
    names = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")
    before = [{name: vars(layer)[name] for name in names if name in vars(layer)} for layer in layers]
    try:
        for layer in layers:
            vars(layer).update(zip(names, (True, True, again), strict=True))
        yield
    finally:
        for layer, attributes in zip(layers, before, strict=True):
            for name in names:
                vars(layer).pop(name, None)
            vars(layer).update(attributes)
