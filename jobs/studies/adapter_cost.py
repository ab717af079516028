"""What our path costs beside a family's own: every family at full budget, and pruned against natively short rows.

    python jobs/studies/adapter_cost.py --out reports/adapter_cost

Random models of a middling decoder (384 wide, 6 layers), eight prompts about eight pictures, one thread, four arms in shuffled
turns: `own` is the family's own forward over its own encoder output, positions left to it; `full` is our path with nothing
removed; `pruned` keeps a quarter by an untrained DiffPrune scorer, its overhead charged; `native` are rows always that short.
`path ms` and `with scorer ms` are what our code takes by its own marks, in the arms `full` and `pruned`.
"""

from __future__ import annotations

import argparse
import random
from copy import copy
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from diffprune.benchmarks.world import World
from diffprune.core import registry
from diffprune.core.budget import Budget, Share
from diffprune.core.pruner import Pruner
from diffprune.core.vlm import VLM
from diffprune.statistics import Interval, median_ratio
from diffprune.statistics.speedup import NATIVE_LIMIT
from diffprune.store.provenance import collect
from diffprune.timing import eager
from diffprune.timing.clock import Clock, Marks, clocks
from diffprune.vlm.tiny import sized

WIDTH, LAYERS, BATCH, KEPT = 384, 6, 8, Share(1 / 4)
ADAPTER_LIMIT = 1.02  # our path at full budget over the family's own


def own_inputs(vlm: VLM, inputs: eager.Inputs) -> dict[str, Any]:
    """What the family's own forward takes: its encoder output, ids, mask and token types; no positions, nothing of ours."""
    given = {name: inputs.pixels[name] for name in vlm.encoder_inputs if name in inputs.pixels}
    encoded = vlm.model.model.get_image_features(**given, return_dict=True)
    rows = {"input_ids": inputs.prompts.input_ids, "attention_mask": inputs.prompts.attention_mask}
    return {**rows, **vlm.token_inputs(inputs.prompts), **image_rows(vlm, inputs), "mm_encoder_outputs": {"image": encoded}}


def image_rows(vlm: VLM, inputs: eager.Inputs) -> dict[str, Any]:
    """Grids of pictures, from which a family with M-RoPE makes its own positions."""
    return {name: value for name, value in inputs.pixels.items() if name == "image_grid_thw" and name in vlm.encoder_inputs}


def once(
    vlm: VLM, inputs: eager.Inputs, arm: str, method: tuple[Pruner, Budget], own: dict[str, Any], clock: Clock
) -> tuple[float, float]:
    """ms of one turn of an arm: (overhead, prefill)."""
    if arm == "own":
        fresh = own | {"mm_encoder_outputs": {"image": copy(own["mm_encoder_outputs"]["image"])}}
        marks = Marks(clock)
        clock.wait()
        with marks.span("prefill"):
            vlm.model(**fresh, use_cache=True, logits_to_keep=1)
        return 0.0, marks.totals()["prefill"]
    if arm == "native":
        ready = eager.shrink(vlm, inputs, *method, clock)[0]  # untimed: rows of the very length, also where newlines differ
        return 0.0, eager.prefill(vlm, ready, clock).ms
    chosen = method if arm == "pruned" else (registry.load("pruners", "unpruned"), Share(1))
    ready, spans = eager.shrink(vlm, inputs, chosen[0], chosen[1], clock)
    return spans["overhead"], eager.prefill(vlm, ready, clock).ms


@torch.inference_mode()
def measure(family: str, rounds: int, warmup: int) -> dict[str, Any]:
    """One row of the table: tokens, medians and both ratios with their intervals."""
    with sized(WIDTH, LAYERS):
        vlm: Any = registry.find("models", family).tiny()  # type: ignore[attr-defined]
    world = World("gqa")
    samples = world.samples("test", BATCH)[:BATCH]
    inputs = eager.prepare(vlm, [world.image(s) for s in samples], [s.question for s in samples], frozenset())
    pruner = registry.load("pruners", "diffprune")
    torch.manual_seed(0)
    pruner.build(inputs.tokens).eval()
    own, clock = own_inputs(vlm, inputs), clocks(vlm.device)[0]
    arms, order = ["own", "full", "pruned", "native"], random.Random(0)
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    spent: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(warmup + rounds):
        for arm in order.sample(arms, len(arms)):
            overhead, prefill = once(vlm, inputs, arm, (pruner, KEPT), own, clock)
            if turn >= warmup:
                found[arm].append(overhead + prefill)
                spent[arm].append(overhead)
    adapter, native = median_ratio(found["full"], found["own"]), median_ratio(found["pruned"], found["native"])
    medians = {f"{arm}_ms": float(pd.Series(times).median()) for arm, times in found.items()}
    medians |= {f"{arm}_overhead_ms": float(pd.Series(spent[arm]).median()) for arm in ("full", "pruned")}
    visual = inputs.tokens.counts.float().mean().item()
    return {"family": family, "visual_tokens": visual, "sequence": inputs.prompts.input_ids.shape[1], "rounds": rounds, **medians,
            **bounds("adapter_ratio", adapter), **bounds("native_ratio", native)}  # fmt: skip


def bounds(name: str, interval: Interval) -> dict[str, float]:
    """An interval as three columns."""
    return {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}


def page(table: pd.DataFrame, origin: str) -> str:
    """The table as Markdown, verdicts in words."""

    def ratio(row: Any, name: str, limit: float) -> str:
        low, high = row[f"{name}_low"], row[f"{name}_high"]
        verdict = "" if row[name] <= limit else " (above)"
        return f"{row[name]:.3f} [{low:.3f}, {high:.3f}]{verdict}"

    lines = [
        "# What the path costs, family by family", "", (__doc__ or "").split("\n\n", 2)[2].strip(), "",
        f"Targets: full <= {ADAPTER_LIMIT} of the family's own, pruned <= {NATIVE_LIMIT} of native. {origin}", "",
        "| family | visual tokens | rows | own ms | path ms | full / own | with scorer ms | pruned / native |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for _, row in table.iterrows():
        adapter, native = ratio(row, "adapter_ratio", ADAPTER_LIMIT), ratio(row, "native_ratio", NATIVE_LIMIT)
        head = f"| {row.family} | {row.visual_tokens:.0f} | {row.sequence} | {row.own_ms:.1f} |"
        lines.append(f"{head} {row.full_overhead_ms:.2f} | {adapter} | {row.pruned_overhead_ms:.2f} | {native} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every family, write table.csv and README.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--family", action="append", choices=registry.names("models"), help="all of them, unless given")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for family in given.family or registry.names("models"):
        rows.append(measure(family, given.rounds, given.warmup))
        last = rows[-1]
        print(f"{family}: full / own {last['adapter_ratio']:.3f}, pruned / native {last['native_ratio']:.3f}", flush=True)
    table, made = pd.DataFrame(rows), collect("adapter_cost", 1, 0)
    given.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(given.out / "table.csv", index=False, float_format="%.4f")
    origin = f"Commit {made.commit[:12]}{' (changed)' if made.dirty else ''}, {made.started}."
    (given.out / "README.md").write_text(page(table, origin), encoding="utf-8")


if __name__ == "__main__":
    main()
