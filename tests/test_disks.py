"""A disk that is really full, and a folder that is really read-only: small file systems in memory, mounted where root may."""

from __future__ import annotations

import errno
import hashlib
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from diffprune.cli import commands
from diffprune.distributed import cluster
from diffprune.store import Store
from diffprune.train import loop
from diffprune.train.checkpoints import Files, read_steps, verified
from diffprune.train.context import LocalContext
from diffprune.train.recipe import Recipe
from diffprune.train.step_log import STEPS
from diffprune.vlm.load import load
from tests.records import evaluate_cell, prediction, provenance

RECIPE = Recipe(
    model="tiny(llava)", pruners=("diffprune",), steps=6, images=2, questions=1, workers=1, calibration_images=4,
    validation_images=2, checkpoint_every=1, validate_every=0, grad_cosine_every=0,
)  # fmt: skip


def answered(store: Store, number: int) -> None:
    """A cell of sixty answers."""
    rows = [prediction(i, i % 2) for i in range(60)]
    store.publish({"predictions": rows}, cell=evaluate_cell("random", f"Keep({number})"), provenance=provenance())


@contextmanager
def disk(name: str, kib: int) -> Iterator[Path]:
    """A file system of so many KiB."""
    place = Path(name).absolute()
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"nothing can be mounted here ({made.stderr.decode().strip()})")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(place)], check=True)


def files(place: Path) -> list[Path]:
    return [path for path in place.rglob("*") if path.is_file()]


def test_training_on_a_disk_that_fills_up_stops_with_a_sentence_and_goes_on_with_more() -> None:
    vlm = load(RECIPE.model, device="cpu")
    (whole,) = loop.train(RECIPE, LocalContext("whole"), lambda _: vlm)
    largest = max(path.stat().st_size for path in files(Path("whole")))
    with disk("small", largest // 1024 * 7 + 40) as place:  # two states of three times as much, not three
        with pytest.raises(OSError, match=r"disk full, could not write: .*small/run/") as stopped:
            loop.train(RECIPE, LocalContext(place / "run"), lambda _: vlm)
        assert stopped.value.errno == errno.ENOSPC
        states = files(place / "run/states")
        assert states and all(hashlib.sha256(p.read_bytes()).hexdigest() in p.name for p in states), "no stub is left"
        begun = max(row.step for row in read_steps(place / "run")["diffprune-0"])
        assert 0 <= begun < RECIPE.steps - 1
        remount(place, "size=16m")
        (again,) = loop.train(RECIPE, LocalContext(place / "run"), lambda _: vlm)
        assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
        assert [row.step for row in read_steps(place / "run")["diffprune-0"]] == list(range(6))


def test_a_line_of_the_log_that_only_partly_fits_is_an_error() -> None:
    with disk("small", 8) as place:
        (place / "filler").write_bytes(bytes(4096))
        written = Files(place, 1)
        done = 0
        with pytest.raises(OSError, match="disk full"):
            while True:
                written.append({"begin": ["diffprune-0", done]})
                done += 1
        lines = (place / STEPS).read_bytes().split(b"\n")
        assert done > 10 and sum(verified(line) is not None for line in lines) == done, "what was said to be written is there"
        (place / "filler").unlink()
        written.append({"begin": ["diffprune-0", 100]})
        assert (place / STEPS).read_bytes().split(b"\n")[-2].startswith(b'{"begin": ["diffprune-0", 100]')


def test_a_full_disk_leaves_no_stub_of_states_scorers_and_records() -> None:
    with disk("small", 64) as place:
        state: dict[str, Any] = {"step": 1, "weights": torch.ones(100_000)}
        with pytest.raises(OSError, match="disk full, could not write"):
            Files(place / "run", 1).save("a", state)
        with pytest.raises(OSError, match="disk full, could not write"):
            for number in range(1, 100):
                answered(Store(place / "store"), number)
        assert not [path for path in files(place) if path.name.startswith(".")], "no unfinished file"
        remount(place, "size=16m")
        answered(Store(place / "store"), 999)
        assert not Store(place / "store").problems


def test_a_temporary_folder_that_is_full_is_a_sentence_and_keeps_no_stub(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault() -> None:
        raise KeyError("a fault of ours")

    with disk("tmp", 64) as place:
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        monkeypatch.setattr(cluster, "MOST_TMPDIR", 1000)  # no socket is made in it
        (place / "filler").write_bytes(bytes(65536))
        with pytest.raises(OSError, match=r"disk full, could not write: .*tmp/dp-ray-.*/owner"), cluster.private_folder():
            pytest.fail("Ray would start without room for its notes")
        monkeypatch.setattr(commands.app.commands["doctor"], "callback", fault)
        code, sentence = commands.call(["doctor"])
        assert code == 1 and "a fault of ours" in sentence and "could not be written: No space left" in sentence
        assert [path.name for path in place.iterdir()] == ["filler"]


def test_the_page_of_a_read_only_run_is_written_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with disk("archive", 4096) as place:
        answered(Store(place / "mine/store"), 1)
        remount(place, "ro")
        before = {path: path.read_bytes() for path in files(place)}
        code, sentence = commands.call(["report", str(place / "mine")])
        assert code and "Read-only file system" in sentence and str(place / "mine") in sentence and "\n" not in sentence
        assert commands.call(["report", str(place / "mine"), "--out", "page"]) == (0, "")
        assert "<html" in Path("page/report.html").read_text()
        assert {path: path.read_bytes() for path in files(place)} == before
