"""Trials: each in a scene of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from scenario import EVALUATE, Curve, Scene, Tables, answers, losses, train


@pytest.fixture
def scene(own_folder: Path) -> Iterator[Scene]:
    made = Scene(own_folder)
    yield made
    made.end()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """What `EVALUATE` finds where nothing happens."""
    made = Scene(out := tmp_path_factory.mktemp("undisturbed"))
    try:
        run = made.diffprune(str(out / "runs"), *EVALUATE, "--workers", "1")
        assert run.wait(120) == 0, run.text
        made.assert_clean(out / "runs" / "tried")
    finally:
        made.end()
    return answers(out / "runs" / "tried")


def undisturbed_curve(out: Path, workers: int) -> Curve:
    made = Scene(out)
    try:
        run = made.diffprune(str(out / "runs"), *train(workers=workers))
        assert run.wait(120) == 0, run.text
        made.assert_clean(out / "runs" / "tried")
    finally:
        made.end()
    found = losses(out / "runs" / "tried")
    assert len(found) == 30
    return found


@pytest.fixture(scope="session")
def curve(tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """Losses of `train` where nothing happens."""
    return undisturbed_curve(tmp_path_factory.mktemp("undisturbed"), 1)


@pytest.fixture(scope="session")
def curve_of_two(tmp_path_factory: pytest.TempPathFactory, curve: Curve) -> Curve:
    """Those of two workers, which are those of one but for the order of sums: repeated, they are the very same."""
    found = undisturbed_curve(tmp_path_factory.mktemp("two"), 2)
    assert found == pytest.approx(curve, rel=1e-3)
    return found
