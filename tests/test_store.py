"""The store against faults: whatever breaks, a reader sees whole commits only, and what is lost is named and done again."""

import errno
import json
import math
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffprune.core.records import TABLES, Cell, CurvePoint, Outcome, Prediction, Provenance, Step
from diffprune.store import Busy, Fenced, Store, commits, lock, manifest
from diffprune.store import columns as columns_module
from diffprune.store import parts as parts_module
from diffprune.store import run_lock as lock_module

MADE = Provenance("demo", 1, "abc", True, '{"python": "3"}', '{"cpu": "x"}', 5, "2026-01-01T00:00:00+00:00")
OK = Outcome("ok", "", 3, 1.5)
FAILED = Outcome("failed", "it broke", 0, 0.1)


def cell(seed: int = 0) -> Cell:
    return Cell("evaluate", "embedded", "m", "grid", "", "Keep(64)", "world", "r1", seed=seed)


def prediction(number: int, answer: str = "red") -> Prediction:
    return Prediction(f"s{number}", "g", "color", "open", "what?", answer, answer, "red", 0.5, 64, 16, 12, 1, "")


def step(number: int, loss: float, seed: int = 0) -> Step:
    return Step("diffprune", seed, number, loss, 0.0, 1.0, "Keep(8)", 8.0, 1.0, math.nan, 3.0, 2, math.nan, math.nan)


def publish(store: Store, seed: int, answer: str = "red", outcome: Outcome = OK, made: Provenance = MADE) -> None:
    rows = [prediction(i, answer) for i in range(3)]
    store.publish({"predictions": rows, "outcomes": [outcome]}, cell=cell(seed), provenance=made)


def files(root: Path, folder: str) -> list[Path]:
    return sorted(path for path in (root / folder).rglob("*") if path.is_file())


def answers(root: Path) -> dict[str, list[str]]:
    frame = Store(root).read("predictions")
    return {key: rows["answer"].tolist() for key, rows in frame.groupby("cell")}


# What is written comes back ------------------------------------------------------------------------------------------


def test_nothing_is_created_before_the_first_write(tmp_path: Path) -> None:
    store = Store(tmp_path / "new")
    assert store.done() == set() and store.problems == []
    for table in TABLES:
        frame = store.read(table)
        assert len(frame) == 0 and list(frame.columns) == [column.name for column in columns_module.columns(table)]
    assert not (tmp_path / "new").exists()


def test_rows_carry_their_cell_and_provenance(tmp_path: Path) -> None:
    publish(Store(tmp_path), 4)
    frame = Store(tmp_path).read("predictions")
    first = frame.iloc[0].to_dict()
    for name, value in asdict(prediction(0)).items():
        assert first[name] == value
    for name, value in asdict(cell(4)).items():
        assert pd.isna(first[name]) if value is None else first[name] == value
    for name, value in asdict(MADE).items():
        assert first["provenance_seed" if name == "seed" else name] == value
    assert first["cell"] == cell(4).key and frame["visual_kept"].dtype == "int64" and frame["limit"].dtype == "Int64"
    assert frame["sample"].tolist() == ["s0", "s1", "s2"]


def test_colliding_columns_belong_to_the_record_first(tmp_path: Path) -> None:
    Store(tmp_path).append("steps", [step(1, 0.5, seed=9)], cell=cell(4), provenance=MADE)
    row = Store(tmp_path).read("steps").iloc[0]
    assert (row["seed"], row["cell_seed"], row["provenance_seed"]) == (9, 4, 5)
    assert (row["budget"], row["cell_budget"]) == ("Keep(8)", "Keep(64)")


def test_nan_stays_nan_and_a_missing_cell_stays_missing(tmp_path: Path) -> None:
    Store(tmp_path).append("steps", [step(1, math.inf), step(2, -0.0)], cell=None, provenance=MADE)
    frame = Store(tmp_path).read("steps")
    assert frame["coherence"].isna().all() and frame["coherence"].dtype == "float64"
    assert frame["loss"].tolist() == [math.inf, 0.0] and math.copysign(1, frame["loss"][1]) == -1
    assert frame["cell"].tolist() == ["", ""] and frame["model"].tolist() == ["", ""] and frame["batch"].isna().all()
    assert frame["cell_seed"].dtype == "Int64" and frame["step"].dtype == "int64"


def test_every_table_can_be_written_and_read(tmp_path: Path) -> None:
    for table, kind in TABLES.items():
        values = {"str": "é\x00'\"\n", "int": 2**40, "float": 0.1, "bool": True}
        row = kind(**{name: values[note] for name, note in kind.__annotations__.items()})
        Store(tmp_path).append(table, [row], cell=cell(), provenance=MADE)
        back = Store(tmp_path).read(table).iloc[0].to_dict()
        assert {name: back[name] for name in asdict(row)} == asdict(row)


def test_parts_say_their_schema_and_carry_page_checksums(tmp_path: Path) -> None:
    publish(Store(tmp_path), 0)
    (path,) = files(tmp_path, "parts/predictions")
    meta = pq.read_metadata(path)
    assert meta.metadata[b"diffprune.schema"] == b"predictions 1"
    assert meta.row_group(0).column(0).compression == "ZSTD"
    raw = bytearray(path.read_bytes())
    raw[meta.row_group(0).column(0).data_page_offset + meta.row_group(0).column(0).total_compressed_size // 2] ^= 1
    with pytest.raises(manifest.Damaged):
        parts_module.decode("predictions", bytes(raw), [column.name for column in columns_module.columns("predictions")])


def test_a_hundred_thousand_rows_are_read_quickly(tmp_path: Path) -> None:
    rows = [prediction(i, f"answer {i}") for i in range(25_000)]
    for seed in range(4):
        Store(tmp_path).append("predictions", rows, cell=cell(seed), provenance=MADE)
    start = time.perf_counter()
    frame = Store(tmp_path).read("predictions")
    assert len(frame) == 100_000 and time.perf_counter() - start < 10


# Once, and in one order ----------------------------------------------------------------------------------------------


def test_publishing_again_changes_nothing(tmp_path: Path) -> None:
    publish(Store(tmp_path), 0)
    before = files(tmp_path, ".")
    publish(Store(tmp_path), 0, made=replace(MADE, attempt=2, started="later"))
    assert files(tmp_path, ".") == before


def test_of_two_attempts_at_a_cell_the_first_counts(tmp_path: Path) -> None:
    publish(Store(tmp_path), 0, "first")
    publish(Store(tmp_path), 0, "second", made=replace(MADE, attempt=2))
    assert answers(tmp_path) == {cell(0).key: ["first"] * 3}
    assert Store(tmp_path).read("outcomes")["attempt"].tolist() == [1]


def test_a_failed_cell_is_not_done_and_yields_to_success(tmp_path: Path) -> None:
    Store(tmp_path).append("outcomes", [FAILED], cell=cell(0), provenance=MADE)
    assert Store(tmp_path).done() == set()
    Store(tmp_path).append("outcomes", [replace(FAILED, reason="again")], cell=cell(0), provenance=MADE)
    assert Store(tmp_path).read("outcomes")["reason"].tolist() == ["again"]
    publish(Store(tmp_path), 0)
    assert Store(tmp_path).done() == {cell(0).key} == Store(tmp_path).done("predictions")
    assert Store(tmp_path).read("outcomes")["status"].tolist() == ["ok"]


def test_rows_without_a_cell_are_replaced_by_the_resumed_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append("steps", [step(n, 1.0) for n in (1, 2, 3)], cell=None, provenance=MADE)
    store.append("steps", [step(n, 2.0) for n in (3, 4)], cell=None, provenance=replace(MADE, attempt=2))
    store.append("steps", [step(3, 3.0)], cell=None, provenance=replace(MADE, run="other"))
    frame = store.read("steps")
    assert list(zip(frame["run"], frame["step"], frame["loss"], strict=True)) == [
        ("demo", 1, 1.0), ("demo", 2, 1.0), ("demo", 3, 2.0), ("demo", 4, 2.0), ("other", 3, 3.0)
    ]  # fmt: skip


def test_the_order_of_publication_does_not_show(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        publish(Store(tmp_path / "a"), seed)
    for seed in (2, 0, 1):
        publish(Store(tmp_path / "b"), seed)
    pd.testing.assert_frame_equal(Store(tmp_path / "a").read("predictions"), Store(tmp_path / "b").read("predictions"))


def test_processes_publish_side_by_side(tmp_path: Path) -> None:
    script = """
        import sys
        sys.path.insert(0, sys.argv[1])
        from test_store import Store, publish
        for seed in range(15):
            publish(Store(sys.argv[2]), seed)
    """
    workers = [start(script, str(tmp_path)) for _ in range(2)]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    reader = Store(tmp_path)
    assert reader.done() == {cell(seed).key for seed in range(15)} and reader.problems == []
    assert len(reader.read("predictions")) == 45 and files(tmp_path, "tmp") == []


# Mistakes are refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "row", "words"),
    [
        ("prediction", prediction(0), "did you mean 'predictions'"),
        ("../predictions", prediction(0), "no table named"),
        ("predictions", OK, "takes Prediction records, got Outcome"),
        ("predictions", replace(prediction(0), visual_kept="16"), "'visual_kept'"),  # type: ignore[arg-type]
        ("predictions", replace(prediction(0), visual_kept=16.5), "'visual_kept'"),  # type: ignore[arg-type]
        ("predictions", replace(prediction(0), visual_kept=True), "'visual_kept'"),
        ("predictions", replace(prediction(0), credit="1.0"), "'credit'"),  # type: ignore[arg-type]
        ("predictions", replace(prediction(0), visual_kept=2**63), "'visual_kept'"),
        ("predictions", replace(prediction(0), answer=None), "'answer'"),  # type: ignore[arg-type]
        ("predictions", replace(prediction(0), answer="\ud800"), "'answer'"),
    ],
)
def test_wrong_rows_are_refused_with_the_column(tmp_path: Path, table: str, row: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Store(tmp_path).append(table, [row], cell=cell(), provenance=MADE)
    assert files(tmp_path, ".") == []


@pytest.mark.parametrize("run", ["../x", "/x", "a/b", "a\x00", "a\n", "x" * 65, "", ".x", "-x", "CON", "nul.txt", "a.", "é"])
def test_unsafe_run_names_are_refused(tmp_path: Path, run: str) -> None:
    with pytest.raises(ValueError, match="run name"):
        publish(Store(tmp_path), 0, made=replace(MADE, run=run))
    with pytest.raises(ValueError, match="run name"), lock(tmp_path, run=run):
        pass
    assert files(tmp_path.parent, tmp_path.name) == []


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        Store(tmp_path / "file")
    with pytest.raises(ValueError, match="is a file"), lock(tmp_path / "file", run="demo"):
        pass


# Killed, full, damaged -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["replace", "fsync", "open"])
def test_stopped_at_any_point_the_reader_sees_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    real: Callable[..., object] = getattr(os, call)
    for point in range(100):
        root = tmp_path / str(point)
        publish(Store(root), 0, "old")
        left = [point]

        def failing(*args: object, left: list[int] = left) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(os, call, failing)
        try:
            publish(Store(root), 1, "new")
            finished = True
        except KeyboardInterrupt:
            finished = False
        monkeypatch.setattr(os, call, real)
        seen, reader = answers(root), Store(root)
        assert seen.pop(cell(0).key) == ["old"] * 3
        assert seen in ({}, {cell(1).key: ["new"] * 3})
        assert reader.done() == {cell(0).key} | set(seen) and reader.problems == [] and files(root, "tmp") == []
        publish(Store(root), 1, "new")
        assert len(Store(root).done()) == 2 and len(Store(root).read("outcomes")) == 2
        if finished:
            assert point >= 3, "the patched call was never made"
            return
    raise AssertionError("never finished")


def start(script: str, *arguments: str) -> subprocess.Popen[bytes]:
    code = textwrap.dedent(script)
    house = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, str(Path(__file__).parent), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": house})


def test_killed_at_random_moments(tmp_path: Path) -> None:
    script = """
        import itertools, sys
        sys.path.insert(0, sys.argv[1])
        from test_store import Store, publish
        print("ready", flush=True)
        for seed in itertools.count(int(sys.argv[3])):
            publish(Store(sys.argv[2]), seed)
    """
    for number in range(3):
        writer = start(script, str(tmp_path), str(number * 100_000))
        assert writer.stdout and writer.stdout.readline() == b"ready\n"
        time.sleep(random.uniform(0.05, 0.25))
        writer.kill()
        writer.wait()
        reader = Store(tmp_path)
        frame = reader.read("predictions")
        assert reader.problems == [] and set(frame["cell"]) == reader.done() == set(reader.read("outcomes")["cell"])
        assert len(frame) == 3 * len(reader.done())
    with lock(tmp_path, run="demo"):
        assert files(tmp_path, "tmp") == []


def test_a_full_disk_names_the_path_and_hurts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(Store(tmp_path), 0)
    before = files(tmp_path, ".")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"disk full.*parts/predictions/") as caught:
            publish(Store(tmp_path), 1)
    assert caught.value.errno == errno.ENOSPC and files(tmp_path, ".") == before
    assert Store(tmp_path).done() == {cell(0).key}
    publish(Store(tmp_path), 1)
    assert len(Store(tmp_path).done()) == 2


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    draw = random.Random(0)
    for number in range(30):
        root = tmp_path / str(number)
        for seed in (0, 1):
            publish(Store(root), seed)
        damaged = draw.choice(files(root, "parts") + files(root, "manifests"))
        raw = bytearray(damaged.read_bytes())
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        damaged.write_bytes(raw)
        reader = Store(root)
        lost = next(key for key in (cell(0).key, cell(1).key) if damaged.name.startswith(key))
        assert reader.done() == {cell(0).key, cell(1).key} - {lost}
        assert set(reader.read("predictions")["cell"]) == set(reader.read("outcomes")["cell"]) == reader.done()
        assert len(reader.problems) == 1 and damaged.name in reader.problems[0]
        assert bytes(raw) in [path.read_bytes() for path in files(root, "quarantine")]


@pytest.mark.parametrize("folder", ["parts/predictions", "parts/outcomes", "manifests"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "missing"])
def test_damaged_files_are_put_aside_named_and_done_again(tmp_path: Path, folder: str, damage: str) -> None:
    for seed in (0, 1):
        publish(Store(tmp_path), seed)
    victim = next(path for path in files(tmp_path, folder) if path.name.startswith(cell(0).key))
    raw = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes({"truncated": raw[: len(raw) // 2], "empty": b"", "foreign": b"PK\x03\x04" + raw}[damage])
    reader = Store(tmp_path)
    assert set(reader.read("predictions")["cell"]) == {cell(1).key} == reader.done()
    if (folder, damage) != ("manifests", "missing"):  # a commit without a manifest never was
        assert len(reader.problems) == 1 and victim.name in reader.problems[0] and cell(0).key in reader.problems[0]
    publish(Store(tmp_path), 0)
    again = Store(tmp_path)
    assert again.done() == {cell(0).key, cell(1).key} and len(again.read("predictions")) == 6 and again.problems == []


def test_a_second_attempt_counts_when_the_first_is_damaged(tmp_path: Path) -> None:
    publish(Store(tmp_path), 0, "first")
    (part,) = files(tmp_path, "parts/predictions")
    publish(Store(tmp_path), 0, "second")
    part.write_bytes(b"")
    assert answers(tmp_path) == {cell(0).key: ["second"] * 3} and Store(tmp_path).done() == {cell(0).key}


def test_damage_between_two_reads_of_one_store_is_found(tmp_path: Path) -> None:
    reader = Store(tmp_path)
    publish(reader, 0)
    assert len(reader.read("predictions")) == 3
    (part,) = files(tmp_path, "parts/predictions")
    raw = bytearray(part.read_bytes())
    raw[len(raw) // 2] ^= 1
    part.write_bytes(raw)
    assert len(reader.read("predictions")) == 0 and len(reader.problems) == 1 and reader.done() == set()


def test_foreign_files_are_put_aside_or_ignored(tmp_path: Path) -> None:
    publish(Store(tmp_path), 0)
    (tmp_path / "manifests" / "notes.txt").write_text("hello")
    (tmp_path / "manifests" / ".DS_Store").write_text("hello")
    (tmp_path / "manifests" / "folder").mkdir()
    (tmp_path / "parts" / "predictions" / "other.parquet").write_text("hello")
    reader = Store(tmp_path)
    assert len(reader.read("predictions")) == 3 and len(reader.problems) == 2
    assert (tmp_path / "quarantine" / "manifests" / "notes.txt").read_text() == "hello"


def test_a_read_only_store_can_be_read_although_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (0, 1):
        publish(Store(tmp_path), seed)
    next(path for path in files(tmp_path, "parts/predictions") if path.name.startswith(cell(0).key)).write_bytes(b"")

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    reader = Store(tmp_path)
    assert set(reader.read("predictions")["cell"]) == {cell(1).key} == reader.done()
    assert len(reader.problems) == 1 and "left in place" in reader.problems[0]


def test_a_manifest_cannot_lead_out_of_the_store(tmp_path: Path) -> None:
    (tmp_path / "store" / "manifests").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"x")
    for table, name in (("predictions", "../../../secret"), ("..", "secret"), ("predictions", "/etc/passwd")):
        part = manifest.Part(table, name, 1, 1, manifest.sha256(b"x"))
        commit = manifest.Commit("evil", "", "demo", 1, "", 1, (part,))
        (tmp_path / "store" / "manifests" / "evil.json").write_bytes(manifest.render(commit))
        reader = Store(tmp_path / "store")
        assert len(reader.read("predictions")) == 0 and len(reader.problems) == 1
    assert (tmp_path / "secret").read_bytes() == b"x"


# Versions of a table -------------------------------------------------------------------------------------------------


def rewrite(root: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Replace the only part by a changed one that its manifest vouches for, as an older program would have written it."""
    (path,), (record,) = files(root, "parts"), files(root, "manifests")
    pq.write_table(change(pq.read_table(path)), path, write_page_checksum=True)
    commit = manifest.parse(record.read_bytes(), record.stem)
    raw = path.read_bytes()
    part = replace(commit.parts[0], bytes=len(raw), sha256=manifest.sha256(raw))
    record.write_bytes(manifest.render(replace(commit, parts=(part,))))


def as_text(rows: pa.Table) -> pa.Table:
    place = rows.schema.get_field_index("sequence")
    return rows.set_column(place, "sequence", rows["sequence"].cast(pa.string())).replace_schema_metadata(rows.schema.metadata)


def renamed(rows: pa.Table) -> pa.Table:
    names = ["length" if name == "sequence" else name for name in rows.column_names]
    return rows.rename_columns(names).replace_schema_metadata(rows.schema.metadata)


CHANGES = {
    "lacking": (lambda rows: rows.drop_columns(["sequence"]), "no column 'sequence'"),
    "renamed": (renamed, "no column 'sequence'"),
    "as text": (as_text, "'sequence' as string, not int64"),
    "more": (lambda rows: rows.append_column("extra", rows["sequence"]), "unknown column 'extra'"),
    "other table": (lambda rows: rows.replace_schema_metadata({"diffprune.schema": "costs 1"}), "'costs 1'"),
    "unlabelled": (lambda rows: rows.replace_schema_metadata(None), "not a part of table 'curve'"),
    "newer": (lambda rows: rows.replace_schema_metadata({"diffprune.schema": "curve 2"}), "version 2"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_columns_are_refused_by_name(tmp_path: Path, change: str) -> None:
    Store(tmp_path).append("curve", [CurvePoint(8, 100, 64, 1.0, 0.9, 1.1, 5, 1.0)], cell=cell(), provenance=MADE)
    rewrite(tmp_path, CHANGES[change][0])
    reader = Store(tmp_path)
    assert len(reader.read("curve")) == 0 and reader.done("curve") == set()
    assert len(reader.problems) == 1 and CHANGES[change][1] in reader.problems[0] and "quarantine" in reader.problems[0]


def test_a_migration_reads_what_an_older_program_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = CurvePoint(8, 100, 64, 1.0, 0.9, 1.1, 5, 1.0)
    Store(tmp_path).append("curve", [point], cell=cell(), provenance=MADE)
    rewrite(tmp_path, renamed)
    monkeypatch.setitem(columns_module.VERSIONS, "curve", 2)

    def named_back(rows: pa.Table) -> pa.Table:
        return rows.rename_columns([name.replace("length", "sequence") for name in rows.column_names])

    monkeypatch.setitem(parts_module.MIGRATIONS, ("curve", 1), named_back)
    Store(tmp_path).append("curve", [replace(point, sequence=200)], cell=cell(1), provenance=MADE)
    reader = Store(tmp_path)
    assert sorted(reader.read("curve")["sequence"]) == [100, 200] and reader.problems == []


def test_a_migration_that_does_not_lead_here_is_named_also_where_nothing_can_be_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(tmp_path).append("curve", [CurvePoint(8, 100, 64, 1.0, 0.9, 1.1, 5, 1.0)], cell=cell(), provenance=MADE)
    monkeypatch.setitem(columns_module.VERSIONS, "curve", 2)
    monkeypatch.setitem(parts_module.MIGRATIONS, ("curve", 1), lambda rows: rows.drop_columns(["sequence"]))

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    reader = Store(tmp_path)
    assert len(reader.read("curve")) == 0 and len(reader.problems) == 1 and "'sequence'" in reader.problems[0]


# One run of a name at a time -----------------------------------------------------------------------------------------


def test_a_second_run_is_refused_at_once_and_told_who(tmp_path: Path) -> None:
    with lock(tmp_path, run="demo") as attempt:
        assert attempt == 1
        begin = time.perf_counter()
        with pytest.raises(Busy, match=f"'demo'.*process {os.getpid()} on .*attempt 1"), lock(tmp_path, run="demo"):
            pass
        assert time.perf_counter() - begin < 2
        with lock(tmp_path, run="other") as other:
            assert other == 1
    with lock(tmp_path, run="demo") as attempt:
        assert attempt == 2


def test_another_process_is_refused_and_takes_over_when_the_owner_is_killed(tmp_path: Path) -> None:
    script = """
        import sys, time
        from diffprune.store.run_lock import lock
        with lock(sys.argv[2], run="demo"):
            print("held", flush=True)
            time.sleep(60)
    """
    owner = start(script, str(tmp_path))
    assert owner.stdout and owner.stdout.readline() == b"held\n"
    with pytest.raises(Busy, match=f"process {owner.pid} "), lock(tmp_path, run="demo"):
        pass
    owner.kill()
    while psutil.Process(owner.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with lock(tmp_path, run="demo") as attempt:  # the killed process is still a zombie here
        assert attempt == 2
    owner.wait()


@pytest.mark.parametrize("change", [{"pid": 2**22 + 1}, {"started": 1.0}, {"host": "elsewhere"}])
def test_stale_locks(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "locks" / "demo" / "1.json"
    with lock(tmp_path, run="demo"):
        text = path.read_text()
    path.with_suffix(".released").unlink()
    path.write_text(json.dumps({**json.loads(text), **change}))
    if "host" in change:
        with pytest.raises(Busy, match="on elsewhere"), lock(tmp_path, run="demo"):
            pass
        return
    with lock(tmp_path, run="demo") as attempt:
        assert attempt == 2


@pytest.mark.parametrize("text", ["", '{"host":', "[]", '{"pid": 1}'])
def test_a_lock_whose_maker_died_while_writing_it_is_taken_over(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "EMPTY_S", 0.1)
    (tmp_path / "locks" / "demo").mkdir(parents=True)
    (tmp_path / "locks" / "demo" / "6.json").write_text(text)
    with lock(tmp_path, run="demo") as attempt:
        assert attempt == 7


def test_one_of_many_gets_the_lock(tmp_path: Path) -> None:
    script = """
        import pathlib, sys, time
        from diffprune.store.run_lock import Busy, lock
        try:
            with lock(sys.argv[2], run="demo"):
                while not (pathlib.Path(sys.argv[2]) / "stop").exists():
                    time.sleep(0.01)
        except Busy:
            sys.exit(3)
    """
    racers = [start(script, str(tmp_path)) for _ in range(4)]
    patience = time.monotonic() + 60
    while sum(racer.poll() is not None for racer in racers) < 3 and time.monotonic() < patience:
        time.sleep(0.01)
    (tmp_path / "stop").touch()
    assert sorted(racer.wait(60) for racer in racers) == [0, 3, 3, 3]


def test_a_lock_being_written_is_waited_for(tmp_path: Path) -> None:
    with lock(tmp_path, run="demo"):
        path = tmp_path / "locks" / "demo" / "1.json"
        text = path.read_text()
        path.write_text("")
        later = threading.Timer(0.2, path.write_text, [text])
        later.start()
        with pytest.raises(Busy, match="attempt 1"), lock(tmp_path, run="demo"):
            pass
        later.join()


def test_an_earlier_attempt_cannot_publish(tmp_path: Path) -> None:
    with lock(tmp_path, run="demo") as attempt:
        mine = replace(MADE, attempt=attempt)
        publish(Store(tmp_path), 0, made=mine)
    with lock(tmp_path, run="demo") as attempt:
        with pytest.raises(Fenced, match="attempt 1 of run 'demo'"):
            publish(Store(tmp_path), 1, made=mine)
        publish(Store(tmp_path), 2, made=replace(MADE, attempt=attempt))
        publish(Store(tmp_path), 3, made=replace(MADE, run="other"))
    assert Store(tmp_path).done() == {cell(seed).key for seed in (0, 2, 3)}


def test_the_fence_falls_between_parts_and_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = commits.write_durably

    def slow(path: Path, data: bytes, staging: Path) -> None:
        real(path, data, staging)
        with lock(tmp_path, run="demo"):
            pass

    monkeypatch.setattr(commits, "write_durably", slow)
    with pytest.raises(Fenced):
        publish(Store(tmp_path), 0, made=replace(MADE, attempt=0))
    assert Store(tmp_path).done() == set() and files(tmp_path, "manifests") == []
