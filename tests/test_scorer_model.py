"""A scorer knows the model it was trained on: another one of the same width is refused, unless its user says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import diffprune
from diffprune import pruning
from diffprune.core import registry
from diffprune.core.vlm import VLM
from diffprune.io.checkpoint import read_config
from diffprune.pruners.replaced import Replaced
from diffprune.pruning.pretrained import check_model, from_pretrained, make_ready
from diffprune.vlm.tokenize import weights_hash
from tests.test_families import pictures, tiny


def model(seed: int) -> VLM:
    made: VLM = registry.find("models", "llava").tiny(seed=seed)  # type: ignore[attr-defined]
    return made


def scorer(vlm: VLM, folder: Path, **facts: Any) -> Path:
    """Written as training writes it, untrained."""
    method = registry.load("pruners", "diffprune")
    torch.manual_seed(0)
    method.build(vlm.encode(vlm.pixels(pictures())))
    about = {"model": "tiny llava", "model_hash": vlm.weights_hash, "dtype": vlm.dtype}
    method.save_pretrained(folder, **about | facts)
    return folder


def ask(vlm: VLM, method: Any) -> list[str]:
    return pruning.generate(vlm, pictures()[0], "what?", pruner=method, budget=4, max_new_tokens=2)


def test_another_model_of_the_same_width_is_refused_everywhere(tmp_path: Path) -> None:
    own, other = model(0), model(1)
    folder = scorer(own, tmp_path / "scorer")
    method = from_pretrained(folder)
    assert len(ask(own, method)) == 1
    sentence = "DiffPrune was trained on tiny llava with the weights .* this is .* with other ones .*other_model=True"
    with pytest.raises(ValueError, match=sentence):
        ask(other, method)
    with pytest.raises(ValueError, match=sentence), diffprune.pruned(other.model, method, 4):
        pass
    with pytest.raises(ValueError, match="trained on tiny llava"):
        ask(other, Replaced(method))
    with pytest.raises(ValueError, match=sentence):
        ask(other, f"diffprune(weights='{folder}')")


@pytest.mark.parametrize("name", ["diffprune", "atp"])
def test_what_was_loaded_follows_the_model_to_its_device(name: str, tmp_path: Path) -> None:
    """To torch's meta device, which stands for one that is not the CPU; `atp` looks at no features that it could follow."""
    vlm = model(0)
    method = registry.load("pruners", name)
    method.build(vlm.encode(vlm.pixels(pictures())))
    method.save_pretrained(tmp_path / "scorer")
    vlm.device = torch.device("meta")
    for loaded in (from_pretrained(tmp_path / "scorer"), registry.load("pruners", f"{name}(untrained=True)")):
        make_ready(Replaced(loaded), vlm)
        assert all(p.is_meta for p in loaded.networks.parameters())  # type: ignore[attr-defined]


def test_its_user_may_say_so_and_the_spelling_says_it(tmp_path: Path) -> None:
    own, other = model(0), model(1)
    folder = scorer(own, tmp_path / "scorer")
    allowed = from_pretrained(folder, other_model=True)
    assert len(ask(other, allowed)) == 1 and str(allowed.spec) == "diffprune(other_model=True)"
    allowed.save_pretrained(tmp_path / "again")  # type: ignore[attr-defined]
    assert read_config(tmp_path / "again")["spec"] == "diffprune" and str(allowed.spec) == "diffprune(other_model=True)"
    assert "other_model" not in (tmp_path / "again" / "README.md").read_text()
    config = (tmp_path / "again" / "config.json").read_text()  # as earlier versions wrote it
    (tmp_path / "again" / "config.json").write_text(config.replace('"spec": "diffprune"', '"spec": "diffprune(other_model=True)"'))
    assert not from_pretrained(tmp_path / "again").other_model
    with pytest.raises(ValueError, match="was trained on tiny llava"):
        ask(other, from_pretrained(tmp_path / "again"))
    with diffprune.pruned(other.model, f"diffprune(weights='{folder}', other_model=True)", 4):
        pass
    for name in ("gumbel_topk", "gumbel_keepdrop"):
        assert registry.load("pruners", f"{name}(other_model=True)").other_model


def test_the_type_weights_are_loaded_in_makes_no_other_model(tmp_path: Path) -> None:
    """bfloat16 weights are the same model in float32; those of another seed are not, in any type."""
    half = model(0)
    half.model.to(torch.bfloat16)
    wide = model(0)
    wide.model.to(torch.bfloat16).to(torch.float32)
    assert half.weights_hash != wide.weights_hash and weights_hash(wide.model, torch.bfloat16) == half.weights_hash
    method = from_pretrained(scorer(half, tmp_path / "half"))
    check_model(method, wide)
    check_model(from_pretrained(scorer(wide, tmp_path / "wide")), half)
    changed = model(1)
    with pytest.raises(ValueError, match=r"\(bfloat16\), this is tiny llava with other ones \(float32\)"):
        check_model(method, changed)


def test_weights_that_change_in_place_are_noticed(tmp_path: Path) -> None:
    vlm = model(0)
    method = from_pretrained(scorer(vlm, tmp_path / "scorer"))
    with diffprune.pruned(vlm.model, method, 4):
        pass
    with torch.no_grad():
        next(vlm.model.parameters()).add_(1)
    with pytest.raises(ValueError, match="other ones"), diffprune.pruned(vlm.model, method, 4):
        pass


def test_cards_without_a_hash_and_rules_are_taken_as_they_are(tmp_path: Path) -> None:
    vlm = tiny("llava")
    folder = scorer(model(0), tmp_path / "old", model_hash="")
    assert from_pretrained(folder).trained_on is None
    for method in (from_pretrained(folder), diffprune.pruner("attention"), None):
        check_model(method, vlm)
