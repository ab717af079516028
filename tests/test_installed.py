"""The wheel, unpacked into a folder of its own: jobs and published numbers travel inside, and the commands find them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from diffprune.core import registry

pytestmark = pytest.mark.slow

HOUSE = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install` of the wheel would put into site-packages."""
    pytest.importorskip("setuptools")
    source, built, site = (tmp_path_factory.mktemp(name) for name in ("source", "built", "site"))
    for folder in ("diffprune", "jobs", "reports/published"):
        shutil.copytree(HOUSE / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(HOUSE / name, source)
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *offline, "-w", str(built), str(source)], check=True)
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def test_everything_that_runs_is_in_the_wheel(installed: Path) -> None:
    for folder, inside in (("diffprune", "diffprune"), ("jobs", "diffprune/jobs"), ("reports/published", "diffprune/published")):
        files = [file for file in (HOUSE / folder).rglob("*") if file.is_file() and file.suffix not in (".pyc", ".md")]
        wanted = {file.relative_to(HOUSE / folder) for file in files}
        assert wanted and not [name for name in wanted if not (installed / inside / name).is_file()]
    assert [path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")] == ["diffprune"]


def test_the_code_in_the_wheel_has_the_digests_of_the_clone(installed: Path, own_folder: Path) -> None:
    names = ("attention", "diffprune", "replaced")
    line = f"from diffprune.core import registry; print([registry.code('pruners', name) for name in {names!r}])"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", line], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([registry.code("pruners", name) for name in names])


def test_the_demo_is_found_from_an_empty_folder(installed: Path, own_folder: Path) -> None:
    line = """if True:
        from diffprune.cli.commands import call
        from diffprune.io import job_files
        assert job_files.shipped().parent.name == "diffprune", job_files.shipped()
        few = ["--dry-run", "--set", "evaluate.blind=false", "--set", "budgets=[7]"]
        print(call(["run", "compare_gumbel", *few]), call(["run", "table_llava15_7b", "--tiny", *few]))
        print(call(["demo", "--dry-run", "--set", "budgets=[7]", "--set", "evaluate.blind=false"]))
    """
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", line], env=environment, capture_output=True, text=True, check=True)
    said = done.stdout
    assert "(0, '') (0, '')\n" in said and said.endswith("(0, '')\n") and "train: 15 scorers of 100 or 133 or 200 steps" in said
    assert not list(own_folder.iterdir())
