"""Prefill, overhead, TTFT and KV bytes of three 7B shapes with random weights, launched one by one and as CUDA graphs.

    python jobs/studies/latency_7b.py --out reports/latency_7b       on a CUDA device; resumes, so it may be stopped at any time
    python jobs/studies/latency_7b.py --tiny --out runs/latency_tiny  the same on tiny instances, on a CPU, in seconds

Time depends on shapes, not on the values of weights: they are random, and the records say so. Pictures are random pixels of the
model's own size, prompts have 64 text tokens, the scorer is untrained at the paper's shape. Prefill in mode eager is the model's
own forward on the features its encoder made (`mm_encoder_outputs`), in mode graph the same forward on embedded rows
(`inputs_embeds`), which are compared with each other when a graph is captured. What the device could do at best: `roofline`.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffprune.core import registry
from diffprune.core.budget import Share
from diffprune.core.cell import Cell, MeasureSpec, Questions, describe
from diffprune.core.evidence import IDENTITY
from diffprune.core.pruner import Pruner
from diffprune.core.records import Outcome, Provenance
from diffprune.core.spec import Spec
from diffprune.core.vlm import VLM
from diffprune.measure import measure
from diffprune.report.tables import latency
from diffprune.store import Store, lock
from diffprune.store.provenance import collect
from diffprune.timing import cuda_graph, eager, roofline
from diffprune.timing.clock import clocks
from diffprune.timing.machine import steady
from diffprune.timing.options import Measurement, Span
from diffprune.timing.session import Session
from diffprune.vlm.load import described
from diffprune.vlm.meta_model import outline, projector_input_width
from diffprune.vlm.random_weights import randomised

NAME, TEXT, SEED = "latency_7b", 64, 0
TITLE = "Latency of three 7B shapes with random weights"
NOTES = (
    "* Prefill is the decoder's alone, to the logits of the last position. Mode eager: the model's own forward on encoder outputs. "
    "Mode graph: the same forward on embedded rows, one CUDA graph per length; rows are padded on the left to a multiple of 64 "
    "tokens, which counts as cost (`sequence`), the unpruned request runs at its own length.",
    "* Overhead is scoring, choosing and cutting; projection, which every request needs, is not in it. In mode graph it is one "
    "graph of a fixed count. A threshold keeps another number of tokens of every image: it has no fixed shapes to capture.",
    "* TTFT is from a picture of random pixels and text in host memory to the first token id on the host, preprocessing included.",
    "* `random` makes its scores on the host, which its overhead shows. The scorer of `diffprune` is untrained; the type of its "
    "arithmetic stands beside it.",
)
SHARES = (Share(1), Share(1 / 2), Share(1 / 3), Share(2 / 9), Share(1 / 9))  # 576, 288, 192, 128 and 64 of LLaVA-1.5's 576
SPANS: tuple[Span, ...] = ("encoder", "parts", "prefill", "ttft")
VICUNA = {
    "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model", "num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
QWEN = {
    "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
    "vocab_size": 152064, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}  # fmt: skip
QWEN_VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": 3584,
}  # fmt: skip
SQUARE = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}


@dataclass(frozen=True)
class Subject:
    """A published shape. family: its file under `models/`. picture, small: width and height of a picture of the full and of the
    tiny instance, px. patches: what the encoder sees of a picture, where that is not its default size."""

    family: str
    picture: tuple[int, int]
    small: tuple[int, int]
    config: dict[str, Any]
    pictures: dict[str, Any]
    patches: int = 0


SUBJECTS = {
    "llava-1.5-7b": Subject(
        "llava", (336, 336), (32, 32), {"text_config": VICUNA, "vision_config": CLIP}, SQUARE | {"do_pad": True}
    ),
    "llava-next-7b": Subject("llava_next", (672, 672), (64, 64), {"text_config": VICUNA, "vision_config": CLIP}, SQUARE),
    "qwen2.5-vl-7b": Subject(
        "qwen2_5_vl", (1120, 896), (48, 32), {"text_config": QWEN, "vision_config": QWEN_VISION},
        {"patch_size": 14, "size": {"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}}, patches=64 * 80,
    ),
}  # fmt: skip


def build(name: str, tiny: bool, device: torch.device) -> VLM:
    """The model, of a name that says how its weights were made."""
    subject = SUBJECTS[name]
    if tiny:
        vlm: VLM = registry.find("models", subject.family).tiny()  # type: ignore[attr-defined]
        vlm.model.to(device)
        vlm.device, vlm.asked, vlm.weights_hash = device, Spec(label(name, tiny)), f"random {SEED}"
        return vlm
    config = {"model_type": subject.family, **subject.config}
    vlm = randomised(config, subject.pictures, label(name, tiny), device, torch.bfloat16, SEED)
    vlm.shape = replace(vlm.shape, patches=subject.patches or vlm.shape.patches)
    return vlm


def outlines(tiny: bool) -> dict[str, VLM]:
    """Every model by the name its cells have; of the full ones only the outline, without weights."""
    found: dict[str, VLM] = {}
    for name, subject in SUBJECTS.items():
        family: Any = registry.find("models", subject.family)
        vlm = family.tiny() if tiny else outline({"model_type": subject.family, **subject.config})
        vlm.shape = replace(vlm.shape, patches=(not tiny and subject.patches) or vlm.shape.patches)
        found[label(name, tiny)] = vlm
    return found


def notes(models: dict[str, VLM], tiny: bool) -> str:
    """What the reader of the table must know; for full shapes also what the scorer costs by arithmetic."""
    lines = [*NOTES]
    for name, vlm in () if tiny else models.items():
        features, tokens = projector_input_width(vlm), vlm.shape.patches // 4 if "qwen" in name else vlm.num_visual_tokens
        pruner: Any = registry.load("pruners", "diffprune")
        scorer: Any = pruner.outline(features)["scorer"]
        depth, width, work = pruner.dims["depth"], pruner.dims["width"], scorer.flops(tokens)
        best = ", ".join(f"{1e3 * work / d.flops:.3f} ms on {d.name}" for _, d in roofline.KNOWN[:3])
        lines.append(
            f"* Scorer of {name}: {depth} blocks, {width} wide, {work / 1e9:.1f} GFLOP on {tokens} tokens; at the rate of bfloat16 "
            f"products at least {best}, so an overhead below that is out of reach for this shape."
        )
    return "\n".join(lines)


def label(name: str, tiny: bool) -> str:
    """The name of a model in the records."""
    return f"{name}{' tiny' * tiny} (weights=random)"


def requests(vlm: VLM, size: tuple[int, int], batch: int) -> eager.Inputs:
    """One batch of random pixels with prompts of `TEXT` text tokens."""
    rng = np.random.default_rng(SEED)
    noise = [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(batch)]
    pixels = vlm.pixels(noise[:1])
    slots = vlm.slots(pixels)
    frame = int(vlm.prompts(["x"], slots, vlm.layout(pixels)).attention_mask.sum()) - slots[0] - 1
    return eager.prepare(vlm, noise, ["x" * (TEXT - frame)] * batch, frozenset({IDENTITY}))


def scorer(inputs: eager.Inputs, dtype: torch.dtype) -> Pruner:
    """DiffPrune, untrained, at the paper's shape; `weights_sha256` of its cells says so, and which arithmetic it runs in."""
    torch.manual_seed(SEED)
    pruner: Any = registry.load("pruners", "diffprune")
    pruner.build(inputs.tokens).eval().requires_grad_(False)
    weights = f"random {str(dtype).removeprefix('torch.')}"
    pruner.spec = replace(pruner.spec, weights_sha256=weights)
    if dtype != torch.float32:
        network = pruner.networks["scorer"].to(dtype)
        network.register_forward_pre_hook(lambda _, args: (args[0].to(dtype), *args[1:]))
    return pruner  # type: ignore[no-any-return]


def methods_of(vlm: VLM, inputs: eager.Inputs) -> list[Pruner]:
    """What is timed unless a study says otherwise: a rule without a scorer, and the scorer in both types of arithmetic."""
    kinds = dict.fromkeys((torch.float32, vlm.model.dtype))
    return [registry.load("pruners", "random"), *(scorer(inputs, kind) for kind in kinds)]


def cells(vlm: VLM, inputs: eager.Inputs, mode: str, methods: Sequence[Pruner]) -> dict[Cell, tuple[Pruner, Share]]:
    """What one session times, beside the unpruned request that every session has."""
    width, height = inputs.images[0].size
    questions = Questions(Spec("random_pixels"), f"{width} x {height} px", f"{TEXT} text tokens", split="")
    found = {}
    for share in SHARES:
        for m in methods:
            subject = MeasureSpec(m.spec, share, questions, len(inputs.images), mode, SEED)
            found[Cell(vlm.spec, vlm.dtype, subject, describe(m), "Random pixels")] = m, share
    return found


@torch.inference_mode()
def session(
    vlm: VLM, inputs: eager.Inputs, mode: str, options: Measurement, done: set[str], methods: Sequence[Pruner]
) -> Iterator[tuple[Cell, measure.Measured]]:
    """What was found about each cell that is not done."""
    asked = {cell: how for cell, how in cells(vlm, inputs, mode, methods).items() if cell.key not in done}
    if not asked:
        return
    run: eager.Mode = cuda_graph.Graphs(vlm) if mode == "graph" else eager
    made = Session(vlm, [inputs], options, *clocks(vlm.device), run)
    with steady(options.threads) as threads:
        yield from measure.side_by_side(made, asked, threads).items()
    if isinstance(run, cuda_graph.Graphs) and run.differences:
        print("    " + ", ".join(f"{what} differs from eager by {by:.1e}" for what, by in run.differences.items()))


def publish(
    vlm: VLM, inputs: eager.Inputs, mode: str, options: Measurement, store: Store, provenance: Provenance,
    methods: Sequence[Pruner],
) -> int:  # fmt: skip
    """Time one session and put it into the store; returns how many cells failed."""
    failed = 0
    for cell, found in session(vlm, inputs, mode, options, store.done(), methods):
        store.publish(found.tables, cell=cell, provenance=provenance)
        failed += complain(cell, found.outcome)
    return failed


def picture(name: str, tiny: bool) -> tuple[int, int]:
    """Width and height of a picture, px."""
    return SUBJECTS[name].small if tiny else SUBJECTS[name].picture


def free() -> None:
    """Give the device back what nothing refers to any more."""
    gc.collect()
    torch.cuda.empty_cache()


def measure_all(given: argparse.Namespace, device: torch.device, store: Store, attempt: int) -> int:
    """Every model, batch and mode, published session by session; returns how many cells failed."""
    provenance, failed = collect(NAME, attempt, SEED), 0
    for name in given.model or SUBJECTS:
        vlm = build(name, given.tiny, device)
        for batch in given.batch or (1, 8):
            inputs = requests(vlm, picture(name, given.tiny), batch)
            for mode in given.mode or modes(device):
                print(f"{name}, batch {batch}, {mode}", flush=True)
                options = Measurement(
                    rounds=given.rounds, warmup=given.warmup, slow_rounds=max(2, given.rounds // 3), spans=SPANS, inputs=1,
                    threads=1 if given.tiny else None,
                )  # fmt: skip
                failed += publish(vlm, inputs, mode, options, store, provenance, methods_of(vlm, inputs))
            del inputs
        del vlm
        free()
    return failed


def modes(device: torch.device) -> tuple[str, ...]:
    """Modes a device can run."""
    return ("eager", "graph") if device.type == "cuda" else ("eager",)


def complain(cell: Cell, outcome: Outcome) -> bool:
    """Whether it failed, which is said."""
    if outcome.status != "ok":
        print(f"    {cell.method.label} {cell.columns().weights_sha256} {cell.columns().budget}: {outcome.reason}", file=sys.stderr)
    return outcome.status != "ok"


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line; by default all models, batches 1 and 8, and every mode the device can run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the records (store/), latency.csv and latency.md")
    parser.add_argument("--tiny", action="store_true", help="the families' tiny instances, in float32")
    parser.add_argument("--device", help="cuda, or cpu with --tiny [default: cuda; cpu with --tiny]")
    parser.add_argument("--model", action="append", choices=SUBJECTS, help="repeat for several [default: all]")
    parser.add_argument("--batch", action="append", type=int, help="repeat for several [default: 1 and 8]")
    parser.add_argument("--mode", action="append", choices=("eager", "graph"), help="repeat for several [default: both on cuda]")
    parser.add_argument("--rounds", type=int, help="repetitions kept [default: 30; 3 with --tiny]")
    parser.add_argument("--warmup", type=int, help="repetitions discarded [default: 10; 1 with --tiny]")
    found = parser.parse_args(given)
    found.rounds = (3 if found.tiny else 30) if found.rounds is None else found.rounds
    found.warmup = (1 if found.tiny else 10) if found.warmup is None else found.warmup
    return found


def device_of(given: argparse.Namespace) -> torch.device:
    """Where to run.

    Raises:
        ValueError: no CUDA device for the full shapes or for mode graph, or a transformers that is too old.
    """
    device = torch.device(given.device or ("cpu" if given.tiny else "cuda"))
    if not torch.cuda.is_available() if device.type == "cuda" else not given.tiny:
        raise ValueError(f"{NAME} needs a CUDA device for models of 7B, and here is none: --tiny tries the same code on the CPU")
    if device.type != "cuda" and "graph" in (given.mode or ()):
        raise ValueError(f"mode graph needs a CUDA device, this is {device.type}: leave --mode out, or ask for eager")
    described("tiny(llava)")  # refuses a transformers that is too old
    return device


def main(given: Sequence[str] | None = None) -> int:
    """0 when every cell was measured, 1 where some failed, 2 for a user's mistake."""
    asked = arguments(given)
    try:
        device = device_of(asked)
        store = Store(asked.out / "store")
        with lock(store.blobs, NAME) as attempt:
            failed = measure_all(asked, device, store, attempt)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    command = f"python jobs/{NAME}.py{' --tiny' * asked.tiny} --out {asked.out.name}"
    models = outlines(asked.tiny)
    shapes = {name: vlm.shape for name, vlm in models.items()}
    made = latency.write(store, asked.out, TITLE, command, shapes, notes(models, asked.tiny))
    print(made.read_text())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
