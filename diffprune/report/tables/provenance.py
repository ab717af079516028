"""Provenance tables: commits, versions, hardware, weights, failures and example answers."""

from __future__ import annotations

import json

import pandas as pd

from diffprune.io import event_log
from diffprune.report.analysis.records import Records
from diffprune.report.render.table import Entry, Number, Table


def _short(text: object, digits: int = 12) -> str:
    return str(text)[:digits] or "–"


def _facts(text: object) -> str:
    """JSON text as `key value; key value`; other text as it is."""
    try:
        found = json.loads(str(text))
    except ValueError:
        return str(text)
    if not isinstance(found, dict):
        return str(found)
    return "; ".join(
        f"{k} {', '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in found.items() if v not in (None, [], "")
    )


def facts(records: Records) -> Table:
    """Distinct values of everything a number depends on beside its cell."""
    rows: list[tuple[Entry, ...]] = []
    s, cells = records.sources, records.cells
    if len(s):
        dirty = {c: bool(s.loc[s["commit"] == c, "dirty"].any()) for c in sorted(set(s["commit"]))}
        rows += [("commit", (c or "outside a repository") + (" with uncommitted changes" if d else "")) for c, d in dirty.items()]
        rows += [
            ("run", f"{r}, attempts {', '.join(str(a) for a in sorted(set(s.loc[s['run'] == r, 'attempt'])))}")
            for r in sorted(set(s["run"]))
        ]
        rows += [
            ("restarts", f"{r}: {told}")
            for r in sorted(set(s["run"]))
            if (told := event_log.restarts(list(event_log.read(records.store.blobs, r))))
        ]
        rows.append(("job seeds", ", ".join(str(x) for x in sorted(set(s["job_seed"])))))
        rows += [("versions", _facts(v)) for v in sorted(set(s["versions"]))]
        rows += [("hardware", _facts(v)) for v in sorted(set(s["hardware"]))]
        rows.append(("made", f"{s['started'].min()} to {s['started'].max()}"))
    for model, sha in sorted(set(zip(cells["model"], cells["model_sha256"], strict=True))):
        rows.append(("model", f"{model}, weights {_short(sha)}"))
    single = cells[cells["verb"].isin(("evaluate", "measure"))]
    for benchmark, revision in sorted(set(zip(single["benchmark"], single["revision"], strict=True))):
        if benchmark:
            rows.append(("benchmark", f"{benchmark}, revision {_short(revision, 40)}"))
    return Table("provenance", "Provenance", ("what", "value"), tuple(rows))


def weights(records: Records) -> Table | None:
    """What each method had learnt: one row per scorer."""
    learnt = records.cells[(records.cells["weights_sha256"] != "") & ~records.cells["replaced"].astype(bool)]
    columns = ["label", "weights_sha256", "recipe", "scorer_seed"]
    found = learnt.drop_duplicates(columns)[columns].to_dict("records")
    place = list(records.methods)
    found.sort(key=lambda r: (place.index(r["label"]), str(r["recipe"]), str(r["scorer_seed"]), r["weights_sha256"]))
    rows = tuple((r["label"], str(r["weights_sha256"]), str(r["recipe"]), _seed(r["scorer_seed"])) for r in found)
    return Table("weights", "Scorer weights", ("Method", "sha256, first 20 digits", "recipe", "seed"), rows) if rows else None


def _seed(value: object) -> str:
    return "" if pd.isna(value) else str(int(value))  # type: ignore[call-overload]


def pictures(records: Records) -> Table | None:
    """What each method keeps of the pictures on the page, as their captions say."""
    rows: tuple[tuple[Entry, ...], ...] = tuple(
        (str(scene), label, Number(keep.sum(), digits=0), Number(keep.size, digits=0))
        for scene, kept in sorted(records.masks.items()) for label, keep in kept.items()
    )  # fmt: skip
    return Table("pictures", "Tokens kept of pictures", ("picture", "Method", "kept", "tokens"), rows) if rows else None


def failures(records: Records) -> Table | None:
    """Cells that failed, answers that failed, files set aside: nothing is dropped in silence."""
    rows: list[tuple[Entry, ...]] = [("store", "", "", problem) for problem in records.problems]
    outcomes = records.frames["outcomes"]
    failed = outcomes[outcomes["status"].astype(str) != "ok"].join(
        records.cells[["label", "budget", "benchmark"]], on="cell", how="inner"
    )
    for r in failed.sort_values("cell").head(50).to_dict("records"):
        rows.append(("cell failed", r["label"], f"{r['budget']} {r['benchmark']}".strip(), r["reason"]))
    if len(failed) > 50:
        rows.append(("cell failed", "", "", f"and {len(failed) - 50:,} more"))
    predictions = records.frames["predictions"]
    errors = predictions.loc[predictions["error"] != "", ["cell", "error"]].join(records.cells[["label"]], on="cell", how="inner")
    if len(errors):
        counts = errors.groupby(["label", "error"], observed=True).size().sort_values(ascending=False, kind="stable").head(20)
        rows += [("answers failed (error_rows)", label, f"{n:,} rows", str(error)) for (label, error), n in counts.items()]
    return Table("failures", "What failed or was set aside", ("what", "Method", "where", "reason"), tuple(rows)) if rows else None


def examples(chapter_rows: pd.DataFrame, records: Records, arms: dict[str, list[str]], where: str, limit: int = 4) -> Table | None:
    """Answers in which methods differ. arms: label -> cells, the unpruned model first, then the subject; where: the budget.

    Deterministic: first by benchmark and sample, `limit` where only the unpruned model is right and `limit` where the subject alone
    of the pruned ones is.
    """
    labels = [x for x in arms if arms[x]]
    if len(labels) < 2:
        return None
    rows = chapter_rows[chapter_rows["cell"].isin([c for x in labels for c in arms[x]])]
    rows = rows.assign(
        label=rows["cell"].astype(str).map({c: x for x in labels for c in arms[x]}),
        question_of=rows["cell"].map(records.cells["benchmark"]).astype(str) + "\t" + rows["sample"].astype(str),
    )
    wide = (
        rows.pivot_table(index="question_of", columns="label", values="credit", aggfunc="first", observed=True)
        .dropna()
        .sort_index()
    )
    if any(x not in wide.columns for x in labels):
        return None
    lost = wide.index[(wide[labels[0]] == 1) & (wide[labels[1:]] == 0).all(axis=1)][:limit]
    won = wide.index[(wide[labels[1]] == 1) & (wide[labels[2:]] == 0).all(axis=1)][:limit] if len(labels) > 2 else []
    lone = wide.index[(wide[labels[1]] == 0) & (wide[labels[2:]] == 1).all(axis=1)][:limit] if len(labels) > 2 else []
    texts = rows[rows["question_of"].isin([*lost, *won, *lone])].drop_duplicates(["question_of", "label"])
    texts = records.texts(texts).set_index(["question_of", "label"])
    found: list[tuple[Entry, ...]] = []
    for why, samples in (("all of these pruned wrong", lost), (f"only {labels[1]} right", won), (f"only {labels[1]} wrong", lone)):
        for sample in samples:
            about = texts.loc[(sample, labels[0])]
            found.append((why, about["question"], str(about["target"]), *(texts.loc[(sample, x)]["answer"] for x in labels)))
    columns, notes = ("why shown", "question", "target", *labels), (f"{where}; the first scorer seed of trained methods.",)
    return Table("examples", "Examples of answers", columns, tuple(found), notes) if found else None
