"""Learned weights in a folder: config.json + model.safetensors + README.md, as the hub lays them out. Never a pickle.

safetensors checks structure, not content: a flipped bit or a NaN loads happily. So the config carries the sha256 of the
file, and values must be finite.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = "model.safetensors"
CONFIG = "config.json"
CHECKSUM = "weights_sha256"


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def write(folder: Path | str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], card: str) -> None:
    """Save tensors and what describes them. config.json comes last: a folder without it is no checkpoint.

    Raises:
        ValueError: a tensor holds NaN or infinity.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    check_finite(tensors, folder / FILE)
    temporary = folder / f".{FILE}.{os.getpid()}"
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary)
    temporary.replace(folder / FILE)
    replace_text(folder / "README.md", card)
    replace_text(folder / CONFIG, json.dumps({**config, CHECKSUM: sha256(folder / FILE)}, indent=2, sort_keys=True) + "\n")


def read(folder: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config of a folder written by `write`.

    Raises:
        ValueError: missing, truncated or altered file, or values that are not finite; names the file and the reason.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = folder / FILE
    check_file(path, config.get(CHECKSUM))
    tensors = load_file(path)
    check_finite(tensors, path)
    return tensors, config


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        ValueError: no such folder, no config, or one that is not JSON.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: no trained weights here (config.json is missing)")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def check_file(path: Path, checksum: str | None = None) -> None:
    """Refuse a safetensors file that is not whole: its header says how long it has to be. Values are read for a checksum only.

    Raises:
        ValueError: the file is missing, truncated, or altered since it was written.
    """
    if not path.is_file():
        raise ValueError(f"{path}: the weights file is missing")
    if checksum and sha256(path) != checksum:
        raise ValueError(f"{path}: altered or damaged since it was written (sha256 differs from the one that was noted then)")
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from None


def check_finite(tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Raises ValueError when a tensor holds NaN or infinity."""
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{path}: tensor {name!r} holds NaN or infinite values")


def load_into(module: torch.nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy tensors into a module of exactly these names and shapes.

    Raises:
        ValueError: names or shapes differ; names the first that does.
    """
    wanted = module.state_dict()
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in tensors or name not in wanted:
            raise ValueError(f"{path}: tensor {name!r} is {'missing' if name in wanted else 'unknown'}")
        if tensors[name].shape != wanted[name].shape:
            raise ValueError(
                f"{path}: tensor {name!r} has shape {tuple(tensors[name].shape)}, expected {tuple(wanted[name].shape)}"
            )
    module.load_state_dict(dict(tensors))
