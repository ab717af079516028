"""Trained scorers: loaded from a folder or a repository of the Hub, pushed there, compared with the model they were trained on."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from diffprune.core import registry
from diffprune.core.budget import Share
from diffprune.core.fitted import FittedPruner, TrainablePruner, of_the_artefact
from diffprune.core.pruner import Pruner, TrainedOn
from diffprune.core.site import PROJECTED
from diffprune.core.vlm import VLM
from diffprune.io.blob_store import remote
from diffprune.io.checkpoint import CONFIG, read_config
from diffprune.io.hub import scorer_folder, upload
from diffprune.io.scorer_card import card
from diffprune.vlm.meta_model import projector_input_width
from diffprune.vlm.tokenize import weights_hash

_hashes: WeakKeyDictionary[torch.nn.Module, tuple[Any, dict[str, str]]] = WeakKeyDictionary()


def from_pretrained(name: str | Path, revision: str = "main", *, other_model: bool = False) -> Pruner:
    """The method `save_pretrained` wrote, its options and weights. safetensors only; no code from a repository ever runs.

    name: a folder, or "user/scorer-llava15" on the Hub, fetched at `revision` (a branch, a tag or a commit) into the Hub's cache.
    other_model: it may serve another model than the one it was trained on.

    Raises:
        ValueError: neither a folder nor a name of the Hub, not to be had, no scorer, or a damaged one.
    """
    folder = scorer_folder(str(name), revision)
    config = read_config(folder)
    if config.get("method") not in registry.names("pruners") or not isinstance(config.get("spec"), str):
        method = config.get("method")
        raise ValueError(f"{folder / CONFIG} names no method of ours but {method!r}; a scorer's folder is written by training")
    asked = of_the_artefact(registry.spec("pruners", config["spec"]))  # a folder never says that it may serve another model
    asked = asked.with_options(other_model=True) if other_model else asked
    made: Pruner = registry.make("pruners", asked.at(weights=folder.absolute()))
    return made


def push_to_hub(scorer: Pruner | Path | str, name: str, *, private: bool = True) -> str:
    """Upload a scorer, or the folder of one, with its card to the Hub's repository "owner/name"; returns the address of the commit.

    The repository is made where there is none, private unless told otherwise; `from_pretrained(name)` loads from it.

    Raises:
        ValueError: no scorer, a damaged or untrained one, no name of the Hub, or the Hub refuses.
    """
    if not isinstance(scorer, Pruner) and not remote(scorer) and not Path(scorer).is_dir():
        raise ValueError(f"there is no folder {str(scorer)!r:.200}: give a trained scorer, or the folder that training wrote it to")
    method = scorer if isinstance(scorer, Pruner) else from_pretrained(scorer)
    if not isinstance(method, FittedPruner) or not method.weights_sha256:
        raise ValueError(f"{method.label} has learnt nothing that could be uploaded: give a trained scorer or its folder")
    with tempfile.TemporaryDirectory(prefix="diffprune-") as place:
        folder = Path(place)
        method.save_pretrained(folder)
        facts = read_config(folder).get("facts", {})
        (folder / "README.md").write_text(
            card("A visual-token pruner", str(of_the_artefact(method.spec)), name, facts), encoding="utf-8"
        )
        return upload(folder, name, private=private)


def check_model(pruner: Pruner | None, vlm: VLM) -> None:
    """Refuse a scorer, or one inside a wrapper, that was trained on other weights than those of `vlm`, unless its user says so.

    A card without a hash of its model is taken as it is.

    Raises:
        ValueError: names both models.
    """
    while pruner is not None:
        told = pruner.trained_on
        if told is not None and not pruner.other_model and not is_trained_on(vlm, told):
            raise ValueError(
                f"{pruner.label} was trained on {told.model or 'a model'} with the weights {told.weights_sha256} ({told.dtype}), "
                f"this is {vlm.name} with other ones ({vlm.dtype}); train it on this model, or write other_model=True"
            )
        pruner = pruner.inner


def make_ready(pruner: Pruner, vlm: VLM) -> None:
    """Refuse a method, or one inside a wrapper, that cannot select on this model; random weights are made where they are asked for.

    Raises:
        ValueError: it has learnt nothing, with what to write instead; or as in `check_model`.
    """
    check_model(pruner, vlm)
    inside: Pruner | None = pruner
    while inside is not None:
        if isinstance(inside, FittedPruner) and not inside.ready:
            raise ValueError(f"{inside.spec} is not trained: {inside.lacking}")
        if isinstance(inside, TrainablePruner):
            _made_for(inside, vlm)
        inside = inside.inner


def _made_for(pruner: TrainablePruner, vlm: VLM) -> None:
    """Random weights of the model's widths where they are asked for; networks where the model is."""
    if pruner.untrained:
        before = pruner.cuts(Share(1.0), vlm.shape)[0].site < PROJECTED
        pruner.draw(projector_input_width(vlm) if before else vlm.shape.width, vlm.shape.width)
    found = None if pruner.networks is None else next(pruner.networks.parameters(), None)
    if pruner.networks is not None and found is not None and found.device != vlm.device:
        pruner.networks.to(vlm.device)


def is_trained_on(vlm: VLM, told: TrainedOn) -> bool:
    """Whether the weights of `vlm` are those a card tells of, also where they were loaded in a wider or narrower type."""
    if vars(vlm).get("weights_hash") == told.weights_sha256:  # taken already
        return True
    state = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in vlm.model.parameters()]
    before, known = _hashes.get(vlm.model, (None, {}))
    if before != state:
        known = {}
        _hashes[vlm.model] = state, known
    if told.dtype not in known:
        known[told.dtype] = weights_hash(vlm.model, getattr(torch, told.dtype, None))
    return known[told.dtype] == told.weights_sha256
