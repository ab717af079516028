"""An export is there at once or not at all, and a report that has not seen all records is not exported."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

import pytest

from diffprune.cli import commands, runs
from diffprune.store import Store
from diffprune.store import manifest as manifests
from diffprune.store.manifest import VERSION
from diffprune.verify.integrity import unsound
from tests.test_disks import disk
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


@pytest.mark.parametrize("kind", ["link", "link to nothing", "mount"])
def test_an_export_goes_through_links_and_into_other_file_systems(kind: str) -> None:
    reported()
    with contextlib.ExitStack() as stack:
        if kind == "mount":
            stack.enter_context(disk("out", 4096))
        else:
            Path("out").symlink_to("target")
        if kind == "link":
            Path("target").mkdir()
        assert commands.call(["export", "run", "out"]) == (0, "")
        assert {"report.html", "store", "numbers.csv", "tables"} <= {path.name for path in Path("out").iterdir()}
        assert Path("out").is_symlink() == (kind != "mount") and not list(Path().rglob("*.unfinished"))
        assert len(Store("out/store").done()) == 1


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("run", "run lies in the run that is exported: choose a folder outside run"),
        ("run/report", "run/report lies in the run that is exported: choose a folder outside run"),
        ("notes.txt", "notes.txt is a file, but a folder is needed"),
    ],
)
def test_a_place_that_no_export_can_have_is_refused_before_any_work(out: str, says: str) -> None:
    reported()
    Path("notes.txt").write_text("stay")
    before = sorted(Path().rglob("*"))
    assert commands.call(["export", "run", out]) == (2, says)
    assert sorted(Path().rglob("*")) == before


def test_an_export_to_a_full_disk_says_so_and_leaves_nothing() -> None:
    run = reported()
    size = sum(path.stat().st_size for path in run.rglob("*.parquet"))
    with disk("small", size // 1024 + 200) as place:
        code, said = commands.call(["export", "run", "small/out"])
        assert code == 1 and said.startswith("disk full, could not write: ") and "traceback" not in said
        assert list(place.iterdir()) == []


def test_the_report_of_a_folder_goes_where_it_is_told_and_not_beside_records_of_others() -> None:
    reported()
    shutil.rmtree("run/report")
    assert commands.call(["report", "run", "--out", "runs"]) == (0, "")  # which is the default of a job
    assert Path("runs/report.html").is_file() and not Path("run/report").exists()
    shutil.copytree("run", "other")
    code, said = commands.call(["report", "run", "--out", "other"])
    assert code == 2 and said.startswith("other has a store of its own") and not Path("other/report.html").exists()
    assert commands.call(["report", "run", "--out", "run"]) == (0, ""), "its own store"


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
    takes = "takes --name, --out and --set subject=LABEL alone"
    assert code == 2 and said == f"the report of the folder run {takes}: leave out --pruner, --dry-run, --set foo.bar"


FAULTS = {
    "a short row": ("report/numbers.csv", lambda data: data + b"a,b\n", "numbers.csv is damaged"),
    "no number": ("report/numbers.csv", lambda data: data.replace(b",50.0,", b",fifty,"), "numbers.csv is damaged"),
    "no digits": ("report/numbers.csv", lambda data: re.sub(rb",1,(\"?50)", rb",x,\1", data), "numbers.csv is damaged"),
    "no text": ("report/numbers.csv", lambda data: b"\xff" + data, "numbers.csv is damaged"),
    "no text on the page": ("report/report.md", lambda data: b"\xff" + data, "report.md is damaged"),
    "no page": ("report/report.md", None, "report.md is missing"),
    "a part cut short": ("store/parts/answers/*.parquet", lambda data: data[:-9], "run/store has a damaged file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_verified_ends_with_2_and_one_sentence(fault: str) -> None:
    name, change, says = FAULTS[fault]
    (path,) = reported().glob(name)
    if change is None:
        path.unlink()
    else:
        before = path.read_bytes()
        path.write_bytes(change(before))
        assert path.read_bytes() != before
    code, said = commands.call(["verify", "run"])
    assert code == 2 and says in said and "`diffprune report" in said and "\n" not in said, said


def test_a_store_whose_files_were_changed_is_not_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that still agree with a page say nothing of a file that is not the one that was written."""
    reported()
    assert unsound(Path("run/store")) == []
    part, *_ = Path("run/store").glob("parts/outcomes/*.parquet")
    manifest, *_ = Path("run/store").glob("manifests/*.json")
    whole, told = part.read_bytes(), manifest.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert unsound(Path("run/store")) == [f"{part.relative_to('run/store')} was changed after it was written (sha256 differs)"]
    part.unlink()
    assert unsound(Path("run/store")) == [f"{part.relative_to('run/store')} is missing"]
    part.write_bytes(whole)
    manifest.write_bytes(told.replace(b'"status": "ok"', b'"status": "no"'))
    (said,) = unsound(Path("run/store"))
    assert said.startswith(str(manifest.relative_to("run/store"))) and "checksum" in said
    with monkeypatch.context() as newer:
        newer.setattr(manifests, "VERSION", VERSION + 1)
        publish(Store(Path("newer/store")), cell(), answers(6))
    with pytest.raises(ValueError, match="it is verified by the version that wrote it"):
        unsound(Path("newer/store"))
