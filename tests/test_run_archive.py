"""What comes back of a run that is at work: its files go, grow and are merged while they are packed or copied."""

from __future__ import annotations

import io
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blob_stores import MemoryBlobs

from diffprune.distributed import results
from diffprune.io import run_archive
from diffprune.io.blob_store import TEMPORARY, Blobs, LocalBlobs
from diffprune.job import seen
from diffprune.store import manifest

RUN = "run"


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_archive, "PAUSE_S", 0.0)


def publish(blobs: Blobs, folder: str, name: str, *parts: str) -> None:
    """A manifest that names its parts, after them, as a store writes it."""
    for part in parts:
        blobs.replace(f"store/parts/outcomes/{part}", part.encode())
    blobs.replace(f"store/{folder}/{name}.json", " ".join(parts).encode())


def merge(blobs: Blobs, first: str, second: str, whole: str) -> None:
    """Two bundles become one: the whole first, then each goes, its manifest before its part."""
    publish(blobs, "bundles", whole, f"{whole}.parquet")
    for name in (first, second):
        blobs.delete(f"store/bundles/{name}.json")
        blobs.delete(f"store/parts/outcomes/{name}.parquet")


def filled(blobs: Blobs) -> Blobs:
    blobs.replace("report/report.html", b"page")
    blobs.replace("settings.json", b"{}")
    blobs.replace("store/events/1.jsonl", b"{}\n")
    publish(blobs, "manifests", "m", "m.parquet")
    for name in ("b1", "b2"):
        publish(blobs, "bundles", name, f"{name}.parquet")
    return blobs


def unpacked(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        names = archive.getnames()
        assert len(set(names)) == len(names), "no file twice"
        return {name: archive.extractfile(name).read() for name in names}  # type: ignore[union-attr]


def whole(files: dict[str, bytes]) -> set[str]:
    """The manifests, all of whose parts are there."""
    shown = {name for name in files if name.startswith(run_archive.MANIFESTS)}
    for name in shown:
        for part in files[name].decode().split():
            assert files[f"store/parts/outcomes/{part}"] == part.encode(), f"{name} without its part {part}"
    return {Path(name).stem for name in shown}


def once(monkeypatch: pytest.MonkeyPatch, where: str, act: Callable[[], None]) -> list[str]:
    """Do something just before a file is packed for the first time."""
    real, done = run_archive._add, list[str]()

    def adding(archive: tarfile.TarFile, folder: Path, path: Path) -> bool:
        if path.match(where) and not done:
            done.append(str(path))
            act()
        return real(archive, folder, path)

    monkeypatch.setattr(run_archive, "_add", adding)
    return done


def test_a_store_names_its_manifests_as_the_archive_does() -> None:
    assert (f"store/{manifest.MANIFESTS}", f"store/{manifest.BUNDLES}") == run_archive.MANIFESTS


@pytest.mark.parametrize("where", ["report.html", "m.json", "b1.json", "b2.json", "b1.parquet", "b2.parquet", "m.parquet"])
def test_bundles_that_are_merged_while_a_run_is_packed_are_there_once_and_whole(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = filled(LocalBlobs(RUN))
    done = once(monkeypatch, where, lambda: merge(blobs, "b1", "b2", "b3"))
    assert whole(unpacked(run_archive._at_rest(Path(RUN)))) == {"m", "b3"} and done


def test_a_bundle_that_a_listing_missed_with_those_it_was_made_of_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes before a listing comes to it, and what comes behind its back, are both not in it."""
    blobs, real, listings = filled(LocalBlobs(RUN)), run_archive._manifests, list[int]()

    def listed(folder: Path) -> list[Path]:
        found = real(folder)
        if not listings:
            merge(blobs, "b1", "b2", "b3")
            found = [path for path in found if path.stem == "m"]
        listings.append(len(found))
        return found

    monkeypatch.setattr(run_archive, "_manifests", listed)
    assert whole(unpacked(run_archive._at_rest(Path(RUN)))) == {"m", "b3"}


def test_what_is_being_written_goes_and_grows_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    filled(LocalBlobs(RUN))
    Path(RUN, "store", "parts", f".abc{TEMPORARY}").write_bytes(b"half")
    Path(RUN, f".abc{TEMPORARY}").write_bytes(b"half")
    Path(RUN, "report", "away").symlink_to("/etc/hostname")
    (log := Path(RUN, "store", "events", "2.jsonl")).write_bytes(b"gone")
    once(monkeypatch, "1.jsonl", log.unlink)
    found = unpacked(run_archive._at_rest(Path(RUN)))
    assert set(found) == {
        "report/report.html", "settings.json", "store/events/1.jsonl", "store/manifests/m.json", "store/bundles/b1.json",
        "store/bundles/b2.json", *(f"store/parts/outcomes/{name}.parquet" for name in ("m", "b1", "b2")),
    }  # fmt: skip


def test_a_run_is_packed_while_another_thread_merges_all_the_time() -> None:
    blobs, ended = filled(LocalBlobs(RUN)), threading.Event()

    def write() -> None:
        number = 0
        while not ended.wait(0.02):
            for name in (first := f"x{number}", second := f"y{number}"):
                publish(blobs, "bundles", name, f"{name}.parquet")
            merge(blobs, first, second, f"z{number}")
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20):
            try:
                assert {"m", "b1", "b2"} <= whole(unpacked(run_archive.packed(Path(RUN))))
            except run_archive.Busy:
                continue
    finally:
        ended.set()
        writer.join()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (run_archive.Busy(), "were merged all the while they were packed: ask again"),
        (OSError(5, "Input/output error", "run/report/report.html"), "report.html cannot be read on the head (Input/output error)"),
    ],
)
def test_what_cannot_be_packed_is_told_in_a_sentence(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(LocalBlobs(RUN))

    def fails(*_: Any) -> bool:
        raise error

    monkeypatch.setattr(run_archive, "_add", fails)
    monkeypatch.setattr(sys, "argv", ["run_archive.py", RUN])
    assert run_archive.main() == 2
    said = capsys.readouterr().out
    assert says in said and said.count("\n") == 1


# The same from a bucket -----------------------------------------------------------------------------------------------


class Changing(MemoryBlobs):
    """Blobs of which something happens to the others when one is read for the first time."""

    where, act = "", staticmethod(lambda: None)

    def read(self, key: str) -> bytes:
        if self.where and key.endswith(self.where):
            self.where = ""
            self.act()
        return super().read(key)


def files(to: Path) -> dict[str, bytes]:
    return {path.relative_to(to).as_posix(): path.read_bytes() for path in to.rglob("*") if path.is_file()}


@pytest.mark.parametrize("where", ["m.json", "b1.json", "b2.json", "b1.parquet", "b2.parquet", "m.parquet"])
def test_bundles_that_are_merged_while_a_bucket_is_copied_are_there_whole(where: str, own_folder: Path) -> None:
    blobs = Changing()
    filled(blobs)
    blobs.where, blobs.act = where, lambda: merge(blobs, "b1", "b2", "b3")  # type: ignore[method-assign]
    count = results.copied(blobs, own_folder / "came")
    came = files(own_folder / "came")
    assert {"m", "b3"} == whole(came) and not blobs.where and count == len(came)


def test_a_report_from_a_bucket_is_no_older_than_its_store(own_folder: Path) -> None:
    """`export` goes by the times of files where a report says nothing of what it has seen."""
    blobs = filled(MemoryBlobs())
    results.copied(blobs, own_folder / "came")
    assert files(own_folder / "came") == {key: blobs.read(key) for key in blobs.list()}
    assert seen.all_of(own_folder / "came" / "store", own_folder / "came" / "report")


@pytest.mark.parametrize("error", [OSError(5, "the object store did not answer", "s3://a/b"), None])
def test_what_was_not_copied_whole_may_be_asked_for_again(error: OSError | None, own_folder: Path) -> None:
    blobs = filled(MemoryBlobs())

    class Broken(MemoryBlobs):
        list = staticmethod(blobs.list)

        def read(self, key: str) -> bytes:
            if error and key.endswith(".parquet"):
                raise error
            if not error and key.endswith("b1.json"):
                raise FileNotFoundError(2, "no such blob", key)
            return blobs.read(key)

    with pytest.raises(OSError if error else ValueError, match="did not answer" if error else "ask again in a minute"):
        results.copied(Broken(), own_folder / "came")
    assert not (own_folder / "came").exists()
    assert results.copied(blobs, own_folder / "came") == len(blobs.list())
