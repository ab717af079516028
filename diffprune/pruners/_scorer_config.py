"""config.json of a scorer: types and ranges of all that is read from it, looked at before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffprune.core.pruner import TrainedOn

DIMS = ("features", "text", "width", "depth")  # what fixes the shapes of a scorer
SWITCHES = ("question_aware", "attention", "denoiser")
SIZES = {"depth": None, "width": 0}  # options, and what leaves them to the paper's shape, scaled
MOST = {"features": 2**20, "text": 2**20, "width": 2**16, "depth": 1024}


def checked(config: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, int | None]]:
    """(options, dims) of a scorer.

    Raises:
        ValueError: one is missing, of another type or out of its range; names it.
    """
    options, dims = _mapping(config, "options", path), _mapping(config, "dims", path)
    for name in SWITCHES:
        if not isinstance(options.get(name), bool):
            raise ValueError(f"{path}: options.{name} is {options.get(name)!r:.60}, but must be true or false")
    for name in SIZES:
        if name != "depth" or options.get(name, "missing") is not None:
            _whole(options, "options", name, 0, path)
    for name in options.keys() - {*SWITCHES, *SIZES}:
        raise ValueError(f"{path}: options.{name!r:.60} is no option of a scorer")
    for name in DIMS:
        if name not in dims:
            raise ValueError(f"{path}: dims.{name} is missing; retrain this scorer")
        if name != "text" or dims[name] is not None or options["question_aware"]:
            _whole(dims, "dims", name, int(name != "depth"), path)
    if options["depth"] == 0 and dims["depth"]:
        options = options | {"depth": None}  # which was written 0 before a scorer without blocks had a name
    return {name: options[name] for name in (*SWITCHES, *SIZES)}, {name: dims[name] for name in DIMS}


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
