"""Jobs through the Ray Jobs API, against a head node that `cluster/local.sh` starts and stops."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from diffprune.distributed import submit
from diffprune.io.job_files import REPOSITORY, placed

LOCAL = REPOSITORY / "cluster" / "local.sh"
JOB = """
import os, sys
import ray
from diffprune.distributed.cluster import connect
with connect():
    print("cpus", ray.cluster_resources()["CPU"], "files", *sorted(os.listdir(".")))
sys.exit(int(sys.argv[1]))
"""


def called(job: str) -> tuple[str, Path]:
    folder, name = placed(job)
    return name, folder


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """A head node with a port, folder and token of its own; the environment of its clients."""
    place = Path(tempfile.mkdtemp(prefix="dp-"))  # short, as the paths of sockets must be
    port = free_port()
    token = {"RAY_AUTH_TOKEN_PATH": str(place / "token")}
    own = {"DIFFPRUNE_HEAD": str(place / "head"), "PORT": str(port), "PYTHON": sys.executable, "CPUS": "2"}
    outside = {key: value for key, value in os.environ.items() if key != "RAY_AUTH_TOKEN"}
    environment = outside | token | own
    try:
        subprocess.run([LOCAL, "start"], env=environment, check=True, capture_output=True, timeout=120)
        yield token | {"address": f"http://127.0.0.1:{port}", "pid": (place / "head" / "pid").read_text().strip()}
    finally:
        subprocess.run([LOCAL, "stop"], env=environment, check=True, capture_output=True, timeout=60)
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def token(head: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", head["RAY_AUTH_TOKEN_PATH"])


def test_a_job_is_followed_and_its_status_returned(head: dict[str, str], token: None, own_folder: Path, capfd) -> None:
    (own_folder / "job.py").write_text(JOB)
    (own_folder / "secret.txt").touch()
    (own_folder / ".gitignore").write_text("secret.txt\n")
    (own_folder / "runs").mkdir()
    (own_folder / "runs" / "large").touch()
    shutil.copytree(REPOSITORY / "diffprune", own_folder / "diffprune", ignore=shutil.ignore_patterns("checkpoint", "__pycache__"))
    assert submit.run([sys.executable, "job.py", "3"], head["address"], own_folder) == 3
    captured = capfd.readouterr()
    assert captured.out.count("cpus 2.0 files .gitignore diffprune job.py\n") == 1, (
        "the log is shown once, and what stays here stayed here"
    )
    assert "exit code 3" in captured.err
    secret = Path(head["RAY_AUTH_TOKEN_PATH"]).read_text()
    assert secret not in captured.out + captured.err
    assert submit.run([sys.executable, "-c", "print('fine')"], head["address"], own_folder) == 0
    assert "fine\n" in capfd.readouterr().out


def test_ctrl_c_leaves_the_job_and_says_how_to_stop_it(
    head: dict[str, str], token: None, own_folder: Path, capfd, monkeypatch
) -> None:
    async def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, "_follow", interrupted)
    assert submit.run([sys.executable, "-c", "import time; time.sleep(60)"], head["address"], own_folder, name="long") == 130
    assert f"job stop long --address {head['address']}" in capfd.readouterr().err
    client = submit.connect(head["address"])
    client.stop_job("long")
    until = time.monotonic() + 20
    while not client.get_job_status("long").is_terminal() and time.monotonic() < until:
        time.sleep(0.2)
    assert submit._verdict(client, "long") == 130
    with pytest.raises(ValueError, match="does not take the job long"):
        submit.run(["true"], head["address"], own_folder, name="long")


def test_each_way_in_that_is_closed_has_its_sentence(head: dict[str, str], token: None, own_folder: Path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="nobody answers at"):
        submit.connect(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ValueError, match="write http://HOST:8265"):
        submit.connect("localhost:8265")
    with pytest.raises(ValueError, match="submission id"):
        submit.run(["true"], head["address"], own_folder, name="../../etc")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong" * 8)
    with pytest.raises(ValueError, match="refuses the token in RAY_AUTH_TOKEN") as caught:
        submit.connect(head["address"])
    assert "wrongwrong" not in str(caught.value)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(own_folder / "none"))
    with pytest.raises(ValueError, match="no token for this cluster"):
        submit.connect(head["address"])


def test_the_head_listens_on_loopback_only(head: dict[str, str]) -> None:
    first, found = psutil.Process(int(head["pid"])), set()
    for process in [first, *first.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # one of the short-lived ones
            found |= {c.laddr.ip.removeprefix("::ffff:") for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert found == {"127.0.0.1"}


def test_what_runs_on_the_cluster(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[object, ...]] = []
    monkeypatch.setattr(submit, "run", lambda command, address, folder, name=None: ran.append((command, folder)) or 0)
    assert submit.submit(*called("demo"), "http://127.0.0.1:8265", ["--limit", "8"]) == 0
    out = ["--limit", "8", "--out", str(own_folder / "runs")]
    assert ran.pop() == ([sys.executable, "-m", "diffprune", "run", "demo", *out], REPOSITORY)
    (own_folder / "mine.py").touch()
    submit.submit(*called("mine.py"), "http://10.0.0.1:8265", ["--out", "/shared"])
    assert ran.pop() == (["python", "-m", "diffprune", "run", "mine.py", "--out", "/shared"], own_folder)
    with pytest.raises(ValueError, match="add --out"):
        submit.submit(*called("demo"), "http://10.0.0.1:8265")
    with pytest.raises(ValueError, match=r"no job file other\.py"):
        placed("other.py")
