"""The study of what our path costs runs on a family without and one with sliding windows, and writes its table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

pytestmark = pytest.mark.slow

STUDY = Path(__file__).parents[1] / "jobs" / "studies" / "adapter_cost.py"


def test_every_arm_is_timed_and_the_table_written(tmp_path: Path) -> None:
    families = ["--family", "llava", "--family", "gemma3"]
    done = subprocess.run(
        [sys.executable, str(STUDY), "--out", str(tmp_path), "--rounds", "6", "--warmup", "1", *families],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "table.csv")
    assert table.family.tolist() == ["llava", "gemma3"] and (table.visual_tokens == 16).all() and (table.rounds == 6).all()
    assert (table[["own_ms", "adapter_ratio", "native_ratio"]] > 0).all(axis=None)
    assert "| gemma3 | 16 |" in (tmp_path / "README.md").read_text()
