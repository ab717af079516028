"""Provenance says which code ran on what, and nothing about who or where."""

import getpass
import json
import os
import socket
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from diffprune.store.provenance import collect, repository


def git(folder: Path, *words: str) -> str:
    config = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *config, "-C", str(folder), *words], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "project" / "package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    git(folder.parent, "init", "-q")
    repository.cache_clear()
    return folder


def look(folder: Path) -> tuple[str, bool]:
    repository.cache_clear()
    return repository(folder)


def test_commit_and_dirty_flag(package: Path) -> None:
    git(package, "add", ".")
    git(package, "commit", "-qm", "first")
    head = git(package, "rev-parse", "HEAD")
    assert look(package) == (head, False)
    (package / "new.py").write_text("1")
    assert look(package) == (head, True)
    (package / "new.py").unlink()
    (package / "__init__.py").write_text("1")
    assert look(package) == (head, True)


def test_a_package_installed_in_another_repository_has_no_commit(package: Path, tmp_path: Path) -> None:
    (package.parent / "own.txt").write_text("")
    git(package.parent, "add", "own.txt")
    git(package.parent, "commit", "-qm", "theirs")
    assert look(package) == ("", False)
    assert look(tmp_path) == ("", False)


def test_a_git_hook_of_another_repository_does_not_mislead(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(package, "add", ".")
    git(package, "commit", "-qm", "first")
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    repository.cache_clear()
    found = repository(package)
    monkeypatch.delenv("GIT_DIR")
    assert found == (git(package, "rev-parse", "HEAD"), False)


def test_without_git_the_commit_is_empty(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(package, "add", ".")
    git(package, "commit", "-qm", "first")
    monkeypatch.setenv("PATH", "")
    assert look(package) == ("", False)


def test_versions_and_hardware_are_json_and_tell_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hunter2-secret")
    found = collect("demo", 3, 7)
    assert (found.run, found.attempt, found.job_seed) == ("demo", 3, 7)
    assert json.loads(found.versions)["torch"] == metadata.version("torch")
    hardware = json.loads(found.hardware)
    assert hardware["cpu"] and hardware["cores"] >= 1 and hardware["memory_gib"] > 0
    text = found.versions + found.hardware
    for secret in ("hunter2-secret", str(Path.home()), os.getcwd(), socket.gethostname(), getpass.getuser()):
        assert len(secret) < 4 or secret not in text
    assert found.started.endswith("+00:00")
