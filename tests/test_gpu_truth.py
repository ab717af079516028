"""The study of a GPU on tiny instances: without Ray or a network, cut off and gone on with, and what its page makes of records."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch

from diffprune.store import Store
from diffprune.train import estimate

pytestmark = pytest.mark.slow

HOUSE = Path(__file__).parent.parent
STUDIES = HOUSE / "jobs" / "studies"
WITHOUT_RAY = """
import socket, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ray":
            raise ImportError("Ray is blocked")
def refused(*_):
    raise OSError("no network")
sys.meta_path.insert(0, Blocked())
socket.socket.connect = refused
sys.path.insert(0, sys.argv[1])
import gpu_truth
sys.exit(gpu_truth.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    sys.path.insert(0, str(STUDIES))
    import gpu_truth

    yield gpu_truth
    sys.path.remove(str(STUDIES))


def test_one_command_runs_all_parts_without_ray_or_a_network(tmp_path: Path) -> None:
    asked = [sys.executable, "-c", WITHOUT_RAY, str(STUDIES), "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(asked, env=os.environ | {"PYTHONPATH": str(HOUSE)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "gpu_truth.md").read_text()
    assert (
        re.search(r"only collected, as no device is at hand; \d+/\d+ tests collected", page)
        and "3 steps of 2 pictures" in page
        and "Not begun" not in page
    )
    found = pd.read_csv(tmp_path / "latency.csv")
    assert len(found) == 3 * 2 * 5 and set(found["method"]) == {"diffprune (float32)"} and set(found["batch"]) == {1, 2}
    assert "| – |" in page, "a CPU tells no memory"
    told = json.loads((tmp_path / "parts" / "training.json").read_text())
    assert told["steps"] == 3 and told["step_s"] > 0 and told["estimated_peak_gib"] > 0 and told["skipped_steps"] == 0


def test_a_run_without_time_says_what_is_left_and_goes_on(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "ORDER", study.ORDER[:1])
    monkeypatch.setattr(study.latency, "SHARES", study.latency.SHARES[-1:])
    monkeypatch.setattr(study, "gpu_tests", lambda tiny: {"said": "6 passed"})
    asked = ["--tiny", "--out", str(tmp_path)]
    assert study.main([*asked, "--seconds", "0"]) == 0
    said = capsys.readouterr()
    assert "no time left for llava-1.5-7b, batch 1, eager: the same command goes on there" in said.err
    assert "Not begun, as the time was up: tests, llava-1.5-7b, batch 1, eager" in said.out and "Training: not run." in said.out
    monkeypatch.setattr(study, "training", lambda *_: 1 / 0)
    assert study.main(asked) == 1, "a part that failed"
    assert "failed, ZeroDivisionError: division by zero" in capsys.readouterr().out
    timings = len(Store(tmp_path / "store").read("timings"))
    assert timings > 0
    monkeypatch.setattr(study, "training", lambda *_: {"failed": "again"})
    monkeypatch.setattr(study, "gpu_tests", None)  # done, so it is not asked
    assert study.main(asked) == 1 and len(Store(tmp_path / "store").read("timings")) == timings
    assert "Training: failed, again." in capsys.readouterr().out


def test_training_stands_beside_the_estimate_of_the_very_rows(study: ModuleType, tmp_path: Path) -> None:
    """On random weights of a small shape with pictures of the published size, as the full run has them."""
    text = {**study.latency.VICUNA, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": 300}  # fmt: skip
    sight = {**study.latency.CLIP, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"model_type": "llava", "text_config": text, "vision_config": sight}
    pictures = study.latency.SUBJECTS[study.TRAINED].pictures
    vlm = study.latency.randomised(config, pictures, "small (weights=random)", torch.device("cpu"), torch.float32)
    found = study.training(vlm, config, tmp_path, True)
    assert found["positions"] > 576 + 20 and found["estimated_step_s"] is None and found["steps_peak_gib"] is None
    (asked,) = estimate.estimate(
        study.recipe(vlm, True), config, estimate.Assumed(text=found["positions"] - 576, answer=1, visual=576)
    )
    assert found["step_tflop"] == pytest.approx(asked.step_flops / 1e12, rel=0.05) and found["first_loss"] > 0


def test_the_full_recipe_is_the_papers(study: ModuleType) -> None:
    vlm = study.latency.build(study.TRAINED, True, torch.device("cpu"))
    full = study.recipe(vlm, False)
    assert (full.steps, full.images, full.micro_images, full.checkpointing) == (20, 32, 8, True)
    assert [str(budget) for budget in full.budgets] == ["Keep(192)", "Keep(128)", "Keep(64)"]
    assert set(study.ORDER) == set(study.latency.SUBJECTS)


def test_tests_that_fail_or_are_missing_are_findings(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "TESTS", tmp_path / "tests")
    (tmp_path / "tests").mkdir()
    parts = study.Parts(tmp_path, 60)
    parts.run("tests", lambda: study.gpu_tests(False))
    assert "has no test marked gpu" in parts.read("tests")["failed"]
    marked = "import pytest\n\n@pytest.mark.gpu\ndef test_it():\n    assert {}\n"
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "tests" / "test_one.py").write_text(marked.format("False"))
    parts.run("tests", lambda: study.gpu_tests(False))
    assert "1 failed" in parts.read("tests")["failed"]
    (tmp_path / "tests" / "test_one.py").write_text(marked.format("True"))
    parts.run("tests", lambda: study.gpu_tests(False))
    assert "failed" not in parts.read("tests") and "1 passed" in parts.read("tests")["said"]
    (tmp_path / "parts" / "tests.json").write_text("{")
    assert parts.read("tests") is None, "a damaged part is run again"


def test_targets_are_counted_over_the_judged_rows(study: ModuleType) -> None:
    rows = pd.DataFrame({"targets": ["prefill met overhead missed", "", "prefill missed", "overhead met"]})
    said = "\n".join(study._targets(rows))
    assert "90% of the roofline's prefill speedup" in said and "0.69 ms eager and 0.10 ms graph" in said
    assert "* prefill: met in 1 of 2 rows." in said and "* overhead: met in 1 of 2 rows." in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is at hand")
def test_without_a_device_it_ends_with_a_sentence(study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["--out", str(tmp_path / "out")]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_shape_that_fails_does_not_keep_the_others(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built, build = [], study.latency.build

    def broken(name: str, tiny: bool, device: torch.device) -> object:
        built.append(name)
        if name == study.ORDER[0]:
            raise torch.OutOfMemoryError("no memory for its weights")
        return build(name, tiny, device)

    monkeypatch.setattr(study.latency, "build", broken)
    monkeypatch.setattr(study, "gpu_tests", lambda tiny: {"said": "6 passed"})
    assert study.main(["--tiny", "--out", str(tmp_path), "--seconds", "0.5"]) == 1
    assert built == list(study.ORDER)
    assert "Failed: llava-1.5-7b: OutOfMemoryError: no memory for its weights." in capsys.readouterr().out
