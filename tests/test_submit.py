"""Jobs through the Ray Jobs API: against a stand-in for a head, and once against a head that `cluster/local.sh` starts."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
import requests
from blob_stores import MemoryBlobs
from fake_head import TOKEN, FakeHead

from diffprune.cli import commands, job_verbs
from diffprune.core import registry, termination
from diffprune.core.registry import FOLDER
from diffprune.distributed import cluster, head, results, submit
from diffprune.distributed.submit import Request
from diffprune.io import project, run_archive
from diffprune.io.job_files import REPOSITORY
from diffprune.io.project import Project, project_of
from diffprune.store import provenance
from tests.sockets import listening

LOCAL = REPOSITORY / "cluster" / "local.sh"
JOB = """
import os, sys
import ray
from diffprune.distributed.cluster import connect
with connect():
    print("cpus", ray.cluster_resources()["CPU"], "files", *sorted(os.listdir(".")))
sys.exit(int(sys.argv[1]))
"""
OWN_JOB = """
from diffprune.job import Evaluation, Job
from helper import BUDGETS
job = Job(name="mine", evaluate=Evaluation(limit=2), baselines=("unpruned", "local"), budgets=BUDGETS)
"""
FORWARDS = """
import asyncio, sys
async def copy(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()
async def through(reader, writer):
    there = await asyncio.open_connection("127.0.0.1", int(sys.argv[1]))
    await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))
async def main():
    server = await asyncio.start_server(through, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""
PRUNER = """
from diffprune.core.pruner import Kind, ScorePruner
class Local(ScorePruner):
    label, kind = "Local", Kind.RULE
    def score(self, tokens): return tokens.features.norm(dim=-1)
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def fake(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHead]:
    """A stand-in for a head of this machine that lets our token in: this process passes for Ray's dashboard."""
    monkeypatch.setattr(head, "_is_dashboard", os.getpid().__eq__)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setattr(submit, "POLL_S", 0.02)
    monkeypatch.setattr(results, "POLL_S", 0.02)
    monkeypatch.setattr(results, "MONITOR_S", 0.02)
    (own_folder / "head").mkdir()
    with FakeHead(own_folder / "head") as found:
        yield found


@pytest.fixture
def own_job(own_folder: Path) -> Path:
    """A job of one's own in a folder that is not of git, with a helper beside it, a plug-in, and a private key."""
    files = {
        "mine/jobs/study.py": OWN_JOB,
        "mine/jobs/helper.py": "from more.inner import BUDGETS",
        "mine/jobs/more/__init__.py": "",
        "mine/jobs/more/inner.py": "BUDGETS = ('Keep(3)',)",
        "mine/pruners/local.py": PRUNER,
        "mine/.ssh/id_ed25519": "private",
        "mine/data.bin": "large",
        "mine/unrelated.py": "",
    }
    for name, text in files.items():
        (own_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (own_folder / name).write_text(text)
    return own_folder / "mine"


TRAVELS = {"jobs/study.py", "jobs/helper.py", "jobs/more/__init__.py", "jobs/more/inner.py", "pruners/local.py"}


# --- what travels -----------------------------------------------------------------------------------------------------


def test_without_git_a_job_travels_with_what_it_imports_and_the_plugins(own_job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_job)
    found = project_of("jobs/study.py")
    assert set(found.files) == TRAVELS and found.job == "jobs/study.py"
    assert set(project_of("study").files) == TRAVELS, "by name, too"
    (own_job / "pruners" / ".#local.py").symlink_to("me@host.99:1")  # of an editor, while the file is open in it
    (own_job / "pruners" / "old.py").mkdir()
    assert set(project_of("study").files) == TRAVELS, "what is no file is no plug-in"
    monkeypatch.setenv("HOME", str(own_job))
    assert set(project_of("study").files) == TRAVELS, "a home directory does not travel either"


def test_with_git_what_is_tracked_travels(own_job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_job)
    subprocess.run(["git", "init", "-q"], check=True)
    outside = own_job.parent / "outside.txt"
    outside.write_text("of somebody else")
    (own_job / "link.txt").symlink_to(outside)
    subprocess.run(["git", "add", "data.bin", "link.txt", "jobs/study.py"], check=True)
    assert set(project_of("study").files) == {*TRAVELS, "data.bin"}, "untracked code of the job too; no link to elsewhere, no key"
    with monkeypatch.context() as hook:  # of another repository, which tracks a file of this name
        subprocess.run(["git", "init", "-q", "--bare", own_job.parent / "other"], check=True)
        hook.setenv("GIT_DIR", str(own_job.parent / "other"))
        hook.setenv("GIT_WORK_TREE", str(own_job))
        subprocess.run(["git", "add", "unrelated.py"], check=True)
        assert set(project_of("study").files) == {*TRAVELS, "data.bin"}, "of the folder's own repository"
    monkeypatch.setenv("HOME", str(own_job))
    assert set(project_of("study").files) == TRAVELS, "a home directory under git does not travel whole"


def test_a_checkout_of_which_git_tells_nothing_is_refused(own_job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_job)
    subprocess.run(["git", "init", "-q"], check=True)
    (own_job / ".git" / "config").write_text("[core")
    for place in (None, Path(".")):
        with pytest.raises(ValueError, match=r"is a checkout of git, which does not tell what it tracks \(.*bad config"):
            project_of("study", place)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"does not tell what it tracks \(.*git"):
        project_of("study", Path("."))


def test_what_a_submodule_tracks_travels(own_job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_job)
    inner = own_job.parent / "inner"
    inner.mkdir()
    (inner / "rows.jsonl").touch()
    who = ["-c", "user.name=me", "-c", "user.email=me@host", "-c", "protocol.file.allow=always"]
    for folder, line in (
        (inner, ["init", "-q"]),
        (inner, ["add", "rows.jsonl"]),
        (inner, ["commit", "-qm", "rows"]),
        (own_job, ["init", "-q"]),
        (own_job, ["submodule", "--quiet", "add", str(inner), "data"]),
    ):
        subprocess.run(["git", *who, *line], cwd=folder, check=True)
    assert set(project_of("study").files) == {*TRAVELS, ".gitmodules", "data/rows.jsonl"}


def test_the_repository_travels_as_git_has_it() -> None:
    found = project_of("demo")
    assert found.root == REPOSITORY and found.job == "demo"
    assert {
        "jobs/demo.py",
        "diffprune/cli/commands.py",
        "pyproject.toml",
        "diffprune/embedded/checkpoint/model.safetensors",
    } <= set(found.files)
    assert not any(name.startswith((".git/", ".venv", "runs/")) for name in found.files)
    found.check()


def test_a_folder_that_is_named_may_hold_data_but_no_home(own_job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_job)
    assert set(project_of("study", Path(".")).files) == {*TRAVELS, "data.bin", "unrelated.py"}
    monkeypatch.setenv("HOME", str(own_job / "jobs"))
    for place in (Path("/"), own_job, own_job / "jobs"):
        with pytest.raises(ValueError, match="is a home directory, or holds one"):
            project_of("study", place)
    with pytest.raises(ValueError, match="would not travel"):
        project_of("jobs/study.py", own_job / "pruners")
    with pytest.raises(ValueError, match="no folder nowhere"):
        project_of("study", Path("nowhere"))
    with pytest.raises(ValueError, match=r"no job file 'other\.py'"):
        project_of("other.py")


@pytest.mark.parametrize("tracked", [True, False])
def test_a_name_that_is_not_utf8_is_refused_before_anything_is_sent(
    tracked: bool, fake: FakeHead, own_job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own_job)
    Path(os.fsdecode(b"caf\xe9.txt")).touch()
    if tracked:
        subprocess.run(["git", "init", "-q"], check=True)
        subprocess.run(["git", "add", "."], check=True)
    where = [] if tracked else ["--working-dir", "."]
    code, sentence = commands.call(["submit", "study", "--address", fake.address, *where])
    assert (code, not fake.requests) == (2, True)
    assert sentence.startswith(r"the name 'caf\udce9.txt' is not UTF-8, so it cannot travel: rename it") and sentence.isprintable()


def test_a_job_is_called_as_it_is_found_where_it_runs(own_job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name from `jobs/` of what travels alone, or from the installed package; else by its path there."""
    monkeypatch.chdir(own_job)
    assert project_of("study").job == "study"
    above = project_of("study", own_job.parent)
    assert above.job == "mine/jobs/study.py" and above.job in above.files
    (own_job / "jobs").rename(own_job.parent / "elsewhere")
    (own_job / "jobs").symlink_to(own_job.parent / "elsewhere")
    assert project_of("study").job == "study.py" and "study.py" in project_of("study").files
    shutil.copytree(own_job.parent / "elsewhere", own_job / "package" / "jobs")
    monkeypatch.setattr(project, "PACKAGE", own_job / "package")
    for job in ("package/jobs/study.py", str(own_job / "package" / "jobs" / "study.py")):
        assert project_of(job).job == "study", "the cluster has it in its own package"


def test_too_much_is_refused_with_the_largest_names(own_job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_job)
    monkeypatch.setattr(project, "MOST_BYTES", 200)
    (own_job / "large.bin").write_bytes(b"x" * 300)
    with pytest.raises(ValueError, match=r"the largest: (jobs/study\.py|large\.bin|pruners/local\.py) "):
        project_of("study", own_job).check()


def test_an_archive_depends_on_names_and_contents_alone(own_job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_job)
    first, second = own_job / "a.zip", own_job / "b.zip"
    project_of("study").write(first)
    os.utime(own_job / "jobs" / "study.py", (1, 1))
    project_of("study").write(second)
    assert first.read_bytes() == second.read_bytes() and stat.S_IMODE(first.stat().st_mode) == 0o600
    assert set(zipfile.ZipFile(first).namelist()) == TRAVELS


# --- the way in -------------------------------------------------------------------------------------------------------


def test_ids_say_run_and_attempt_and_are_unique(fake: FakeHead, own_job: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(own_job)
    client = head.connect(fake.address)
    asked = Request("mine", "study", ("--limit", "8"), {"DEPTH": "3"}, timeout_s=60)
    assert submit.submit(client, fake.address, asked, project_of("study")) == "mine-1"
    assert submit.follow(client, "mine-1") == 0
    command = f"timeout --signal=TERM --kill-after=120 60 {sys.executable} -m diffprune run study --limit 8 --out {own_job}/runs"
    assert capfd.readouterr().out == f"ran: {command}\n"
    told = fake.jobs["mine-1"]
    assert told["metadata"]["run"] == "mine" and told["metadata"]["attempt"] == "1" and told["metadata"]["out"] == f"{own_job}/runs"
    assert told["runtime_env"]["env_vars"]["DEPTH"] == "3"
    variables = told["runtime_env"]["env_vars"]
    assert submit.STOP_S > int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) >= float(variables[termination.GRACE]) + 10, "time to save"
    assert {str(p.relative_to(fake.place / "mine-1")) for p in (fake.place / "mine-1").rglob("*") if p.is_file()} == TRAVELS

    def faster(job: dict[str, Any]) -> None:
        fake.before_job = lambda job: None
        fake.start(job | {"metadata": {}})

    fake.before_job = faster  # somebody else takes the number in between
    assert submit.submit(client, fake.address, asked, project_of("study")) == "mine-3"
    assert submit.submit(client, fake.address, replace(asked, run="x" * 64), project_of("study")) == "x" * 56 + "-1"
    assert TOKEN not in json.dumps(fake.jobs) + capfd.readouterr().out


def test_a_job_is_checked_before_anything_is_sent(fake: FakeHead, own_job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_job)
    for line, says in (
        (("--set", "evaluate.limt=3"), "did you mean 'limit'"),
        (("--pruner", "locl"), "did you mean 'local'"),
        (("--budget", "0"), "at least 1"),
        (("--workers", "0"), "--workers"),
        (("--lmit", "3"), "--limit"),
        (("--env", "HF_TOKEN=hf_secret"), "give secrets to the nodes"),
        (("--env", "PLACE=redis://me:hf_secret@host/1"), "give secrets to the nodes"),
        (("--env", "1"), "NAME=VALUE"),
        (("--working-dir", "/"), "is a home directory"),
        (("--image", "x", "--working-dir", "."), "in it, without --working-dir"),
    ):
        code, sentence = commands.call(["submit", "study", "--address", fake.address, *line])
        assert (code, says in sentence, "hf_secret" in sentence) == (2, True, False), sentence
    assert not fake.requests
    for line, says in (((), "add --out"), (("--out", "runs"), "absolute path"), (("--out", "s3://b"), "is no place")):
        code, sentence = commands.call(["submit", "study", "--address", "https://10.255.255.1:8265", *line])
        assert (code, says in sentence) == (2, True), sentence


def test_a_job_through_a_tunnel_gets_nothing_of_this_machine(
    fake: FakeHead, own_job: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """127.0.0.1 is where `ssh -L`, `kubectl port-forward` and `ray attach -p` listen, and no Ray."""
    monkeypatch.undo()
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.chdir(own_job)
    there = ["--address", fake.address]
    for line, says in (((), "add --out"), (("--out", "runs"), "absolute path")):
        code, sentence = commands.call(["submit", "study", *there, *line])
        assert (code, says in sentence) == (2, True), sentence
    assert not fake.jobs and not fake.packages
    assert commands.call(["submit", "study", *there, "--out", "/shared/runs"]) == (0, "")
    assert "ran: python -m diffprune run study --out /shared/runs\n" in capfd.readouterr().out
    fake.shell = lambda entrypoint: f"echo asked: {entrypoint}"
    code, sentence = commands.call(["results", "mine-1", *there])
    assert (code, sentence) == (2, "asked: python run_archive.py /shared/runs/mine")
    code, sentence = commands.call(["submit", "study", "--address", f"http://127.0.0.1:{free_port()}"])
    assert code == 2 and sentence.startswith("nobody answers at"), "not that --out is missing"


def test_a_container_on_this_machine_has_folders_of_its_own(fake: FakeHead) -> None:
    assert head.on_this_machine(fake.address)
    asked = Request("demo", "demo", image="registry/diffprune:1")
    with pytest.raises(ValueError, match="add --out"):
        asked.entrypoint("demo", fake.address)


@pytest.mark.parametrize(
    "name",
    "AZURE_STORAGE_ACCOUNT_KEY AZURE_STORAGE_CONNECTION_STRING AZURE_STORAGE_SAS_TOKEN GOOGLE_SERVICE_ACCOUNT_KEY "
    "AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY "
    "SSH_KEY MY_PASSPHRASE mysql_pwd DB_PASS APIKEY SIGNING_KEY_2 HF_TOKEN WANDB_API_KEY "
    "GITHUB_PAT PAT SLACK_WEBHOOK JWT DB_LOGIN".split(),
)
def test_a_variable_named_as_a_secret_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"--env {name}: Ray writes variables into its logs"):
        submit.variables([f"{name}=x"])


@pytest.mark.parametrize(
    "value",
    [
        "DefaultEndpointsProtocol=https;AccountName=x;AccountKey=Eby8",
        "https://x.blob.core.windows.net/c?sv=2024&sig=abc",
        "https://b.s3.amazonaws.com/k?X-Amz-Signature=abc",
        "https://storage.googleapis.com/b?X-Goog-Signature=abc",
        '{"type": "service_account", "private_key": "abc"}',
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "redis://:abc@host/1",
        "https://abc@github.com/me/mine",
        "Bearer abc",
        f"hf_{'abc' * 10}",
        f"AKIA{'ABCD' * 4}",
        "https://hooks.slack.com/services/T0/B0/abc",
        f"glpat-{'abc' * 7}",
        f"npm_{'abc' * 12}",
        f"xoxb-{'abc' * 4}-abc",
        f"AIza{'abc' * 12}",
        f"eyJ{'abc' * 5}.eyJ{'abc' * 5}.abc",
    ],
)
def test_a_value_that_is_a_secret_is_refused_and_not_repeated(value: str) -> None:
    with pytest.raises(ValueError, match="--env PLACE: Ray writes variables") as caught:
        submit.variables([f"PLACE={value}"])
    assert "abc" not in str(caught.value).lower() and "Eby8" not in str(caught.value)


def test_other_variables_travel() -> None:
    plain = {
        "AZURE_STORAGE_ACCOUNT_NAME": "mine", "AWS_ENDPOINT_URL_S3": "https://minio.example.com:9000", "PASSES": "2",
        "GOOGLE_SERVICE_ACCOUNT": "/shared/login.json", "NUM_KEYS": "3", "KEYBOARD": "x", "REPO": "ssh://git@host/mine",
        "SIG": "a=b;design=c", "OMP_NUM_THREADS": "2", "PATTERN": "x", "LOGIN_SHELL": "no",
    }  # fmt: skip
    assert submit.variables([f"{name}={value}" for name, value in plain.items()]) == plain


def test_the_verbs_of_a_head(fake: FakeHead, own_job: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(own_job)
    there = ["--address", fake.address]
    assert commands.call(["submit", "study", *there, "--limit", "1"]) == (0, "")
    out = capfd.readouterr().out
    assert out.startswith(f"sending 5 files, 0.0 MiB, of {own_job}\nsubmitted mine-1 to {fake.address}\nran: ")
    assert commands.call(["logs", "mine-1", *there]) == (0, "") and "ran: " in capfd.readouterr().out
    code, sentence = commands.call(["logs", "mine-7", *there])
    assert (code, "did you mean 'mine-1'" in sentence) == (2, True)
    fake.shell = lambda entrypoint: "echo begun; sleep 60"
    waiting = threading.Thread(target=commands.call, args=(["resume", "mine-1", *there],))
    waiting.start()
    until = time.monotonic() + 20
    while "mine-2" not in fake.jobs and time.monotonic() < until:
        time.sleep(0.02)
    code, sentence = commands.call(["resume", "mine-2", *there])
    assert (code, "is not over (running)" in sentence) == (2, True), sentence
    assert commands.call(["stop", "mine-2", *there]) == (0, "")
    assert commands.call(["stop", "mine-2", *there]) == (0, "")
    waiting.join(20)
    assert (
        fake.jobs["mine-2"]["entrypoint"] == fake.jobs["mine-1"]["entrypoint"] and fake.jobs["mine-2"]["metadata"]["attempt"] == "2"
    )
    assert commands.call(["logs", "mine-2", "-f", *there]) == (130, "")
    said = capfd.readouterr()
    assert "mine-2 was stopped; what was finished is kept: diffprune resume mine-2" in said.out and "had ended already" in said.out
    head.connect(fake.address).submit_job(
        entrypoint="echo not\necho ours", submission_id="other-1", metadata={"run": "x", "job": "x", "arguments": "--lr 3"}
    )
    assert commands.call(["jobs", *there]) == (0, "")
    rows = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert rows[0][:2] == ["ID", "STATUS"] and rows[0][-1] == "JOB"
    assert [(row[0], row[1], row[4:7]) for row in rows[1:]] == [
        ("mine-1", "SUCCEEDED", ["study", "--limit", "1"]),
        ("mine-2", "STOPPED", ["study", "--limit", "1"]),
        ("other-1", rows[-1][1], ["echo", "not", "echo"]),
    ]


@pytest.mark.parametrize("dirty", [False, True])
def test_the_commit_of_what_is_sent_goes_with_it(fake: FakeHead, dirty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "repository", lambda folder: ("0123abcd", dirty))
    asked = Request("demo", "demo", (), {provenance.SENT: "of another time"})
    name = submit.submit(head.connect(fake.address), fake.address, asked, project_of("demo"))
    sent = fake.jobs[name]["runtime_env"]["env_vars"][provenance.SENT]
    monkeypatch.setenv(provenance.SENT, sent)
    assert provenance.repository(Path(f"nowhere-{dirty}")) == ("0123abcd", dirty)


def test_a_job_is_resumed_into_its_own_folder(fake: FakeHead, own_job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder too, where a run of its own would begin anew; where its files are not, one is told where they are."""
    monkeypatch.chdir(own_job)
    there = ["--address", fake.address]
    assert commands.call(["submit", "study", *there]) == (0, "")
    other = own_job.parent / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    code, sentence = commands.call(["resume", "mine-1", *there])
    assert code == 2 and sentence == f"there is no job study here: mine-1 was sent from {own_job}, resume it there"
    shutil.copytree(own_job / "jobs", other / "jobs")
    shutil.copytree(own_job / "pruners", other / "pruners")
    assert commands.call(["resume", "mine-1", *there]) == (0, "")
    assert commands.call(["resume", "mine-2", *there]) == (0, "")
    outs = [shlex.split(job["entrypoint"])[-2:] for job in fake.jobs.values()]
    assert outs == [["--out", f"{own_job}/runs"]] * 3 and [job["metadata"]["out"] for job in fake.jobs.values()] == [outs[0][1]] * 3


def test_a_job_is_checked_again_before_it_is_resumed(fake: FakeHead, own_job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the files that are here now, which may have changed; under another name it would begin anew, elsewhere."""
    monkeypatch.chdir(own_job)
    there, job = ["--address", fake.address], own_job / "jobs" / "study.py"
    assert commands.call(["submit", "study", *there, "--limit", "1"]) == (0, "")
    for before, now, says in (
        ("limit=2", "limt=2", "did you mean 'limit'"),
        ("'local'", "'locl'", "did you mean 'local'"),
        ("'mine'", "'other'", "study names its run 'other' now, and mine-1 was of 'mine': submit it as a run of its own"),
    ):
        job.write_text(OWN_JOB.replace('"', "'").replace(before, now))
        code, sentence = commands.call(["resume", "mine-1", *there])
        assert (code, says in sentence, list(fake.jobs)) == (2, True, ["mine-1"]), sentence


def test_results_that_cannot_be_written_leave_nothing_and_can_be_asked_for_again(
    fake: FakeHead, own_job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own_job)
    asked = ["results", "mine-1", "--address", fake.address]
    assert commands.call(["submit", "study", "--address", fake.address]) == (0, "")
    (own_job / "runs" / "mine" / "report").mkdir(parents=True)
    for name in ("one", "two"):
        (own_job / "runs" / "mine" / "report" / name).touch()
    whole = tarfile.TarFile.extractall

    def full(archive: tarfile.TarFile, path: Path, **options: Any) -> None:
        whole(archive, path, members=archive.getmembers()[:1], **options)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    code, sentence = commands.call(asked)
    assert (code, "No space left" in sentence, Path("results/mine-1").exists()) == (1, True, False)
    monkeypatch.setattr(tarfile.TarFile, "extractall", whole)
    assert commands.call(asked) == (0, "")


def test_results_come_back_through_the_log(fake: FakeHead, own_job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_job)
    client = head.connect(fake.address)
    submit.submit(client, fake.address, Request("mine", "study"), project_of("study"))
    with pytest.raises(ValueError, match="there is no folder"):
        results.fetch(client, "mine-1", own_job / "early")
    for name in ("report/report.html", "store/parts/a.parquet", "scorers/weights", "settings.json"):
        (own_job / "runs" / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (own_job / "runs" / "mine" / name).write_bytes(os.urandom(3000))
    assert commands.call(["results", "mine-1", "--address", fake.address]) == (0, "")
    came = own_job / "results" / "mine-1"
    assert {str(p.relative_to(came)) for p in came.rglob("*") if p.is_file()} == {
        "report/report.html",
        "store/parts/a.parquet",
        "settings.json",
    }
    assert (came / "report/report.html").read_bytes() == (own_job / "runs/mine/report/report.html").read_bytes()
    assert list(fake.jobs) == ["mine-1"], "the log with the archive is gone"
    with pytest.raises(ValueError, match="is not empty"):
        results.fetch(client, "mine-1", came)
    answer, deleted = fake.answer, list[str]()

    def haunted(method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Ray's monitor puts a job down again that was deleted just as it ended."""
        before = dict(fake.jobs)
        if method == "DELETE" and not deleted:
            deleted.append(path)
            answer(method, path, body)
            fake.jobs.update(before)
            return 200, {"deleted": True}
        return answer(method, path, body)

    monkeypatch.setattr(fake, "answer", haunted)
    results.fetch(client, "mine-1", own_job / "again")
    assert deleted and list(fake.jobs) == ["mine-1"]


@pytest.mark.parametrize("where", ["submit_job", "get_job_status"])
def test_results_that_are_interrupted_leave_no_job_of_theirs(
    where: str, fake: FakeHead, own_job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the head takes its time to end it, as with a job that is being started: it refuses to delete one that runs."""
    monkeypatch.chdir(own_job)
    client = head.connect(fake.address)
    submit.submit(client, fake.address, Request("mine", "study"), project_of("study"))
    answer, asked, whole, seen = fake.answer, list[str](), getattr(head.Head, where), list[str]()

    def slow(method: str, path: str, body: bytes) -> tuple[int, Any]:
        asked.append(path)
        if path.endswith("/stop"):
            asked.clear()
            return 200, {"stopped": True}
        if asked.count(path) == 20:
            answer("POST", f"{path}/stop", body)
        return answer(method, path, body)

    def interrupted(self: head.Head, *arguments: Any, **options: Any) -> Any:
        found = whole(self, *arguments, **options)
        if not seen:
            seen.extend(fake.jobs)
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(fake, "shell", lambda line: "exec sleep 60")
    monkeypatch.setattr(fake, "answer", slow)
    monkeypatch.setattr(head.Head, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        results.fetch(client, "mine-1", own_job / "came")
    assert len(seen) == 2 and list(fake.jobs) == ["mine-1"]


@pytest.mark.parametrize("out", ["s3://a-bucket/runs", "gs://a-bucket/runs", "az://a-container/runs"])
def test_a_job_s_results_may_lie_in_a_bucket(out: str, own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Request("mine", "study", ("--out", out))
    for address in ("https://10.255.255.1:8265", f"http://127.0.0.1:{free_port()}"):
        assert asked.entrypoint("study", address)[-2:] == ["--out", out], "as it was given, and once"
        assert asked.metadata(1, "study", address)["out"] == out
    blobs = MemoryBlobs()
    monkeypatch.setattr(results, "found", lambda head, name: SimpleNamespace(metadata={"run": "mine", "out": out}))
    monkeypatch.setattr(results, "open_blobs", lambda place: blobs if place == f"{out}/mine" else None)
    nobody: Any = None
    with pytest.raises(ValueError, match=r"there is nothing in .* yet"):
        results.fetch(nobody, "mine-1", own_folder / "came")
    for key in ("report/report.html", "store/parts/a.parquet", "scorers/weights", "job.json"):
        blobs.create(key, key.encode())
    assert results.fetch(nobody, "mine-1", own_folder / "came") == 3
    came = {str(path.relative_to(own_folder / "came")): path.read_text() for path in (own_folder / "came").rglob("*.*")}
    assert came == {key: key for key in ("report/report.html", "store/parts/a.parquet", "job.json")}


def test_a_damaged_archive_is_not_unpacked(own_folder: Path) -> None:
    (own_folder / "run").mkdir()
    (own_folder / "run" / "settings.json").write_text("{}")
    done = subprocess.run([sys.executable, run_archive.__file__, "run"], capture_output=True, text=True, check=True).stdout
    assert run_archive.unpacked("noise\n" + done, own_folder / "whole") == 1
    cut = done.replace(run_archive.END, "")
    for text in ("", cut, done[: len(done) // 2], done.replace("\nH4", "\nI4")):
        with pytest.raises(ValueError, match="did not come whole"):
            run_archive.unpacked(text, own_folder / "none")
    assert not (own_folder / "none").exists()


def test_a_log_is_shown_without_rays_own_lines(fake: FakeHead, own_job: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Whole lines as they come, and at the end what no line break follows."""
    monkeypatch.chdir(own_job)
    said: list[logging.LogRecord] = []
    (handler := logging.Handler()).emit = said.append  # type: ignore[method-assign]
    monkeypatch.setattr(logging.getLogger("ray"), "handlers", [handler])
    raw = (
        "2026-11-28 14:46:21,704\\tINFO job_manager.py:581 -- Runtime env is setting up.\\nRunning entrypoint for job mine-1: x\\n"
    )
    fake.shell = lambda entrypoint: f"printf '{raw}ours: 2026 INFO -- stays\\nthe end'"
    assert commands.call(["submit", "study", "--address", fake.address]) == (0, "")
    assert commands.call(["logs", "mine-1", "--address", fake.address]) == (0, "")
    shown = capfd.readouterr()
    sent, again = shown.out.split("submitted mine-1", 1)
    assert again.partition("\n")[2] == "ours: 2026 INFO -- stays\nthe end" * 2
    assert sent.startswith("sending 5 files") and not said


def test_without_an_address_the_job_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(job_verbs, "_perform", lambda verb, options: ran.append((verb, options)))
    assert commands.call(["submit", "demo", "--limit", "8"]) == (0, "")
    ((verb, options),) = ran
    assert (verb, options["job"], options["limit"], options["address"]) == ("run", "demo", 8, None)
    code, sentence = commands.call(["submit", "demo", "--timeout", "8"])
    assert (code, "--timeout is about a cluster" in sentence) == (2, True) and len(ran) == 1


def test_ctrl_c_leaves_the_job_and_says_how_to_stop_it(fake: FakeHead, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    async def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, "_follow", interrupted)
    assert submit.follow(head.connect(fake.address), "demo-1") == 130
    assert f"diffprune stop demo-1 --address {fake.address}" in capfd.readouterr().err


def test_ctrl_c_does_not_wait_for_a_head_that_is_mute(fake: FakeHead, monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a tunnel that has come down, where an answer is waited for for two minutes."""
    client, ended = head.connect(fake.address), threading.Event()
    monkeypatch.setattr(client, "get_job_status", lambda _: ended.wait(20))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    press = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    press.start()
    try:
        began = time.monotonic()
        assert submit.follow(client, "mine-1") == 130 and time.monotonic() - began < 10
    finally:
        press.cancel()
        signal.signal(signal.SIGINT, before)
        ended.set()


def test_a_head_that_goes_away_is_told_in_one_sentence(fake: FakeHead, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """The log breaks off with an error of its own, which nobody waits for."""
    client, gone = head.connect(fake.address), threading.Event()

    async def broken(_: str) -> Any:
        yield "half a "
        fake.server.shutdown()
        fake.server.server_close()
        gone.set()
        raise RuntimeError("WebSocket connection closed unexpectedly")

    monkeypatch.setattr(client, "tail_job_logs", broken)
    monkeypatch.setattr(client, "get_job_status", lambda _: gone.wait(10) and client._do_request("GET", "/api/jobs/x"))
    with pytest.raises(RuntimeError, match="went away while mine-1 ran; once a head is there again, send the same submit again"):
        submit.follow(client, "mine-1")
    gc.collect()
    assert "never retrieved" not in caplog.text


@pytest.mark.parametrize("verb", ["stop", "results"])
def test_a_head_that_goes_away_while_it_is_asked_is_told_in_one_sentence(
    fake: FakeHead, own_job: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own_job)
    fake.shell = lambda entrypoint: "sleep 60"
    client = head.connect(fake.address)
    submit.submit(client, fake.address, Request("mine", "study"), project_of("study"))
    answer = fake.answer

    def last(method: str, path: str, body: bytes) -> tuple[int, Any]:
        if method == "POST":
            threading.Thread(target=fake.server.shutdown).start()
            fake.server.socket.close()
        return answer(method, path, body)

    monkeypatch.setattr(fake, "answer", last)
    code, sentence = commands.call([verb, "mine-1", "--address", fake.address])
    assert (code, sentence) == (1, f"{fake.address} no longer answers: is the head still there, and the tunnel to it?")


def test_ctrl_c_while_a_job_is_handed_over_says_that_it_may_run(
    fake: FakeHead, own_job: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(own_job)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def slowly(job: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)

    fake.before_job = slowly
    try:
        assert commands.call(["submit", "study", "--address", fake.address])[0] == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert f"mine-1 may have begun all the same: diffprune jobs --address {fake.address}" in capfd.readouterr().err


def test_an_image_has_everything_and_is_sent_nothing(fake: FakeHead) -> None:
    asked = Request("demo", "demo", ("--out", "/shared"), image="registry/diffprune:1")
    assert submit.submit(head.connect(fake.address), fake.address, asked, None) == "demo-1"
    told = fake.jobs["demo-1"]
    assert told["runtime_env"]["image_uri"] == "registry/diffprune:1" and not fake.packages
    assert told["entrypoint"] == "python -m diffprune run demo --out /shared"


# --- who is let in ----------------------------------------------------------------------------------------------------


def test_the_job_comes_before_options_of_its_own() -> None:
    code, said = commands.call(["submit", "--limit", "4", "demo"])
    assert (code, said) == (2, "the job comes before options of `run`, as in `diffprune submit demo --limit ...`")


@pytest.mark.parametrize("end", ["\n", "\r\n", " "])
def test_a_token_that_ends_in_a_line_end_is_that_token(fake: FakeHead, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN + end)
    head.connect(fake.address)
    assert fake.requests and os.environ["RAY_AUTH_TOKEN"] == TOKEN


@pytest.mark.parametrize("token", [f"{TOKEN[:9]}\n{TOKEN}", f"{TOKEN} {TOKEN}", f"{TOKEN}\u00e9"])
def test_what_no_header_takes_is_refused_without_showing_it(fake: FakeHead, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with pytest.raises(ValueError, match="the token in RAY_AUTH_TOKEN has spaces or letters that are not ASCII") as refused:
        head.connect(fake.address)
    assert TOKEN[:9] not in str(refused.value) and not fake.requests


def test_a_token_in_clear_goes_by_no_proxy_and_no_login_of_a_netrc_takes_its_place(
    fake: FakeHead, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")  # where nobody listens
    (own_folder / "netrc").write_text("default login me password secret\n")
    (own_folder / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(own_folder / "netrc"))
    assert head.connect(fake.address).list_jobs() == [], "the head refuses all but its token"


def test_a_log_that_is_no_text_and_a_job_that_another_head_was_sent(
    fake: FakeHead, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    client = head.connect(fake.address)

    def refused(name: str) -> str:
        raise RuntimeError("Request failed with status code 500: UnicodeDecodeError: 'utf-8' codec can't decode byte 0xe9")

    monkeypatch.setattr(client, "get_job_logs", refused)
    assert submit.log_of(client, "mine-1") == "" and "is no UTF-8 text" in capfd.readouterr().err

    def gone(name: str) -> Any:
        raise RuntimeError("Request failed with status code 404: Job mine-1 does not exist.")

    monkeypatch.setattr(client, "get_job_status", gone)
    with pytest.raises(RuntimeError, match="went away while mine-1 ran"):
        submit.follow(client, "mine-1")


def test_each_way_in_that_is_closed_has_its_sentence(fake: FakeHead, own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for address, says in (
        (f"http://127.0.0.1:{free_port()}", "nobody answers at"),
        ("localhost:8265", "write http://HOST:8265"),
        ("http://", "write http://HOST:8265"),
        ("http://host:port", "write http://HOST:8265"),
        ("http://me:secret@host:8265", "would end up in logs"),
        ("http://10.1.2.3:8265", "would travel there in clear"),
        ("http://localhost.evil.org:8265", "would travel there in clear"),
    ):
        with pytest.raises(ValueError, match=says) as caught:
            head.connect(address)
        assert "secret" not in str(caught.value)
    head.check("http://10.1.2.3:8265", insecure=True)
    head.check("https://10.1.2.3:8265", insecure=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong" * 8)
    with pytest.raises(ValueError, match="refuses the token in RAY_AUTH_TOKEN") as refused:
        head.connect(fake.address)
    assert "wrongwrong" not in str(refused.value)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "  ")
    with pytest.raises(ValueError, match="RAY_AUTH_TOKEN is blank"):
        head.connect(fake.address)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(own_folder / "none"))
    with pytest.raises(ValueError, match="no token for this cluster"):
        head.connect(fake.address)
    assert not (own_folder / "none").exists()


def test_a_cluster_that_is_not_there_is_told_before_ray_knocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray knocks for minutes"))
    for address in (f"127.0.0.1:{free_port()}", f"ray://localhost:{free_port()}", "[::1]:1", "127.0.0.1:999999"):
        began = time.monotonic()
        with pytest.raises(ValueError, match="no Ray answers at"), cluster.connect(address):
            pass
        assert time.monotonic() - began < cluster.REACH_S


def test_what_listens_but_is_no_ray_is_told_before_ray_knocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that is frozen, and the port of another service, take connections as well."""
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray knocks for a quarter of an hour"))
    monkeypatch.setattr(cluster, "REACH_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        for where in (address, f"ray://{address}"):
            began = time.monotonic()
            with pytest.raises(ValueError, match=f"what listens at {where} does not answer as Ray does"), cluster.connect(where):
                pass
            assert time.monotonic() - began < 5
        monkeypatch.setenv(cluster.TLS, "1")
        assert cluster._reached(address) == "127.0.0.1", "what is encrypted is left to Ray"


def test_a_mute_host_is_told_in_time(fake: FakeHead, monkeypatch: pytest.MonkeyPatch) -> None:
    assert head.CONNECT_S + head.VERSION_S < 15
    monkeypatch.setattr(head, "VERSION_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        with pytest.raises(ValueError, match="does not answer within"):
            head.connect(f"http://127.0.0.1:{server.getsockname()[1]}")
    assert time.monotonic() - began < 5


def test_something_else_that_answers_is_no_head(fake: FakeHead, monkeypatch: pytest.MonkeyPatch) -> None:
    for status, body in ((200, "hello"), (302, ""), (500, "no"), (404, ""), (200, {"version": "1"})):
        monkeypatch.setattr(fake, "answer", lambda *_, said=(status, body): said)
        with pytest.raises(ValueError, match=r"is no Ray 2\.60\.\d+ head"):
            head.connect(fake.address)


@pytest.mark.parametrize("spoilt", ["link", "other", "empty", "blank", "folder"])
def test_a_token_file_that_is_not_ours_alone_is_refused(spoilt: str, own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, target = own_folder / "token", own_folder / "target"
    target.write_text("t" * 64)
    target.chmod(0o644)
    says = {"link": "is a link", "other": "belongs to another user", "folder": "is no file"}.get(spoilt, "is empty")
    if spoilt == "link":
        path.symlink_to(target)
    elif spoilt == "folder":
        path.mkdir()
    else:
        path.write_text({"other": "t" * 64, "empty": "", "blank": " \n"}[spoilt])
    if spoilt == "other":
        if os.geteuid():
            pytest.skip("only root gives files away")
        os.chown(path, 12345, 12345)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    before = path.stat().st_mode
    with pytest.raises(ValueError, match=says) as caught:
        cluster.secure()
    assert path.stat().st_mode == before and stat.S_IMODE(target.stat().st_mode) == 0o644
    assert "tttt" not in str(caught.value)


def test_a_token_file_that_is_open_is_closed(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_folder / "token").write_text("t" * 64)
    (own_folder / "token").chmod(0o644)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(own_folder / "token"))
    cluster.secure()
    assert stat.S_IMODE((own_folder / "token").stat().st_mode) == 0o600


def test_the_folder_of_a_verbs_own_ray_lies_in_a_closed_one() -> None:
    with cluster._one_host() as folder:
        os.chmod(folder, 0o777)  # as Ray does
        assert stat.S_IMODE(Path(folder).parent.stat().st_mode) == 0o700 and Path(folder).parent.stat().st_uid == os.geteuid()


STARTING = """
import os, sys, time
place = os.environ["PLACE"]
os.makedirs(place, exist_ok=True)
log = open(f"{place}/log", "w")
while True:
    os.makedirs(place, exist_ok=True)
    time.sleep(0.01)
"""


@pytest.mark.parametrize("titled", [False, True])
def test_an_agent_that_is_starting_does_not_make_the_folder_anew_when_all_is_over(titled: bool) -> None:
    """As Ray's do on a busy machine: open to every user, and with nothing that says whose it was."""
    with cluster._one_host() as folder:
        innocent = subprocess.Popen(["sleep", "60"])
        place = f"{folder}/session/logs"
        line = [sys.executable, "-c", STARTING, "ray::Agent" if titled else place]
        agent = subprocess.Popen(line, env=os.environ | {"PLACE": place})
        until = time.monotonic() + 20
        while not Path(folder, "session/logs/log").is_file() and time.monotonic() < until:
            time.sleep(0.02)
    ended, alive = agent.poll() is not None, innocent.poll() is None
    for process in (agent, innocent):
        process.kill()
        process.wait()
    assert ended and alive and not Path(folder).parent.exists()


STARTS_SLOWLY = """#!/bin/sh
case "$1" in
  -m) exec sleep 60 ;;             # Ray
  -) [ "$2" = 6 ] && echo 1 2 3 4 5 6 ;;  # free ports; and that it answers, later on
esac
exit 0
"""


@pytest.mark.parametrize("spoilt", ["link", "file", "other"])
def test_a_head_refuses_a_folder_of_somebody_else(spoilt: str, own_folder: Path) -> None:
    place, target = own_folder / "place", own_folder / "target"
    target.mkdir()
    if spoilt == "link":
        place.symlink_to(target)
    elif spoilt == "file":
        place.touch()
    else:
        if os.geteuid():
            pytest.skip("only root gives folders away")
        place.mkdir()
        os.chown(place, 12345, 12345)
    for verb in ("start", "status", "stop"):
        done = subprocess.run(
            [LOCAL, verb], env=os.environ | {"DIFFPRUNE_HEAD": str(place), "PYTHON": sys.executable}, capture_output=True, text=True
        )
        assert done.returncode == 2 and "set DIFFPRUNE_HEAD to a folder of your own" in done.stderr
    assert not any(target.iterdir())


def test_stop_ends_no_process_that_is_not_the_head(own_folder: Path) -> None:
    (own_folder / "place").mkdir(mode=0o755)
    with subprocess.Popen(["sleep", "60"]) as innocent:
        (own_folder / "place" / "pid").write_text(f"{innocent.pid}\n")
        own = {"DIFFPRUNE_HEAD": str(own_folder / "place"), "PYTHON": sys.executable}
        done = subprocess.run([LOCAL, "stop"], env=os.environ | own, capture_output=True, text=True, check=True)
        alive = innocent.poll() is None
        innocent.kill()
    assert alive and "no head is running" in done.stdout
    assert stat.S_IMODE((own_folder / "place").stat().st_mode) == 0o700
    done = subprocess.run([LOCAL, "start"], env=os.environ | own | {"PORT": "10500"}, capture_output=True, text=True)
    assert done.returncode == 2 and "worker ports" in done.stderr


def test_a_head_that_is_just_being_started_has_not_failed(own_folder: Path) -> None:
    """For a moment the process that becomes it is a shell still, which a busy machine makes a long one."""
    for name, text in {"python": STARTS_SLOWLY, "ps": "#!/bin/sh\necho bash cluster/local.sh start\n"}.items():
        (own_folder / "bin").mkdir(exist_ok=True)
        (own_folder / "bin" / name).write_text(text)
        (own_folder / "bin" / name).chmod(0o755)
    own = {"DIFFPRUNE_HEAD": str(own_folder / "place"), "PYTHON": f"{own_folder}/bin/python", "PORT": "8265"}
    done = subprocess.run([LOCAL, "start"], env=os.environ | own, capture_output=True, text=True, timeout=60)
    pid = int((own_folder / "place" / "pid").read_text())
    os.kill(pid, signal.SIGTERM)
    assert (done.returncode, done.stderr) == (0, "") and f"process {pid}" in done.stdout


def test_the_interpreter_of_a_head_is_found_on_the_path_or_missed_in_one_sentence(own_folder: Path) -> None:
    """One that is given by its name alone must not put the folder one works in before all others of PATH."""
    own = {"DIFFPRUNE_HEAD": str(own_folder / "place"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    line = ["bash", "-x", str(LOCAL), "status"]
    done = subprocess.run(line, env=os.environ | own | {"PYTHON": Path(sys.executable).name}, capture_output=True, text=True)
    (set_to,) = [said for said in done.stderr.splitlines() if said.startswith("+ PATH=")]
    assert set_to.startswith(f"+ PATH={Path(sys.executable).parent}:"), set_to
    gone = subprocess.run([LOCAL, "status"], env=os.environ | own | {"PYTHON": "/nowhere/python"}, capture_output=True, text=True)
    assert gone.returncode == 2 and gone.stderr.startswith("there is no /nowhere/python: set PYTHON to that of"), gone.stderr


def test_a_port_of_another_program_is_named_at_once(own_folder: Path) -> None:
    """Ray would take half a minute to say so, or somebody else's head would seem to be ours."""
    with socket.create_server(("", 0)) as server:
        own = {"DIFFPRUNE_HEAD": str(own_folder / "place"), "PYTHON": sys.executable, "PORT": str(port := server.getsockname()[1])}
        done = subprocess.run([LOCAL, "start"], env=os.environ | own, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr == f"port {port} is taken by another program: set PORT to another one\n"
    assert [path.name for path in (own_folder / "place").iterdir()] == []


# --- a real head ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Iterator[dict[str, str]]:
    """A head node with a port, folder and token of its own; the environment of its clients."""
    place = Path(tempfile.mkdtemp(prefix="dp-"))  # short, as the paths of sockets must be
    port = free_port()
    token = {"RAY_AUTH_TOKEN_PATH": str(place / "token")}
    own = {"DIFFPRUNE_HEAD": str(place / "head"), "PORT": str(port), "PYTHON": sys.executable, "CPUS": "2"}
    outside = {key: value for key, value in os.environ.items() if key != "RAY_AUTH_TOKEN"}
    environment = outside | token | own
    try:
        subprocess.run([LOCAL, "start"], env=environment, check=True, capture_output=True, timeout=120)
        yield token | {
            "address": f"http://127.0.0.1:{port}",
            "pid": (place / "head" / "pid").read_text().strip(),
            "folder": str(place / "head"),
        }
    finally:
        subprocess.run([LOCAL, "stop"], env=environment, check=True, capture_output=True, timeout=60)
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def token(real: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", real["RAY_AUTH_TOKEN_PATH"])


def gcs(real: dict[str, str]) -> str:
    """The address of the cluster itself."""
    written, end = Path(real["folder"]) / "ray" / "ray_current_cluster", time.monotonic() + 60
    while not (written.is_file() and (address := written.read_text().strip())):  # Ray's last act, after the head answers
        assert time.monotonic() < end
        time.sleep(0.05)
    return address


@pytest.mark.slow
def test_a_job_is_followed_and_its_status_returned(real: dict[str, str], token: None, own_folder: Path, capfd: Any) -> None:
    (own_folder / "job.py").write_text(JOB)
    (own_folder / "secret.txt").touch()
    files = {"job.py": own_folder / "job.py"} | {
        str(path.relative_to(REPOSITORY)): path for path in (REPOSITORY / "diffprune").rglob("*.py")
    }
    client = head.connect(real["address"])
    with tempfile.TemporaryDirectory() as place:
        Project(own_folder, files, "job.py").write(Path(place) / "project.zip")
        runtime = {"working_dir": f"{place}/project.zip"}
        assert submit.start(client, shlex.join([sys.executable, "job.py", "3"]), "demo-1", runtime, {"run": "demo", "attempt": "1"})
        assert not submit.start(client, "true", "demo-1", {}, {}), "an id is taken once"
    assert submit.follow(client, "demo-1") == 3
    captured = capfd.readouterr()
    assert captured.out.count("cpus 2.0 files diffprune job.py\n") == 1, "the log is shown once, and what stays here stayed here"
    assert "exit code 3" in captured.err
    secret = Path(real["RAY_AUTH_TOKEN_PATH"]).read_text()
    assert secret not in captured.out + captured.err
    assert [row[:2] for row in submit.listed(client)] == [("demo-1", "FAILED")]
    assert submit.found(client, "demo-1").metadata == {"run": "demo", "attempt": "1"}
    place = Path(real["folder"])
    assert stat.S_IMODE(place.stat().st_mode) == 0o700, "what Ray opens to everyone lies below it"
    assert {stat.S_IMODE((place / name).stat().st_mode) for name in ("pid", "log")} == {0o600}
    assert (place / "ray").is_dir() and (place / "log").is_file() and not (place / "ray" / "pid").exists()
    assert not any(secret in path.read_text(errors="replace") for path in (place / "ray").rglob("*.log")), "in no log of Ray's"


@pytest.mark.slow
def test_a_running_job_is_stopped(real: dict[str, str], token: None) -> None:
    client = head.connect(real["address"])
    submit.start(client, "sleep 60", "long-1", {}, {})
    assert submit.stop(client, "long-1").startswith("long-1 was stopped")
    assert submit._verdict(client, "long-1") == 130


def test_a_head_is_told_from_a_tunnel_to_it_by_who_listens(real: dict[str, str]) -> None:
    assert head.on_this_machine(real["address"])
    assert head.on_this_machine(real["address"].replace("127.0.0.1", "localhost"))
    assert not head.on_this_machine(real["address"].replace("127.0.0.1", "10.1.2.3"))
    assert not head.on_this_machine(f"http://127.0.0.1:{free_port()}")
    line = [sys.executable, "-c", FORWARDS, real["address"].rpartition(":")[2]]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as tunnel:
        assert tunnel.stdout is not None
        address = f"http://127.0.0.1:{tunnel.stdout.readline().strip()}"
        answer, here = requests.get(f"{address}/api/gcs_healthz", timeout=20).status_code, head.on_this_machine(address)
        tunnel.kill()
    assert (answer, here) == (200, False), "Ray answers there, and need not run here"


def test_the_head_listens_on_loopback_only(real: dict[str, str]) -> None:
    assert {address for address, _ in listening(psutil.Process(int(real["pid"])))} == {"127.0.0.1"}


def test_without_the_token_every_port_of_a_head_is_closed_but_that_of_metrics(real: dict[str, str]) -> None:
    """Of those that speak HTTP; nothing of the token stands in what any of them answers."""
    ports = {port for _, port in listening(psutil.Process(int(real["pid"])))}
    secret, answers = Path(real["RAY_AUTH_TOKEN_PATH"]).read_text(), {}
    for port in ports:
        for header in ({}, {"Authorization": "Bearer " + "wrong" * 8}):
            with suppress(requests.RequestException):  # those of gRPC
                found = requests.get(f"http://127.0.0.1:{port}/api/jobs/", headers=header, timeout=10)
                assert found.status_code in (401, 403) or found.text.startswith("# HELP"), (port, found.text[:200])
                assert secret not in found.text
                answers[port] = found.status_code
    assert answers[int(real["address"].rpartition(":")[2])] in (401, 403)


@pytest.mark.slow
def test_plugins_of_the_folder_one_works_in_are_found_by_workers_of_a_head_that_is_joined(
    real: dict[str, str], token: None, own_job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not those of the folder that it was started in, which may have others of their names."""
    monkeypatch.chdir(own_job)
    monkeypatch.delenv(FOLDER, raising=False)
    with cluster.connect(gcs(real)):
        found = ray.get(ray.remote(num_cpus=0)(registry.sources).remote("pruners"))
    assert found["local"].file == own_job / "pruners" / "local.py"


def test_a_verb_joins_a_head_by_the_address_of_its_cluster(real: dict[str, str], token: None) -> None:
    """127.0.0.1 stays what it is: Ray would put the host's own address in its place, and knock there for minutes."""
    address = gcs(real)
    assert address.startswith("127.0.0.1:")
    before = os.environ.get(cluster.ONE_HOST)
    with cluster.connect(address):
        assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]
    assert os.environ.get(cluster.ONE_HOST) == before
