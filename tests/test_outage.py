"""An object store that is away for a while is waited for; one that never answered is not."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator

import pytest

from diffprune.io import outage
from diffprune.io.outage import Outage, patient


class Store:
    """Gives what it is told to, one thing a call."""

    def __init__(self, name: str, *gives: Exception | str) -> None:
        self.name, self.gives, self.calls = name, list(gives), 0

    def __str__(self) -> str:
        return self.name

    @patient
    def read(self, key: str) -> str:
        self.calls += 1
        found = self.gives.pop(0)
        if isinstance(found, Exception):
            raise found
        return f"{key}: {found}"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {"FIRST_S": 0.01, "PATIENCE_S": 0.5, "_answered": set(), "_away": set(), "_silent": set()}.items():
        monkeypatch.setattr(outage, name, value)
    outage.hurry(False)
    yield
    outage.hurry(False)


def away() -> Outage:
    return Outage(errno.EIO, "the object store did not answer", "s3://a/b")


@pytest.mark.parametrize("first", ["one", FileNotFoundError(), FileExistsError()])
def test_a_store_that_has_answered_is_waited_for(first: Exception | str, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store("s3://a", first, away(), away(), "two", "three")
    if isinstance(first, Exception):
        with pytest.raises(type(first)):
            store.read("b")
    else:
        assert store.read("b") == "b: one"
    assert store.read("b") == "b: two" and store.calls == 4 and store.read("b") == "b: three"
    said = capsys.readouterr().out.splitlines()
    assert said == ["the object store did not answer: s3://a/b; it is asked again for up to 0 s", "s3://a answers again"]


def test_one_that_never_answered_is_not() -> None:
    store = Store("s3://b", away(), "late")
    with pytest.raises(Outage):
        store.read("b")
    assert store.calls == 1 and store.read("b") == "b: late"


def test_other_faults_are_raised_at_once() -> None:
    store = Store("s3://c", "one", OSError(errno.EACCES, "refused"), "two")
    store.read("b")
    with pytest.raises(OSError, match="refused"):
        store.read("b")
    assert store.calls == 2


def test_patience_ends() -> None:
    store = Store("s3://d", "one", *(away() for _ in range(1000)))
    store.read("b")
    began = time.monotonic()
    with pytest.raises(Outage):
        store.read("b")
    assert 0.5 <= time.monotonic() - began < 5 and store.calls > 3


def test_who_is_to_end_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "PATIENCE_S", 60.0)
    monkeypatch.setattr(outage, "FIRST_S", 60.0)
    store = Store("s3://e", "one", *(away() for _ in range(10)))
    store.read("b")
    threading.Timer(0.1, outage.hurry).start()
    began = time.monotonic()
    with pytest.raises(Outage):
        store.read("b")
    assert time.monotonic() - began < 10


def test_in_a_hurry_a_silent_store_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "HURRY_S", 0.3)

    class Hangs(Store):
        @patient
        def read(self, key: str) -> str:
            self.calls += 1
            time.sleep(60)
            return key

    hangs, works = Hangs("s3://f/one"), Store("s3://g", "one", OSError(errno.EACCES, "refused"))
    outage.hurry()
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(Outage, match="in time"):
            hangs.read("b")
    with pytest.raises(Outage):
        Hangs("s3://f/two").read("b")
    assert hangs.calls == 1 and time.monotonic() - began < 5
    assert works.read("b") == "b: one"
    with pytest.raises(OSError, match="refused"):
        works.read("b")
    outage.hurry(False)
    assert not outage._silent


def test_a_thread_that_waits_for_a_store_is_waited_for_until_there_is_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "HURRY_S", 0.3)
    gate = threading.Event()
    thread = threading.Thread(target=gate.wait, daemon=True)
    thread.start()
    threading.Timer(0.5, outage.hurry).start()
    began = time.monotonic()
    outage.joined(thread)
    assert 0.7 < time.monotonic() - began < 5 and thread.is_alive()
    gate.set()
    outage.joined(thread)
    assert not thread.is_alive()
