"""Load a trained scorer from a folder or a repository of the Hub, whose config.json says which method it is."""

from __future__ import annotations

from pathlib import Path

from diffprune.core import registry
from diffprune.core.pruner import Pruner
from diffprune.io.checkpoint import CONFIG, read_config
from diffprune.io.hub import scorer_folder


def from_pretrained(name: str | Path, revision: str = "main") -> Pruner:
    """The method `save_pretrained` wrote, its options and weights. safetensors only; no code from a repository ever runs.

    name: a folder, or "user/scorer-llava15" on the Hub, fetched at `revision` (a branch, a tag or a commit) into the Hub's cache.

    Raises:
        ValueError: neither a folder nor a name of the Hub, not to be had, no scorer, or a damaged one.
    """
    folder = scorer_folder(str(name), revision)
    config = read_config(folder)
    if config.get("method") not in registry.names("pruners") or not isinstance(config.get("spec"), str):
        method = config.get("method")
        raise ValueError(f"{folder / CONFIG} names no method of ours but {method!r}; a scorer's folder is written by training")
    made: Pruner = registry.make("pruners", registry.spec("pruners", config["spec"]).at(weights=folder.absolute()))
    return made
