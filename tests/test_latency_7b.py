"""The latency job on tiny instances, its table against hand-made records, and its shapes against the specification."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib import util
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch

from diffprune.core.budget import Share
from diffprune.core.cell import Cell, MeasureSpec, Questions
from diffprune.core.spec import Spec
from diffprune.core.vlm import Shape
from diffprune.report.tables import latency
from diffprune.store import Store
from diffprune.timing import flops, roofline
from tests.records import cost, outcome, provenance, timing

pytestmark = pytest.mark.slow

WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is at hand")


@pytest.fixture(scope="module")
def job() -> ModuleType:
    path = Path(__file__).parent.parent / "jobs" / "studies" / "latency_7b.py"
    spec = util.spec_from_file_location("latency_7b", path)
    assert spec and spec.loader
    made = util.module_from_spec(spec)
    sys.modules[spec.name] = made  # dataclasses look their module up
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def models(job: ModuleType) -> dict[str, Shape]:
    return {name.split(" ")[0]: vlm.shape for name, vlm in job.outlines(tiny=False).items()}


# --- the job -----------------------------------------------------------------------------------------------------------


def test_the_very_job_runs_on_tiny_instances_and_resumes(
    job: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--tiny", "--out", str(tmp_path), "--batch", "2", "--rounds", "2", "--warmup", "0"]
    monkeypatch.setattr(job, "SHARES", (job.Share(1 / 2), job.Share(1 / 9)))
    assert job.main(asked) == 0
    found = pd.read_csv(tmp_path / "latency.csv")
    assert len(found) == len(job.SUBJECTS) * len(job.SHARES) * 2 and set(found["method"]) == {"random", "diffprune (float32)"}
    assert found["model"].str.endswith("tiny (weights=random)").all() and found["of_roofline"].isna().all()
    llava = found[found["model"].str.startswith("llava-1.5") & (found["method"] == "random")]
    assert llava["kept"].tolist() == [8, 2] and (llava["sequence"] == llava["kept"] + job.TEXT).all()
    store = Store(tmp_path / "store")
    assert set(store.read("timings")["model_sha256"]) == {"random 0"} and set(store.read("timings")["mode"]) == {"eager"}
    text = (tmp_path / "latency.md").read_text()
    assert "Roofline: none" in text and "A threshold" in text and "weights=random" in text
    before = len(store.read("timings"))
    monkeypatch.setattr(job.measure, "side_by_side", None)  # nothing is left to time
    assert job.main(asked) == 0
    assert len(Store(tmp_path / "store").read("timings")) == before
    capsys.readouterr()


@WITHOUT_CUDA
@pytest.mark.parametrize(
    "options, message", [((), "needs a CUDA device"), (("--tiny", "--mode", "graph"), "graph needs a CUDA device")]
)
def test_what_this_machine_cannot_do_ends_with_a_sentence(
    job: ModuleType, options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.main([*options, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_scorer_in_other_arithmetic_scores_alike(job: ModuleType) -> None:
    vlm = job.build("llava-1.5-7b", True, torch.device("cpu"))
    inputs = job.requests(vlm, (32, 32), 2)
    assert int(inputs.prompts.attention_mask.sum()) == 2 * (16 + job.TEXT)
    exact, half = (job.scorer(inputs, kind).score(inputs.tokens) for kind in (torch.float32, torch.bfloat16))
    assert (
        half.dtype == torch.bfloat16 and torch.allclose(half.float(), exact, rtol=0.1, atol=0.02) and not torch.equal(half, exact)
    )


def test_weights_are_drawn_where_the_model_stands(job: ModuleType) -> None:
    config = {
        "model_type": "llava",
        "text_config": {**job.VICUNA, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                        "num_key_value_heads": 2, "vocab_size": 300},
        "vision_config": {**job.CLIP, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    }  # fmt: skip
    subject = job.SUBJECTS["llava-1.5-7b"]
    vlm = job.randomised(config, subject.pictures, "small", torch.device("cpu"), torch.bfloat16)
    assert vlm.weights_hash == "random 0" and vlm.model.dtype == torch.bfloat16 and vlm.num_visual_tokens == 576
    inputs = job.requests(vlm, subject.picture, 1)
    assert int(inputs.tokens.counts) == 576 and int(inputs.prompts.attention_mask.sum()) == 640
    with pytest.raises(ValueError, match="no model named"):
        job.randomised({"model_type": "nothing"}, {}, "x", torch.device("cpu"), torch.float32)


# --- shapes, against published constants ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, per_layer, kv_kib", [("llava-1.5-7b", 202.4e6, 512), ("llava-next-7b", 202.4e6, 512), ("qwen2.5-vl-7b", 233.0e6, 56)]
)
def test_shapes_are_the_published_ones(models: dict[str, Shape], name: str, per_layer: float, kv_kib: int) -> None:
    shape = models[name]
    assert flops.layer_weights(shape) == pytest.approx(per_layer, rel=1e-3)
    assert flops.kv_bytes(shape, (1,) * shape.layers, 0, 2) == kv_kib * 1024


def test_encoders_see_the_published_pictures(models: dict[str, Shape]) -> None:
    assert flops.encoder_flops(models["llava-1.5-7b"]) == pytest.approx(0.381e12, rel=0.02)
    assert models["llava-next-7b"].tiles == 5 and models["qwen2.5-vl-7b"].patches == 4 * 1280


def test_the_scorers_work_is_what_torch_counts(job: ModuleType) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    vlm = job.build("llava-1.5-7b", True, torch.device("cpu"))
    inputs = job.requests(vlm, (32, 32), 2)
    pruner = job.scorer(inputs, torch.float32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        pruner.score(inputs.tokens)
    assert counter.get_total_flops() == pytest.approx(2 * pruner.networks["scorer"].flops(16), rel=0.01)


# --- the table -----------------------------------------------------------------------------------------------------------


ASKED = MeasureSpec(
    Spec("diffprune", weights_sha256="random bfloat16"), Share(0.222222), Questions(Spec("random_pixels"), ""), 1, "graph"
)
CELL = Cell(Spec("llava-1.5-7b (weights=random)"), "bfloat16", ASKED)
SPENT = {  # ms; the device needs 11.46 and 3.48 at best
    ("full", "prefill"): 14.0, ("full", "ttft"): 40.0, ("pruned", "prefill"): 4.4, ("pruned", "overhead"): 0.05,
    ("pruned", "ttft"): 30.0, ("native", "prefill"): 4.4,
}  # fmt: skip


def publish(root: Path, gpu: str, cell: Cell = CELL, spent: dict[tuple[str, str], float] = SPENT) -> Store:
    """A store with one cell of three equal rounds."""
    store = Store(root)
    hardware = json.dumps({"cpu": "x", "gpus": [gpu]})
    made = provenance(commit="abc", hardware=hardware)
    kept = {"full": 576.0, "pruned": 128.0, "native": 128.0}
    times = [
        timing(ms, span=span, arm=arm, repetition=turn, visual_kept=kept[arm], sequence=int(kept[arm]) + 64, flags="few_repeats")
        for (arm, span), ms in spent.items() for turn in range(3)
    ]  # fmt: skip
    costs = [
        cost(arm=arm, visual_kept=num, text_tokens=64.0, prefill_flops={576.0: 8.397e12, 128.0: 2.497e12}[num],
             kv_bytes=(num + 64) * 2**19, kv_measured_bytes=(num + 64) * 2**19)
        for arm, num in kept.items()
    ]  # fmt: skip
    store.publish({"timings": times, "costs": costs, "outcomes": [outcome(18)]}, cell=cell, provenance=made)
    return store


def row(store: Store, models: dict[str, Shape]) -> pd.Series[object]:
    (found,) = latency.table(store, {str(CELL.model): models["llava-1.5-7b"]}).to_dict("records")
    return pd.Series(found)


def test_a_row_is_held_against_the_roofline(models: dict[str, Shape], tmp_path: Path) -> None:
    found = row(publish(tmp_path, "NVIDIA H200"), models)
    assert found["prefill_speedup"] == pytest.approx(14 / 4.4) and found["net_speedup"] == pytest.approx(14 / 4.45)
    assert found["ttft_speedup"] == pytest.approx(40 / 30) and found["native_ratio"] == pytest.approx(4.45 / 4.4)
    assert found["roofline_speedup"] == pytest.approx(3.30, abs=0.01) and found["full_roofline_ms"] == pytest.approx(
        11.46, abs=0.01
    )
    assert found["of_roofline"] == pytest.approx(14 / 4.4 / 3.30, rel=0.01)
    assert found["targets"] == "prefill met overhead met" and found["kv_mib"] == 96
    assert found["full_tflops"] == pytest.approx(8397 / 14, rel=1e-3) and "above_flop_ratio" not in found["flags"]


def test_a_speedup_above_the_arithmetic_is_flagged_and_a_slow_one_misses(models: dict[str, Shape], tmp_path: Path) -> None:
    fast = row(publish(tmp_path / "fast", "NVIDIA H200", spent=SPENT | {("full", "prefill"): 20.0}), models)
    assert "above_flop_ratio" in fast["flags"]
    slow = row(publish(tmp_path / "slow", "NVIDIA H200", spent=SPENT | {("pruned", "prefill"): 5.0}), models)
    assert slow["targets"].startswith("prefill missed")
    late = row(publish(tmp_path / "late", "NVIDIA H200", spent=SPENT | {("pruned", "overhead"): 0.11}), models)
    assert late["targets"] == "prefill met overhead missed"
    eager = replace(CELL, subject=replace(ASKED, mode="eager"))
    assert row(publish(tmp_path / "eager", "NVIDIA H200", eager), models)["targets"] == "overhead met"


def test_an_unknown_device_has_no_roofline_which_is_said(models: dict[str, Shape], tmp_path: Path) -> None:
    store = publish(tmp_path / "store", "Some GPU")
    found = row(store, models)
    assert pd.isna(found["roofline_speedup"]) and found["targets"] == ""
    page = latency.write(store, tmp_path, "Latency", "the command", {}).read_text()
    assert "Device: Some GPU. Roofline: none" in page and "Commit: abc." in page and "| – |" in page


def test_a_failed_cell_is_told_with_its_reason(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.publish({"outcomes": [outcome(0, "failed", "out of memory")]}, cell=CELL, provenance=provenance())
    page = latency.write(store, tmp_path, "Latency", "the command", {}).read_text()
    assert "Failed: llava-1.5-7b (weights=random), batch 1, graph, diffprune Share(0.222222): out of memory" in page


def test_devices_are_told_apart_by_their_memory() -> None:
    assert roofline.known("NVIDIA H100 80GB HBM3").bytes == 3.35e12  # type: ignore[union-attr]
    assert roofline.known("NVIDIA A100-SXM4-80GB").flops == 312e12  # type: ignore[union-attr]
    assert not any(roofline.known(name) for name in ("NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "NVIDIA H200 NVL", "cpu"))
