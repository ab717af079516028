"""What a cut inside the decoder costs beside the layers it shortens: measured against the sum of layers at their lengths.

    python jobs/studies/cut_cost.py --out reports/cut_cost

LLaVAs with random weights and two decoders: one of 8 layers, 384 wide, smaller than any in use, with pictures of 144 visual tokens,
one row, and four rows whose questions differ in length, so that there is padding and a mask to shorten; and one of the size
of LLaVA-OneVision-0.5B's (24 layers, 896 wide, 14 heads that share 2 keys), with 576 visual tokens. One thread; milliseconds are
the processor time of that thread, which other work on the machine moves less than the clock on the wall. Every round runs all arms
in a new order:

* rows that were always as short, at every length that a plan has. Marks around each layer make the curve: what a layer takes of
  rows of that length, and what the forward pass takes around the layers;
* `cut`: the plan carried out in the real path by tokens that are told beforehand. It holds all that cutting takes: hooks, which
  tokens go, hidden states, rotary embeddings and mask of what is left, states put back in their places at the end;
* `method`: the same plan by the method itself. What it takes beyond `cut` is evidence (attention rows, a look ahead at the next
  layer) and choosing, which every table charges as overhead.

`predicted` is what the plan says from the curve of the same round: each layer at the length it has there, and the rest at full
length. `by whole passes` predicts from whole prefills alone, each length by the share of layers that have it. Ratios are of medians
over rounds, with 95 % intervals. What a cut takes more hardly depends on the model's width: hooks of the layers behind it, and some
tens of small operations for each cut; and the first layer at a new length finds its memory cold.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Budget, Share
from diffprune.core.pruner import Pruner
from diffprune.core.site import Cut, Plan, tokens_per_layer
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.core.vlm import VLM, Shape
from diffprune.statistics import Interval, median_ratio
from diffprune.store.provenance import collect
from diffprune.timing import eager
from diffprune.timing.machine import keep_memory
from diffprune.vlm.activation_checkpointing import decoder_layers
from diffprune.vlm.random_weights import randomised

LIMIT = 1.03  # a cut over what its plan predicts
METHODS = (
    ("fastv(after=2)", Share(1 / 2)),
    ("pyramiddrop", Share(15 / 32)),
)  # a half is left at each cut of the second, as released
QUESTIONS = ("What is written on the sign?", "Which one?", "How many people are there beside the car?", "Is it raining?")


class Size(NamedTuple):
    """Of a decoder, and what it is timed with.

    width, inner: of its states and of its feed-forward parts; heads, keys: of attention, and how many keys and values they share.
    side: visual tokens along one side of a picture; batches: rows at once; rounds: that count, after those that warm up.
    """

    width: int
    layers: int
    inner: int
    heads: int
    keys: int
    side: int
    batches: tuple[int, ...]
    rounds: int


SIZES = (Size(384, 8, 1056, 12, 12, 12, (1, 4), 40), Size(896, 24, 4864, 14, 2, 24, (1,), 10))


class Told(Pruner):
    """Keeps the tokens that come first in an order [I N] told beforehand, at the cuts of another method's plan."""

    label = "told"

    def __init__(self, plan: Plan, order: Tensor) -> None:
        self.plan, rank, left = plan, order.argsort(dim=1), order.shape[1]
        self.kept: dict[Cut, Selection] = {}
        for step in plan:
            left = step.budget.count(left)
            self.kept[step] = Selection(rank < left)

    def cuts(self, budget: Budget, shape: Shape) -> Plan:
        return self.plan

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        return self.kept[cut]


def model(size: Size) -> VLM:
    """A LLaVA of random weights with a decoder of this size; its encoder is as small as it can be."""
    side = size.side
    text = {
        "model_type": "llama", "num_hidden_layers": size.layers, "hidden_size": size.width, "intermediate_size": size.inner,
        "num_attention_heads": size.heads, "num_key_value_heads": size.keys, "vocab_size": 320,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
        "num_attention_heads": 2, "image_size": 8 * side, "patch_size": 8, "projection_dim": 64,
    }  # fmt: skip
    square = {"size": {"shortest_edge": 8 * side}, "crop_size": {"height": 8 * side, "width": 8 * side}}
    config = {"model_type": "llava", "text_config": text, "vision_config": vision}
    return randomised(config, square, "random llava", torch.device("cpu"), torch.float32)


def inputs(vlm: VLM, batch: int, side: int) -> eager.Inputs:
    """A batch of pictures of random pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 8 * side, 8 * side, 3), dtype=np.uint8)
    return eager.prepare(vlm, [Image.fromarray(one) for one in pixels], QUESTIONS[:batch], frozenset())


def spent(vlm: VLM, packed: pruning.Packed) -> float:
    """ms of this thread for a prefill through the path."""
    start = time.thread_time()
    pruning.forward(vlm, packed, use_cache=True, logits_to_keep=1)
    return 1000 * (time.thread_time() - start)


def by_layer(vlm: VLM, packed: pruning.Packed) -> tuple[float, list[float]]:
    """ms of a prefill, and of each of its layers."""
    edges: list[float] = []
    with ExitStack() as hooks:
        for layer in decoder_layers(vlm.model):
            hooks.callback(layer.register_forward_pre_hook(lambda *_: edges.append(time.thread_time())).remove)
            hooks.callback(layer.register_forward_hook(lambda *_: edges.append(time.thread_time())).remove)
        whole = spent(vlm, packed)
    return whole, [1000 * (end - start) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def curve(whole: dict[int, float], layers: dict[int, list[float]], lengths: Sequence[int]) -> tuple[float, float]:
    """ms that a plan predicts from one round: (by its layers, by whole passes). lengths: visual tokens that each layer sees."""
    rest = whole[lengths[0]] - sum(layers[lengths[0]])
    return rest + sum(layers[num][i] for i, num in enumerate(lengths)), float(np.mean([whole[num] for num in lengths]))


@torch.inference_mode()
def measure(vlm: VLM, batch: int, size: Size, warmup: int) -> list[dict[str, Any]]:
    """One row of the table per method."""
    given, num = inputs(vlm, batch, size.side), size.side**2
    chance = torch.Generator().manual_seed(1)
    order = torch.rand(batch, num, generator=chance).argsort(dim=1)
    methods: list[Pruner] = [registry.load("pruners", text) for text, _ in METHODS]
    plans = [method.cuts(budget, vlm.shape) for method, (_, budget) in zip(methods, METHODS, strict=True)]
    lengths = [tokens_per_layer(plan, num, vlm.shape.layers) for plan in plans]
    native = {count: eager.native(vlm, given, [count] * batch).packed for count in {n for seen in lengths for n in seen}}
    arms: dict[tuple[str, int], pruning.Packed] = {("native", count): packed for count, packed in native.items()}
    for i, (method, (_, budget)) in enumerate(zip(methods, METHODS, strict=True)):
        for arm, pruner in (("cut", Told(plans[i], order)), ("method", method)):
            arms[arm, i] = pruning.shrink(vlm, given.prompts, given.tokens, pruner, budget)
    found: dict[tuple[str, int], list[float]] = {(arm, i): [] for i in range(len(METHODS)) for arm in ("layers", "passes")}
    found |= {key: [] for key in arms}
    turns = random.Random(0)
    for turn in range(warmup + size.rounds):
        took: dict[tuple[str, int], float] = {}
        layers: dict[int, list[float]] = {}
        for key in turns.sample(list(arms), len(arms)):
            if key[0] == "native":
                took[key], layers[key[1]] = by_layer(vlm, arms[key])
            else:
                took[key] = spent(vlm, arms[key])
        if turn < warmup:
            continue
        whole = {count: took["native", count] for count in native}
        for i, seen in enumerate(lengths):
            took["layers", i], took["passes", i] = curve(whole, layers, seen)
        for key, value in took.items():
            found[key].append(value)
    about = {"decoder": f"{size.layers} x {size.width}", "rows": batch, "sequence": arms["cut", 0].prompts.input_ids.shape[1]}
    return [about | row(found, i, plans[i], lengths[i]) for i in range(len(METHODS))]


def row(found: dict[tuple[str, int], list[float]], i: int, plan: Plan, seen: Sequence[int]) -> dict[str, Any]:
    """What was found of a method's plan."""
    cut, method, predicted = found["cut", i], found["method", i], found["layers", i]
    return {
        "method": METHODS[i][0], "after": " ".join(str(step.site.layer) for step in plan),
        "tokens": " ".join(map(str, dict.fromkeys(seen))), "full_ms": median(found["native", seen[0]]),
        "predicted_ms": median(predicted), "cut_ms": median(cut), "method_ms": median(method),
        **bounds("ratio", median_ratio(cut, predicted)), **bounds("by_passes", median_ratio(cut, found["passes", i])),
        **bounds("with_evidence", median_ratio(method, predicted)), "rounds": len(cut),
    }  # fmt: skip


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


def bounds(name: str, interval: Interval) -> dict[str, float]:
    """An interval as three columns."""
    return {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}


def page(table: pd.DataFrame, origin: str) -> str:
    """The table as Markdown."""

    def ratio(one: Any, name: str) -> str:
        return f"{one[name]:.3f} [{one[f'{name}_low']:.3f}, {one[f'{name}_high']:.3f}]"

    lines = [
        "# What a cut inside the decoder costs", "", (__doc__ or "").split("\n\n", 2)[2].strip(), "",
        f"Target: cut / predicted at most {LIMIT:g}. {origin}", "",
        "| decoder | method | rows x tokens | after layer | visual tokens | full ms | predicted ms | cut ms | more, ms | "
        "cut / predicted | "
        "by whole passes | method ms | evidence and choice, % of predicted |", "|" + "---|" * 13,
    ]  # fmt: skip
    for _, one in table.iterrows():
        mark = "" if one.ratio <= LIMIT else " (above)"
        added = 100 * (one.method_ms - one.cut_ms) / one.predicted_ms
        lines.append(
            f"| {one.decoder} | {one.method} | {one.rows} x {one.sequence} | {one.after.replace(' ', ', ')} | "
            f"{one.tokens.replace(' ', ' → ')} | "
            f"{one.full_ms:.1f} | {one.predicted_ms:.1f} | {one.cut_ms:.1f} | {one.cut_ms - one.predicted_ms:.2f} | "
            f"{ratio(one, 'ratio')}{mark} | {ratio(one, 'by_passes')} | {one.method_ms:.1f} | {added:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write table.csv and README.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, help="of every size")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=6, metavar=Size._fields[:6], help="of a decoder in place of the two")
    parser.add_argument("--note", default="", help="a sentence on the machine, for the page")
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    made, rows = collect("cut_cost", 1, 0), []
    asked = SIZES[0]._replace(**dict(zip(Size._fields, given.size or (), strict=False)))
    for size in (asked,) if given.size else SIZES:
        vlm, size = model(size), size._replace(rounds=given.rounds or size.rounds)
        rows += [one for batch in size.batches for one in measure(vlm, batch, size, given.warmup)]
    table = pd.DataFrame(rows)
    given.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(given.out / "table.csv", index=False, float_format="%.4f")
    origin = f"Commit {made.commit[:12]}{' (changed)' if made.dirty else ''}, {made.started}. {given.note}".strip()
    (given.out / "README.md").write_text(page(table, origin), encoding="utf-8")
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
