"""The doctor's screen: true on this machine, and it names what is wrong where something is."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch

from diffprune.cli import commands, doctor
from diffprune.core import registry


def of(what: str) -> doctor.Finding:
    return next(f for f in doctor.examine() if f.what == what)


def test_what_it_finds_here_is_true() -> None:
    found = {f.what: f for f in doctor.examine()}
    assert found["packages"].state == "ok" and f"torch {metadata.version('torch')}" in found["packages"].detail
    assert found["families"].detail.split(", ") == registry.names("models")
    assert found["embedded model"].state == "ok"
    assert ("GPU" in found) != torch.cuda.is_available()


def test_it_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=99", "no-such-package", "ray==2.60.*; extra == 'other'"])
    finding = of("packages")
    assert (
        finding.state == "missing" and "is outside >=99" in finding.detail and "no-such-package is not installed" in finding.detail
    )
    monkeypatch.setattr(metadata, "requires", lambda name: metadata.distribution(f"no-{name}").requires)
    finding = of("packages")
    assert finding.state == "note" and finding.detail.startswith("diffprune is not installed"), "as where its code is merely there"
    monkeypatch.setattr(doctor, "load", lambda name: (_ for _ in ()).throw(ValueError("model.safetensors: altered or damaged")))
    assert of("embedded model").state == "missing"


def test_the_command_shows_one_screen_and_fails_only_where_something_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _ = commands.call(["doctor"])
    shown = capsys.readouterr().out
    assert code == 0 and "families" in shown and len(shown.splitlines()) < 40
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=99"])
    assert commands.call(["doctor"])[0] == 1
