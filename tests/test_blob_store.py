"""The contract of blob storage, asked of every implementation; then what `LocalBlobs` promises of files, and attempts on both."""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blob_stores import FailingBlobs, MemoryBlobs, together
from object_server import ACCOUNT, azurite, place, serving
from s3_server import bucket, server

from diffprune.io import blob_store, checkpoint
from diffprune.io.attempts import Attempts, Fenced
from diffprune.io.blob_store import Blobs, LocalBlobs, open_blobs, refuse_if_unwritable
from diffprune.io.object_blobs import ObjectBlobs
from diffprune.io.s3_blobs import S3Blobs

IMPLEMENTATIONS: dict[str, Callable[[], Blobs]] = {"local": lambda: LocalBlobs("blobs"), "memory": MemoryBlobs}


@pytest.fixture(params=[*IMPLEMENTATIONS, "s3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gs", "az", "azurite"))])
def blobs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Blobs:
    if request.param == "s3":
        return S3Blobs(bucket(request.getfixturevalue("s3_endpoint"), monkeypatch))
    if request.param not in IMPLEMENTATIONS:
        endpoint = request.getfixturevalue(f"{request.param}_endpoint")
        return ObjectBlobs(place(request.param[:2], endpoint, monkeypatch))
    return IMPLEMENTATIONS[request.param]()


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    with server() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def gs_endpoint() -> Iterator[str]:
    with serving("gs") as server:
        yield f"http://127.0.0.1:{server.server_port}"


@pytest.fixture(scope="module")
def az_endpoint() -> Iterator[str]:
    with serving("az") as server:
        yield f"http://127.0.0.1:{server.server_port}/{ACCOUNT}"


@pytest.fixture(scope="module")
def azurite_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with azurite(tmp_path_factory.mktemp("azurite")) as endpoint:
        yield endpoint


def files(folder: str = "blobs") -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


# The contract --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"a\x00\n", memoryview(b"view"), bytes(range(256)) * 4096], ids="no few view MiB".split())
def test_what_is_written_is_read(blobs: Blobs, data: bytes | memoryview) -> None:
    blobs.create("a/b.c", data)
    blobs.replace("d", data)
    assert blobs.read("a/b.c") == bytes(data) == blobs.read("d")


def test_create_writes_once(blobs: Blobs) -> None:
    blobs.create("a", b"first")
    with pytest.raises(FileExistsError, match="is there already"):
        blobs.create("a", b"second")
    assert blobs.read("a") == b"first"
    blobs.delete("a")
    blobs.create("a", b"third")
    assert blobs.read("a") == b"third"


def test_the_version_changes_with_every_write_and_only_then(blobs: Blobs) -> None:
    seen = [blobs.version("a")]
    for number in range(20):
        blobs.replace("a", b"%02d" % number)
        seen.append(blobs.version("a"))
        assert blobs.read("a") and blobs.version("a") == seen[-1]
    blobs.delete("a")
    assert seen[0] is None is blobs.version("a")
    assert all(before != after for before, after in itertools.pairwise(seen))


def test_listing_is_by_whole_names_and_in_order(blobs: Blobs) -> None:
    assert blobs.list() == {} == blobs.list("a")
    for key in ("b", "a/z", "a/c/d", "ab/x", "a/c/ä ö"):
        blobs.replace(key, key.encode())
    assert list(blobs.list()) == sorted(["a/c/d", "a/c/ä ö", "a/z", "ab/x", "b"])
    assert list(blobs.list("a")) == ["a/c/d", "a/c/ä ö", "a/z"] and list(blobs.list("a/c")) == ["a/c/d", "a/c/ä ö"]
    assert blobs.list("b") == {} == blobs.list("nothing/here")
    assert all(blobs.version(key) == version for key, version in blobs.list().items())


def test_what_is_not_there_is_not_read_and_need_not_be_deleted(blobs: Blobs) -> None:
    blobs.replace("a/b", b"")
    for key in ("c", "a/c", "a", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=key):
            blobs.read(key)
        assert blobs.version(key) is None
    for key in ("c", "a/c", "a/b/c", "a/b", "a/b"):
        blobs.delete(key)
    assert blobs.list() == {}


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "..", "../a", "a/../b", ".a", "a/.b", ".", "a\\b", "a\0", "a\n", "\udc80"])
def test_names_that_lead_elsewhere_are_refused(blobs: Blobs, key: str) -> None:
    verbs: list[Callable[[], Any]] = [
        lambda: blobs.create(key, b""), lambda: blobs.replace(key, b""), lambda: blobs.read(key),
        lambda: blobs.version(key), lambda: blobs.delete(key),
    ]  # fmt: skip
    for verb in [*verbs, *([lambda: blobs.list(key)] if key else [])]:
        with pytest.raises(ValueError, match="names no blob"):
            verb()
    assert blobs.list() == {}


def test_one_of_many_creates_succeeds(blobs: Blobs) -> None:
    for round in range(20):
        won: list[int] = []

        def race(number: int, key: str = f"a/{round}", won: list[int] = won) -> None:
            try:
                blobs.create(key, b"%d" % number)
            except FileExistsError:
                return
            won.append(number)

        together(4, race)
        assert len(won) == 1 and blobs.read(f"a/{round}") == b"%d" % won[0]


def test_a_reader_sees_whole_blobs_while_they_are_replaced(blobs: Blobs) -> None:
    values = [bytes([number]) * 300_000 for number in range(3)]
    blobs.replace("a", values[0])

    def work(number: int) -> None:
        for _ in range(30):
            if number:
                blobs.replace("a", values[number])
            else:
                assert blobs.read("a") in values and list(blobs.list()) == ["a"]

    together(3, work)


def test_places_are_folders_or_blobs(blobs: Blobs) -> None:
    assert open_blobs(blobs) is blobs
    assert str(open_blobs("x")) == str(open_blobs(Path("x"))) == str(Path("x").resolve())
    for scheme in ("s3", "gs", "az"):
        for address in (f"{scheme}://a-bucket/x/y", Path(f"{scheme}://a-bucket/x/y"), f"{scheme}://a-bucket/x/y/"):
            assert str(open_blobs(address)) == f"{scheme}://a-bucket/x/y"
        assert str(open_blobs(f"{scheme}://a-bucket")) == f"{scheme}://a-bucket"
    for address, words in (
        ("ftp://a-bucket/x", "ftp:// is no storage that is known here"), ("s3://", "is no place"), ("gs://", "is no place"),
        ("az://a-container/../x", "is no place: az://container/folder is needed"),
        ("gs://key:secret@a-bucket/x", r"'gs://\.\.\.@a-bucket/x' is no place: .* credentials come from the environment"),
        ("s3://a-bucket/../x", "is no place"),
        ("s3://key:secret@a-bucket/x", r"'s3://\.\.\.@a-bucket/x' is no place: .* credentials come from the environment"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            open_blobs(address)


# Files ---------------------------------------------------------------------------------------------------------------


def start(script: str, *arguments: str) -> subprocess.Popen[bytes]:
    house = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    code = "import sys\nfrom diffprune.io.blob_store import LocalBlobs\n" + textwrap.dedent(script)
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": house})


def test_one_of_many_processes_creates() -> None:
    script = """
        won = []
        for number in range(200):
            try:
                LocalBlobs("blobs").create(f"a/{number}", sys.argv[1].encode())
            except FileExistsError:
                continue
            won.append(str(number))
        print(",".join(won))
    """
    racers = [start(script, name) for name in "xyz"]
    won = {name: racer.communicate(timeout=60)[0].decode().strip().split(",") for name, racer in zip("xyz", racers, strict=True)}
    found = {key.removeprefix("a/"): LocalBlobs("blobs").read(key).decode() for key in LocalBlobs("blobs").list()}
    assert len(found) == 200 and found == {number: name for name, numbers in won.items() for number in numbers if number}


def test_killed_at_random_moments_blobs_are_whole() -> None:
    script = """
        blobs = LocalBlobs("blobs")
        print("ready", flush=True)
        for number in range(10**9):
            blobs.replace("a/b", bytes([number % 256]) * 2_000_000)
            blobs.create(f"a/{number}", b"x" * 100_000)
            blobs.delete(f"a/{number}")
    """
    for wait in (0.02, 0.05, 0.08):
        writer = start(script)
        assert writer.stdout and writer.stdout.readline() == b"ready\n"
        time.sleep(wait)
        writer.kill()
        writer.wait()
        for key in LocalBlobs("blobs").list():
            data = LocalBlobs("blobs").read(key)
            assert len(set(data)) == 1 and len(data) == (2_000_000 if key == "a/b" else 100_000)


def test_what_killed_processes_left_is_removed_when_it_is_old() -> None:
    LocalBlobs("blobs").create("a/b", b"")
    for name, age in (("old", 7200), ("new", 0)):
        path = Path(f"blobs/a/.{name}{blob_store.TEMPORARY}")
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    LocalBlobs("blobs").replace("a/c", b"")
    assert f"a/.new{blob_store.TEMPORARY}" in files() and f"a/.old{blob_store.TEMPORARY}" not in files()


@pytest.mark.parametrize("verb", ["create", "replace"])
@pytest.mark.parametrize("call", ["fsync", "open", "link", "replace"])
def test_stopped_at_any_system_call_a_blob_is_as_before_or_after(monkeypatch: pytest.MonkeyPatch, verb: str, call: str) -> None:
    real: Callable[..., object] = getattr(os, call)
    for point in range(20):
        blobs = LocalBlobs(f"{point}")
        if verb == "replace":
            blobs.replace("a/b", b"old")
        left = [point]

        def stopping(*args: object, left: list[int] = left) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, stopping)
            try:
                getattr(blobs, verb)("a/b", b"new")
                finished = True
            except KeyboardInterrupt:
                finished = False
        found = {key: blobs.read(key) for key in blobs.list()}
        assert found in ({"a/b": b"new"}, {"a/b": b"old"} if verb == "replace" else {}) and files(f"{point}") == list(found)
        if finished:
            assert found == {"a/b": b"new"}
            return
    raise AssertionError("never finished")


def test_a_write_costs_two_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    blobs, synced, real = LocalBlobs("blobs"), [], os.fsync
    blobs.replace("a/b", b"")
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(handle), real(handle))[1])
    blobs.replace("a/b", b"")
    blobs.create("a/c", b"")
    assert len(synced) == 4


@pytest.mark.parametrize(
    ("call", "number", "said"),
    [
        ("fsync", errno.ENOSPC, r"disk full, could not write.*blobs/a/b"),
        ("fsync", errno.EIO, r"could not write \(Input/output error\).*blobs/a/b"),
        ("link", errno.EPERM, r"could not write \(the file system has no hard links\).*blobs/a/b"),
    ],
)
def test_a_failed_write_names_its_blob_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, call: str, number: int, said: str
) -> None:
    def failing(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    LocalBlobs("blobs").create("a/other", b"")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(OSError, match=said) as caught:
            LocalBlobs("blobs").create("a/b", b"new")
    assert caught.value.errno == number and files() == ["a/other"]


def test_a_link_that_was_made_but_reported_as_there_counts_as_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a network file system says when the first answer was lost."""
    real = os.link

    def lost(*args: Any) -> None:
        real(*args)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", lost)
    LocalBlobs("blobs").create("a", b"mine")
    assert LocalBlobs("blobs").read("a") == b"mine"


def test_a_file_where_a_folder_is_needed_is_named() -> None:
    Path("file").write_text("")
    with pytest.raises(ValueError, match="file is a file, but a folder is needed"):
        LocalBlobs("file")
    with pytest.raises(ValueError, match="file is a file, but a folder is needed"):
        LocalBlobs(".").create("file/a", b"")


def test_only_files_with_names_of_blobs_are_listed() -> None:
    blobs = LocalBlobs("blobs")
    blobs.create("a/b", b"")
    for name in ("a/.DS_Store", ".git/config", "a/line\nbreak", ".half"):
        Path("blobs", name).parent.mkdir(exist_ok=True)
        Path("blobs", name).write_text("")
    Path("blobs/folder").mkdir()
    os.mkfifo("blobs/pipe")
    Path("blobs/dangling").symlink_to("nowhere")
    assert list(blobs.list()) == ["a/b"] and blobs.version("pipe") is None is blobs.version("dangling")


def test_a_relative_folder_stays_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blobs = LocalBlobs("blobs")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    blobs.create("a", b"")
    assert (tmp_path / "blobs" / "a").is_file()


# Attempts ------------------------------------------------------------------------------------------------------------


def test_attempts_grow_and_fence_off_the_ones_before(blobs: Blobs) -> None:
    work = Attempts(blobs, "attempts/x", "work x")
    assert work.newest() == 0 and [work.begin() for _ in range(12)] == list(range(1, 13))
    assert list(blobs.list()) == ["attempts/x/12"] and Attempts(blobs, "attempts/y", "work y").begin() == 1
    work.check(12)
    with pytest.raises(Fenced, match=r"attempt 11 of work x in .* may not write: attempt 12 has taken over"):
        work.check(11)


def test_a_number_is_taken_once_also_after_it_was_passed_on(blobs: Blobs) -> None:
    work = Attempts(blobs, "attempts", "work")
    assert work.take(1, b"first") and not work.take(1, b"second") and blobs.read("attempts/1") == b"first"
    assert work.take(2, b"third") and not work.take(1, b"fourth"), "who looked before others took 1 and 2 comes too late"
    assert list(blobs.list()) == ["attempts/2"]


def test_a_create_whose_answer_was_lost_is_taken_by_whose_note_stands_there(blobs: Blobs) -> None:
    class Unheard(FailingBlobs):
        def create(self, key: str, data: bytes | memoryview) -> None:
            super().create(key, data)
            raise FileExistsError(errno.EEXIST, "is there already", key)

    work = Attempts(Unheard(blobs, OSError(), allowed=9), "attempts", "work")
    taken = work.take(1, b"mine")
    assert taken == 1 and taken.note == b"mine" and work.take(1, b"other") is None
    work.check(taken)


def test_an_attempt_is_known_by_its_note(blobs: Blobs) -> None:
    """After the blob was removed by hand the next attempt has the same number; the old one stays shut out."""
    work = Attempts(blobs, "attempts", "work")
    old = pickle.loads(pickle.dumps(work.begin()))
    work.check(old)
    blobs.delete("attempts/1")
    with pytest.raises(Fenced, match=r"attempts/1 is gone or another's: was the folder moved"):
        work.check(old)
    new = work.begin()
    assert new == old == 1
    work.check(new)
    with pytest.raises(Fenced, match="gone or another's"):
        work.check(old)


def test_of_many_that_begin_each_has_its_own_attempt(blobs: Blobs) -> None:
    begun: list[int] = []
    together(4, lambda _: begun.extend(Attempts(blobs, "attempts", "work").begin() for _ in range(5)))
    assert len(set(begun)) == 20 and Attempts(blobs, "attempts", "work").newest() == max(begun)


# Trained weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
def test_weights_are_the_old_the_new_or_refused(blobs: Blobs, late: bool) -> None:
    def write(place: Blobs, value: float) -> str:
        return checkpoint.write(place, {"w": torch.full((3,), value)}, {"value": value}, "# A card\n")

    write(blobs, 1.0)
    for point in range(10):
        try:
            digest = write(FailingBlobs(blobs, KeyboardInterrupt(), point, late), 2.0)
        except KeyboardInterrupt:
            try:
                tensors, config = checkpoint.read(blobs)
            except ValueError as error:
                assert "altered or damaged" in str(error)
            else:
                assert tensors["w"].tolist() == [config["value"]] * 3
            write(blobs, 1.0)
            continue
        tensors, config = checkpoint.read(blobs)
        assert (tensors["w"].tolist(), config) == ([2.0] * 3, {"value": 2.0, "weights_sha256": digest})
        assert checkpoint.is_complete(blobs) and blobs.read("README.md") == b"# A card\n"
        return
    raise AssertionError("never finished")


def test_weights_that_are_missing_cut_short_or_not_finite_are_named(blobs: Blobs) -> None:
    assert not checkpoint.is_complete(blobs)
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        checkpoint.read(blobs)
    with pytest.raises(ValueError, match="'w' holds NaN or infinite"):
        checkpoint.write(blobs, {"w": torch.tensor([float("nan")])}, {}, "")
    assert blobs.list() == {}
    checkpoint.write(blobs, {"w": torch.ones(3)}, {}, "")
    weights = blobs.read(checkpoint.FILE)
    blobs.replace(checkpoint.FILE, weights[:-1])
    with pytest.raises(ValueError, match="altered or damaged"):
        checkpoint.read(blobs)
    blobs.replace(checkpoint.CONFIG, b"{}")  # as of a checkpoint that others made, without a sum
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        checkpoint.read(blobs)
    blobs.delete(checkpoint.FILE)
    with pytest.raises(ValueError, match="weights file is missing"):
        checkpoint.read(blobs)


def test_a_folder_that_can_be_written_is_left_as_it_was_found(tmp_path: Path) -> None:
    refuse_if_unwritable(tmp_path / "deep" / "below")
    refuse_if_unwritable("s3://bucket/x")
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    refuse_if_unwritable(tmp_path / "there" / "x")
    refuse_if_unwritable(tmp_path / "there")
    assert [one.name for one in tmp_path.rglob("*")] == ["there"]
    (tmp_path / "file").write_text("x")
    for below in ("file", "file/x", "file/x/y"):
        with pytest.raises(ValueError, match=f"{tmp_path}/file is a file, but a folder is needed"):
            refuse_if_unwritable(tmp_path / below)


def test_what_the_system_says_of_a_folder_that_takes_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(ValueError, match=r"x/y \(Read-only file system\): give another folder with --out"):
        refuse_if_unwritable(tmp_path / "x" / "y")
    assert not list(tmp_path.iterdir())
