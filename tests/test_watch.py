"""A run one can watch: what is read of its folder against what was written there, the page in a browser, the terminal, its ends."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from diffprune.cli import commands
from diffprune.io.attempts import Fenced
from diffprune.io.blob_store import LocalBlobs, open_blobs
from diffprune.io.run_lock import lock
from diffprune.store import Store
from diffprune.train.checkpoints import Files, claim
from diffprune.train.step_log import STEPS
from diffprune.watch import observer as observing
from diffprune.watch import screen as screens
from diffprune.watch.drawing import _ticks
from diffprune.watch.news import News
from diffprune.watch.observer import Observer
from diffprune.watch.page import page
from diffprune.watch.screen import follow, screen, spark
from diffprune.watch.snapshot import FILE, PAGE, Curve, Failure, Point, Snapshot, Stage, read, standing
from tests.browser import CHROMIUM, Browser
from tests.records import evaluate_cell, measure_cell, outcome, prediction, provenance, step, timing
from tests.s3_server import bucket, server

SCRIPT, ARABIC, ESCAPE = "<script>alert(1)</script>", "سؤال \u202eعن", "\x1b[2J[red]gone[/red]"
SPENT = {("full", "prefill"): 12.0, ("pruned", "prefill"): 5.0, ("pruned", "overhead"): 1.0, ("native", "prefill"): 5.0}


def log(folder: Path, scorer: str, *steps: int, loss: float = 1.0) -> None:
    files = Files(folder, claim(folder))
    for number in steps:
        values = {
            "scorer": scorer,
            **vars(step(step=number, loss=loss + number, validation_hard=0.5 if number == 3 else float("nan"))),
        }
        files.append({k: None if v != v else v for k, v in values.items()})


def fill(folder: Path, label: str = "") -> None:
    """A store with accuracies of two methods, one of them measured, and one failure."""
    store = Store(folder / "store")
    for asked, budget, credits in (
        ("unpruned", "Keep(1)", (1, 1, 1, 0)),
        ("grid", "Keep(16)", (1, 0, 1, 0)),
        ("grid", "Keep(4)", (0, 0, 1, 0)),
    ):
        cell = evaluate_cell(asked, budget)
        cell = replace(cell, method=replace(cell.method, label=label)) if label and asked == "grid" else cell
        rows = [
            prediction(i, float(credit), visual_kept=144 if asked == "unpruned" else int(budget[5:-1]))
            for i, credit in enumerate(credits)
        ]
        store.publish({"predictions": rows, "outcomes": [outcome(4)]}, cell=cell, provenance=provenance())
    cell = measure_cell("grid", "Keep(16)")
    cell = replace(cell, method=replace(cell.method, label=label)) if label else cell
    times = [timing(ms, span=span, arm=arm, repetition=turn) for (arm, span), ms in SPENT.items() for turn in range(6)]
    store.publish({"timings": times, "outcomes": [outcome(24)]}, cell=cell, provenance=provenance())
    broken = evaluate_cell("random", "Keep(4)")
    store.publish({"outcomes": [outcome(0, "failed", f"ValueError: {SCRIPT}")]}, cell=broken, provenance=provenance())


def snapshot(**changed: object) -> Snapshot:
    now = time.time()
    values: dict[str, object] = {
        "run": "demo", "title": f"{SCRIPT} {ARABIC}", "attempt": 1, "began": now - 75, "written": now, "every_s": 3.0,
        "stages": (Stage(name="train", state="running", began=now - 70, total=2, done=1, note=ESCAPE), Stage(name="report")),
        "curves": (Curve(scorer=SCRIPT, step=3, steps=10, loss=0.5, points=((0, 2.0), (1, 1.0), (2, 0.5))),),
        "points": (Point(method="unpruned", budget="", kept=144, accuracy=0.9, cells=1, bound=True),
                   Point(method=ARABIC, budget="Keep(16)", kept=16, accuracy=0.5, cells=2, speedup=2.0)),
        "failures": (Failure(what=ESCAPE, reason=SCRIPT),), "num_failures": 7, "timed": "batch 8",
    }  # fmt: skip
    return Snapshot.model_validate(values | changed)


# --- what is read --------------------------------------------------------------------------------------------------------


def test_the_step_log_is_read_little_by_little_and_redone_steps_count_once(tmp_path: Path) -> None:
    news = News(tmp_path, {"a-0": 8})
    assert news.look() == [] and news.curves() == ()
    log(tmp_path, "a-0", 0, 1)
    assert [(row.series, row.step, row.values["loss"]) for row in news.look()] == [("train/a-0", 0, 1.0), ("train/a-0", 1, 2.0)]
    with (tmp_path / STEPS).open("ab") as stream:
        stream.write(b'{"torn": ')
    assert news.look() == []
    files = Files(tmp_path, claim(tmp_path))
    files.append({"begin": ["a-0", 1]})  # a killed run goes on from step 1
    assert news.look() == [] and [curve.step for curve in news.curves()] == [1], "what is done again does not count yet"
    log(tmp_path, "a-0", 1, 2, 3, loss=5.0)
    assert [row.step for row in news.look()] == [1, 2, 3]
    (curve,) = news.curves()
    assert (curve.step, curve.steps, curve.loss, curve.validation) == (4, 8, 8.0, 0.5)
    assert curve.points == ((0, 1.0), (1, 6.0), (2, 7.0), (3, 8.0))


def test_a_long_curve_is_means_of_neighbouring_steps(tmp_path: Path) -> None:
    news = News(tmp_path, {"a-0": 240})
    log(tmp_path, "a-0", *range(6))
    news.look()
    (curve,) = news.curves()
    assert curve.points == ((0.5, 1.5), (2.5, 3.5), (4.5, 5.5)), "240 steps in 120 bins"


def test_accuracies_speedups_and_failures_come_in_with_their_cells(tmp_path: Path) -> None:
    news = News(tmp_path, {})
    fill(tmp_path)
    told = {(row.series, row.step): dict(row.values) for row in news.look()}
    assert [(p.budget, p.kept, p.accuracy, p.speedup, p.bound) for p in news.points()] == [
        ("Share(1)", 144, 0.75, None, True), ("Keep(16)", 16, 0.5, 2.0, False), ("Keep(4)", 4, 0.25, None, False),
    ]  # fmt: skip
    assert told["measure/grid", 16] == {"net_speedup": 2.0} and ("evaluate/grid", 16) in told
    (failure,), num = news.failures()
    assert num == 1 and failure.reason == f"ValueError: {SCRIPT}" and failure.what.startswith("evaluate ")
    assert news.look() == [], "nothing is read twice"
    rows = [prediction(i, 1.0) for i in range(4)]
    again = {"predictions": rows, "outcomes": [outcome(4)]}
    Store(tmp_path / "store").publish(again, cell=evaluate_cell("random", "Keep(4)"), provenance=provenance())
    assert len(news.look()) == 1 and news.failures() == ((), 0), "what was tried again is no failure"


def test_only_cells_of_the_plan_are_shown(tmp_path: Path) -> None:
    """As where a run was followed by one of the same name with a limit: both stand in the store, and only the second is shown."""
    news, store = News(tmp_path, {}), Store(tmp_path / "store")
    fill(tmp_path)
    cell = evaluate_cell("grid", "Keep(16)", limit=1)
    store.publish({"predictions": [prediction(0, 1.0)], "outcomes": [outcome(1)]}, cell=cell, provenance=provenance())
    news.look()
    assert [p.accuracy for p in news.points() if p.budget == "Keep(16)"] == [0.75], "while nothing is known of the plan"
    news.planned = {"evaluate": {cell.key}}
    (point,) = news.points()
    assert (point.accuracy, point.cells, point.speedup) == (1.0, 1, 2.0) and news.failures() == ((), 0)
    news.planned = {"evaluate": {cell.key}, "measure": {"another"}}
    assert news.points()[0].speedup is None and news.speedups() == (None, {})


def test_speedups_are_those_of_one_batch_and_mode_and_a_mean_over_sessions(tmp_path: Path) -> None:
    news, store = News(tmp_path, {}), Store(tmp_path / "store")
    fill(tmp_path)  # one session in mode eager with a batch of 8, 12 ms against 6
    for about, factor, flags in (
        ({"session": 1}, 4, ""), ({"mode": "graph"}, 7, ""), ({"batch": 1}, 9, ""), ({"session": 2}, 99, "overhead_excluded"),
    ):  # fmt: skip
        spent = SPENT | {("full", "prefill"): 6.0 * factor}
        times = [
            timing(ms, span=span, arm=arm, repetition=turn, flags=flags) for (arm, span), ms in spent.items() for turn in range(6)
        ]
        cell = measure_cell("grid", "Keep(16)", **about)
        store.publish({"timings": times, "outcomes": [outcome(24)]}, cell=cell, provenance=provenance())
    news.look()
    timed, found = news.speedups()
    assert str(timed) == "batch 8, mode eager" and found == {("Grid", "Keep(16)"): pytest.approx((2 * 4) ** 0.5)}


# --- the observer ----------------------------------------------------------------------------------------------------------


def observed(folder: Path, attempt: int = 1) -> Observer:
    made = Observer(folder, "demo", "A demo", attempt, {"a-0": 4})
    made.plan({"train": (), "evaluate": ("a", "b", "c", "d"), "report": ()})
    return made


def test_snapshot_and_page_follow_a_run_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observing, "EVERY_S", 0.02)
    with lock(tmp_path / "store", "demo") as attempt, observed(tmp_path, attempt) as watcher:
        watcher.begins("train")
        watcher.expects("train", scorers=[tmp_path / "scorers" / "a-0"])
        log(tmp_path, "a-0", 0, 1)
        until(lambda: (tmp_path / FILE).is_file() and bool(read(tmp_path).curves))
        seen = read(tmp_path)
        assert seen.state == "running" and [s.state for s in seen.stages] == ["running", "waiting", "waiting"]
        assert seen.stages[0].total == 1 and seen.stages[1].total == 4 and standing(tmp_path, seen) == "running"
        watcher.ends("train")
        watcher.begins("evaluate")
        fill(tmp_path)
        watcher.expects("evaluate", list(Store(tmp_path / "store").statuses()))
        watcher.ends("evaluate", "1 cell failed")
    seen = read(tmp_path)
    assert seen.state == "finished" and [(s.done, s.failed) for s in seen.stages][1] == (4, 1)
    assert seen.stages[1].state == "failed" and seen.num_failures == 1 and len(seen.points) == 3
    assert seen.spent_s > 0 and list((tmp_path / "tensorboard").rglob("events.*"))
    for name in (FILE, PAGE):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert not list(tmp_path.glob(".*.temporary"))
    assert 'http-equiv="refresh"' not in (tmp_path / PAGE).read_text()


def test_a_snapshot_leaves_out_what_the_run_does_not_ask(tmp_path: Path) -> None:
    with lock(tmp_path / "store", "demo") as attempt, observed(tmp_path, attempt) as watcher:
        watcher.plan({"evaluate": [evaluate_cell("grid", "Keep(16)").key], "report": []})
        fill(tmp_path)
    seen = read(tmp_path)
    assert [point.budget for point in seen.points] == ["Keep(16)"] and seen.num_failures == 0 and seen.timed == "batch 8"


def test_how_long_a_stage_took_is_no_matter_of_a_clock_that_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour forward while the first one is at work, and back again in the second, which is at work when it is looked at last."""
    told = time.time
    with lock(tmp_path / "store", "demo") as attempt, observed(tmp_path, attempt) as watcher:
        watcher.begins("train")
        monkeypatch.setattr(time, "time", lambda: told() + 3600)
        watcher.ends("train")
        watcher.begins("evaluate")
        monkeypatch.setattr(time, "time", told)
    seen = read(tmp_path)
    lasted = [stage.lasted(seen.written) for stage in seen.stages]
    assert all(0 <= float(one.removesuffix(" s")) < 30 for one in lasted[:2]) and lasted[2] == "–", lasted
    assert seen.stages[1].ended and seen.stages[1].began and seen.stages[1].ended >= seen.stages[1].began


@pytest.mark.parametrize(
    ("error", "state"), [(KeyboardInterrupt(), "interrupted"), (RuntimeError("two cells failed"), "failed: two cells failed")]
)
def test_how_a_run_ended_is_in_its_snapshot(error: BaseException, state: str, tmp_path: Path) -> None:
    with pytest.raises(type(error)), lock(tmp_path / "store", "demo") as attempt, observed(tmp_path, attempt):
        raise error
    assert standing(tmp_path, read(tmp_path)) == state


def test_whatever_goes_wrong_with_watching_is_said_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(observing, "EVERY_S", 0.01)
    monkeypatch.setattr(observing, "page", lambda seen: 1 / 0)
    with lock(tmp_path / "store", "demo") as attempt, observed(tmp_path, attempt):
        time.sleep(0.2)
    assert capsys.readouterr().out.count("live.html is no longer written, the run goes on: ZeroDivisionError") == 1


def test_storage_that_fails_costs_looks_not_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(observing, "EVERY_S", 0.01)

    def full(*_: object) -> None:
        raise OSError(28, "disk full")

    with lock(tmp_path / "store", "demo") as attempt:
        with monkeypatch.context() as patch:
            patch.setattr(observing, "page", full)
            watched = observed(tmp_path, attempt)
            watched.__enter__()
            until(lambda: watched._failing)
            time.sleep(0.1)
        watched.__exit__(None, None, None)
    assert read(tmp_path).state == "finished" and (tmp_path / PAGE).is_file()
    assert capsys.readouterr().out.count("live.html is not written, and tried again: OSError") == 1


def test_a_run_that_was_taken_over_leaves_the_files_alone(tmp_path: Path) -> None:
    with lock(tmp_path / "store", "demo") as first:
        pass
    with lock(tmp_path / "store", "demo"), observed(tmp_path, first):
        pass
    assert not (tmp_path / FILE).exists()


def test_a_folder_that_vanished_is_not_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observing, "EVERY_S", 0.02)
    folder = tmp_path / "run"
    with pytest.raises(Fenced), lock(folder / "store", "demo") as attempt, observed(folder, attempt):
        until(lambda: (folder / PAGE).is_file())
        folder.rename(tmp_path / "elsewhere")
    assert not folder.exists() and (tmp_path / "elsewhere" / PAGE).is_file()


def until(what: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


KILLED = """
import sys, time
from pathlib import Path
from diffprune.io.run_lock import lock
from diffprune.watch.observer import Observer
folder = Path(sys.argv[1])
with lock(folder / "store", "demo") as attempt, Observer(folder, "demo", "", attempt) as watcher:
    watcher.plan({"train": ()})
    watcher.begins("train")
    time.sleep(600)
"""


def test_a_killed_run_does_not_seem_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = Path(__file__).parent.parent
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env=os.environ | {"PYTHONPATH": str(here)})
    try:
        until(lambda: (tmp_path / PAGE).is_file(), 120)
        seen = read(tmp_path)
        assert seen.state == "running" and standing(tmp_path, seen) == "running"
        assert standing(tmp_path, seen, seen.written + 100).startswith("no news for 100 s")
    finally:
        process.kill()
        process.wait()
    assert standing(tmp_path, read(tmp_path)).startswith("killed: the process that drove it is gone")
    assert commands.call(["watch", str(tmp_path)]) == (0, "")
    assert "killed" in capsys.readouterr().out
    assert 'http-equiv="refresh"' in (tmp_path / PAGE).read_text() and 'id="late" hidden' in (tmp_path / PAGE).read_text()


# --- what is shown -----------------------------------------------------------------------------------------------------------


def test_runs_that_cannot_be_watched_end_with_a_sentence(tmp_path: Path) -> None:
    code, said = commands.call(["watch", "nothing"])
    assert code == 2 and said == "there is no run 'runs/nothing': name a folder below runs/, or give --out"
    (tmp_path / "runs" / "old").mkdir(parents=True)
    code, said = commands.call(["watch", "old", "--out", str(tmp_path / "runs")])
    assert code == 2 and "holds no live.json" in said and "\n" not in said
    dates = (json.dumps({**snapshot().model_dump(), "written": at}) for at in ("NaN", 1e300, 1e12, -1e17, -1))
    for damaged in ("{", '{"run": "x"}', "[" * 100_000, *dates):
        (tmp_path / "runs" / "old" / FILE).write_text(damaged)
        code, said = commands.call(["watch", "old", "--out", str(tmp_path / "runs")])
        assert code == 2 and "live.json is damaged" in said and "\n" not in said


def test_the_terminal_shows_everything_and_obeys_nothing(tmp_path: Path) -> None:
    out = io.StringIO()
    (tmp_path / FILE).write_text(snapshot(state="finished").model_dump_json())
    follow(tmp_path, Console(file=out, width=160, force_terminal=False, color_system=None))
    text = out.getvalue()
    assert all(mark.isprintable() or mark == "\n" for mark in text), "no escape sequence of others survives"
    shown = (
        "[red]gone[/red]", SCRIPT, "1/2", "3/10", "0.500", "90.0", "2.00", "net speedup, batch 8", "and 6 more failures",
        "finished",
    )  # fmt: skip
    for words in shown:
        assert words in text, words
    assert spark(Curve(scorer="a", step=1, steps=1, points=((0, 0.0), (1, 1.0)))) == "▁█"
    assert screen(tmp_path, snapshot(stages=(), curves=(), points=(), failures=(), num_failures=0)).renderables


def test_a_terminal_is_followed_until_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screens, "LOOK_S", 0.02)
    out, blobs = io.StringIO(), LocalBlobs(tmp_path)
    with lock(tmp_path / "store", "demo"):
        blobs.replace(FILE, snapshot(title="A demo").model_dump_json().encode())
        ended = snapshot(title="A demo", state="failed", reason=f"two cells {ESCAPE}").model_dump_json().encode()
        later = threading.Timer(0.2, blobs.replace, (FILE, ended))
        later.start()
        follow(tmp_path, Console(file=out, width=160, force_terminal=True, color_system=None))
        later.join()
    assert "attempt 1  running" in out.getvalue() and "failed: two cells" in out.getvalue()
    assert "\x1b[2J[red]" not in out.getvalue()


@pytest.mark.slow
def test_a_run_in_a_bucket_is_watched_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with server() as endpoint:
        folder = Path(bucket(endpoint, monkeypatch)) / "demo"
        with lock(folder / "store", "demo") as attempt, observed(folder, attempt) as watcher:
            watcher.begins("evaluate")
            fill(folder)
            watcher.expects("evaluate", list(Store(folder / "store").statuses()))
        assert "TensorBoard is told nothing more of this run, which goes on: event files need" in capsys.readouterr().out
        seen = read(folder)
        assert seen.state == "finished" and len(seen.points) == 3 and seen.num_failures == 1
        assert commands.call(["watch", f"s3://{str(folder).partition(':/')[2]}"]) == (0, "")
        shown = "".join(capsys.readouterr().out.split())  # a narrow terminal breaks the address
        assert "finished" in shown and f"thepage:s3://{str(folder).partition(':/')[2]}/{PAGE}" in shown
        assert open_blobs(folder).read(PAGE).startswith(b"<!DOCTYPE html>")
    assert not list(tmp_path.iterdir()), "nothing of it is on this machine"


def test_ticks_are_round_and_hold_what_is_drawn() -> None:
    assert _ticks(0.0, 1.0) == [0, 0.5, 1.0] and _ticks(3.0, 3.0)[0] <= 3 <= _ticks(3.0, 3.0)[-1]
    for low, high in ((0.013, 0.0131), (-5, 1e6), (97.3, 97.9), (0, 1e-9)):
        ticks = _ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 7, ticks


def test_the_page_escapes_names_and_loads_nothing() -> None:
    text = page(snapshot())
    assert "Speedups: batch 8." in text
    assert SCRIPT not in text and "\x1b" not in text and "\u202e" not in text and text.count("<script>") == 1
    policy = text.partition('Content-Security-Policy" content="')[2].partition('"')[0]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "connect-src" not in policy
    assert "http://" not in text and "https://" not in text and 'src="' not in text


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    made = Browser(tmp_path_factory.mktemp("chromium"))
    yield made
    made.close()


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_in_a_browser_says_when_news_stay_away(width: int, tmp_path: Path, browser: Browser) -> None:
    path = tmp_path / PAGE
    path.write_text(page(snapshot()))
    browser.open(path, width)
    assert browser.messages == [], "the policy refuses nothing of the page's own"
    assert browser.look("document.documentElement.scrollWidth - innerWidth") == 0
    assert browser.look("document.getElementById('told').textContent").startswith("written ")
    assert browser.look("document.getElementById('late').hidden") is True
    assert browser.look("document.querySelectorAll('figure.live svg').length") == 3
    path.write_text(page(snapshot(written=time.time() - 3600)))
    browser.open(path, width)
    assert browser.look("document.getElementById('late').hidden") is False
    path.write_text(page(snapshot(written=time.time() - 3600, state="finished")))
    browser.open(path, width)
    assert browser.look("document.getElementById('late').hidden") is True
