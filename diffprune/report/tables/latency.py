"""Latency records as a table: medians, speedups, and what the device could do at best. A function of store and shapes alone.

One row per model, batch, mode, method and budget. `of_roofline` is the measured prefill speedup over the one the roofline allows
for the same tokens; the padding of a bucket is not among them, so it counts against the measurement. `flop_ratio` is what
arithmetic alone would save: a speedup above it is flagged, as then the unpruned arm was slow for a reason of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from diffprune.core.vlm import Shape
from diffprune.statistics import Interval, speedup
from diffprune.store import Store
from diffprune.timing import roofline
from diffprune.timing.flops import prefill_work

PREFILL_TARGET = 0.90  # of the roofline's speedup, in mode graph
OVERHEAD_TARGET = {"eager": 0.69, "graph": 0.10}  # ms at batch 1, scorer, selection and gather; eager: arXiv 2605.28051
JUDGED = "diffprune"
SHOWN = {  # column -> format, of the Markdown table
    "model": "{}", "batch": "{}", "mode": "{}", "method": "{}", "kept": "{:.0f}", "sequence": "{:.0f}", "full_prefill_ms": "{:.2f}",
    "prefill_ms": "{:.2f}", "overhead_ms": "{:.3f}", "full_ttft_ms": "{:.1f}", "ttft_ms": "{:.1f}", "prefill_speedup": "{:.2f}",
    "net_speedup": "{:.2f}", "roofline_speedup": "{:.2f}", "of_roofline": "{:.0%}", "flop_ratio": "{:.2f}", "kv_mib": "{:.1f}",
    "full_tflops": "{:.0f}", "tflops": "{:.0f}", "targets": "{}", "flags": "{}",
}  # fmt: skip


def table(store: Store, shapes: Mapping[str, Shape]) -> pd.DataFrame:
    """The rows, sorted; empty where nothing was measured. shapes: by model as the cells name it; no roofline without one."""
    times, costs = store.read("timings"), store.read("costs")
    found = [
        _row(rows, costs[costs["cell"] == key].set_index("arm"), shapes.get(str(rows["model"].iloc[0])))
        for key, rows in times.groupby("cell", observed=True, sort=False)
    ]
    order = ["model", "batch", "mode", "method", "kept"]
    made = pd.DataFrame(found)
    return made.sort_values(order, ascending=[True, True, True, True, False], ignore_index=True) if found else made


def _row(rows: pd.DataFrame, costs: pd.DataFrame, shape: Shape | None) -> dict[str, Any]:
    """One cell."""
    first, full, pruned = rows.iloc[0], costs.loc["full"], costs.loc["pruned"]
    rounds = speedup.rounds(rows)
    prefill, net = speedup.prefill_speedup(rounds), speedup.prefill_speedup_net(rounds)
    ms = {(arm, span): speedup.times(rounds, arm, span).median() for arm in ("full", "pruned") for span in ("prefill", "ttft")}
    ratio = full["prefill_flops"] / pruned["prefill_flops"]
    made = {
        "model": first["model"], "batch": int(first["batch"]), "mode": first["mode"], "dtype": first["dtype"],
        "method": _method(first), "budget": first["budget"], "kept": pruned["visual_kept"],
        "text_tokens": pruned["text_tokens"], "sequence": rows.loc[rows["arm"] == "pruned", "sequence"].iloc[0],
        "full_prefill_ms": ms["full", "prefill"], "prefill_ms": ms["pruned", "prefill"],
        "overhead_ms": speedup.times(rounds, "pruned", "overhead").median(),
        "full_ttft_ms": ms["full", "ttft"], "ttft_ms": ms["pruned", "ttft"],
        **_interval("prefill_speedup", prefill), **_interval("net_speedup", net),
        "native_ratio": speedup.native_ratio(rounds).estimate, "ttft_speedup": speedup.ttft_speedup(rounds).estimate,
        "flop_ratio": ratio, "kv_mib": pruned["kv_bytes"] / 2**20, "kv_held_mib": pruned["kv_measured_bytes"] / 2**20,
        "peak_mib": pruned["peak_bytes"] / 2**20,
        "full_tflops": full["prefill_flops"] * first["batch"] / ms["full", "prefill"] / 1e9,
        "tflops": pruned["prefill_flops"] * first["batch"] / ms["pruned", "prefill"] / 1e9,
        "device": _device(first["hardware"]),
    }  # fmt: skip
    made |= _bound(made, full, pruned, shape)
    flags = {word for text in rows["flags"].astype(str).unique() for word in text.split()} - {""}
    flags |= {"above_flop_ratio"} if prefill.low > ratio else set()
    return made | {"targets": " ".join(_verdicts(made)), "flags": " ".join(sorted(flags)), "commit": first["commit"]}


def _interval(name: str, found: Interval) -> dict[str, float]:
    return {name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high}


def _method(first: pd.Series) -> str:
    """The method, and of an untrained one the arithmetic of its scorer."""
    kind = str(first["weights_sha256"]).removeprefix("random ")
    return f"{first['pruner']} ({kind})" if kind else str(first["pruner"])


def _device(hardware: str) -> str:
    """The GPU's name, or the processor's where there is none."""
    found = json.loads(str(hardware))
    return str(found["gpus"][0] if found.get("gpus") else found.get("cpu", ""))


def _bound(row: Mapping[str, Any], full: pd.Series, pruned: pd.Series, shape: Shape | None) -> dict[str, float]:
    """Least times of both arms on the device, GB/s they moved, and the share of the roofline's speedup; nan where unknown."""
    device = roofline.known(row["device"]) if row["dtype"] == "bfloat16" else None
    if device is None or shape is None:
        return dict.fromkeys(("full_roofline_ms", "roofline_ms", "roofline_speedup", "of_roofline", "full_gbs", "gbs"), math.nan)
    least, moved = [], []
    for arm in (full, pruned):
        parts = prefill_work(shape, (arm["visual_kept"],) * shape.layers, arm["text_tokens"], row["batch"], 2)
        least.append(roofline.milliseconds(device, parts))
        moved.append(sum(part.bytes for part in parts))
    best = least[0] / least[1]
    return {
        "full_roofline_ms": least[0], "roofline_ms": least[1], "roofline_speedup": best,
        "of_roofline": row["prefill_speedup"] / best,
        "full_gbs": moved[0] / row["full_prefill_ms"] / 1e6, "gbs": moved[1] / row["prefill_ms"] / 1e6,
    }  # fmt: skip


def _verdicts(row: Mapping[str, Any]) -> Iterator[str]:
    """Whether the targets are met, of the rows they are about and where the device is known."""
    if math.isnan(row["of_roofline"]) or not row["method"].startswith(JUDGED):
        return
    if row["mode"] == "graph":
        yield f"prefill {'met' if row['of_roofline'] >= PREFILL_TARGET else 'missed'}"
    if row["batch"] == 1:
        yield f"overhead {'met' if row['overhead_ms'] <= OVERHEAD_TARGET[row['mode']] else 'missed'}"


def write(store: Store, folder: Path, title: str, command: str, shapes: Mapping[str, Shape], notes: str = "") -> Path:
    """`latency.csv` with every column and `latency.md` with those one reads; returns the latter's path."""
    found = table(store, shapes)
    folder.mkdir(parents=True, exist_ok=True)
    found.to_csv(folder / "latency.csv", index=False, float_format="%.6g")
    path = folder / "latency.md"
    path.write_text("\n".join(_page(found, store, title, command, notes)) + "\n", encoding="utf-8")
    return path


def _page(found: pd.DataFrame, store: Store, title: str, command: str, notes: str) -> Iterator[str]:
    """Lines of the page: what was run on what, the table, failures."""
    yield from (f"# {title}", "", f"`{command}`", "")
    if not found.empty:
        yield from _provenance(found, store)
        yield from ("", *([notes, ""] if notes else []))
        yield "| " + " | ".join(name.replace("_", " ") for name in SHOWN) + " |"
        yield "|" + "---|" * len(SHOWN)
        for _, row in found.iterrows():
            yield "| " + " | ".join(_cell(row[name], form) for name, form in SHOWN.items()) + " |"
    outcomes = store.read("outcomes")
    for _, row in outcomes[outcomes["status"] != "ok"].iterrows():
        yield f"\nFailed: {row['model']}, batch {row['batch']}, {row['mode']}, {row['pruner']} {row['budget']}: {row['reason']}"


def _provenance(found: pd.DataFrame, store: Store) -> Iterator[str]:
    origins = store.origins("timings")
    names = sorted(set(found["device"]))
    for name in names:
        device = roofline.known(name)
        rates = f"{device.flops / 1e12:.0f} TFLOP/s ({device.basis}), {device.bytes / 1e12:.2f} TB/s" if device else ""
        yield f"* Device: {name}. Roofline: {rates or 'none, its rates are not known; no target is judged'}."
    for commit, dirty in sorted({(str(o["commit"]), bool(o["dirty"])) for _, o in origins.iterrows()}):
        yield f"* Commit: {commit or 'none'}{' with uncommitted changes' * dirty}."
    for text in sorted({str(v) for v in origins["versions"]}):
        yield "* Versions: " + ", ".join(f"{k} {v}" for k, v in json.loads(text).items()) + "."


def _cell(value: Any, form: str) -> str:
    return "–" if isinstance(value, float) and math.isnan(value) else form.format(value)
