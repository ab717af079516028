"""What this machine can do with the service: one line per thing looked at, with what to do where something is missing."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import torch
from packaging.requirements import Requirement

from diffprune.core import registry
from diffprune.vlm.load import TRANSFORMERS, load

GOOD, WORSE, BAD = "ok", "note", "missing"
# what an optional package brings: (distribution, import name, what it is for)
EXTRAS = (
    ("flash-attn", "flash_attn", "attention implementation flash_attention_2"),
    ("accelerate", "accelerate", "device maps: a model spread over several GPUs"),
    ("torchvision", "torchvision", "the full processors of some families (pictures work without)"),
    ("wandb", "wandb", "the tracker Weights & Biases"),
    ("mlflow", "mlflow", "the tracker MLflow"),
    ("boto3", "boto3", "results in a bucket: --out s3://bucket/folder"),
    ("obstore", "obstore", "results in Google's or Azure's storage: --out gs://bucket/folder, az://container/folder"),
    ("lmms-eval", "lmms_eval", "tasks of lmms-eval, and `lmms-eval --model diffprune`"),
)
SPACE_GIB = 20  # below this, checkpoints of 7B models do not fit


@dataclass(frozen=True)
class Finding:
    """One thing looked at: state is "ok", "note" (works, with a limit) or "missing" (something asked for will fail)."""

    what: str
    state: str
    detail: str


def examine() -> list[Finding]:
    """Everything, in the order of the screen. Loads the embedded model; starts no cluster and opens no connection."""
    looks: tuple[Callable[[], list[Finding]], ...] = (
        _requirements, _processor, _gpus, _attention, _embedded, _families, _extras, _store,
    )  # fmt: skip
    return [finding for look in looks for finding in look()]


def _requirements() -> list[Finding]:
    """Versions of what the package requires, against the ranges it states."""
    wrong, found = [], []
    try:
        needs = metadata.requires("diffprune") or []
    except metadata.PackageNotFoundError:
        hint = "install it with pip install -c constraints.txt -e ."
        return [Finding("packages", WORSE, f"diffprune is not installed, so nothing here says which versions it needs: {hint}")]
    for text in needs:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is not installed")
            continue
        if not need.specifier.contains(version, prereleases=True):
            wrong.append(f"{need.name} {version} is outside {need.specifier}")
        if need.name in ("torch", "transformers", "ray"):
            found.append(f"{need.name} {version}")
    python = f"Python {platform.python_version()}"
    if wrong:
        return [Finding("packages", BAD, "; ".join(wrong) + ": install again with pip install -c constraints.txt -e .")]
    return [Finding("packages", GOOD, ", ".join([python, *sorted(found)]))]


def _processor() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    state = GOOD if cores > 1 else WORSE
    return [
        Finding("processor", state, f"{cores} cores" + ("" if cores > 1 else ": a demo of two workers will take twice as long"))
    ]


def _gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch is built for CUDA {built} but sees no device" if built else "torch is built without CUDA"
        return [Finding("GPU", WORSE, f"none ({why}): the embedded model and tiny families run, 7B models will not")]
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        bf16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
        found.append(Finding(f"GPU {index}", GOOD, f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {bf16}"))
    return found


def _attention() -> list[Finding]:
    kinds = ["eager", "sdpa"] + (["flash_attention_2"] if util.find_spec("flash_attn") and torch.cuda.is_available() else [])
    kernels = [name for name in ("flash", "mem_efficient", "math", "cudnn") if _enabled(name)]
    return [Finding("attention", GOOD, f"{', '.join(kinds)}; sdpa kernels enabled: {', '.join(kernels)}")]


def _enabled(kernel: str) -> bool:
    ask = getattr(torch.backends.cuda, f"{kernel}_sdp_enabled", None)
    return bool(ask and ask())


def _embedded() -> list[Finding]:
    try:
        vlm = load("embedded")
    except ValueError as error:
        return [Finding("embedded model", BAD, str(error))]
    return [Finding("embedded model", GOOD, f"{sum(p.numel() for p in vlm.model.parameters()):,} parameters, checksum fits")]


def _families() -> list[Finding]:
    usable, broken = [], []
    for name in registry.names("models"):
        try:
            registry.find("models", name)
            usable.append(name)
        except (ImportError, ValueError) as error:
            broken.append(Finding(f"family {name}", BAD, f"{error}; it needs transformers >= {TRANSFORMERS}"))
    return [Finding("families", GOOD, ", ".join(usable)), *broken]


def _extras() -> list[Finding]:
    found = []
    for name, module, purpose in EXTRAS:
        here = util.find_spec(module) is not None
        found.append(Finding(name, GOOD if here else WORSE, purpose if here else f"not installed; brings {purpose}"))
    return found


def _store() -> list[Finding]:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    enough = free >= SPACE_GIB
    detail = f"{free:.0f} GiB free here" + ("" if enough else f"; a 7B checkpoint and its records want {SPACE_GIB}")
    return [Finding("disk", GOOD if enough else WORSE, detail)]
