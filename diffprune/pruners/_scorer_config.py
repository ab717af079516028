"""config.json of a scorer: types and ranges of all that is read from it, looked at before anything is allocated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffprune.core.pruner import TrainedOn

DIMS = ("features", "text", "width", "depth")  # what fixes the shapes of a scorer
CHOICES = {"question_aware": (True, False, "cross"), "attention": (True, False), "denoiser": (True, False, "global")}  # options
SIZES = {"depth": None, "width": 0}  # options, and what leaves them to the paper's shape, scaled
MOST = {"features": 2**20, "text": 2**20, "width": 2**16, "depth": 1024}


def checked(config: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, int | None]]:
    """(options, dims) of a scorer.

    Raises:
        ValueError: one is missing, of another type or out of its range; names it.
    """
    options, dims = _mapping(config, "options", path), _mapping(config, "dims", path)
    for name, known in CHOICES.items():
        if not _is_one(options.get(name), known):
            said = " or ".join(json.dumps(one) for one in known)
            raise ValueError(f"{path}: options.{name} is {options.get(name)!r:.60}, but must be {said}")
    for name in SIZES:
        if name != "depth" or options.get(name, "missing") is not None:
            _whole(options, "options", name, 0, path)
    for name in options.keys() - {*CHOICES, *SIZES}:
        raise ValueError(f"{path}: options.{name!r:.60} is no option of a scorer")
    for name in DIMS:
        if name not in dims:
            raise ValueError(f"{path}: dims.{name} is missing; retrain this scorer")
        if name != "text" or dims[name] is not None or options["question_aware"]:
            _whole(dims, "dims", name, int(name != "depth"), path)
    if options["depth"] == 0 and dims["depth"]:
        options = options | {"depth": None}  # which was written 0 before a scorer without blocks had a name
    return {name: options[name] for name in (*CHOICES, *SIZES)}, {name: dims[name] for name in DIMS}


def check_asked(options: Mapping[str, Any], label: str) -> None:
    """Look at the options of a constructor; `attention` and `depth` may be None.

    Raises:
        ValueError: no such value, or two that contradict each other.
    """
    for name, known in CHOICES.items():
        if not (_is_one(options[name], known) or (name == "attention" and options[name] is None)):
            raise ValueError(f"{label}: {name} is one of {', '.join(map(repr, known))}, not {options[name]!r}")
    for name, unsaid in SIZES.items():
        told = options[name]
        if told is not unsaid and (type(told) is not int or told < 0):
            raise ValueError(f"{label}: {name} is {told!r}, but a scorer has a whole number of it, not below 0")
    if options["depth"] == 0 and options["attention"]:
        raise ValueError(f"{label}: depth=0 leaves no block that attention=True could let look at other tokens")


def _is_one(value: Any, known: tuple[Any, ...]) -> bool:
    """Whether an option has one of its values; 1 is no true."""
    return type(value) in (bool, str) and value in known


def trained_on(config: Mapping[str, Any], path: Path) -> tuple[TrainedOn | None, str, int | None]:
    """(the model it was trained on, the recipe's key, the seed), as far as the card tells.

    Raises:
        ValueError: a fact of another type.
    """
    facts = _mapping(config, "facts", path) if "facts" in config else {}
    model, digest, dtype, key = (_text(facts, name, path) for name in ("model", "model_hash", "dtype", "recipe_key"))
    if facts.get("seed") is not None:
        _whole(facts, "facts", "seed", 0, path)
    return (TrainedOn(model, digest, dtype) if digest else None), key, facts.get("seed")


def _mapping(config: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    found = config.get(name)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {name} is {found!r:.60}, but must be an object as training writes it")
    return found


def _whole(found: Mapping[str, Any], where: str, name: str, least: int, path: Path) -> None:
    value, most = found.get(name), MOST.get(name, 2**31 - 1)
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{path}: {where}.{name} is {value!r:.60}, but must be a whole number from {least} to {most:,}")


def _text(facts: Mapping[str, Any], name: str, path: Path) -> str:
    value = facts.get(name, "")
    if not isinstance(value, str):
        raise ValueError(f"{path}: facts.{name} is {value!r:.60}, but must be text")
    return value
