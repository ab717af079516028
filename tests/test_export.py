"""An export is there at once or not at all, and a report that has not seen all records is not exported."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from diffprune.cli import commands, runs
from diffprune.store import Store
from tests.test_own_job import answers, cell, publish


def reported() -> Path:
    """A run's folder with its report."""
    publish(Store(Path("run/store")), cell(), answers(6))
    assert commands.call(["report", "run"])[0] == 0
    return Path("run")


def test_an_export_that_was_cut_short_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    reported()

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runs, "_put", cut)
        assert commands.call(["export", "run", "out"])[0] == 130
    assert not Path("out").exists() and not Path(".out.unfinished").exists()
    Path(".out.unfinished/store/manifests").mkdir(parents=True)  # as SIGKILL leaves it
    assert commands.call(["export", "run", "out"]) == (0, "")
    assert {"report.html", "store", "numbers.csv"} <= {path.name for path in Path("out").iterdir()}
    assert not Path("out/seen.txt").exists() and not Path(".out.unfinished").exists()
    code, said = commands.call(["export", "run", "out"])
    assert code == 2 and "holds records already: choose another folder" in said
    Path("beside").mkdir()
    Path("beside/notes.txt").write_text("stay")
    assert commands.call(["export", "run", "beside"]) == (0, "")
    assert Path("beside/notes.txt").exists() and Path("beside/store").is_dir()


def test_what_a_report_has_seen_is_told_by_names_not_by_times() -> None:
    run = reported()
    shutil.copytree(run, "copied")
    for file in Path("copied/store").rglob("*.json"):  # a copy may write the store last
        os.utime(file, (2e9, 2e9))
    assert commands.call(["export", "copied", "out"]) == (0, "")
    publish(Store(run / "store"), cell(pruner="grid"), answers(6))
    for file in run.rglob("*"):
        os.utime(file, (1e9, 1e9))
    code, said = commands.call(["export", "run", "other"])
    assert code == 2 and "its store has records that its report has not seen" in said


def test_the_report_of_a_folder_refuses_options_that_it_has_no_use_for() -> None:
    reported()
    code, said = commands.call(["report", "run", "--pruner", "grid", "--set", "foo.bar=1", "--dry-run"])
    assert code == 2 and said == "the report of the folder run takes --name and --out alone: leave out --pruner, --set, --dry-run"
