"""The study of what a cut inside the decoder costs: cuts remove what their plan says, predictions add up, the page is written."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Share

pytestmark = pytest.mark.slow

STUDY = Path(__file__).parents[1] / "jobs" / "studies" / "cut_cost.py"


def test_the_table_has_both_plans_with_and_without_padding(tmp_path: Path) -> None:
    small = ["--rounds", "6", "--warmup", "1", "--size", "32", "8", "88", "1", "1", "4", "--note", "A note."]
    done = subprocess.run([sys.executable, str(STUDY), "--out", str(tmp_path), *small], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "table.csv")
    assert list(table.rows) == [1, 1, 4, 4] and set(table.method) == {"fastv(after=2)", "pyramiddrop"}
    assert (table[["full_ms", "predicted_ms", "cut_ms", "method_ms"]] > 0).all(axis=None)
    assert (table.ratio_low <= table.ratio).all() and (table.ratio <= table.ratio_high).all()
    assert table.tokens.str.startswith("16 ").all() and table.after.tolist()[:2] == ["2", "2 4 6"]
    text = (tmp_path / "README.md").read_text()
    assert "Target: cut / predicted at most 1.03." in text and text.count("A note.") == 1


def test_a_prediction_is_layers_at_their_lengths_and_the_rest_at_full_length() -> None:
    curve = runpy.run_path(str(STUDY))["curve"]
    by_layers, by_passes = curve({9: 100.0, 3: 40.0}, {9: [20.0, 30.0, 40.0], 3: [6.0, 10.0, 14.0]}, [9, 3, 3])
    assert by_layers == pytest.approx(10 + 20 + 10 + 14) and by_passes == pytest.approx((100 + 40 + 40) / 3)


def test_told_tokens_are_removed_where_the_plan_says() -> None:
    made = runpy.run_path(str(STUDY))
    vlm: Any = made["model"](made["Size"](32, 4, 88, 1, 1, 4, (2,), 1))
    given = made["inputs"](vlm, 2, 4)
    plan = registry.load("pruners", "pyramiddrop").cuts(Share(15 / 32), vlm.shape)
    order = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    packed = pruning.shrink(vlm, given.prompts, given.tokens, made["Told"](plan, order), Share(15 / 32))
    with torch.inference_mode():
        pruning.forward(vlm, packed, logits_to_keep=1)
    assert packed.inside is not None
    assert packed.per_layer(4) == [(16, 8, 4, 2)] * 2
    for row, left in zip(order, packed.inside.left[3], strict=True):
        assert left.nonzero().flatten().tolist() == sorted(row[:2].tolist())
