"""Records, states, scorers and report in a bucket: two writers, a killed one, conditions refused late, and no secret anywhere.

What a run does is tried on stores of all three kinds; what a store may answer, on each.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from object_server import ACCOUNT, KEY, LOST, Server, serving
from object_server import SECRET as TOKEN
from object_server import place as folder_of
from s3_server import SECRET, bucket, keys, server

from diffprune import verify
from diffprune.cli import commands
from diffprune.core.cell import Cell, TrainSpec
from diffprune.core.records import Outcome, Provenance
from diffprune.core.spec import Spec
from diffprune.io import checkpoint, lease, object_blobs, outage, run_lock
from diffprune.io.attempts import Attempts
from diffprune.io.blob_store import open_blobs
from diffprune.io.object_blobs import ObjectBlobs
from diffprune.io.s3_blobs import S3Blobs
from diffprune.job import pipeline
from diffprune.job.job import Job
from diffprune.store import Busy, Fenced, Store, lock
from diffprune.train.checkpoints import Files, claim, read_steps, verified
from diffprune.train.recipe import Recipe
from diffprune.train.step_log import opened
from tests.records import evaluate_cell, prediction, provenance

AWSResponse: Any = pytest.importorskip("botocore.awsrequest", reason="no S3 server: boto3 is missing").AWSResponse


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "PATIENCE_S", 0.0)  # what a store says, not that it is waited for


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with server() as found:
        yield found


@pytest.fixture
def s3_place(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of a bucket that speaks S3."""
    return bucket(endpoint, monkeypatch)


@pytest.fixture(scope="module")
def google() -> Iterator[Server]:
    with serving("gs") as found:
        yield found


@pytest.fixture
def slow() -> Iterator[Server]:
    """One for a single test, as an answer that is held up holds up the others."""
    with serving("gs") as found:
        yield found


@pytest.fixture(scope="module")
def azure() -> Iterator[Server]:
    with serving("az") as found:
        yield found


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}" + (f"/{ACCOUNT}" if server.kind == "az" else "")


@pytest.fixture(params=["s3", "google", "azure"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of a bucket of each kind."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3_place"))
    server = request.getfixturevalue(request.param)
    return folder_of(server.kind, address(server), monkeypatch)


def train_cell(number: int) -> Cell:
    return Cell(Spec("embedded"), "float32", TrainSpec(Spec("random"), "key", number))


def publish(store: Store, number: int, made: Provenance) -> None:
    store.publish({"outcomes": [Outcome("ok", "", 1, 0.0)]}, cell=train_cell(number), provenance=made)


WRITER = """
    import sys, itertools
    from diffprune.io import lease, run_lock
    from diffprune.core.cell import Cell, TrainSpec
    from diffprune.core.records import Outcome, Provenance
    from diffprune.core.spec import Spec
    from diffprune.store import Store, lock
    lease.BEAT_S = 0.25
    run_lock.machine = lambda: "another-boot-4026531836"
    place, run, start, stop = sys.argv[1:]
    with lock(place, run) as attempt:
        print(int(attempt), flush=True)
        for number in range(int(start), int(stop)):
            cell = Cell(Spec("embedded"), "float32", TrainSpec(Spec("random"), "key", number))
            made = Provenance(run, attempt, "", False, "{}", "{}", 0, "2026-01-01T00:00:00+00:00")
            Store(place).publish({"outcomes": [Outcome("ok", "", 1, 0.0)]}, cell=cell, provenance=made)
            print(number, flush=True)
"""


@contextlib.contextmanager
def writer(place: str, run: str, start: int, stop: int) -> Iterator[subprocess.Popen[str]]:
    """A process elsewhere that publishes cells, one after the other, and says which are done."""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", textwrap.dedent(WRITER), place, run, str(start), str(stop)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    try:
        yield process
    finally:
        with process:
            process.kill()


def said(process: subprocess.Popen[str]) -> list[str]:
    """All that a process says to its end."""
    assert process.stdout is not None
    return process.stdout.read().split()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["s3", pytest.param("google", marks=pytest.mark.trial(18))], indirect=True)
def test_two_writers_one_killed_and_one_that_takes_over(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with writer(place, "one", 0, 1000) as one, writer(place, "other", 500, 512) as other:
        assert one.stdout is not None
        told = [one.stdout.readline() for _ in range(6)]
        with pytest.raises(Busy, match=f"in {place}.* is held by process {one.pid} on "):
            run_lock.refuse_if_held(place, "one")
        one.kill()
        assert said(other) == ["1", *map(str, range(500, 512))] and other.wait() == 0
        told += [f"{word}\n" for word in said(one)]
    assert told[0] == "1\n"
    done = {train_cell(int(word)).key for word in told[1:]} | {train_cell(number).key for number in range(500, 512)}
    reader = Store(place)
    assert done <= reader.done() and len(reader.done() - done) <= 1 and reader.problems == [], "what was said is there, whole"
    monkeypatch.setattr(lease, "LEASE_S", 1.5)
    began = time.monotonic()
    with lock(place, "one") as attempt:
        assert attempt == 2 and time.monotonic() - began > 1.4
        with pytest.raises(Fenced, match="attempt 2 has taken over"):
            publish(Store(place), 999, provenance(run="one", attempt=1))
        publish(Store(place), 999, provenance(run="one", attempt=attempt))
    assert train_cell(999).key in Store(place).done()


# What S3 may answer to a conditional put --------------------------------------------------------------------------------


class Raw(io.BytesIO):
    """The body of an answer."""

    def stream(self, **_: Any) -> Iterator[bytes]:
        yield self.read()


def answer(request: Any, status: int, code: str) -> Any:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>key {SECRET}</Message></Error>".encode()
    return AWSResponse(request.url, status, {"content-type": "application/xml"}, Raw(body))


def answering(blobs: S3Blobs, turns: list[Callable[[Any], Any]]) -> None:
    """Answer the next puts so; None: as the server does."""

    def hook(request: Any, **_: Any) -> Any:
        return turns.pop(0)(request) if turns else None

    blobs.client.meta.events.register("before-send.s3.PutObject", hook)


@pytest.mark.parametrize("others", [False, True])
def test_a_condition_that_is_in_conflict_is_asked_again(s3_place: str, others: bool) -> None:
    """What S3 answers while two conditional writes of one key are under way: neither yes nor no."""
    blobs = S3Blobs(s3_place)

    def conflict(request: Any) -> Any:
        if others:
            S3Blobs(s3_place).replace("a", b"another's")
        return answer(request, 409, "ConditionalRequestConflict")

    answering(blobs, [conflict, conflict])
    if others:
        with pytest.raises(FileExistsError, match="is there already"):
            blobs.create("a", b"mine")
    else:
        blobs.create("a", b"mine")
    assert blobs.read("a") == (b"another's" if others else b"mine")


def test_conflicts_without_end_are_an_error(s3_place: str) -> None:
    blobs = S3Blobs(s3_place)
    answering(blobs, [lambda request: answer(request, 409, "ConditionalRequestConflict")] * 99)
    with pytest.raises(OSError, match=r"others keep writing it.*/a'"):
        blobs.create("a", b"mine")


def test_a_put_that_took_effect_and_was_refused_when_it_was_sent_again(s3_place: str) -> None:
    """The answer to the first is lost, the second meets what the first has written: an attempt knows its own note."""
    blobs = S3Blobs(s3_place)

    def lost(request: Any) -> Any:
        blobs.client._endpoint.http_session.send(request)
        return answer(request, 500, "InternalError")

    answering(blobs, [lost])
    with pytest.raises(FileExistsError):
        blobs.create("a", b"mine")
    assert S3Blobs(s3_place).read("a") == b"mine"
    other = S3Blobs(s3_place)
    answering(other, [lost])
    attempts = Attempts(other, "attempts", "work")
    taken = attempts.take(1, b"mine")
    assert taken == 1 and attempts.take(1, b"another") is None
    attempts.check(taken)


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [(403, "AccessDenied", r"refuses these credentials \(AccessDenied\)"), (400, "<b>&amp;\nodd", r"failed \(")],
)
def test_what_a_store_says_is_not_repeated(s3_place: str, status: int, code: str, words: str) -> None:
    blobs = S3Blobs(s3_place)
    answering(blobs, [lambda request: answer(request, status, code)] * 9)
    for put in (blobs.create, blobs.replace):
        with pytest.raises(OSError, match=words) as caught:
            put("a/b", b"")
        assert SECRET not in str(caught.value) and f"{s3_place}/a/b" in str(caught.value)


def test_a_store_that_is_away_for_a_while_is_waited_for(s3_place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that break and answers of 503, behind what boto3 tries again by itself."""
    from botocore.exceptions import ClientError, ConnectionClosedError, EndpointConnectionError

    monkeypatch.setattr(outage, "FIRST_S", 0.01)
    monkeypatch.setattr(outage, "PATIENCE_S", 30.0)
    blobs = S3Blobs(s3_place)
    blobs.replace("a", b"1")
    faults: list[Exception] = [
        EndpointConnectionError(endpoint_url="x"), ConnectionClosedError(endpoint_url="x"),
        ClientError({"Error": {"Code": "SlowDown"}, "ResponseMetadata": {"HTTPStatusCode": 503}}, "x"),
    ]  # fmt: skip
    for verb, call, expected in (
        ("get_object", lambda: blobs.read("a"), b"1"), ("put_object", lambda: blobs.replace("b", b"2"), None),
        ("put_object", lambda: blobs.create("c", b"3"), None), ("head_object", lambda: blobs.version("d"), None),
        ("get_paginator", lambda: list(blobs.list()), ["a", "b", "c"]), ("delete_object", lambda: blobs.delete("a"), None),
    ):  # fmt: skip
        left, own = list(faults), getattr(blobs.client, verb)

        def broken(*args: Any, left: list[Exception] = left, own: Any = own, **kwargs: Any) -> Any:
            if left:
                raise left.pop(0)
            return own(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(blobs.client, verb, broken)
            assert call() == expected and not left


def test_a_store_that_does_not_answer_and_a_bucket_that_is_not_there(s3_place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="there is no bucket elsewhere: make it first"):
        S3Blobs("s3://elsewhere/x").read("a")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"did not answer \(EndpointConnectionError\).*s3://a-bucket/.*/a'"):
        S3Blobs(s3_place).read("a")
    for name in keys():
        monkeypatch.delenv(name)
    for name in ("AWS_EC2_METADATA_DISABLED", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "true")
    with pytest.raises(OSError, match="no credentials: set them"):
        S3Blobs(s3_place).read("a")


# What Google's and Azure's stores may answer ---------------------------------------------------------------------------------


@pytest.fixture(params=["google", "azure"])
def other(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, str]]:
    """A server whose next answers a test may give, and a folder there."""
    server = request.getfixturevalue(request.param)
    yield server, folder_of(server.kind, address(server), monkeypatch)
    server.answers.clear()


def test_a_put_that_took_effect_elsewhere_and_was_refused_when_sent_again(other: tuple[Server, str]) -> None:
    server, place = other
    server.answers[:] = [LOST]
    with pytest.raises(FileExistsError):
        ObjectBlobs(place).create("a", b"mine")
    assert ObjectBlobs(place).read("a") == b"mine"
    attempts = Attempts(ObjectBlobs(place), "attempts", "work")
    server.answers[:] = [LOST]
    taken = attempts.take(1, b"mine")
    assert taken == 1 and attempts.take(1, b"another") is None
    attempts.check(taken)


@pytest.mark.parametrize(
    ("status", "words"), [(401, "refuses these credentials"), (403, "refuses these credentials"), (400, "failed")]
)
def test_what_these_stores_say_is_not_repeated(other: tuple[Server, str], status: int, words: str) -> None:
    server, place = other
    blobs = ObjectBlobs(place)
    for act in (
        lambda: blobs.create("a/b", b""),
        lambda: blobs.replace("a/b", b""),
        lambda: blobs.read("a/b"),
        lambda: blobs.list("a/b"),
    ):
        server.answers[:] = [status] * 9
        with pytest.raises(OSError, match=words) as caught:
            act()
        assert str(caught.value).endswith(f"'{place}/a/b'") and not any(
            word in str(caught.value) for word in (TOKEN, KEY, "127.0.0.1")
        )


def test_a_bucket_that_is_not_there_and_settings_that_are_none(other: tuple[Server, str], monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = other[1][:2]
    blobs = ObjectBlobs(f"{scheme}://elsewhere/x")
    for act in (lambda: blobs.create("a", b""), lambda: blobs.replace("a", b""), lambda: blobs.read("a"), blobs.list):
        with pytest.raises(OSError, match=r"there is no (bucket|container) elsewhere: make it first"):
            act()
    endpoint = "GOOGLE_BASE_URL" if scheme == "gs" else "AZURE_STORAGE_ENDPOINT"
    for wrong in ("nonsense", "ftp://host", "http://10.255.255.1", "https://"):
        monkeypatch.setenv(endpoint, wrong)
        with pytest.raises(ValueError, match=f"{endpoint} must be an address that begins with https://"):
            ObjectBlobs(other[1]).read("a")
    monkeypatch.setenv(endpoint, "http://127.0.0.1:9")
    with pytest.raises(OSError, match="the object store did not answer"):
        ObjectBlobs(other[1]).read("a")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    if scheme == "az":
        with pytest.raises(ValueError, match=r"no usable login in the environment .*: AZURE_STORAGE_ACCOUNT_NAME must be set"):
            ObjectBlobs(other[1]).read("a")


@pytest.mark.parametrize("verb", ["create", "replace", "read", "version", "list", "delete"])
def test_a_missing_package_is_named_by_every_verb(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    given = {"create": ("a", b""), "replace": ("a", b""), "list": ()}.get(verb, ("a",))
    with pytest.raises(ValueError, match=r"gs://a-bucket/x needs obstore: pip install 'diffprune\[objects\]'"):
        getattr(ObjectBlobs("gs://a-bucket/x"), verb)(*given)


def test_no_login_and_one_that_cannot_be_read_are_named(monkeypatch: pytest.MonkeyPatch, own_folder: Path) -> None:
    """An address of documentation stands for the machine's own identity, which nobody may ask in a test."""
    monkeypatch.setenv("GCE_METADATA_HOST", "192.0.2.1")
    monkeypatch.setenv("GCE_METADATA_ROOT", "192.0.2.1")
    (own_folder / "login.json").write_text("{")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(own_folder / "login.json"))
    with pytest.raises(
        ValueError, match=r"no usable login in the environment \(GOOGLE_APPLICATION_CREDENTIALS or .*it cannot be read"
    ):
        ObjectBlobs("gs://a-bucket/x").read("a")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "no base64")
    with pytest.raises(ValueError, match=r"no usable login in the environment \(AZURE_STORAGE_ACCOUNT_NAME and") as caught:
        ObjectBlobs("az://a-container/x").read("a")
    assert "no base64" not in str(caught.value)


@pytest.mark.slow
def test_a_body_may_take_as_long_as_it_is_large_and_slowness_is_told_from_silence(
    slow: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 5 MB a second 300 MB take a minute, which once was the limit of all requests."""
    assert object_blobs.seconds(0) == object_blobs.seconds(10**6) == 30 and object_blobs.seconds(300 * 10**6) > 2 * 300 / 5
    blobs, data = ObjectBlobs(folder_of("gs", address(slow), monkeypatch)), os.urandom(2**20)
    for name, value in {"REQUEST_S": 1.5, "LARGE": 2**16, "RETRIES": 0, "SLOWEST": 2**15}.items():
        monkeypatch.setattr(object_blobs, name, value)
    monkeypatch.setattr(slow, "pause_s", 0.15)
    blobs.replace("a", data)
    assert blobs.read("a") == data, "more than a second and a half, each"
    monkeypatch.setattr(object_blobs, "SLOWEST", 2**22)
    for act in (lambda: blobs.replace("a", data), lambda: blobs.read("a")):
        with pytest.raises(OSError, match=r"1 MiB did not pass in 2 s: the connection is too slow, or broke off.*/a'"):
            act()
    monkeypatch.setattr(slow, "pause_s", 3.0 * 2**16)
    with pytest.raises(OSError, match="the object store did not answer"):
        blobs.replace("b", b"x")
    monkeypatch.setattr(object_blobs, "CONNECT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as mute, contextlib.ExitStack() as waiting:
        for _ in range(3):  # so that nobody else comes in
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(mute.getsockname())
        monkeypatch.setenv("GOOGLE_BASE_URL", f"http://127.0.0.1:{mute.getsockname()[1]}")
        with pytest.raises(OSError, match="the object store did not answer"):
            ObjectBlobs("gs://a-bucket/x").replace("a", data)


# Everything else a run keeps -----------------------------------------------------------------------------------------------


def test_states_and_scorers_lie_in_a_bucket(place: str) -> None:
    blobs = open_blobs(place)
    Path("run").mkdir()
    old = Files(Path("run"), claim(blobs), blobs)
    for step in (2, 4, 6):
        old.save("scorer", {"step": step, "weight": torch.full((3,), float(step))})
    new = Files(Path("run"), claim(place), blobs)
    found = new.load("scorer", torch.device("cpu"))
    assert found and found["step"] == 6 and found["weight"].tolist() == [6.0] * 3 and len(blobs.list("states")) == 2
    with pytest.raises(Fenced):
        old.save("scorer", {"step": 8})
    digest = checkpoint.write(f"{place}/scorers/a", {"w": torch.ones(3)}, {"kind": "x"}, "# A card\n")
    tensors, config = checkpoint.read(Path(f"{place}/scorers/a"))
    assert tensors["w"].tolist() == [1.0] * 3 and config == {"kind": "x", "weights_sha256": digest}


@pytest.mark.slow
@pytest.mark.parametrize("place", ["s3", "azure"], indirect=True)
def test_a_run_reports_from_a_bucket_into_it_and_leaves_no_secret(place: str, capfd: pytest.CaptureFixture[str]) -> None:
    store, cells = Store(f"{place}/look/store"), [evaluate_cell("unpruned"), evaluate_cell("grid")]
    for one in cells:
        rows = [prediction(number) for number in range(4)]
        store.publish({"predictions": rows, "outcomes": [Outcome("ok", "", 4, 1.0)]}, cell=one, provenance=provenance(run="look"))
    pipeline.run(Job(name="look"), place, stages=("report",))
    page = open_blobs(f"{place}/look/report").read("report.html").decode()
    assert page.count("<table") > 3 and "Grid" in page
    out, err = capfd.readouterr()
    assert f"report: {place}/look/report/report.html" in out
    blobs = open_blobs(place)
    everything = [out, err, *blobs.list(), *(blobs.read(key).decode(errors="replace") for key in blobs.list())]
    assert not any(secret in text for text in everything for secret in (SECRET, keys()["AWS_ACCESS_KEY_ID"], KEY, TOKEN))
    run = f"{place}/look"
    assert commands.call(["export", run, "here"])[0] == 0
    again = verify.verify(Path("here"))
    assert again.recomputed > 20 and not again.differences
    store.publish({"outcomes": [Outcome("ok", "", 1, 1.0)]}, cell=evaluate_cell("random"), provenance=provenance(run="look"))
    code, said = commands.call(["export", run, "later"])
    assert code == 2 and f"{run}: its store has records that its report has not seen" in said and not Path("later").exists()
    assert f"`diffprune report JOB --name look --out {place}`" in said
    code, said = commands.call(["export", f"{place}/other", "later"])
    assert code == 2 and f"{place}/other has no report" in said
    assert not any(path.name.startswith(place[:2]) for path in Path().iterdir()), "no folder of that name on this machine"


# A run whose folder is a bucket's ------------------------------------------------------------------------------------------

RECIPE: dict[str, Any] = {
    "pruners": ("diffprune",), "steps": 5, "images": 2, "questions": 2, "workers": 1, "calibration_images": 2,
    "validation_images": 2, "checkpoint_every": 2, "validate_every": 5, "grad_cosine_every": 0,
}  # fmt: skip
TRAINED = """
    import sys, torch
    from diffprune.train.context import LocalContext
    from diffprune.train.loop import train
    from diffprune.vlm.load import load
    from test_object_stores import RECIPE, Recipe
    torch.set_num_threads(1)
    for place in sys.argv[1:]:
        train(Recipe(**RECIPE), LocalContext(place), lambda name: load(name, device="cpu"))
"""


@pytest.mark.trial(3)
def test_a_killed_training_goes_on_from_the_bucket_and_all_stages_work_there(place: str) -> None:
    """The scorer is, byte for byte, that of a run on a disk that nobody disturbed."""
    folder, states = f"{place}/run", open_blobs(f"{place}/run")
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    command = [sys.executable, "-c", textwrap.dedent(TRAINED), "whole", folder]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}) as process:
        while not (killed := [key for key in states.list("states") if "-00000002-" in key]):
            assert process.poll() is None, "ended without a state"
            time.sleep(0.01)
        process.kill()
    assert killed and not checkpoint.is_complete(f"{folder}/scorers/diffprune-0"), "killed before it was done"
    search = {"recipe": Recipe(**RECIPE), "configurations": 1, "seeds": (9,), "validation_images": 2, "halvings": 0}
    tune = {
        "targets": (1.5,), "benchmarks": ("world('gqa')",), "calibration": 4, "held_out": 4, "batch": 2, "candidates": 1,
        "curve_repeats": 3, "warmup": 1, "repeats": 1, "corrections": 0, "threads": 1,
    }  # fmt: skip
    evaluate = {"benchmarks": ("world('gqa')",), "limit": 4, "batch": 4}
    job = Job(
        name="run", search=search, train=Recipe(**RECIPE), tune=tune, evaluate=evaluate, baselines=("unpruned", "grid"),
        budgets=("Keep(16)",), workers=1,
    )  # fmt: skip
    pipeline.run(job, place, stages=("search", "train", "tune", "evaluate"))
    whole = Path("whole/scorers/diffprune-0/model.safetensors").read_bytes()
    assert open_blobs(f"{folder}/scorers/diffprune-0").read("model.safetensors") == whole
    found, expected = (read_steps(one)["diffprune-0"] for one in (folder, "whole"))
    assert [(row.step, row.loss) for row in found] == [(row.step, row.loss) for row in expected] and len(found) == 5
    assert {key.rpartition("-")[0] for key in states.list("steps")} == {"steps/00000001", "steps/00000002"}, "both have written"
    begun = [line["begin"][1] for text in opened(folder).read().splitlines() if (line := verified(text)) and "begin" in line]
    assert begun[0] == 0 and begun[1] >= 2 and len(begun) == 2, "not from the beginning"
    store = Store(f"{folder}/store")
    assert set(store.read("outcomes")["verb"]) >= {"search", "train", "tune", "evaluate"} and not store.problems
    assert len(store.read("steps")) == 5 and not states.list("states")
    assert not list(Path().glob(f"{place[:2]}*")), "no folder of that name on this machine"
