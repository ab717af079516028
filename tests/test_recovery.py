"""The study of how fast training begins and goes on: what it makes of the times at which lines of a step log come."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from diffprune.core.records import Step
from diffprune.train.checkpoints import signed, verified

STUDY = Path(__file__).parents[1] / "jobs" / "studies" / "recovery.py"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recovery", STUDY)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["recovery"] = module
    spec.loader.exec_module(module)
    return module


def step(number: int) -> dict[str, object]:
    row = Step(number, 1.0, 0.0, 1.0, "", 8.0, 1.0, False, 1.0, 1.0, 1.0, 30.0, 1, 1.0, 1.0)
    line = verified(signed({"scorer": "diffprune-0", **asdict(row)}))
    assert line
    return line


def test_phases_and_times_of_steps_are_told_from_the_lines(study: ModuleType) -> None:
    """Steps of 0.1 s; killed at 6.05 s, of which the log hears a step late; then step 10 again and on, of 0.2 s."""
    seen = study.Seen()
    lines = [(4.0, {"group": 2}), (4.5, {"begin": ["diffprune-0", 0]}), *((5 + 0.1 * i, step(i)) for i in range(12))]
    lines += [(8.0, {"group": 2}), (9.5, {"begin": ["diffprune-0", 10]}), *((10 + 0.2 * i, step(10 + i)) for i in range(20))]
    lines += [(20.0, {"saved": "diffprune-0", "step": 30})]
    for when, line in lines:
        seen.hear(line, when)
    found = study.phases(seen, 6.05)
    assert found == pytest.approx({"noticed_s": 1.95, "loaded_s": 1.5, "goes_on_s": 3.95})
    times = study.step_ms(seen)
    assert sorted(times) == list(range(16, 30)), "the first is of no interval, five are not settled"
    assert list(times.values()) == pytest.approx([200.0] * 14)


def test_processor_time_is_that_of_a_process_and_all_below_it(study: ModuleType) -> None:
    busy = "import time\nwhile time.process_time() < 0.4: pass\nprint(flush=True)\ntime.sleep(60)"
    parent = f"import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', {busy!r}])\n{busy}"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout
        said = [process.stdout.readline(), process.stdout.readline()]
        found = study.processor_s(process.pid)
        for one in [*psutil.Process(process.pid).children(), process]:
            one.kill()
    assert said == [b"\n", b"\n"] and 0.75 <= found < 2
    assert study.processor_s(process.pid) == 0, "it is gone"


def test_ratios_compare_the_same_steps_and_goals_have_a_direction(study: ModuleType) -> None:
    one = {step: 100.0 + step for step in range(20)}
    half = {step: (100.0 + step) / 2 for step in range(5, 30)}
    assert study.ratio([one, one], [half, half]) == pytest.approx((2.0, 2.0, 2.0))
    round_ = {
        "begins_s": [14.0, 16.0], "begins_1_cpu_s": 20.0, "begins_2_cpu_s": 30.0, "goes_on_s": 13.0, "noticed_s": 5.0,
        "loaded_s": 4.0, "blocks_ms": 0.3, "one": one, "plain": one, "two": half,
        "apart": {step: 1.25 * value for step, value in one.items()},
    }  # fmt: skip
    rows = study.table([round_, round_ | {"goes_on_s": 10.0}]).set_index("figure")
    assert rows["met"].to_dict() == {
        "begins_s": "yes", "begins_1_cpu_s": "", "begins_2_cpu_s": "", "goes_on_s": "yes", "noticed_s": "", "loaded_s": "",
        "blocks_ms": "yes", "ray_ratio": "yes", "speed_of_two": "yes", "speed_apart": "",
    }  # fmt: skip
    assert rows.loc["speed_apart", ["value", "low", "high"]].tolist() == pytest.approx([1.6, 1.6, 1.6]), "2 / 1.25"
    assert rows.loc["goes_on_s", ["value", "low", "high"]].tolist() == [11.5, 10.0, 13.0]
    slow = study.table([round_ | {"two": one, "one": {step: 1.2 * ms for step, ms in one.items()}}]).set_index("figure")
    assert slow.loc[["goes_on_s", "ray_ratio", "speed_of_two"], "met"].tolist() == ["no", "no", "no"]
    text = study.page(slow.reset_index(), "Commit 0.")
    assert "| a step with Ray's one worker over one without Ray | 1.20 | 1.20 | 1.20 | at most 1.05 | no |" in text
    assert "| 1.20 | 1.20 | 1.20 | at least 1.7 | no |" in text and "13.00 s | 13.00 | 13.00 | at most 12 s | no |" in text
