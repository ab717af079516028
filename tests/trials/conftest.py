"""Trials: each in a scene of its own; the table of what came of them is printed at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    report = yield
    if (mark := item.get_closest_marker("trial")) and mark.args:
        report.user_properties = [("trial", mark.args[0]), ("load", os.getloadavg()[0])]
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    rows = []
    for result in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(result, []):
            about = dict(getattr(report, "user_properties", ()))
            if "trial" in about and (report.when == "call" or result != "passed"):
                name = report.nodeid.partition("::")[2]
                rows.append(
                    (about["trial"], f"{about['trial']:>5}  {result:7}  {report.duration:7.1f}  {about['load']:5.1f}  {name}")
                )
    if rows:
        terminalreporter.write_line("trial  result   seconds   load  test")
    for _, text in sorted(rows):
        terminalreporter.write_line(text)
