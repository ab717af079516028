"""Trackers are read back by their own readers: event files, an offline W&B run, an MLflow file store."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffprune.track import trackers
from diffprune.track.tensorboard import TensorBoard
from diffprune.track.tracker import Scalars, Told, clean, flat
from diffprune.track.trackers import Trackers, checked

ROWS = [Scalars("train/diffprune-0", step, {"loss": 2.0 - step, "validation": math.nan if step else 0.5}) for step in range(3)]
SHOWN = Scalars("evaluate/<script>", 32, {"GQA": 0.75})


def events(folder: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """What TensorBoard's own reader finds, by folder and tag."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed"
    )
    found = {}
    for place in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        read = accumulator.EventAccumulator(str(place)).Reload()
        tags = {tag: [(e.step, round(e.value, 6)) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
        found[place.relative_to(folder).as_posix()] = tags
    return found


def test_event_files_say_each_thing_once_also_when_a_run_goes_on(tmp_path: Path) -> None:
    for rows in (ROWS[:2], [*ROWS, SHOWN]):  # the second process hears everything again
        board = TensorBoard(tmp_path)
        board.log(rows)
        board.close(False)
    found = events(tmp_path / "tensorboard")
    assert found["train/diffprune-0"] == {"loss": [(0, 2.0), (1, 1.0), (2, 0.0)], "validation": [(0, 0.5)]}
    (other,) = found.keys() - {"train/diffprune-0"}
    assert re.fullmatch(r"evaluate/script-[0-9a-f]{6}", other) and found[other] == {"GQA": [(32, 0.75)]}


def test_event_files_are_there_before_the_run_ends(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.log(ROWS)
    assert events(tmp_path / "tensorboard")["train/diffprune-0"]["loss"][-1] == (2, 0.0)
    board.close(True)


@pytest.mark.parametrize("name", ["../../etc", "..", "", "a/b", "模型", "\x1b[2J", "x" * 300, "CON\0"])
def test_hostile_names_are_no_paths_and_stay_apart(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_=][A-Za-z0-9_.=-]{0,100}", clean(name)) and clean(name) != clean(name + "模")
    assert clean("DiffPrune (seed=3)") == "DiffPrune-seed=3" and clean("diffprune-0") == "diffprune-0"


def test_what_was_told_is_not_told_again(tmp_path: Path) -> None:
    told = Told(tmp_path, "x")
    assert len(told.new([*ROWS[:2], SHOWN])) == 3
    told.run = "abc"
    told.save()
    again = Told(tmp_path, "x")
    assert again.run == "abc" and again.new([*ROWS, SHOWN]) == [ROWS[2]]
    assert (tmp_path / "trackers" / "x.json").stat().st_mode & 0o777 == 0o600
    (tmp_path / "trackers" / "x.json").write_text('{"run": 3, "last": [], "each": {"a": [')
    assert len(Told(tmp_path, "x").new(ROWS)) == 3, "a damaged note begins anew"


def test_settings_are_flat() -> None:
    assert flat({"train": {"steps": 5, "seeds": [0, 1]}, "name": "a"}) == {
        "train.steps": "5",
        "train.seeds": "[0, 1]",
        "name": '"a"',
    }


def test_a_tracker_that_fails_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        name = "broken"

        def __init__(self, *_: object) -> None: ...

        def log(self, rows: object) -> None:
            raise ConnectionError("no route to host")

    monkeypatch.setitem(trackers.EXTRAS, "broken", Broken)
    made = Trackers(tmp_path, "run", ["broken"], {})
    for row in ROWS:
        made.log([row])
    made.close(False)
    said = capsys.readouterr().out
    assert said.count("broken is told nothing more of this run, which goes on: ConnectionError: no route to host") == 1
    assert len(events(tmp_path / "tensorboard")["train/diffprune-0"]["loss"]) == 3


def test_names_are_checked_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no tracker 'wand' beside TensorBoard, which is always told: did you mean 'wandb'"):
        checked("wand")
    monkeypatch.setattr(trackers.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'mlflow' is not installed: pip install 'diffprune\[mlflow\]'"):
        checked("mlflow")


def test_mlflow_keeps_one_run_over_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for rows, failed in ((ROWS[:2], True), ([*ROWS, SHOWN], False)):
        made = trackers.MLflow(tmp_path, "my run", {"train": {"steps": 3, "name": "x" * 900}})
        made.log(rows)
        made.close(failed)
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("diffprune").experiment_id])
    assert (run.info.run_name, run.info.status) == ("my run", "FINISHED") and run.data.params["train.steps"] == "3"
    history = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/diffprune-0/loss")]
    assert history == [(0, 2.0), (1, 1.0), (2, 0.0)]
    assert [m for m in run.data.metrics if m.startswith("evaluate/script-")]


def history(path: Path) -> Iterator[dict[str, float]]:
    """The rows of an offline run: a log of protocol buffers in blocks of 32 KiB (LevelDB's), after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, place = path.read_bytes(), 7
    assert len(raw) < 2**15, "one block"
    while place + 7 <= len(raw):
        size = int.from_bytes(raw[place + 4 : place + 6], "little")
        record = Record.FromString(raw[place + 7 : place + 7 + size])
        place += 7 + size
        if record.WhichOneof("record_type") == "history":
            named = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            yield {key: value for key, value in named.items() if not key.startswith("_")}


def test_wandb_offline_logs_each_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for rows in (ROWS[:2], ROWS):
        made = trackers.Wandb(tmp_path, "my run", {"train": {"steps": 3}})
        made.log(rows)
        made.close(False)
    wandb.teardown()  # its own process writes what it was given, as it does when a driver ends
    places = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(places) == 2 and len({place.name.split("-")[3] for place in places}) == 1, "one run of W&B"
    rows = [values for place in places for path in place.glob("*.wandb") for values in history(path)]
    assert [(row["train/diffprune-0/step"], row["train/diffprune-0/loss"]) for row in rows] == [(0, 2.0), (1, 1.0), (2, 0.0)]
    assert rows[0]["train/diffprune-0/validation"] == 0.5 and "train/diffprune-0/validation" not in rows[1]
