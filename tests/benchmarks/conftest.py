"""All fixture folders, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffprune.benchmarks import _fixtures


@pytest.fixture(scope="session")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one folder of rows per benchmark."""
    folder = tmp_path_factory.mktemp("rows")
    _fixtures.write_all(folder)
    return folder
