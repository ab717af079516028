"""Files and processes of one machine: damaged caches and configurations, a full disk, long temporary folders, foreign bytes."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from PIL import Image, PngImagePlugin
from ray.exceptions import RaySystemError
from safetensors.torch import load_file, save_file

from diffprune.core import registry
from diffprune.core.budget import Keep
from diffprune.core.cell import Cell, TrainSpec
from diffprune.core.records import Outcome, Provenance, Step
from diffprune.core.spec import Spec
from diffprune.core.vlm import VLM
from diffprune.distributed import cluster
from diffprune.distributed.follower import Follower, publish
from diffprune.io.attempts import Fenced
from diffprune.io.blob_store import LocalBlobs
from diffprune.io.dataset_manifest import MANIFEST, Manifest
from diffprune.io.image import open_image
from diffprune.io.json_object import parsed
from diffprune.io.run_lock import Busy, lock, refuse_if_held
from diffprune.job.job import Job
from diffprune.job.pipeline import selected
from diffprune.job.plan import Plan
from diffprune.report import report
from diffprune.report.analysis.records import read
from diffprune.store import Store
from diffprune.store.manifest import parse, render
from diffprune.train.checkpoints import Files, claim, damaged_lines, read_steps, signed
from diffprune.train.context import LocalContext
from diffprune.train.loop import missing
from diffprune.train.recipe import Recipe
from diffprune.train.step_log import STEPS
from diffprune.vlm.load import load
from tests.records import provenance

NOTHING = [b"", b"[]", b"null", b"{", b"5", b'"x"', b"[" * 100_000, b"\xff\xfe", b"{}"]


@pytest.fixture(scope="module")
def embedded() -> VLM:
    return load("embedded")


@pytest.fixture
def scorer(embedded: VLM, own_folder: Path) -> Path:
    """A sound folder of the recipe below, as training writes it."""
    made, recipe, place = registry.load("pruners", "diffprune"), job().train, own_folder / "runs/mine/scorers/diffprune-0"
    assert recipe is not None
    with torch.random.fork_rng():
        made.build(embedded.encode(embedded.pixels([Image.new("RGB", (96, 96))])))
    facts = {"model": embedded.name, "model_hash": embedded.weights_hash, "dtype": "float32", "seed": 0}
    made.save_pretrained(place, recipe_key=recipe.key(Spec("diffprune")), **facts)
    return place


def job() -> Job:
    return Job(name="mine", train=Recipe(pruners=("diffprune",), seeds=(0,)), budgets=("Keep(8)",))


def changed(folder: Path, **at: Any) -> None:
    """config.json with other values at `section__name`."""
    config = json.loads((folder / "config.json").read_text())
    for path, value in at.items():
        *parents, leaf = path.split("__")
        here = config
        for part in parents:
            here = here[part]
        here[leaf] = value
    (folder / "config.json").write_text(json.dumps(config))


# --- small JSON files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", NOTHING)
def test_a_damaged_json_object_is_a_sentence(damage: bytes) -> None:
    if damage == b"{}":
        assert parsed(damage) == {}
        return
    with pytest.raises(ValueError) as refused:
        parsed(damage)
    assert len(str(refused.value)) < 200


def test_what_is_kept_of_the_pictures_on_the_page_is_a_record(scorer: Path, embedded: VLM) -> None:
    (cell,) = Plan(job(), Path("runs/mine"), embedded).pictures()
    Store("store").publish(selected(embedded, cell), cell=cell, provenance=provenance())
    rows = Store("store").read("kept_tokens")
    assert rows.groupby("picture")["token_kept"].sum().tolist() == [8] * 4 and rows.groupby("picture").size().eq(144).all()
    (label,) = {label for masks in read("store").masks.values() for label in masks}
    assert label == "DiffPrune"
    assert f"scene {min(read('store').masks)}" in report("store", "out")["html"].read_text()


@pytest.mark.parametrize(
    "damage",
    [
        *NOTHING,
        b'{"host": 5, "machine": null, "pid": "x", "ticks": null, "token": 5}',
        b'{"host": "h", "machine": "m", "pid": -1, "ticks": 0, "token": "t"}',
        b'{"host": "h", "machine": "m", "pid": 1, "ticks": 0, "token": "../t"}',
    ],
)
def test_a_damaged_lock_names_nobody_and_is_taken_over(damage: bytes) -> None:
    LocalBlobs("store").replace("locks/mine/1", damage)
    refuse_if_held("store", "mine")
    with lock("store", "mine") as second:
        assert second == 2
        with pytest.raises(Busy):
            refuse_if_held("store", "mine")


@pytest.mark.parametrize("damage", NOTHING)
def test_a_damaged_attempt_blocks_nothing(damage: bytes) -> None:
    first = claim("run")
    LocalBlobs("run").replace(f"attempts/{int(first)}", damage)
    second = claim("run")
    assert second == first + 1
    Files(Path("run"), second).save("a", {"step": 1})
    with pytest.raises(Fenced):
        Files(Path("run"), first).save("a", {"step": 2})


@pytest.mark.parametrize("damage", NOTHING)
def test_a_damaged_data_manifest_is_named_with_what_to_do(damage: bytes) -> None:
    Path(MANIFEST).write_bytes(damage)
    with pytest.raises(ValueError, match="remove it, or fetch the data again"):
        Manifest.read(Path("."))


# --- scorer folders --------------------------------------------------------------------------------------------------

HOSTILE: list[dict[str, Any]] = [
    {"dims": None}, {"dims": []}, {"dims": {}}, {"options": None}, {"options": 5}, {"facts": None}, {"facts": []},
    {"dims__width": None}, {"dims__width": 0}, {"dims__width": -16}, {"dims__width": "16"}, {"dims__width": 16.0},
    {"dims__width": True}, {"dims__width": 10**12}, {"dims__width": 65536}, {"dims__depth": 10**9}, {"dims__depth": 3},
    {"dims__features": 10**6}, {"dims__features": [1]}, {"dims__text": 64}, {"dims__text": "x"},
    {"options__attention": None}, {"options__attention": "yes"}, {"options__depth": -1}, {"options__width": "x"},
    {"options__other": 1}, {"facts__recipe_key": 5}, {"facts__seed": "x"}, {"facts__model_hash": []}, {"method": ["x"] * 9},
]  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE, ids=str)
def test_a_hostile_configuration_is_refused_before_anything_is_allocated(
    hostile: dict[str, Any], scorer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(scorer, **hostile)
    most = max(tensor.numel() for tensor in load_file(scorer / "model.safetensors").values())
    empty = torch.empty

    def watched(*size: Any, **more: Any) -> torch.Tensor:
        found = empty(*size, **more)
        assert found.is_meta or found.numel() <= most, "allocated before it was compared with the file"
        return found

    monkeypatch.setattr(torch, "empty", watched)
    with pytest.raises(ValueError) as refused:
        registry.load("pruners", f"diffprune(weights='{scorer}')")
    assert str(scorer) in str(refused.value) and len(str(refused.value)) < 400
    assert missing(job().train, "runs/mine") == [(Spec("diffprune"), 0)], "training makes it anew"  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", NOTHING)
def test_a_configuration_that_is_none_is_refused(damage: bytes, scorer: Path) -> None:
    (scorer / "config.json").write_bytes(damage)
    with pytest.raises(ValueError, match="diffprune-0"):
        registry.load("pruners", f"diffprune(weights='{scorer}')")
    assert missing(job().train, "runs/mine") == [(Spec("diffprune"), 0)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("spread", lambda t: t * 0, "not above 0"),
        ("spread", lambda t: -t, "not above 0"),
        ("scorer.head.weight", lambda t: t.to(torch.int32), "int32"),
        ("mean", lambda t: t.to(torch.int64), "mean"),
        ("scorer.head.weight", lambda t: t[:, :-1], "shape"),
        ("mean", lambda t: t[:-1], "mean"),
    ],
)
def test_weights_that_cannot_be_right_are_refused(name: str, change: Any, says: str, scorer: Path) -> None:
    tensors = load_file(scorer / "model.safetensors")
    save_file({**tensors, name: change(tensors[name]).contiguous()}, scorer / "model.safetensors")
    changed(scorer, weights_sha256=hashlib.sha256((scorer / "model.safetensors").read_bytes()).hexdigest())
    with pytest.raises(ValueError, match=says):
        registry.load("pruners", f"diffprune(weights='{scorer}')")


def test_a_sound_folder_loads_and_is_not_trained_again(scorer: Path, embedded: VLM) -> None:
    made = registry.load("pruners", f"diffprune(weights='{scorer}')")
    assert made.trained_on.weights_sha256 == embedded.weights_hash and made.trained_seed == 0
    assert missing(job().train, "runs/mine") == []  # type: ignore[arg-type]
    text = "".join(path.read_text() for path in scorer.iterdir() if path.suffix in (".json", ".md"))
    assert str(Path.cwd()) not in text, "a card travels: no path of this machine"


# --- the step log and the store --------------------------------------------------------------------------------------


def step(number: int, loss: float = 1.5) -> Step:
    nan = float("nan")
    return Step(number, loss, 0.0, 2.0, "Keep(8)", 8.0, 1.0, False, nan, nan, nan, 10.0, 1, nan, nan)


def test_every_flipped_bit_of_the_step_log_is_seen() -> None:
    context = LocalContext("run")
    for number in range(3):
        context.report("diffprune-0", step(number))
    path = Path("run") / STEPS
    sound, rows = path.read_bytes(), read_steps(Path("run"))["diffprune-0"]
    assert [row.step for row in rows] == [0, 1, 2] and damaged_lines(Path("run")) == 0
    for place in range(0, len(sound), 3):
        flipped = bytearray(sound)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        found = read_steps(Path("run")).get("diffprune-0", [])
        assert len(found) < 3 and all(repr(row) in map(repr, rows) for row in found), place
        assert damaged_lines(Path("run")) > 0
    path.write_bytes(sound[:-9])
    context.report("diffprune-0", step(2))
    assert list(map(repr, read_steps(Path("run"))["diffprune-0"])) == list(map(repr, rows)), "a torn line is run again"


def test_a_line_ends_with_the_checksum_of_what_stands_before() -> None:
    text = signed({"begin": ["a", 0]})
    assert json.loads(text) == {"begin": ["a", 0], "crc": zlib.crc32(b'{"begin": ["a", 0]}')}


def test_damaged_lines_of_the_log_are_told(scorer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context = LocalContext("runs/mine")
    for number in range(2):
        context.report("diffprune-0", step(number))
    with (Path("runs/mine") / STEPS).open("ab") as stream:
        stream.write(b'{"scorer": "diffprune-0"}\n')
    recipe, store = job().train, Store("runs/mine/store")
    assert recipe is not None
    publish(recipe, Path("runs/mine"), store, Provenance("mine", 0, "", False, "{}", "{}", 0, "2026"))
    assert "1 damaged lines" in capsys.readouterr().out and len(store.read("steps")) == 2


def test_the_last_line_of_every_arm_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of arms that begin and end between two looks, and of what was written after the last look."""
    monkeypatch.setattr(Follower, "every_s", 3600.0)
    recipe = Recipe(pruners=("diffprune", "gumbel_topk"), seeds=(0,), steps=3)
    context = LocalContext("run")
    with Follower(recipe, Path("run"), None, None):
        for arm in ("diffprune-0", "gumbel_topk-0"):
            for number in range(3):
                context.report(arm, step(number))
    lines = [line for line in capsys.readouterr().out.splitlines() if "step 3/3" in line]
    assert [line.split()[1] for line in lines] == ["diffprune-0", "gumbel_topk-0"]


def test_a_manifest_with_another_row_count_than_its_part_is_damaged() -> None:
    store = Store("store")
    cell = Cell(Spec("m"), "float32", TrainSpec(Spec("diffprune"), "key", 0))
    rows = {"steps": [step(0), step(1)], "outcomes": [Outcome("ok", "", 2, 0.0)]}
    store.publish(rows, cell=cell, provenance=Provenance("mine", 0, "", False, "{}", "{}", 0, "2026"))
    assert store.done() == {cell.key}
    (path,) = Path("store/manifests").iterdir()
    commit = parse(path.read_bytes(), path.stem)
    object.__setattr__(commit.part("steps"), "rows", 7)
    path.write_bytes(render(commit))
    again = Store("store")
    assert again.done() == set() and "has 2 rows, its manifest says 7" in again.problems[0]


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every temporary file is /dev/full: writing it fails with ENOSPC."""
    true = open

    def opened(file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        return true("/dev/full", "wb", buffering=0) if "x" in mode else true(file, mode, *more, **named)

    monkeypatch.setattr("builtins.open", opened)
    yield


def test_a_full_disk_is_one_sentence_with_the_path(own_folder: Path) -> None:
    Path("run").mkdir()
    (Path("run") / STEPS).symlink_to("/dev/full")
    with pytest.raises(OSError, match="disk full") as stopped:
        Files(Path("run"), claim("run")).append({"begin": ["a", 0]})
    assert stopped.value.filename == str(Path("run") / STEPS)


def test_a_full_disk_leaves_no_stub(full: None) -> None:
    files = Files(Path("run"), 1, None)
    state = {"step": 1, "weights": torch.ones(1000)}
    for write in (lambda: files.save("a", state), lambda: report("store", "page")):
        with pytest.raises(OSError, match="disk full, could not write"):
            write()
    assert [path for path in Path(".").rglob("*") if path.is_file()] == []


# --- the machine -----------------------------------------------------------------------------------------------------


def test_a_temporary_folder_too_long_for_sockets_is_not_used(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = own_folder / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(cluster.tempfile, "tempdir", str(long))
    with cluster._one_host() as folder:
        assert len(folder) <= cluster.MOST_TMPDIR + 18 and not folder.startswith(str(long)) and Path(folder).is_dir()
    assert not Path(folder).exists()


def test_no_call_starts_a_ray_of_its_own() -> None:
    ray.shutdown()  # what tests before this one may have left
    cluster.secure()
    for call in (ray.nodes, ray.get_runtime_context):
        with suppress(RaySystemError):
            call()
        assert not ray.is_initialized(), "one in a folder that is open to every user"


def test_a_start_that_a_busy_machine_misses_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives its node half a minute, whatever one sets, and raises nothing more special than this."""
    folders: list[str] = []

    def missed(where: str, _temp_dir: str, **_: object) -> None:
        folders.append(_temp_dir)
        if len(folders) != 3:
            raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.setattr(cluster.ray, "init", missed)
    with cluster.connect():
        assert len(set(folders)) == 3 and [Path(one).is_dir() for one in folders] == [False, False, True]
    with (
        pytest.raises(RuntimeError, match="did not start in 4 tries of half a minute: is the machine too busy"),
        cluster.connect(),
    ):
        pass
    assert len(folders) == 7 and not any(Path(one).exists() for one in folders)


def test_a_home_that_cannot_be_written_says_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/proc/nobody/token")
    with pytest.raises(ValueError, match="put a secret of your own into RAY_AUTH_TOKEN"):
        cluster.secure()
    Path("token").touch(0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "token")
    with pytest.raises(ValueError, match="token is empty"):
        cluster.secure()


def test_a_png_with_a_long_comment_is_sound_and_a_huge_picture_is_not() -> None:
    about, stream = PngImagePlugin.PngInfo(), io.BytesIO()
    about.add_text("comment", "x" * 2 * 2**20, zip=True)
    Image.new("RGB", (8, 8), "red").save(stream, "PNG", pnginfo=about)
    assert open_image(stream.getvalue()).getpixel((0, 0)) == (255, 0, 0)
    huge = io.BytesIO()
    Image.new("1", (5001, 5000)).save(huge, "PNG")
    with pytest.raises(ValueError, match="5001 x 5000 pixels"):
        open_image(huge.getvalue())


def test_a_budget_is_met_by_the_scorer_that_was_loaded(scorer: Path, embedded: VLM) -> None:
    from diffprune.core.site import ENCODED, Cut

    made = registry.load("pruners", f"diffprune(weights='{scorer}')")
    tokens = embedded.encode(embedded.pixels([Image.new("RGB", (96, 96))]))
    assert made.select(tokens, Cut(ENCODED, Keep(8))).keep.sum() == 8
