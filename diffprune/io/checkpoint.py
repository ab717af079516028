"""Checkpoints of trained scorers: config.json + model.safetensors + README.md, as the hub lays them out. Never a pickle.

safetensors checks structure, not content: a flipped bit or a NaN loads happily. So the config carries the sha256 of the
file, and values must be finite.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from diffprune.io.blob_store import Blobs, open_blobs
from diffprune.io.json_object import parsed

FILE = "model.safetensors"
CONFIG = "config.json"
CHECKSUM = "weights_sha256"
ALTERED = "{}: altered or damaged since it was written (sha256 differs from the one that was noted then)"


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write(folder: Blobs | Path | str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], card: str) -> str:
    """Save tensors and what describes them; returns the sha256 of the weights file.

    config.json comes last: a folder without it is no checkpoint, and one whose config is older than its weights is refused.

    Raises:
        ValueError: a tensor holds NaN or infinity.
    """
    blobs = open_blobs(folder)
    check_finite(tensors, f"{blobs}/{FILE}")
    weights = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    digest = hashlib.sha256(weights).hexdigest()
    blobs.replace(FILE, weights)
    blobs.replace("README.md", card.encode())
    blobs.replace(CONFIG, (json.dumps({**config, CHECKSUM: digest}, indent=2, sort_keys=True) + "\n").encode())
    return digest


def read(folder: Blobs | Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config of a folder written by `write`; the config says the weights' sha256 in any case.

    Raises:
        ValueError: missing, truncated or altered file, or values that are not finite; names the file and the reason.
    """
    blobs = open_blobs(folder)
    config, name = read_config(blobs), f"{blobs}/{FILE}"
    try:
        weights = blobs.read(FILE)
        digest = hashlib.sha256(weights).hexdigest()
        if config.setdefault(CHECKSUM, digest) not in (None, digest):
            raise ValueError(ALTERED.format(name))
        config[CHECKSUM] = digest
        tensors = load(weights)
    except FileNotFoundError:
        raise ValueError(f"{name}: the weights file is missing") from None
    except SafetensorError as error:
        raise ValueError(f"{name}: not a complete safetensors file ({error})") from None
    check_finite(tensors, name)
    return tensors, config


def is_complete(folder: Blobs | Path | str) -> bool:
    """Whether `write` has ended in this folder; what it wrote is not looked at."""
    return open_blobs(folder).version(CONFIG) is not None


def read_config(folder: Blobs | Path | str) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        ValueError: no such folder, no config, or one that is not JSON.
    """
    blobs = open_blobs(folder)
    try:
        return parsed(blobs.read(CONFIG))
    except FileNotFoundError:
        raise ValueError(f"{blobs}: no trained weights here (config.json is missing)") from None
    except ValueError as error:
        raise ValueError(f"{blobs}/{CONFIG}: {error}") from None


def check_file(path: Path, checksum: str | None = None) -> None:
    """Refuse a safetensors file that is not whole: its header says how long it has to be. Values are read for a checksum only.

    Raises:
        ValueError: the file is missing, truncated, or altered since it was written.
    """
    if not path.is_file():
        raise ValueError(f"{path}: the weights file is missing")
    if checksum and sha256(path) != checksum:
        raise ValueError(ALTERED.format(path))
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
    """Make tensors the values of a module of exactly these names and shapes, which may lie on torch's `meta` device.

    Raises:
        ValueError: names or shapes differ, or a tensor holds no floating-point numbers; names the first that does.
    """
    wanted = module.state_dict()
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in tensors or name not in wanted:
            raise ValueError(f"{path}: tensor {name!r} is {'missing' if name in wanted else 'unknown'}")
        if tensors[name].shape != wanted[name].shape:
            raise ValueError(
                f"{path}: tensor {name!r} has shape {tuple(tensors[name].shape)}, expected {tuple(wanted[name].shape)}"
            )
        if not tensors[name].is_floating_point():
            raise ValueError(f"{path}: tensor {name!r} is of type {tensors[name].dtype}, weights are floating-point numbers")
    module.load_state_dict({name: value.to(wanted[name].dtype, copy=True) for name, value in tensors.items()}, assign=True)
