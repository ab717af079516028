"""Random weights of any size, made on the device, for timing: time does not depend on their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from diffprune.core import registry
from diffprune.core.vlm import VLM
from diffprune.vlm.processor import Parts

SPECIAL = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def randomised(
    config: Mapping[str, Any], pictures: Mapping[str, Any], name: str, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> VLM:
    """A random instance of the family and sizes that `config` names, with a processor that works offline.

    config:   what config.json says, `model_type` included; the family's defaults stand for what is left out. Token ids are those
              of the tiny instance, whose byte-level tokenizer it shares.
    pictures: settings of the family's image processor.

    Weights are drawn as the family initialises them, in `dtype` and on `device`, so that nothing passes through the host. No hash
    of them is taken: `weights_hash` says that they are random, and of which seed.

    Raises:
        ValueError: no family of that `model_type`, or no such configuration.
    """
    family: Any = registry.find("models", str(config.get("model_type")))
    small = family.tiny()
    ids = {key: value for key in SPECIAL if (value := getattr(small.model.config, key, None)) is not None}
    try:
        found = AutoConfig.for_model(**{**config, **ids})
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"this is no configuration of {config['model_type']} ({error})") from None
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(found, dtype=dtype, attn_implementation="sdpa")
    model.generation_config.pad_token_id = small.processor.tokenizer.pad_token_id
    processor = Parts(type(small.processor.image_processor)(**pictures), small.processor.tokenizer)
    vlm: VLM = family(model.eval().requires_grad_(False), processor, name)
    vlm.weights_hash = f"random {seed}"
    return vlm
