"""DiffPrune: train, tune, measure and honestly compare visual-token pruners for vision-language models.

    vlm = diffprune.load("embedded")
    pruner = diffprune.pruner("attention")
    diffprune.generate(vlm, images, questions, pruner=pruner, budget=diffprune.Keep(32))

Names are looked up when first used, so that `diffprune --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffprune.core.budget import Above, Budget, Keep, Share, parse
    from diffprune.core.pruner import Pruner
    from diffprune.core.tokens import Selection, VisualTokens
    from diffprune.core.vlm import VLM
    from diffprune.pruning.hooks import pruned
    from diffprune.pruning.overlay import overlay
    from diffprune.pruning.path import generate
    from diffprune.pruning.pretrained import from_pretrained, push_to_hub
    from diffprune.store import Store
    from diffprune.vlm.load import load

__version__ = "0.1.0"
__all__ = [
    "VLM", "Above", "Budget", "Keep", "Pruner", "Selection", "Share", "Store", "VisualTokens",
    "benchmark", "from_pretrained", "generate", "load", "overlay", "parse", "pruned", "pruner", "push_to_hub",
]  # fmt: skip

_HOMES = {
    "Above": "core.budget", "Budget": "core.budget", "Keep": "core.budget", "Share": "core.budget", "parse": "core.budget",
    "Pruner": "core.pruner", "Selection": "core.tokens", "VisualTokens": "core.tokens", "VLM": "core.vlm",
    "load": "vlm.load", "overlay": "pruning.overlay", "generate": "pruning.path", "pruned": "pruning.hooks", "Store": "store",
    "from_pretrained": "pruning.pretrained", "push_to_hub": "pruning.pretrained",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """A public name, imported from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'diffprune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"diffprune.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def pruner(spelling: str) -> Pruner:
    """A method by its spelling: `attention`, `random(seed=3)`, `diffprune(weights='folder')`.

    Raises:
        ValueError: no such method or option (the nearest valid one is named), or damaged weights.
    """
    return importlib.import_module("diffprune.core.registry").load("pruners", spelling)


def benchmark(spelling: str) -> Any:
    """A benchmark by its spelling: `world('pope')`.

    Raises:
        ValueError: no such benchmark or option; the nearest valid one is named.
    """
    return importlib.import_module("diffprune.core.registry").load("benchmarks", spelling)
