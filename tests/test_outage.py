"""An object store that is away for a while is waited for; one that never answered is not."""

from __future__ import annotations

import errno
import threading
import time

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
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FIRST_S": 0.01, "PATIENCE_S": 0.5, "_answered": set(), "_away": set()}.items():
        monkeypatch.setattr(outage, name, value)
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
