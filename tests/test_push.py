"""A scorer goes to the Hub and comes back: three files, a card, the same weights. The Hub is a stand-in on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import diffprune
from diffprune.cli import commands
from diffprune.core import registry
from diffprune.pruning.pretrained import from_pretrained, push_to_hub
from tests.hub_server import TOKEN, Repositories, serving
from tests.test_scorer_model import model, scorer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repositories]:
    """The client speaks to the stand-in, and keeps what it downloads in the test's folder."""
    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def test_a_scorer_goes_to_the_hub_and_comes_back(hub: Repositories, tmp_path: Path) -> None:
    folder = scorer(model(0), tmp_path / "own", model="owner/other-7b", accuracy=0.5, seed=3)
    (folder / "notes.txt").write_text("stays here")
    address = push_to_hub(folder, "me/scorer")
    files = hub.repositories["me/scorer"]
    assert set(files) == {"README.md", "config.json", "model.safetensors"} and hub.private["me/scorer"] is True
    assert address == f"{hub.address}/me/scorer/commit/{hub.commit('me/scorer')}"
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: diffprune\ntags: [visual-token-pruning]\nbase_model: owner/other-7b\n---\n")
    assert 'diffprune.from_pretrained("me/scorer")' in card and "- accuracy: 0.5" in card
    config = json.loads(files["config.json"])
    assert config == json.loads((folder / "config.json").read_text()), "what it was trained on goes with it"
    again, own = from_pretrained("me/scorer"), from_pretrained(folder)
    assert again.weights_sha256 == own.weights_sha256 and again.trained_on == own.trained_on and again.trained_seed == 3


def test_a_loaded_scorer_keeps_its_facts_and_may_be_public(hub: Repositories, tmp_path: Path) -> None:
    own = from_pretrained(scorer(model(0), tmp_path / "own"))
    diffprune.push_to_hub(own, "me/open", private=False)
    assert hub.private["me/open"] is False and b"model_hash" in hub.repositories["me/open"]["config.json"]
    code, said = commands.call(["push", str(tmp_path / "own"), "me/third"])
    assert (code, said) == (0, "") and "me/third" in hub.repositories


def test_a_mistyped_folder_is_no_name_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a folder that is here, nobody is asked: the Hub's client would try for half a minute."""
    Path("models/my-llava").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.HfApi.snapshot_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    sentence = r"there is no folder models/my-lava here \(models has my-llava: did you mean 'my-llava'\?\)"
    for load in (diffprune.load, from_pretrained, lambda name: registry.load("pruners", f"diffprune(weights={name!r})")):
        with pytest.raises(ValueError, match=sentence):
            load("models/my-lava")


def _unreachable(*_: object, **__: object) -> None:
    raise OSError("Name or service not known")


def test_what_cannot_be_pushed_is_said_in_a_sentence(hub: Repositories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = scorer(model(0), tmp_path / "own")
    for what, name, reason in (
        (folder, "nobody", "is no name of the Hub: write 'owner/name'"),
        (folder, "../x", "is no name of the Hub"),
        (tmp_path / "none", "me/x", "there is no folder .*none"),
        ("runs/none", "me/x", "there is no folder 'runs/none': give a trained scorer, or the folder"),
        (registry.load("pruners", "diffprune"), "me/x", "has learnt nothing"),
        (registry.load("pruners", "grid"), "me/x", "has learnt nothing"),
    ):
        with pytest.raises(ValueError, match=reason):
            push_to_hub(what, name)
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(ValueError, match=r"me/x could not be written \(.*401.*\): log in with `hf auth login`"):
        push_to_hub(folder, "me/x")
    with monkeypatch.context() as away:
        away.setattr("huggingface_hub.HfApi.create_repo", _unreachable)
        with pytest.raises(ValueError, match=r"me/x could not be written \(.*not known.*\): try again where there is a network"):
            push_to_hub(folder, "me/x")
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="sha256 differs"):
        push_to_hub(folder, "me/x")
    assert not hub.repositories
