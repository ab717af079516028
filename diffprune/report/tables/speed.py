"""Tables of time, arithmetic and memory, of the tuner's answers and of training cost."""

from __future__ import annotations

import math
from typing import Any

from diffprune.core.records import told_verdict
from diffprune.report.analysis import tuning
from diffprune.report.analysis.comparison import FULL, Comparison
from diffprune.report.analysis.records import Records
from diffprune.report.analysis.speed import SLOW, Speed, Spread, common_flags, own_flags, said
from diffprune.report.render.table import Entry, Number, Table
from diffprune.report.tables.accuracy import judged_entry, net_speedup, shown, words
from diffprune.statistics import Verdict

NO_FUSED = (
    "Where a mask is multiplied into the softmax of every decoder layer, as keep/drop's and LearnPruner's is, there is no fused "
    "attention kernel: that part of the step cost belongs to the implementation, not to the method."
)


def _ms(spread: Spread | None) -> Number | None:
    return _time(spread.median, 2) if spread else None


def _time(ms: float, digits: int) -> Number | None:
    """A time; none where it is below zero, as a decode time, which is the difference of two timings, can come out."""
    return Number(ms, digits=digits) if ms >= 0 else None


def _ordered(chapter: Comparison, found: list[Speed]) -> tuple[list[Speed], frozenset[int]]:
    """By batch, mode and tokens, then method; and where a new group of tokens begins."""
    ordered = sorted(found, key=lambda s: (s.batch, s.mode, -s.kept, chapter.order(s.label)))
    keys = [(s.batch, s.mode, s.budget) for s in ordered]
    return ordered, frozenset(i for i in range(1, len(keys)) if keys[i] != keys[i - 1])


def _keys(ordered: list[Speed]) -> tuple[str, ...]:
    return tuple(f"{s.label} | {s.budget} | {s.batch} | {s.mode}" for s in ordered)


Rows = list[tuple[Entry, ...]]


def _needed(columns: tuple[str, ...], rows: Rows, found: list[Speed]) -> tuple[tuple[str, ...], tuple[tuple[Entry, ...], ...]]:
    """Columns and rows, without those that tell nothing: modes where the page has one, flags where no row has any of its own."""
    out = {"mode"} if len({s.mode for s in found}) < 2 else set()
    out |= set() if any(row[-1] for row in rows) else {"flags"}
    kept = [i for i, name in enumerate(columns) if name not in out]
    return tuple(columns[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in rows)


def latency(chapter: Comparison, found: list[Speed]) -> Table:
    """Encoder, overhead and prefill of every arm: medians in ms, ratios with intervals, flags beside."""
    ordered, breaks = _ordered(chapter, found)
    common = common_flags(found)
    rows: Rows = []
    for s in ordered:
        span = s.spans.get
        rows.append(
            (
                s.label,
                Number(s.batch, digits=0),
                s.mode,
                Number(s.kept, digits=0),
                _ms(span(("pruned", "encoder")) or span(("full", "encoder"))),
                _ms(span(("pruned", "overhead"))),
                _ms(span(("full", "prefill"))),
                _ms(span(("pruned", "prefill"))),
                _ms(span(("native", "prefill"))),
                shown(s.net, 2, "×"),
                shown(s.encoded, 2, "×"),
                shown(s.native, 2),
                Number(min((x.repeats for (_, name), x in s.spans.items() if name not in SLOW), default=0), digits=0),
                own_flags(s.flags, common),
            )
        )
    columns = (
        "Method",
        "batch",
        "mode",
        "kept",
        "encoder",
        "overhead",
        "prefill: full",
        "pruned",
        "native",
        "net speedup",
        "with encoder",
        "to native",
        "repeats",
        "flags",
    )
    notes = (
        "Milliseconds are medians over all sessions; ratios are medians of the rounds' own, of each session by itself and then "
        "averaged (geometric mean), with a 95 % interval over sessions, or over the interleaved rounds of one. Net speedup: "
        "full / (pruned + overhead). With encoder: the same with the encoder's time in both. "
        "To native: (pruned + overhead) / native, where native is a prompt that was always this short; "
        "1 means that removing tokens costs nothing." + (f" All timings: {said(common)}." if common else ""),
    )
    title = "Encoder, overhead and prefill, ms"
    return Table("latency", title, *_needed(columns, rows, found), notes, breaks, _keys(ordered))


def answer_times(chapter: Comparison, found: list[Speed]) -> Table | None:
    """Time to the first token and per further token."""
    ordered, breaks = _ordered(chapter, [s for s in found if s.ttft or ("pruned", "decode") in s.spans])
    common = set.intersection(*(set(s.slow_flags) for s in ordered)) if ordered else set()
    rows: Rows = []
    for s in ordered:
        span = s.spans.get
        rows.append(
            (
                s.label,
                Number(s.batch, digits=0),
                s.mode,
                Number(s.kept, digits=0),
                _ms(span(("full", "ttft"))),
                _ms(span(("pruned", "ttft"))),
                shown(s.ttft, 2, "×"),
                _ms(span(("full", "decode"))),
                _ms(span(("pruned", "decode"))),
                own_flags(s.slow_flags, common),
            )
        )
    columns = (
        "Method", "batch", "mode", "kept", "TTFT: full", "pruned", "TTFT speedup", "decode: full", "decode: pruned", "flags",
    )  # fmt: skip
    notes = (
        "TTFT: from picture and question to the first answer token, encoder and overhead included. Decode: per further token, from "
        "the times of a short and a long answer; – where these could not be told apart."
        + (f" All of these: {said(common)}." if common else ""),
    )
    title = "Time to first token and decoding, ms"
    return Table("answer_times", title, *_needed(columns, rows, found), notes, breaks, _keys(ordered)) if rows else None


def spans(found: list[Speed]) -> Table:
    """Median, p10, p90 and repeats of every timed span."""
    rows: Rows = [
        (
            s.label,
            s.budget,
            str(s.batch),
            s.mode,
            arm,
            span,
            *(_time(v, 3) for v in (x.median, x.p10, x.p90)),
            Number(x.repeats, digits=0),
        )
        for s in found
        for (arm, span), x in s.spans.items()
    ]
    columns = ("Method", "budget", "batch", "mode", "arm", "span", "median ms", "p10 ms", "p90 ms", "repeats")
    keys = tuple(" | ".join(map(str, row[:6])) for row in rows)
    return Table("latency_spans", "Every timed span", columns, tuple(rows), keys=keys)


def cost(chapter: Comparison) -> Table | None:
    """FLOPs and key-value bytes per image, by arithmetic and as counted. Methods whose figures are all equal share a row."""
    rows = chapter.records.of("costs", chapter.measured)
    if rows.empty:
        return None
    rows = rows.join(chapter.measured[["label", "budget"]], on="cell")
    figures = ["text_tokens", "prefill_flops", "encoder_flops", "counted_flops", "kv_bytes", "kv_measured_bytes", "peak_bytes"]
    table = rows.groupby(["arm", "visual_kept", "label"], observed=True, sort=True)[figures].mean().reset_index()
    every = set(table["label"])
    most = float(table["prefill_flops"].max())
    entries: Rows = []
    keys: list[str] = []
    for (kept, arm, *_), part in sorted(
        table.round(6).groupby(["visual_kept", "arm", *figures], observed=True, dropna=False),
        key=lambda g: (-g[0][0], g[1]["label"].min()),
    ):
        labels = sorted(part["label"], key=chapter.order)
        who = FULL if arm == "full" else "all methods" if set(labels) == every and len(every) > 1 else "; ".join(labels)
        r = part.iloc[0]
        keys.append(f"{arm} | {kept:.3f} | {min(labels)}")
        entries.append(
            (
                who if arm != "native" else f"{who}, native",
                Number(kept, digits=0),
                Number(r["text_tokens"]),
                Number(r["prefill_flops"] / 1e9, digits=3),
                Number(r["counted_flops"] / 1e9, digits=3),
                Number(most / r["prefill_flops"], digits=2, unit="×"),
                Number(r["encoder_flops"] / 1e9, digits=3),
                Number(r["kv_bytes"] / 1024),
                Number(r["kv_measured_bytes"] / 1024),
                Number(r["peak_bytes"] / 2**20, digits=2),
            )
        )
    columns = (
        "Method",
        "visual tokens",
        "text tokens",
        "prefill GFLOP",
        "counted GFLOP",
        "FLOP ratio",
        "encoder GFLOP",
        "KV KiB",
        "KV measured",
        "peak MiB",
    )
    notes = (
        "Per image. FLOPs are 2 × multiply-adds, causal attention, output head on the last position; counted: by torch "
        "over one prefill, attention in full. "
        "KV: keys and values of all layers, from the plan and from the cache object, in KiB. A FLOP ratio is not a speedup.",
    )
    return Table("cost", "FLOPs and memory", columns, tuple(entries), notes, keys=tuple(keys))


def tuned(records: Records) -> Table | None:
    """The tuner's answers: target, verdict, budget, predicted and measured speedup, accuracy and what can be said of its order."""
    frame = records.told("choices", "label", "tuned_kind", "target_speedup", "replicate", "started", *tuning.WHO)
    if frame.empty:
        return None
    every = frame.sort_values("started", kind="stable")
    frame = every.drop_duplicates(
        ["model", "dtype", "label", "replicate", "tuned_kind", "target_speedup"], keep="last"
    ).sort_index()
    order, places = list(records.methods), tuning.against_best(records, frame)
    same = frame.groupby(["model", "dtype", "target_speedup"], observed=True)["accuracy"]
    tied = same.transform(lambda one: (one == one.max()).sum() > 1)
    frame = frame.assign(order=[order.index(x) for x in frame["label"]], tied=tied)
    rows: Rows = []
    breaks, target = set(), None
    frame = frame.sort_values(["target_speedup", "order", "tuned_kind"], kind="stable")
    for index, r in zip(frame.index, frame.to_dict("records"), strict=True):
        if target not in (None, r["target_speedup"]):
            breaks.add(len(rows))
        target = r["target_speedup"]
        note, verdict = r["note"], told_verdict(str(r["verdict"]), r["measured_speedup"], r["target_speedup"])
        if r["verdict"] == "unreachable" and "best is" not in note:
            note = f"unreachable here, best is {r['best_speedup']:.2f}× at the floor" + (f"; {note}" if note else "")
        rows.append((
            Number(r["target_speedup"], digits=2, unit="×"), r["label"], r["tuned_kind"], verdict, r["chosen_budget"],
            Number(r["kept"]), Number(r["predicted_speedup"], digits=2, unit="×"), _measured(r),
            Number(*(100 * r[name] for name in ("accuracy", "accuracy_low", "accuracy_high"))),
            _place(places, index, bool(r["tied"])), Number(r["num_held_out"], digits=0), note,
        ))  # fmt: skip
    columns = (
        "target", "Method", "kind", "verdict", "budget", "kept", "predicted", "measured", "accuracy %", "minus the best, points",
        "held out", "note",
    )  # fmt: skip
    notes: tuple[str, ...] = (
        "Accuracy: mean credit on the calibration split, with its interval over pictures. Minus the best: paired difference to the "
        "most accurate answer to the same target, of these scorers; cannot tell: another calibration set may well reverse this "
        "order. Measured: net of overhead, on held-out samples that the tuner had not seen, in one timing session, which is what "
        "the interval is of.",
        words("all rows of this table"),
    )
    if len(every) > len(frame):
        notes += (f"{len(every) - len(frame)} older answers, found under other settings, are left out.",)
    title = "Tuned to a target prefill speedup"
    return Table("tuned", title, columns, tuple(rows), notes, frozenset(breaks), tuple(frame["cell"].astype(str)))


def _place(places: dict[object, Verdict | None], index: object, tied: bool) -> Entry:
    """Where an answer stands among those to its target, as far as its calibration answers tell. tied: several are the best."""
    best = "most accurate, as another is" if tied else "most accurate"
    return None if index not in places else judged_entry(found) if (found := places[index]) else best


def _measured(row: dict[str, Any]) -> Number | None:
    return (
        Number(row["measured_speedup"], row["measured_low"], row["measured_high"], 2, "×")
        if math.isfinite(row["measured_speedup"])
        else None
    )


def thresholds(chapter: Comparison, fast: dict[tuple[str, str], Speed]) -> Table | None:
    """Arms evaluated at a threshold: they keep a different number of tokens of every picture."""
    rows: Rows = []
    common = common_flags(list(fast.values()))
    for label, budget in chapter.thresholds:
        speed = fast.get((label, budget))
        rows.append(
            (
                label,
                budget,
                Number(chapter.kept_by(label, budget)),
                shown(chapter.accuracy(label, budget)),
                Number(chapter.relative(label, budget)),
                net_speedup(chapter, speed, common) if speed else None,
            )
        )
    columns = ("Method", "budget", "kept, mean", "accuracy %", "avg %", "net prefill speedup")
    keys = tuple(f"{label} | {budget}" for label, budget in chapter.thresholds)
    return Table("thresholds", "Thresholds on the test questions", columns, tuple(rows), keys=keys) if rows else None


def training(records: Records) -> Table | None:
    """What a training step costs of each method, and where it ended."""
    frame = records.told("steps", "label", "scorer_seed")
    if frame.empty:
        return None
    rows: Rows = []
    for label in [x for x in records.methods if (frame["label"] == x).any()]:
        part = frame[frame["label"] == label].sort_values("step", kind="stable")
        seeds = part.groupby("scorer_seed", dropna=False)
        last = part[seeds.cumcount(ascending=False) < (seeds["step"].transform("size") // 10).clip(1)]
        ms, norm = (part[name].quantile([0.1, 0.5, 0.9]) for name in ("step_ms", "grad_norm"))
        rows.append(
            (
                label,
                Number(part["scorer_seed"].nunique(), digits=0),
                Number(part["step"].nunique(), digits=0),
                Number(ms[0.5], ms[0.1], ms[0.9], 0),
                Number(last["loss"].mean(), digits=3),
                Number(norm[0.5], norm[0.1], norm[0.9], 2),
                Number(100 * part["clipped"].mean(), digits=0),
                Number(part["grad_cosine"].mean(), digits=3),
                Number(seeds["validation_soft"].last().mean(), digits=3),
                Number(seeds["validation_hard"].last().mean(), digits=3),
                Number(part["workers"].max(), digits=0),
            )
        )
    columns = (
        "Method",
        "seeds",
        "steps",
        "step ms",
        "loss",
        "gradient norm",
        "clipped %",
        "gradient cosine",
        "validation soft",
        "validation hard",
        "workers",
    )
    notes = (
        "step ms: median [p10, p90]. Loss and validation: answer NLL, nats per token; loss over the last tenth. Losses "
        "through different relaxations are not comparable between methods; accuracy after hard pruning is. Gradient norm: before "
        "clipping, median [p10, p90]; clipped: share of the steps. Gradient cosine: mean over pairs of micro-batches.",
        NO_FUSED,
    )
    return Table("training", "Training", columns, tuple(rows), notes)
