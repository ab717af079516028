"""A model by name: `embedded`, a local folder, or a hub checkpoint. safetensors only; no code from a checkpoint ever runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from diffprune.core import plugins, weights
from diffprune.core.vlm import VLM

logging.disable_progress_bar()  # type: ignore[no-untyped-call]

EMBEDDED = Path(__file__).parent.parent / "embedded" / "checkpoint"


def load(
    name: str = "embedded",
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    attention: str = "sdpa",
) -> VLM:
    """A frozen VLM of a supported family.

    name:      "embedded", a folder, or a hub name such as "llava-hf/llava-1.5-7b-hf" (fetched at `revision`).
    device:    "auto" is the first GPU, else the CPU.
    dtype:     "auto" is float32 on the CPU and the checkpoint's own elsewhere.
    attention: implementation of the decoder, e.g. "sdpa", "eager", "flash_attention_2".

    Raises:
        ValueError: no such checkpoint, a family without a file under `models/`, or damaged weights.
    """
    folder = EMBEDDED if name == "embedded" else Path(name)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if folder.is_dir():
        check(folder)
    elif name.startswith((".", "/")) or name.count("/") != 1:
        raise ValueError(
            f"no model {name!r}: write 'embedded', a folder with a checkpoint, or a hub name such as 'llava-hf/llava-1.5-7b-hf'"
        )
    source: str | Path = folder if folder.is_dir() else name
    options: dict[str, Any] = {"trust_remote_code": False, "revision": revision or "main"}
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: no model configuration can be read ({_first_line(error)})") from None
    family = plugins.find("models", config.model_type)
    kind = dtype if dtype != "auto" or str(device) != "cpu" else torch.float32
    try:
        model, found = AutoModelForImageTextToText.from_pretrained(
            source,
            config=config,
            dtype=kind,
            use_safetensors=True,
            attn_implementation=attention,
            output_loading_info=True,
            **options,
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{name}: the weights cannot be loaded or do not fit config.json ({_first_line(error)})") from None
    wrong = [*found["missing_keys"], *found["mismatched_keys"]]
    if wrong:
        raise ValueError(f"{name}: the weights do not fit config.json, first at {wrong[0]}")
    return family(model.to(device), AutoProcessor.from_pretrained(source, **options), name)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def check(folder: Path) -> None:
    """Refuse a local checkpoint with missing, pickled or damaged weights before any work starts.

    A folder that carries `model.safetensors.sha256` (the embedded model does) is also checked for flipped bits.

    Raises:
        ValueError: names the file and the reason.
    """
    weights.read_config(folder)
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth"})
        raise ValueError(f"{folder}: no safetensors weights" + (f"; {pickled[0]} is a pickle, which is refused" if pickled else ""))
    for path in found:
        listed = path.with_name(path.name + ".sha256")
        weights.read_tensors(path, listed.read_text().split()[0] if listed.is_file() else None)
