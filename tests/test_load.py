"""Models by name: what is damaged, foreign or unsafe is refused with file and reason, before any work starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import FunctionType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffprune.vlm.load import EMBEDDED, TRANSFORMERS, described, load


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the embedded model without its checksum, so that what lies behind it is tested too."""
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder)
    (folder / "model.safetensors.sha256").unlink()
    return folder


def test_the_embedded_model_loads_frozen() -> None:
    vlm = load("embedded")
    assert vlm.num_visual_tokens == 144 and vlm.name == "embedded" and len(vlm.weights_hash) == 20
    assert not vlm.model.training and not any(p.requires_grad for p in vlm.model.parameters())
    assert vlm.weights_hash == load("embedded").weights_hash


@pytest.mark.parametrize("look", [load, described])
@pytest.mark.parametrize("name", ["embedded", "tiny(llava)"])
def test_a_transformers_that_is_too_old_is_refused(look: FunctionType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(look.__globals__, "transformers", SimpleNamespace(__version__="5.22.1"))
    with pytest.raises(ValueError, match=r"^transformers 5\.22\.1 is installed here, .*: install transformers 5\.23 or later$"):
        look(name)


def test_it_is_older_than_what_the_package_asks_for() -> None:
    assert f'"transformers>={TRANSFORMERS},<6"' in (Path(__file__).parent.parent / "pyproject.toml").read_text()


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1000] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"model\.safetensors: altered or damaged"):
        load(str(folder))


def test_truncated_nan_missing_and_misshapen_weights_are_refused(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    whole, values = file.read_bytes(), {n: v.clone() for n, v in load_file(file).items()}  # copies: the file changes below
    name = next(n for n, v in values.items() if v.ndim == 2)

    def refused(reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            load(str(checkpoint))

    file.write_bytes(whole[: len(whole) // 2])
    refused("not a complete safetensors file")
    save_file({**values, name: torch.full_like(values[name], float("nan"))}, file, metadata={"format": "pt"})
    refused("holds NaN")
    save_file({**values, name: torch.zeros(3, 3)}, file, metadata={"format": "pt"})
    refused("do not fit")
    save_file({n: v for n, v in values.items() if n != name}, file, metadata={"format": "pt"})
    refused("do not fit")
    file.unlink()
    refused("no safetensors weights")
    torch.save(values, checkpoint / "pytorch_model.bin")
    refused("is a pickle, which is refused")


def test_what_is_no_supported_model_is_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model 'embeded'"):
        load("embeded")
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load(str(tmp_path))
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(ValueError, match="'bert' is no vision-language model"):
        load(str(checkpoint))
