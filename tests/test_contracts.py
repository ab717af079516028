"""Every pruner keeps every contract; and every contract catches the fault it is about, and no other does.

Pruners are found by their files. `tests/mutants/pruners/` holds one for each contract, of the contract's name, with one fault: it
breaks that contract and keeps all others.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from diffprune.core import registry
from tests.contracts import CONTRACTS, made, of

MUTANTS = Path(__file__).parent / "mutants"
KEPT = [pair for name in registry.names("pruners") for pair in of(name)]


@pytest.mark.parametrize(("title", "spelling"), KEPT, ids=[f"{spelling}-{title}" for title, spelling in KEPT])
def test_every_pruner_keeps_it(title: str, spelling: str) -> None:
    CONTRACTS[title].holds(partial(made, spelling))


@pytest.mark.parametrize("title", CONTRACTS)
def test_it_alone_catches_the_fault_it_is_about(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.FOLDER, str(MUTANTS))
    broken = {}
    for other, spelling in asked_of(title):
        try:
            CONTRACTS[other].holds(partial(made, spelling))
        except AssertionError as error:
            broken[other] = error
    assert list(broken) == [title], broken


def asked_of(name: str) -> list[tuple[str, str]]:
    """(contract, spelling): all contracts about a plug-in that is no wrapper."""
    plugin = registry.find("pruners", name)
    return [(title, name) for title, one in CONTRACTS.items() if issubclass(plugin, one.of)]
