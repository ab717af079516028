"""What a GPU says: graph capture against eager, latency of three 7B shapes against the roofline, training against its estimate.

    python jobs/studies/gpu_truth.py --out reports/gpu_truth        one H100 or H200, under 7 minutes
    python jobs/studies/gpu_truth.py --tiny --out runs/gpu_truth    the same code on tiny instances, on a CPU

Parts, in this order: the tests marked `gpu`; LLaVA-1.5-7B, and twenty steps of a scorer through its frozen decoder; Qwen2.5-VL-7B;
LLaVA-NeXT-7B. Each session of a shape (batch 1 and 8, eager and graphed, budgets 1 to 1/9) and every other part is on the disk
before the next begins, and the page is written after each shape, so a run that is cut off leaves what it has; the same command goes
on. No session begins after --seconds.

Nothing is fetched, and Ray is not needed: beside torch and transformers, and what these bring (numpy, regex, safetensors,
tokenizers, huggingface-hub), the wheels of pillow, pyarrow, pandas, scipy, pydantic, psutil, packaging, jinja2, matplotlib,
cachetools and pytest are. Weights are random in bfloat16; pictures are random pixels where times are taken and drawn scenes in
training. The parts of `latency_7b.py` are used as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import latency_7b as latency
import torch

from diffprune.core import registry
from diffprune.core.budget import Keep
from diffprune.core.errors import with_class
from diffprune.core.records import Provenance
from diffprune.core.spec import Spec
from diffprune.core.vlm import VLM
from diffprune.io.blob_store import LocalBlobs
from diffprune.io.json_object import parsed
from diffprune.report.tables import latency as table
from diffprune.store import Store, lock
from diffprune.store.provenance import collect
from diffprune.timing.options import Measurement
from diffprune.train import estimate
from diffprune.train.ahead import drawn
from diffprune.train.context import LocalContext
from diffprune.train.loop import batches
from diffprune.train.recipe import Recipe
from diffprune.train.scorer_trainer import ScorerTrainer
from diffprune.vlm.meta_model import configuration

NAME, SEED, STEPS = "gpu_truth", 0, 20
TITLE = "What a GPU says of three 7B shapes"
ORDER = ("llava-1.5-7b", "qwen2.5-vl-7b", "llava-next-7b")  # the slowest last
TRAINED = ORDER[0]
TESTS = Path(__file__).resolve().parents[2] / "tests"
MARK = re.compile(r"^@pytest\.mark\.gpu$", re.MULTILINE)
SECONDS = 330.0  # leaves 90 s for the slowest session
PEAKS = {"H100": estimate.GPUS["H200"], **estimate.GPUS}  # H100 and H200 are one chip with other memory
GIB = 2**30


class Parts:
    """What was found besides timings, one JSON file for each part below `parts/`, and what is left of the time."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.blobs, self.until = LocalBlobs(out), time.monotonic() + seconds
        self.unbegun: list[str] = []
        self.failures: list[str] = []

    def read(self, name: str) -> dict[str, Any] | None:
        """What a part found; None where it was not run, or its file is damaged."""
        try:
            return parsed(self.blobs.read(f"parts/{name}.json"))
        except (FileNotFoundError, ValueError):
            return None

    def run(self, name: str, find: Callable[[], dict[str, Any]]) -> None:
        """Run a part that is not done; one that fails is written with its reason, and tried again by the next run."""
        before = self.read(name)
        if (before and not before.get("failed")) or not self.may_begin(name):
            return
        print(name, flush=True)
        try:
            found = find()
        except Exception as error:  # out of memory, or whatever a part raises: a finding
            found = {"failed": with_class(error)}
            print(f"    failed: {found['failed']}", file=sys.stderr)
        self.blobs.replace(f"parts/{name}.json", (json.dumps(found, indent=1, sort_keys=True) + "\n").encode())

    def may_begin(self, name: str) -> bool:
        """Whether there is time for one more part; else it is noted."""
        if time.monotonic() < self.until:
            return True
        self.unbegun.append(name)
        return False


# --- the tests marked gpu ------------------------------------------------------------------------------------------------


def gpu_tests(tiny: bool) -> dict[str, Any]:
    """Run the tests marked `gpu`; on tiny instances only find them, as they need a device.

    Raises:
        RuntimeError: there are none.
    """
    files = [str(path) for path in sorted(TESTS.glob("test_*.py")) if MARK.search(path.read_text(encoding="utf-8"))]
    if not files:
        raise RuntimeError(f"{TESTS} has no test marked gpu: run this from a checkout of the repository")
    asked = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "gpu", *files]
    done = subprocess.run(
        [*asked, *(["--collect-only"] if tiny else [])], cwd=TESTS.parent, capture_output=True, text=True, timeout=240, check=False
    )
    lines = (done.stdout + done.stderr).strip().splitlines() or ["pytest said nothing"]
    found: dict[str, Any] = {"said": lines[-1], "files": [Path(path).name for path in files], "collected_only": tiny}
    return found if done.returncode == 0 else found | {"failed": lines[-1]}


# --- twenty steps of training ----------------------------------------------------------------------------------------------


def recipe(vlm: VLM, tiny: bool) -> Recipe:
    """The paper's batch of 32 pictures, one question each, as `jobs/train_llava15_7b.py` has it."""
    small = {"steps": 3, "images": 2, "micro_images": 1, "calibration_images": 2, "budgets": ("Share(1/3)", "Share(1/9)")}
    full = {"steps": STEPS, "images": 32, "micro_images": 8, "calibration_images": 64, "budgets": (Keep(192), Keep(128), Keep(64))}
    return Recipe(
        **(small if tiny else full), model=vlm.spec, pruners=("diffprune",), data="world", questions=1, questions_alone=1,
        learning_rate=2e-4, dtype=vlm.dtype, checkpointing=True, checkpoint_every=0, validate_every=0, grad_cosine_every=0,
        ease_share=0.0, max_skips=STEPS, workers=1,
    )  # fmt: skip


def training(vlm: VLM, config: Mapping[str, Any], out: Path, tiny: bool) -> dict[str, Any]:
    """Time and memory of the steps, beside what `--dry-run` says of the same recipe and lengths of rows."""
    asked = recipe(vlm, tiny)
    _reset(vlm.device)
    trainer = ScorerTrainer(LocalContext(out / "training", vlm.device), vlm, asked, registry.load("pruners", "diffprune"), SEED)
    calibration = _peak(vlm.device)
    _reset(vlm.device)
    stream, spent, losses, assumed = batches(trainer), [], [], estimate.Assumed()
    for step in range(asked.steps):
        batch = drawn(trainer.context, lambda: next(stream))
        if step == 0:
            visual, length = int(vlm.encode(batch.pixels).counts.max()), batch.prompts.input_ids.shape[1]
            assumed = estimate.Assumed(text=length - visual, answer=round(batch.num_labels / batch.images), visual=visual)
        _wait(vlm.device)
        began = time.perf_counter()
        losses.append(trainer.step(batch).loss)
        _wait(vlm.device)
        spent.append(time.perf_counter() - began)
    (told,) = estimate.estimate(asked, config, assumed)
    peak = next((flops for name, flops in PEAKS.items() if name in _device_name(vlm.device)), math.nan)
    return {
        "model": vlm.name, "device": _device_name(vlm.device), "steps": asked.steps, "images": asked.images,
        "micro_images": asked.micro_images, "positions": told.image.positions, "first_loss": losses[0], "last_loss": losses[-1],
        "step_s": _number(median(spent[1:])), "first_step_s": _number(spent[0]),
        "estimated_step_s": _number(told.step_flops / (estimate.SHARE * peak)), "step_tflop": told.step_flops / 1e12,
        "share_of_peak": _number(told.step_flops / median(spent[1:]) / peak),
        "calibration_peak_gib": _number(calibration / GIB), "steps_peak_gib": _number(_peak(vlm.device) / GIB),
        "estimated_peak_gib": told.peak / GIB, "skipped_steps": trainer.skips,
    }  # fmt: skip


def _number(value: float) -> float | None:
    """None, which JSON has a word for, where there is none."""
    return value if math.isfinite(value) else None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset(device: torch.device) -> None:
    if device.type == "cuda":
        latency.free()
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> float:
    """Most bytes that were allocated at once since `_reset`; nan on a CPU, which does not tell."""
    return float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else math.nan


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# --- latency -------------------------------------------------------------------------------------------------------------


def timed(name: str, vlm: VLM, given: argparse.Namespace, parts: Parts, store: Store, provenance: Provenance) -> int:
    """Sessions of one shape, the scorer in the arithmetic of the model; returns how many cells failed."""
    failed = 0
    for batch in (1, 2) if given.tiny else (1, 8):
        inputs = latency.requests(vlm, latency.picture(name, given.tiny), batch)
        few = 2 if given.tiny else 20 if batch == 1 else 6
        options = Measurement(
            rounds=few, warmup=max(1, few // 3), slow_rounds=max(2, few // 4), spans=latency.SPANS, inputs=1,
            threads=1 if given.tiny else None,
        )  # fmt: skip
        for mode in latency.modes(vlm.device):
            if parts.may_begin(title := f"{name}, batch {batch}, {mode}"):
                print(title, flush=True)
                method = latency.scorer(inputs, vlm.model.dtype)
                failed += latency.publish(vlm, inputs, mode, options, store, provenance, [method])
    return failed


def go(given: argparse.Namespace, device: torch.device, store: Store, attempt: int) -> int:
    """All parts; returns how many parts and cells failed."""
    parts, provenance, failed = Parts(given.out, given.seconds), collect(NAME, attempt, SEED), 0
    parts.run("tests", lambda: gpu_tests(given.tiny))
    write(given, parts, store)
    for name in ORDER:
        try:
            failed += shape(name, device, given, parts, store, provenance)
        except Exception as error:  # no memory for its weights, or a device that is lost: the others are tried, records stay
            parts.failures.append(f"{name}: {with_class(error)}")
            print(parts.failures[-1], file=sys.stderr)
        latency.free()
        write(given, parts, store)
    for title in parts.unbegun:
        print(f"no time left for {title}: the same command goes on there", file=sys.stderr)
    return failed + len(parts.failures) + sum(bool((parts.read(name) or {}).get("failed")) for name in ("tests", "training"))


def shape(
    name: str, device: torch.device, given: argparse.Namespace, parts: Parts, store: Store, provenance: Provenance
) -> int:  # fmt: skip
    """Times of one shape, and training on the first; returns how many cells failed."""
    vlm = latency.build(name, given.tiny, device)
    failed = timed(name, vlm, given, parts, store, provenance)
    if name == TRAINED:
        parts.run("training", lambda: training(vlm, _config(given.tiny), given.out, given.tiny))
    return failed


def _config(tiny: bool) -> Mapping[str, Any]:
    """What config.json of the trained shape says."""
    if tiny:
        return configuration(Spec("tiny").with_options(family=latency.SUBJECTS[TRAINED].family)) or {}
    subject = latency.SUBJECTS[TRAINED]
    return {"model_type": subject.family, **subject.config}


# --- the page ------------------------------------------------------------------------------------------------------------


def write(given: argparse.Namespace, parts: Parts, store: Store) -> Path:
    """`gpu_truth.md`, and the table of timings beside it (`latency.md`, `latency.csv`)."""
    models = latency.outlines(given.tiny)
    shapes = {name: vlm.shape for name, vlm in models.items()}
    command = f"python jobs/studies/{NAME}.py{' --tiny' * given.tiny} --out {given.out.name}"
    notes = latency.notes(models, given.tiny)
    table.write(store, given.out, latency.TITLE, command, shapes, notes)
    lines = [f"# {TITLE}", "", f"`{command}`", "", *_tests(parts.read("tests")), "", *_training(parts.read("training")), ""]
    lines += [*_targets(table.table(store, shapes)), "", "Every timing: [latency.md](latency.md), [latency.csv](latency.csv)."]
    lines += [f"\nFailed: {'; '.join(parts.failures)}."] if parts.failures else []
    lines += [f"\nNot begun, as the time was up: {', '.join(parts.unbegun)}."] if parts.unbegun else []
    parts.blobs.replace(f"{NAME}.md", ("\n".join(lines) + "\n").encode())
    return given.out / f"{NAME}.md"


def _tests(found: Mapping[str, Any] | None) -> Iterator[str]:
    if found is None:
        yield "Tests marked `gpu`: not run."
    else:
        how = "only collected, as no device is at hand" if found.get("collected_only") else "run"
        yield f"Tests marked `gpu` (graph capture equals eager): {how}; {found.get('failed') or found['said']}."


def _training(found: Mapping[str, Any] | None) -> Iterator[str]:
    if found is None or "failed" in found:
        yield f"Training: {'not run' if found is None else 'failed, ' + str(found['failed'])}."
        return
    yield (
        f"Training a scorer through {found['model']} on {found['device']}: {found['steps']} steps of {found['images']} pictures, "
        f"{found['micro_images']} at once, {found['positions']} positions each, decoder layers computed again."
    )
    yield from ("", "| | measured | estimate of `--dry-run` |", "|---|---:|---:|")
    yield f"| step, s (median without the first) | {_shown(found['step_s'])} | {_shown(found['estimated_step_s'])} |"
    yield f"| peak of the steps, GiB | {_shown(found['steps_peak_gib'])} | {_shown(found['estimated_peak_gib'])} |"
    yield f"| peak of calibration, GiB | {_shown(found['calibration_peak_gib'])} | |"
    yield f"| share of the dense peak | {_shown(found['share_of_peak'])} | {estimate.SHARE} |"


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _targets(rows: Any) -> Iterator[str]:
    """How many of the judged rows meet each target."""
    said = [
        words for text in (rows["targets"] if len(rows) else []) for words in re.findall(r"(prefill|overhead) (met|missed)", text)
    ]
    limits = f"{table.PREFILL_TARGET:.0%} of the roofline's prefill speedup when graphed; overhead at batch 1 within "
    limits += " and ".join(f"{ms:.2f} ms {mode}" for mode, ms in table.OVERHEAD_TARGET.items())
    yield f"Targets: {limits}."
    for what in ("prefill", "overhead"):
        judged = [verdict for name, verdict in said if name == what]
        yield (
            f"* {what}: met in {judged.count('met')} of {len(judged)} rows"
            + ("" if judged else ", as no known device was timed")
            + "."
        )


# --- the command -----------------------------------------------------------------------------------------------------------


def main(given: Sequence[str] | None = None) -> int:
    """0 when every part was run, 1 where some failed, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the records (store/, parts/) and the page")
    parser.add_argument("--tiny", action="store_true", help="the families' tiny instances, in float32")
    parser.add_argument("--device", help="cuda, or cpu with --tiny [default: cuda; cpu with --tiny]")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"no part begins later [default: {SECONDS:.0f}]")
    asked = parser.parse_args(given)
    asked.mode = None
    try:
        device = latency.device_of(asked)
        store = Store(asked.out / "store")
        with lock(store.blobs, NAME) as attempt:
            failed = go(asked, device, store, attempt)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print((asked.out / f"{NAME}.md").read_text())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
