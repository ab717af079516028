"""Models on the meta device: a configuration without weights, for sizes and costs that need no download."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from diffprune.core import registry
from diffprune.core.spec import Spec
from diffprune.core.vlm import VLM
from diffprune.io import checkpoint
from diffprune.vlm.load import EMBEDDED, EMBEDDED_NAME, TINY, load
from diffprune.vlm.processor import Absent, read


def outline(config: Mapping[str, Any], asked: Spec | None = None) -> VLM:
    """The family's view of a model on torch's `meta` device: `shape`, `num_visual_tokens` and parameters without values.

    config: what config.json says, `model_type` included; what is left out has the family's defaults.
    asked:  the model whose processor it gets, where no network is needed for it, so that it makes rows and encoder inputs (on the
            CPU); None, and a name of the Hub: none.

    Raises:
        ValueError: no family of that `model_type`, no such configuration, or a folder without a processor.
    """
    kind = str(config.get("model_type"))
    family: Any = registry.find("models", kind)
    try:
        found = AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(found)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"this is no configuration of {kind} ({error})") from None
    processor = _processor(asked, model.config.image_token_id) if asked else Absent()
    options = {key: value for key, value in asked.options if key != "family"} if asked and processor else {}
    vlm: VLM = family(model.eval().requires_grad_(False), processor, f"outline of {kind}", **options)
    vlm.device = torch.device("cpu") if processor else vlm.device
    return vlm


def _processor(asked: Spec, image_token_id: int) -> Any:
    if asked.name == TINY:
        return load(asked, device="cpu").processor
    source = EMBEDDED if asked.name == EMBEDDED_NAME else asked.place("folder")
    return read(source, image_token_id) if source else Absent()


def configuration(asked: Spec) -> dict[str, Any] | None:
    """What config.json of a model says where no network is needed: a folder, "embedded", "tiny(llava)"; None for others."""
    if asked.name == TINY:
        found: dict[str, Any] = load(asked, device="cpu").model.config.to_dict()
        return found
    source = EMBEDDED if asked.name == EMBEDDED_NAME else asked.place("folder")
    return checkpoint.read_config(source) if source else None


def projector_input_width(vlm: VLM) -> int:
    """D of `VLM.encode` without running it: the width of what the projector's first matrix reads, or of what it gives."""
    if getattr(vlm, "projects", False):
        return vlm.shape.width
    model = vlm.model.model
    projector_input: nn.Module = model.get_submodule(getattr(vlm, "projector_input", ""))
    linear = next((m for m in projector_input.modules() if isinstance(m, nn.Linear)), None)
    return linear.in_features if linear is not None else vlm.shape.vision_width
