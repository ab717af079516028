"""The study of what selections cost times every method and writes its table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

pytestmark = pytest.mark.slow

STUDY = Path(__file__).parents[1] / "jobs" / "studies" / "selection_cost.py"


def test_every_method_is_timed_and_the_table_written(tmp_path: Path) -> None:
    small = ["--rounds", "2", "--warmup", "1", "--side", "8", "--widths", "32", "64", "--note", "A note."]
    done = subprocess.run([sys.executable, str(STUDY), "--out", str(tmp_path), *small], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "table.csv")
    assert {"attention", "divprune", "cdpruner", "vispruner", "prumerge(plus=True)"} <= set(table.method)
    assert (table[["select_ms", "bare_ms"]] > 0).all(axis=None) and table.over.notna().all()
    text = (tmp_path / "README.md").read_text()
    assert "| divprune | greedy |" in text and text.count("A note.") == 1
