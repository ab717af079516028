"""The store against faults: whatever breaks, a reader sees whole commits only, and what is lost is named and done again."""

import errno
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
from blob_stores import FailingBlobs, MemoryBlobs, together

from diffprune.core.budget import Keep
from diffprune.core.cell import Cell, EvaluateSpec, Questions
from diffprune.core.records import TABLES, CurvePoint, Outcome, Prediction, Provenance, Step
from diffprune.core.spec import Spec
from diffprune.io.blob_store import Blobs, LocalBlobs
from diffprune.store import Busy, Fenced, Store, lock, manifest, views
from diffprune.store import columns as columns_module
from diffprune.store import parts as parts_module

MADE = Provenance("demo", 1, "abc", True, '{"python": "3"}', '{"cpu": "x"}', 5, "2026-01-01T00:00:00+00:00")
OK = Outcome("ok", "", 3, 1.5)
FAILED = Outcome("failed", "it broke", 0, 0.1)
READ_ONLY = OSError(errno.EROFS, "Read-only file system")


@pytest.fixture(params=["local", "memory"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    """Where a store is kept; it behaves the same everywhere."""
    return LocalBlobs(tmp_path / "store") if request.param == "local" else MemoryBlobs()


def cell(seed: int = 0) -> Cell:
    pruner = Spec("random", (("seed", seed),))
    return Cell(Spec("embedded"), "float32", EvaluateSpec(pruner, Keep(64), Questions(Spec("world"), "r1")))


def prediction(number: int, answer: str = "red") -> Prediction:
    return Prediction(f"s{number}", "g", "color", "open", "what?", answer, answer, "red", 0.5, 64, 16, 12, 1, "")


def step(number: int, loss: float) -> Step:
    return Step(number, loss, 0.0, 1.0, "Keep(8)", 8.0, 1.0, False, 1.0, 0.5, math.nan, 3.0, 2, math.nan, math.nan)


def publish(place: Blobs | Path | str, *seeds: int, answer: str = "red", made: Provenance = MADE) -> None:
    """Three answers and the outcome of the cell of each seed."""
    for seed in seeds:
        rows = [prediction(i, answer) for i in range(3)]
        Store(place).publish({"predictions": rows, "outcomes": [OK]}, cell=cell(seed), provenance=made)


def done(*seeds: int) -> set[str]:
    return {cell(seed).key for seed in seeds}


def answers(place: Blobs | Path) -> dict[str, list[str]]:
    frame = Store(place).read("predictions")
    return {key: rows["answer"].tolist() for key, rows in frame.groupby("cell")}


def key_of(blobs: Blobs, prefix: str, seed: int = 0) -> str:
    """The first blob below `prefix` that belongs to a cell."""
    return next(key for key in blobs.list(prefix) if key.rpartition("/")[2].startswith(cell(seed).key))


def flipped(data: bytes, bit: int) -> bytes:
    raw = bytearray(data)
    raw[bit // 8] ^= 1 << bit % 8
    return bytes(raw)


# What is written comes back ------------------------------------------------------------------------------------------


def test_nothing_is_created_before_the_first_write(tmp_path: Path) -> None:
    store = Store(tmp_path / "new")
    assert store.done() == set() and store.problems == []
    for table in TABLES:
        frame = store.read(table)
        assert len(frame) == 0 and list(frame.columns) == [column.name for column in columns_module.columns(table)]
    assert not (tmp_path / "new").exists()


def test_rows_carry_their_cell_and_provenance(blobs: Blobs) -> None:
    publish(blobs, 4)
    frame = Store(blobs).read("predictions")
    first = frame.iloc[0].to_dict()
    for name, value in asdict(prediction(0)).items():
        assert first[name] == value
    for name, value in asdict(cell(4).columns()).items():
        assert pd.isna(first[name]) if value is None else first[name] == value
    for name, value in asdict(MADE).items():
        assert first[name] == value
    assert first["cell"] == cell(4).key and frame["visual_kept"].dtype == "int64" and frame["limit"].dtype == "Int64"
    assert frame["sample"].tolist() == ["s0", "s1", "s2"]


def test_nan_stays_nan_and_what_does_not_apply_stays_missing(blobs: Blobs) -> None:
    Store(blobs).publish({"steps": [step(1, math.inf), step(2, -0.0)]}, cell=cell(), provenance=MADE)
    frame = Store(blobs).read("steps")
    assert frame["grad_cosine"].isna().all() and frame["grad_cosine"].dtype == "float64"
    assert frame["loss"].tolist() == [math.inf, 0.0] and math.copysign(1, frame["loss"][1]) == -1
    assert frame["limit"].isna().all() and frame["limit"].dtype == "Int64" and frame["step"].dtype == "int64"


@pytest.mark.parametrize("table", TABLES)
def test_every_table_can_be_written_and_read(table: str) -> None:
    store, kind = Store(MemoryBlobs()), TABLES[table]
    values = {"str": "é\x00'\"\n", "int": 2**40, "float": 0.1, "bool": True}
    row = kind(**{name: values[note] for name, note in kind.__annotations__.items()})
    beside = {"answers": [prediction(0).answered]} if table in ("grades", "figures") else {}  # which count with their answers
    beside |= {"grades": [prediction(0).credited("")]} if table == "figures" else {}
    store.publish({table: [row], **beside}, cell=cell(), provenance=MADE)
    back = store.read(table).iloc[0].to_dict()
    assert {name: back[name] for name in asdict(row)} == asdict(row)


def test_parts_say_their_schema_and_carry_page_checksums(blobs: Blobs) -> None:
    publish(blobs, 0)
    raw = blobs.read(key_of(blobs, "parts/answers"))
    meta = pq.read_metadata(pa.BufferReader(raw))
    assert meta.metadata[b"diffprune.schema"] == f"answers {columns_module.VERSION}".encode()
    column = meta.row_group(0).column(0)
    assert column.compression == "ZSTD"
    damaged = flipped(raw, 8 * (column.data_page_offset + column.total_compressed_size // 2))
    with pytest.raises(manifest.Damaged):
        parts_module.decode("answers", damaged, [column.name for column in columns_module.columns("answers")])


# Once, and in one order ----------------------------------------------------------------------------------------------


def test_publishing_again_changes_nothing(blobs: Blobs) -> None:
    publish(blobs, 0)
    before = blobs.list()
    publish(blobs, 0, made=replace(MADE, attempt=2, started="later"))
    assert blobs.list() == before


@pytest.mark.parametrize("step_ns", [1, -(10**18)], ids=["clock", "clock set back"])
def test_of_two_commits_of_a_cell_the_newer_attempts_first_counts(
    blobs: Blobs, step_ns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order they came, and in whatever order a clock says they did."""
    now = [time.time_ns()]

    def clock() -> int:
        now[0] += step_ns
        return now[0]

    monkeypatch.setattr(time, "time_ns", clock)
    writer = Store(blobs)
    for attempt, word in ((1, "first"), (2, "second"), (2, "third"), (1, "late")):
        rows = [prediction(i, word) for i in range(3)]
        made = replace(MADE, attempt=attempt)
        writer.publish({"predictions": rows, "outcomes": [OK]}, cell=cell(0), provenance=made)
        assert answers(blobs) == {cell(0).key: ["first" if word == "first" else "second"] * 3}
    assert Store(blobs).read("outcomes")["attempt"].tolist() == [2]
    if isinstance(blobs, LocalBlobs):
        assert views.connect(blobs.root).sql("SELECT DISTINCT answer FROM answers_given").fetchall() == [("second",)]


def test_of_failures_the_newest_attempts_last_counts(blobs: Blobs) -> None:
    for attempt, reason in ((1, "a"), (2, "b"), (2, "c"), (1, "d")):
        made, rows = replace(MADE, attempt=attempt), {"outcomes": [replace(FAILED, reason=reason)]}
        Store(blobs).publish(rows, cell=cell(0), provenance=made)
    assert Store(blobs).read("outcomes")["reason"].tolist() == ["c"]
    if isinstance(blobs, LocalBlobs):
        assert views.connect(blobs.root).sql("SELECT reason FROM outcomes").fetchall() == [("c",)]


def test_a_failed_cell_is_not_done_and_yields_to_success(blobs: Blobs) -> None:
    store = Store(blobs)
    store.publish({"outcomes": [FAILED]}, cell=cell(0), provenance=MADE)
    assert store.done() == set()
    store.publish({"outcomes": [replace(FAILED, reason="again")]}, cell=cell(0), provenance=MADE)
    assert store.read("outcomes")["reason"].tolist() == ["again"]
    publish(blobs, 0)
    assert store.done() == done(0) == store.done("predictions")
    assert store.read("outcomes")["status"].tolist() == ["ok"]


def test_the_order_of_publication_does_not_show() -> None:
    one, other = MemoryBlobs(), MemoryBlobs()
    publish(one, 0, 1, 2)
    publish(other, 2, 0, 1)
    pd.testing.assert_frame_equal(Store(one).read("predictions"), Store(other).read("predictions"))


def test_writers_publish_side_by_side(blobs: Blobs) -> None:
    together(3, lambda _: publish(blobs, *range(10)))
    reader = Store(blobs)
    assert reader.done() == done(*range(10)) and reader.problems == []
    assert len(reader.read("predictions")) == 30


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
def test_wrong_rows_are_refused_with_the_column(blobs: Blobs, table: str, row: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Store(blobs).publish({table: [row]}, cell=cell(), provenance=MADE)
    assert blobs.list() == {}


@pytest.mark.parametrize("run", ["../x", "/x", "a/b", "a\x00", "a\n", "x" * 65, "", ".x", "-x", "CON", "nul.txt", "a.", "é"])
def test_unsafe_run_names_are_refused(blobs: Blobs, run: str) -> None:
    with pytest.raises(ValueError, match="run name"):
        publish(blobs, 0, made=replace(MADE, run=run))
    with pytest.raises(ValueError, match="run name"), lock(blobs, run=run):
        pass
    assert blobs.list() == {}


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        Store(tmp_path / "file")
    with pytest.raises(ValueError, match="is a file"), lock(tmp_path / "file", run="demo"):
        pass


# Killed, full, damaged -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
def test_stopped_at_any_write_the_reader_sees_old_or_new(blobs: Blobs, late: bool) -> None:
    publish(blobs, 0, answer="old")
    for point in range(4):  # three parts and the manifest
        with pytest.raises(KeyboardInterrupt):
            publish(FailingBlobs(blobs, KeyboardInterrupt(), point, late), 1 + point, answer="new")
        published = late and point == 3
        assert answers(blobs) == {cell(0).key: ["old"] * 3} | ({cell(4).key: ["new"] * 3} if published else {})
        assert Store(blobs).done() == (done(0, 4) if published else done(0)) and Store(blobs).problems == []
    publish(FailingBlobs(blobs, KeyboardInterrupt(), 4), 5)
    publish(blobs, 1, 2, 3, 4, answer="new")
    assert Store(blobs).done() == done(*range(6)) and len(Store(blobs).read("outcomes")) == 6


def start(script: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A process that runs a script beside this file."""
    code = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n" + textwrap.dedent(script)
    house = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": house})


def test_killed_at_a_random_moment(tmp_path: Path) -> None:
    script = """
        from test_store import publish
        print("ready", flush=True)
        publish(sys.argv[1], *range(10**9))
    """
    writer = start(script, str(tmp_path))
    assert writer.stdout and writer.stdout.readline() == b"ready\n"
    time.sleep(random.uniform(0.05, 0.25))
    writer.kill()
    writer.wait()
    reader = Store(tmp_path)
    frame = reader.read("predictions")
    assert reader.problems == [] and set(frame["cell"]) == reader.done() == set(reader.read("outcomes")["cell"])
    assert len(frame) == 3 * len(reader.done())


def test_a_full_disk_names_the_blob_and_hurts_nothing(blobs: Blobs) -> None:
    publish(blobs, 0)
    full = OSError(errno.ENOSPC, "disk full, could not write", "parts/answers/x")
    with pytest.raises(OSError, match=r"disk full.*parts/answers/"):
        publish(FailingBlobs(blobs, full, allowed=1), 1)
    assert Store(blobs).done() == done(0) and Store(blobs).problems == []
    publish(blobs, 1)
    assert Store(blobs).done() == done(0, 1)


@pytest.mark.parametrize("number", range(30))
def test_every_flipped_bit_is_found(number: int) -> None:
    blobs, draw = MemoryBlobs(), random.Random(number)
    publish(blobs, 0, 1)
    victim = draw.choice([*blobs.list("parts"), *blobs.list("manifests")])
    raw = blobs.read(victim)
    blobs.replace(victim, flipped(raw, draw.randrange(8 * len(raw))))
    damaged, reader = blobs.read(victim), Store(blobs)
    kept = 1 if cell(0).key in victim else 0
    assert reader.done() == done(kept)
    assert set(reader.read("predictions")["cell"]) == set(reader.read("outcomes")["cell"]) == reader.done()
    assert len(reader.problems) == 1 and victim in reader.problems[0]
    assert damaged == blobs.read(f"quarantine/{victim}") and blobs.version(victim) is None


def test_a_damaged_version_is_damage_and_no_other_version(blobs: Blobs) -> None:
    publish(blobs, 0)
    (key,) = blobs.list("manifests")
    known = f'"format": {columns_module.VERSION}'.encode()
    assert known in blobs.read(key)
    blobs.replace(key, blobs.read(key).replace(known, b'"format": 7'))
    reader = Store(blobs)
    assert reader.done() == set() and "checksum" in reader.problems[0] and blobs.list("manifests") == {}


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda raw: raw[: len(raw) // 2], "empty": lambda _: b"", "foreign": lambda raw: b"PK\x03\x04" + raw,
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["parts/answers", "parts/grades", "parts/outcomes", "manifests"])
@pytest.mark.parametrize("damage", [*DAMAGES, "missing"])
def test_damaged_blobs_are_put_aside_named_and_done_again(blobs: Blobs, prefix: str, damage: str) -> None:
    publish(blobs, 0, 1)
    victim = key_of(blobs, prefix)
    raw = blobs.read(victim)
    blobs.delete(victim)
    if damage != "missing":
        blobs.replace(victim, DAMAGES[damage](raw))
    reader = Store(blobs)
    assert set(reader.read("predictions")["cell"]) == done(1) == reader.done()
    if (prefix, damage) != ("manifests", "missing"):  # a commit without a manifest never was
        assert len(reader.problems) == 1 and victim in reader.problems[0] and cell(0).key in reader.problems[0]
    publish(blobs, 0)
    again = Store(blobs)
    assert again.done() == done(0, 1) and len(again.read("predictions")) == 6 and again.problems == []


def test_a_second_attempt_counts_when_the_first_is_damaged(blobs: Blobs) -> None:
    publish(blobs, 0, answer="first")
    part = key_of(blobs, "parts/answers")
    publish(blobs, 0, answer="second")
    blobs.replace(part, b"")
    assert answers(blobs) == {cell(0).key: ["second"] * 3} and Store(blobs).done() == done(0)


def test_damage_between_two_reads_of_one_store_is_found(blobs: Blobs) -> None:
    publish(blobs, 0)
    reader, part = Store(blobs), key_of(blobs, "parts/answers")
    assert len(reader.read("predictions")) == 3
    blobs.replace(part, flipped(blobs.read(part), 4000))
    assert len(reader.read("predictions")) == 0 and len(reader.problems) == 1 and reader.done() == set()


def test_quarantine_keeps_every_damaged_blob(blobs: Blobs) -> None:
    for text in (b"first", b"second"):
        publish(blobs, 0)
        part = key_of(blobs, "parts/answers")
        blobs.replace(part, text)
        assert Store(blobs).done() == set()
    assert {b"first", b"second"} <= {blobs.read(key) for key in blobs.list("quarantine/parts")}


def test_foreign_blobs_are_put_aside_or_ignored(blobs: Blobs) -> None:
    publish(blobs, 0)
    for key in ("manifests/notes (old).txt", "manifests/folder/x.json", "parts/answers/other.parquet"):
        blobs.replace(key, b"hello")
    reader = Store(blobs)
    assert len(reader.read("predictions")) == 3 and len(reader.problems) == 2
    assert blobs.read("quarantine/manifests/notes (old).txt") == b"hello"


def test_a_read_only_store_can_be_read_although_damaged(blobs: Blobs) -> None:
    publish(blobs, 0, 1)
    blobs.replace(key_of(blobs, "parts/answers"), b"")
    reader = Store(FailingBlobs(blobs, READ_ONLY))
    assert set(reader.read("predictions")["cell"]) == done(1) == reader.done()
    assert len(reader.problems) == 1 and "left in place: Read-only file system" in reader.problems[0]


def test_a_manifest_cannot_lead_out_of_the_store(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    blobs = LocalBlobs(tmp_path / "store")
    for table, name in (("answers", "../../../secret"), ("..", "secret"), ("answers", "/etc/passwd")):
        part = manifest.Part(table, name, 1, 1, manifest.sha256(b"x"))
        commit = manifest.Commit("evil", "", "demo", 1, "", 1, (part,))
        blobs.replace("manifests/evil.json", manifest.render(commit))
        reader = Store(blobs)
        assert len(reader.read("predictions")) == 0 and len(reader.problems) == 1
    assert (tmp_path / "secret").read_bytes() == b"x"


# Versions of a table -------------------------------------------------------------------------------------------------

POINT = CurvePoint(8, 100, 64, 1.0, 0.9, 1.1, 5, 1.0)


def rewritten(change: Callable[[pa.Table], pa.Table]) -> Blobs:
    """A store whose only part was changed, and whose manifest vouches for it, as an older program would have written it."""
    blobs = MemoryBlobs()
    Store(blobs).publish({"curve": [POINT]}, cell=cell(), provenance=MADE)
    (part_key,), (commit_key,) = blobs.list("parts"), blobs.list("manifests")
    sink = pa.BufferOutputStream()
    pq.write_table(change(pq.read_table(pa.BufferReader(blobs.read(part_key)))), sink, write_page_checksum=True)
    raw = sink.getvalue().to_pybytes()
    commit = manifest.parse(blobs.read(commit_key), Path(commit_key).stem)
    part = replace(commit.parts[0], bytes=len(raw), sha256=manifest.sha256(raw))
    blobs.replace(part_key, raw)
    blobs.replace(commit_key, manifest.render(replace(commit, parts=(part,))))
    return blobs


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
    "other table": (lambda rows: rows.replace_schema_metadata({"diffprune.schema": f"costs {columns_module.VERSION}"}), "'costs "),
    "unlabelled": (lambda rows: rows.replace_schema_metadata(None), "not a part of table 'curve'"),
    "older": (lambda rows: rows.replace_schema_metadata({"diffprune.schema": "curve 1"}), "version 1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_columns_are_refused_by_name(change: str) -> None:
    reader = Store(rewritten(CHANGES[change][0]))
    assert len(reader.read("curve")) == 0 and reader.done("curve") == set()
    assert len(reader.problems) == 1 and CHANGES[change][1] in reader.problems[0] and "quarantine" in reader.problems[0]


@pytest.mark.parametrize("version", [1, columns_module.VERSION + 1])
def test_a_store_of_another_version_is_refused_and_left_alone(monkeypatch: pytest.MonkeyPatch, blobs: Blobs, version: int) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "VERSION", version)
        publish(blobs, 0)
    before = blobs.list()
    for ask in (lambda: Store(blobs).done(), lambda: Store(blobs).read("predictions"), lambda: publish(blobs, 0)):
        with pytest.raises(ValueError, match=rf"holds records of version {version}, this program .* makes it anew"):
            ask()
    assert blobs.list() == before


# One run of a name at a time -----------------------------------------------------------------------------------------


def test_a_second_run_is_refused_and_told_who(blobs: Blobs) -> None:
    with lock(blobs, run="demo") as attempt:
        assert attempt == 1
        with pytest.raises(Busy, match=f"'demo'.*process {os.getpid()} on .*attempt 1"), lock(blobs, run="demo"):
            pass
        with lock(blobs, run="other") as other:
            assert other == 1
    with lock(blobs, run="demo") as attempt:
        assert attempt == 2


def test_another_process_is_refused_and_takes_over_when_the_owner_is_killed(tmp_path: Path) -> None:
    script = """
        import time
        from diffprune.store import lock
        with lock(sys.argv[1], run="demo"):
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


@pytest.mark.parametrize("note", [b"", b'{"host":', b"[]", b'{"pid": 1}', b"\xff"])
def test_a_lock_that_names_nobody_is_taken_over(blobs: Blobs, note: bytes) -> None:
    blobs.replace("locks/demo/6", note)
    with lock(blobs, run="demo") as attempt:
        assert attempt == 7


@pytest.mark.parametrize("stale", [False, True])
def test_one_of_many_gets_the_lock(blobs: Blobs, stale: bool) -> None:
    if stale:
        blobs.replace("locks/demo/1", b'{"host":')
    held: list[int] = []
    refused: list[str] = []
    all_have_tried = threading.Event()

    def race(_: int) -> None:
        try:
            with lock(blobs, run="demo") as attempt:
                held.append(attempt)
                assert all_have_tried.wait(60)
        except Busy as busy:
            refused.append(str(busy))
            if len(refused) == 3:
                all_have_tried.set()

    together(4, race)
    assert held == [1 + stale] and len(refused) == 3


def test_a_run_may_end_on_a_full_disk(blobs: Blobs) -> None:
    with lock(FailingBlobs(blobs, OSError(errno.ENOSPC, "disk full"), allowed=1), run="demo") as attempt:
        assert attempt == 1


def test_an_earlier_attempt_cannot_publish(blobs: Blobs) -> None:
    with lock(blobs, run="demo") as attempt:
        mine = replace(MADE, attempt=attempt)
        publish(blobs, 0, made=mine)
    with lock(blobs, run="demo") as attempt:
        with pytest.raises(Fenced, match="attempt 1 of run 'demo'"):
            publish(blobs, 1, made=mine)
        publish(blobs, 2, made=replace(MADE, attempt=attempt))
        publish(blobs, 3, made=replace(MADE, run="other"))
    assert Store(blobs).done() == done(0, 2, 3)


def test_the_fence_falls_between_parts_and_manifest() -> None:
    class Overtaken(MemoryBlobs):
        """A newer attempt takes the lock while the first part is written."""

        def replace(self, key: str, data: bytes | memoryview) -> None:
            super().replace(key, data)
            if key.startswith("parts/answers"):
                super().create("locks/demo/2", b"")

    blobs = Overtaken()
    with pytest.raises(Fenced):
        publish(blobs, 0)
    assert Store(blobs).done() == set() and blobs.list("manifests") == {} and len(blobs.list("parts")) == 3
