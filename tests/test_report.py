"""The report against recomputation from its own store. The records here are made up, for tests only."""

from __future__ import annotations

import csv
import hashlib
import html.parser
import json
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from diffprune.core import registry
from diffprune.core.benchmark import Graded
from diffprune.core.records import Cell, Choice, Cost, CurvePoint, Outcome, Prediction, Provenance, Step, Timing, Trial
from diffprune.embedded.world import SPLITS
from diffprune.report import report, summary
from diffprune.report.analysis import labels
from diffprune.report.analysis.comparison import Comparison, chapters
from diffprune.report.analysis.derived import Derived
from diffprune.report.analysis.records import read
from diffprune.report.render import escape, table
from diffprune.statistics import holm, sign_flip
from diffprune.store import Store

SOURCE = Provenance(
    "made-up",
    1,
    "0" * 40,
    False,
    json.dumps({"torch": "2.13.0"}),
    json.dumps({"cpu": "test", "threads": 1}),
    0,
    "2026-01-01T00:00:00+00:00",
)
TOTAL = 144
LIKES = ("gqa", "mme", "mmbench")
BUDGETS = ("Keep(32)", "Keep(16)", "Keep(7)")
LOSS = {  # chance that an answer is lost at 32, 16 and 7 tokens; only for tests
    "none": (0, 0, 0), "diffprune": (0.05, 0.2, 0.5), "gumbel_topk": (0.06, 0.22, 0.75), "gumbel_keepdrop": (0.08, 0.3, 0.55),
    "random": (0.4, 0.6, 0.75), "grid": (0.4, 0.6, 0.7), "attention": (0.15, 0.25, 0.4),
}  # fmt: skip
HOSTILE = (
    "<script>alert(1)</script>",
    "</td></table><img src=x onerror=alert(1)>",
    '=HYPERLINK("http://example.org","x")',
    "\x1b[31mred\x1b[0m \x1b]0;t\x07",
    "| a | b |\n# x",
    r"\input{/etc/passwd} $x$ 100%",
    "javascript:alert(1)",
    "@SUM(1)",
    "x" * 100_000,
)


def digest(*parts: object) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big"))


def spelled(seeds: int = 3) -> list[str]:
    learnt = [f"{m}(weights='runs/{m}-{s}')" for m in ("diffprune", "gumbel_topk", "gumbel_keepdrop") for s in range(seeds)]
    aware = [f"diffprune(question_aware=True, weights='runs/aware-{s}')" for s in range(min(seeds, 2))]
    return ["none", *learnt, *aware, "random", "random(seed=1)", "grid", "attention", "replaced(method='attention')"]


def cell_of(pruner: str, budget: str, benchmark: str = "", verb: str = "evaluate", **more: object) -> Cell:
    learnt = hashlib.sha256(pruner.encode()).hexdigest() if "weights" in pruner else ""
    cell = Cell(verb, "embedded", "ab" * 32, pruner, learnt, "Share(1)" if pruner == "none" else budget, benchmark, "3")
    return replace(cell, **more)


@cache
def asked(benchmark: str, limit: int) -> tuple[object, list]:
    bench = registry.load("benchmarks", benchmark)
    return bench, bench.samples("test", limit)


def predictions(cell: Cell, limit: int) -> list[Prediction]:
    found = []
    bench, samples = asked(cell.benchmark, limit)
    method = labels.method(cell.pruner)
    blind = 0.0 if "mmbench" in cell.benchmark else 0.7  # this MMBench needs no picture
    bound = {"none": 0.0, "blind": blind}.get(cell.pruner)
    lost = LOSS[method.name][BUDGETS.index(cell.budget)] if bound is None else bound
    lost *= 0.55 if method.reads_question else 0.8 if method.replaced else 1.0
    for sample in samples:
        hard = digest(sample.id).random() < 0.07
        own = digest(sample.id, cell.pruner, cell.budget)
        wrong = hard or 0.6 * digest(sample.id, "shared").random() + 0.4 * own.random() < 0.8 * lost
        right = sample.row["answer"]
        answer = {"yes": "no", "no": "yes", "A": "B", "B": "C"}.get(right, "A") if wrong else right
        grade = bench.grade(sample, answer)
        kept = {"none": TOTAL, "blind": 0}.get(cell.pruner) if bound is not None else labels.budget(cell.budget)[1]
        found.append(
            Prediction(
                sample.id,
                sample.group,
                sample.category,
                sample.kind,
                sample.question,
                answer,
                grade.parsed,
                grade.target,
                grade.credit,
                TOTAL,
                int(kept),
                20,
                2,
                "",
            )
        )
    return found


def timings(cell: Cell, rounds: int, flags: str = "cpu_only") -> list[Timing]:
    kept = labels.budget(cell.budget)[1] if cell.pruner != "none" else TOTAL
    base = {("full", "prefill"): 40.0, ("pruned", "prefill"): 6 + 34 * kept / TOTAL, ("native", "prefill"): 6 + 33 * kept / TOTAL,
            ("pruned", "overhead"): 1.2, ("full", "encoder"): 9.0, ("pruned", "encoder"): 9.0, ("full", "ttft"): 52.0,
            ("pruned", "ttft"): 19 + 34 * kept / TOTAL, ("full", "decode"): 2.4, ("pruned", "decode"): 2.1}  # fmt: skip
    noise = digest("time", cell.pruner, cell.budget)
    return [
        Timing(
            span,
            arm,
            r,
            ms * float(np.exp(0.05 * noise.standard_normal())),
            cell.batch,
            kept if arm != "full" else TOTAL,
            30 + int(kept),
            flags,
        )
        for r in range(rounds)
        for (arm, span), ms in base.items()
    ]


def blinded(store: Store, limit: int = 24, likes: tuple[str, ...] = LIKES) -> None:
    for like in likes:
        cell = cell_of("blind", "Keep(0)", f"world(like='{like}')")
        store.publish({"predictions": predictions(cell, limit)}, cell=cell, provenance=SOURCE)


def evaluated(store: Store, limit: int = 24, likes: tuple[str, ...] = LIKES, seeds: int = 3) -> None:
    for like in likes:
        for pruner in spelled(seeds):
            for budget in BUDGETS if pruner != "none" else BUDGETS[:1]:
                cell = cell_of(pruner, budget, f"world(like='{like}')")
                rows = predictions(cell, limit)
                store.publish({"predictions": rows, "outcomes": [Outcome("ok", "", len(rows), 1.0)]}, cell=cell, provenance=SOURCE)


def timed(store: Store, rounds: int = 35) -> None:
    for pruner in spelled(1):
        if "replaced" not in pruner and "seed=" not in pruner and pruner != "none":
            for budget in BUDGETS:
                cell = cell_of(pruner, budget, verb="measure", batch=8)
                kept = labels.budget(budget)[1]
                costs = [
                    Cost(arm, k, 20.0, 1e7 * (k + 20), 3e8, 1e7 * (k + 20), 2048.0 * (k + 20), 2048.0 * (k + 20), math.nan)
                    for arm, k in (("full", 144.0), ("pruned", kept))
                ]
                store.publish({"timings": timings(cell, rounds), "costs": costs}, cell=cell, provenance=SOURCE)


def trained(store: Store, steps: int = 120) -> None:
    for arm, ms in (("diffprune", 210), ("gumbel_topk", 220), ("gumbel_keepdrop", 430), ("diffprune(question_aware=True)", 230)):
        for seed in range(3):
            random = digest(arm, seed)
            rows = [
                Step(
                    arm,
                    seed,
                    i,
                    0.4 + 1.2 * math.exp(-i / 25) + 0.05 * random.standard_normal(),
                    0.0,
                    1.0 * 0.05 ** (i / steps),
                    f"Keep({7 + i % 40})",
                    7.0 + i % 40,
                    1.0,
                    float(0.3 * random.random()) if i % 20 == 0 else math.nan,
                    ms * (1 + 0.05 * random.random()),
                    2,
                    0.5 + math.exp(-i / 30) if i % 30 == 0 else math.nan,
                    0.6 + 1.4 * math.exp(-i / 30) if i % 30 == 0 else math.nan,
                )
                for i in range(steps)
            ]
            store.append("steps", rows, cell=None, provenance=SOURCE)


def tuned(store: Store) -> None:
    def speedup(kept: float) -> float:
        return 40 / (7.2 + 34 * kept / TOTAL)

    store.append(
        "curve",
        [
            CurvePoint(
                8, 24 + k, k, 6 + 34 * k / TOTAL + 0.3 * (k % 3), 5.5 + 34 * k / TOTAL, 7 + 34 * k / TOTAL, 20, 6 + 34 * k / TOTAL
            )
            for k in (1, 4, 8, 16, 24, 32, 48, 72, 96, 120, 144)
        ],
        cell=None,
        provenance=SOURCE,
    )
    for method, bias in (
        ("diffprune(weights='runs/diffprune-0')", 1.0),
        ("gumbel_topk(weights='runs/gumbel_topk-0')", 1.15),
        ("attention", 0.8),
    ):
        grid = [(v, TOTAL / (1 + math.exp(2 * bias * v))) for v in np.linspace(-1, 3, 25).tolist()]
        store.append(
            "trials",
            [Trial(method, "threshold", 2.0, v, k, speedup(k), speedup(k) > 2, math.nan) for v, k in grid],
            cell=None,
            provenance=SOURCE,
        )
        rows = []
        for target in (1.5, 2.0, 2.85, 9.0):
            reach = target < 5
            v, k = min(grid, key=lambda g: abs(speedup(g[1]) - target)) if reach else grid[-1]
            s = speedup(k)
            rows.append(
                Choice(
                    method,
                    "threshold",
                    target,
                    "reached" if reach and s >= target else "missed" if reach else "unreachable",
                    f"Above({v:.6g})" if reach else "",
                    v if reach else math.nan,
                    k if reach else math.nan,
                    s,
                    s * 0.99 if reach else math.nan,
                    s * 0.97,
                    s * 1.01,
                    200,
                    0.7,
                    speedup(1),
                    "",
                )
            )
        store.append("choices", rows, cell=None, provenance=SOURCE)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with every table."""
    root = tmp_path_factory.mktemp("store")
    store = Store(root)
    evaluated(store)
    blinded(store)
    timed(store)
    trained(store)
    tuned(store)
    return root


@pytest.fixture(scope="module")
def made(full: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Its report."""
    return report(full, tmp_path_factory.mktemp("report"), title="Test report", masks=scenes())


@pytest.fixture(scope="module")
def chapter(full: Path) -> Comparison:
    return next(chapters(read(full)))


def scenes() -> dict[int, dict[str, np.ndarray]]:
    first = SPLITS["test"].start
    return {
        first + i: {s: digest(i, s).random(TOTAL) < 0.2 for s in ("diffprune(weights='a')", "gumbel_topk(weights='b')")}
        for i in range(3)
    }


# --- numbers ---------------------------------------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def answers(root: Path) -> pd.DataFrame:
    """Predictions as the store has them, with the plug-in's name and variant taken from the spelling by eye."""
    frame = Store(root).read("predictions")
    frame = frame.astype({name: str for name in ("pruner", "budget", "benchmark", "sample", "group")})
    frame["key"] = (
        frame["pruner"].str.replace(r"weights='[^']*'", "", regex=True).str.replace(r"\(seed=1\)", "", regex=True).str.strip("(), ")
    )
    return frame


def native(frame: pd.DataFrame) -> float:
    """One benchmark's main figure by its own plug-in, mean over seeds."""
    bench = registry.load("benchmarks", frame["benchmark"].iloc[0])
    found = []
    for _, part in frame.groupby("pruner"):
        graded = [Graded(r.group, r.category, r.credit, r.parsed, r.target) for r in part.itertuples()]
        found.append(next(iter(bench.aggregate(graded).values())))
    return float(np.mean(found))


def test_the_table_per_budget_is_what_the_benchmarks_say(full: Path, made: dict[str, Path]) -> None:
    frame = answers(full)
    table_ = {r["Method"]: r for r in rows_of(made["csv/budget_keep_16"])}
    assert list(table_)[:4] == ["Unpruned", "DiffPrune", "Gumbel top-K", "Gumbel keep/drop"]
    for label, key in (("DiffPrune", "diffprune"), ("Gumbel keep/drop", "gumbel_keepdrop"), ("Random", "random")):
        shares, credits = [], []
        for like in LIKES:
            mine = frame[(frame["benchmark"] == f"world(like='{like}')") & (frame["key"] == key) & (frame["budget"] == "Keep(16)")]
            bound = frame[(frame["benchmark"] == f"world(like='{like}')") & (frame["key"] == "none")]
            assert float(table_[label][labels.benchmark(f"world(like='{like}')")]) == pytest.approx(native(mine))
            shares.append(native(mine) / native(bound))
            credits.append(mine["credit"].mean())
        assert float(table_[label]["avg %"]) == pytest.approx(100 * np.mean(shares))
        assert float(table_[label]["mean credit"]) == pytest.approx(100 * np.mean(credits))
        assert float(table_[label]["mean credit low"]) < 100 * np.mean(credits) < float(table_[label]["mean credit high"])


def test_paired_differences_agree_with_pictures_and_seeds_drawn_one_by_one(full: Path, made: dict[str, Path]) -> None:
    frame, rng = answers(full), np.random.default_rng(0)
    row = next(r for r in rows_of(made["csv/differences"]) if r["DiffPrune minus"] == "Gumbel top-K")
    for budget, column in (("Keep(7)", "7 tokens"), ("Keep(32)", "32 tokens")):
        arms = []
        for key in ("diffprune", "gumbel_topk"):
            part = frame[(frame["key"] == key) & (frame["budget"] == budget)]
            arms.append(part.pivot(index=["benchmark", "group", "sample"], columns="pruner", values="credit").sort_index())
        gap = pd.DataFrame(100 * (arms[0].to_numpy() - arms[1].to_numpy()), arms[0].index)  # one column per scorer seed
        assert float(row[column]) == pytest.approx(gap.groupby("benchmark").mean().mean().mean())
        of_picture = [np.flatnonzero(gap.index.get_level_values("group") == g) for g in gap.index.unique("group")]
        benchmark, points, found = gap.index.get_level_values("benchmark"), gap.to_numpy(), []
        for _ in range(400):
            rows = np.concatenate([of_picture[g] for g in rng.integers(0, len(of_picture), len(of_picture))])
            drawn = points[rows][:, rng.integers(0, 3, 2)].mean(1)  # two of three seeds
            found.append(np.mean([drawn[benchmark[rows] == b].mean() for b in benchmark.unique()]))
        low, high = np.quantile(found, (0.025, 0.975))
        assert float(row[f"{column} low"]) == pytest.approx(low, abs=0.15 * (high - low))
        assert float(row[f"{column} high"]) == pytest.approx(high, abs=0.15 * (high - low))


def credits(frame: pd.DataFrame, key: str, budget: str, like: str) -> pd.DataFrame:
    """Rows of one arm on one benchmark, by sample."""
    mine = frame[(frame["key"] == key) & (frame["benchmark"] == f"world(like='{like}')")]
    return mine[mine["budget"] == budget] if budget else mine


def test_relative_accuracy_and_its_companions_are_recomputed_from_the_rows(full: Path, made: dict[str, Path]) -> None:
    frame = answers(full)
    tables = {n: {(r["Method"], r["kept"]): r for r in rows_of(made[f"csv/{n}"])} for n in ("relative", "changed")}
    about = {r["Benchmark"]: r["the image's part note"] for r in rows_of(made["csv/blind"])}
    needed = [like for like in LIKES if not about[labels.BENCHMARKS[like]]]
    assert needed == ["gqa", "mme"]
    for label, key in (("DiffPrune", "diffprune"), ("Attention", "attention")):
        row, other = tables["relative"][label, "7.0"], tables["changed"][label, "7.0"]
        ratios, agree, harm, gain, kept = {}, [], [], [], []
        for like in LIKES:
            pruned, bound, none = (credits(frame, *k, like) for k in ((key, "Keep(7)"), ("none", ""), ("blind", "")))
            ratios[like] = native(pruned) / native(bound)
            joined = pruned.merge(bound, on="sample", suffixes=("", "_full"))
            agree.append((joined["parsed"] == joined["parsed_full"]).mean())
            harm.append(((joined["credit_full"] == 1) & (joined["credit"] != 1)).mean())
            gain.append(((joined["credit_full"] != 1) & (joined["credit"] == 1)).mean())
            if like in needed:
                kept.append((native(pruned) - native(none)) / (native(bound) - native(none)))
        worst = min(ratios, key=ratios.__getitem__)
        expected = {
            "relative accuracy %": np.mean(list(ratios.values())),
            "each capped at 100 %": np.mean([min(r, 1) for r in ratios.values()]),
            "worst benchmark %": ratios[worst], "blind-corrected %": np.mean(kept),
        }  # fmt: skip
        for column, value in expected.items():
            assert float(row[column]) == pytest.approx(100 * value), column
            assert float(row[f"{column} low"]) < 100 * value < float(row[f"{column} high"]), column
        assert row["worst benchmark % note"] == labels.benchmark(f"world(like='{worst}')")
        for column, value in (("agreement %", agree), ("harm %", harm), ("gain %", gain)):
            assert float(other[column]) == pytest.approx(100 * np.mean(value)), column


def test_the_interval_of_relative_accuracy_agrees_with_resampled_pictures(full: Path, made: dict[str, Path]) -> None:
    frame = answers(full)
    rng = np.random.default_rng(0)
    parts = {like: [by_picture(credits(frame, *k, like)) for k in (("attention", "Keep(7)"), ("none", ""))] for like in LIKES}
    pictures = sorted({g for arms in parts.values() for g in arms[0]})
    found = []
    for _ in range(200):
        drawn = rng.choice(pictures, len(pictures))
        pairs = [[again(like, arm, drawn) for arm in arms] for like, arms in parts.items()]
        found += [np.mean([m / f for m, f in pairs])] if all(f for _, f in pairs) else []
    row = next(r for r in rows_of(made["csv/relative"]) if r["Method"] == "Attention" and r["kept"] == "7.0")
    low, high = 100 * np.quantile(found, (0.025, 0.975))
    apart = 0.2 * (high - low)
    assert float(row["relative accuracy % low"]) == pytest.approx(low, abs=apart)
    assert float(row["relative accuracy % high"]) == pytest.approx(high, abs=apart)


def by_picture(frame: pd.DataFrame) -> dict[str, list[Graded]]:
    found: dict[str, list[Graded]] = {}
    for r in frame.itertuples():
        found.setdefault(r.group, []).append(Graded(r.group, r.category, r.credit, r.parsed, r.target))
    return found


def again(like: str, arm: dict[str, list[Graded]], drawn: np.ndarray) -> float:
    """The benchmark's own figure of the pictures drawn, each under a name of its own; 0 where it has none of them."""
    rows = [replace(row, group=str(i)) for i, picture in enumerate(drawn) for row in arm.get(picture, ())]
    return next(iter(registry.load("benchmarks", f"world(like='{like}')").aggregate(rows).values())) if rows else 0.0


def test_a_benchmark_that_needs_no_picture_is_called_so(made: dict[str, Path]) -> None:
    rows = {r["Benchmark"]: r for r in rows_of(made["csv/blind"])}
    assert rows["MMBench"]["the image's part note"] == "not image-bound" and not rows["MMBench"]["DiffPrune, 7 tokens: % kept"]
    assert rows["GQA"]["the image's part note"] == "" and float(rows["GQA"]["DiffPrune, 7 tokens: % kept"]) < 100
    assert float(rows["GQA"]["the image's part"]) == pytest.approx(float(rows["GQA"]["Unpruned"]) - float(rows["GQA"]["No image"]))
    assert not any("No image" in r["Method"] for r in rows_of(made["csv/headline"]))


def test_benchmark_by_benchmark_p_values_are_corrected(full: Path, chapter: Comparison, made: dict[str, Path]) -> None:
    found = Derived(chapter).tested("DiffPrune", "Unpruned", "Keep(7)")
    assert [t.p_holm for t in found.values()] == holm([t.p for t in found.values()])
    rows = {r["Benchmark"]: r for r in rows_of(made["csv/benchmarks_unpruned"])}
    for benchmark, t in found.items():
        row = rows[labels.benchmark(benchmark)]
        assert float(row["7 tokens"]) == pytest.approx(t.estimate)
        assert row["7 tokens note"] == (f"p {t.p_holm:.3f}" if t.p_holm >= 0.001 else "p < 0.001")
        assert t.verdict == ("tie" if t.low <= 0 <= t.high else "worse")
    gqa = found["world(like='gqa')"]
    frame = answers(full)
    pruned, bound = (credits(frame, *k, "gqa").groupby("group")["credit"] for k in (("diffprune", "Keep(7)"), ("none", "")))
    assert gqa.test == "sign flips" and gqa.p == pytest.approx(float(sign_flip((pruned.sum() / 3 - bound.sum()).to_numpy())))


def test_tie_stands_exactly_where_the_interval_holds_zero(made: dict[str, Path]) -> None:
    seen = set()
    for name in ("csv/differences", "csv/variants", "csv/replaced"):
        for row in rows_of(made[name]):
            for column in [c.removesuffix(" verdict") for c in row if c.endswith(" verdict") and row[c]]:
                low, high, verdict = float(row[f"{column} low"]), float(row[f"{column} high"]), row[f"{column} verdict"]
                assert verdict == ("tie" if low <= 0 <= high else "better" if low > 0 else "worse")
                seen.add(verdict)
    assert seen == {"tie", "better", "worse"}


def test_bold_means_a_difference_that_excludes_zero(chapter: Comparison) -> None:
    from diffprune.report.tables.accuracy import per_budget

    bold = 0
    for budget in chapter.budgets:
        for row in per_budget(chapter, budget).rows:
            number = row[-2]
            if isinstance(number, table.Number) and number.best:
                bold += 1
                others = [x for x in chapter.methods if x != row[0] and not chapter.methods[x].reads_question]
                assert all(chapter.difference(row[0], x, budget.spelling).low > 0 for x in others)
    assert bold < len(chapter.budgets)


def test_speedup_is_the_ratio_of_medians_with_overhead_charged(full: Path, made: dict[str, Path]) -> None:
    frame = Store(full).read("timings")
    frame = frame[frame["pruner"].str.startswith("gumbel_topk") & (frame["budget"] == "Keep(16)")]
    median = frame.groupby(["arm", "span"])["value_ms"].median()
    cut = frame[(frame["arm"] == "pruned") & frame["span"].isin(["prefill", "overhead"])]
    charged = cut.groupby("round")["value_ms"].sum().median()
    net = median["full", "prefill"] / charged
    row = next(r for r in rows_of(made["csv/latency"]) if r["Method"] == "Gumbel top-K" and float(r["kept"]) == 16)
    assert float(row["net speedup"]) == pytest.approx(net)
    assert float(row["net speedup low"]) < net < float(row["net speedup high"])
    assert float(row["to native"]) == pytest.approx(charged / median["native", "prefill"])
    assert "All timings: cpu_only" in made["html"].read_text("utf-8")


def test_the_words_say_what_the_table_says(made: dict[str, Path]) -> None:
    page = made["html"].read_text("utf-8")
    row = next(r for r in rows_of(made["csv/differences"]) if r["DiffPrune minus"] == "Gumbel top-K")
    verdicts = {k.removesuffix(" verdict"): v for k, v in row.items() if k.endswith("verdict")}
    sentence = re.search(r"Against Gumbel top-K, DiffPrune ([^<]*)", page)
    assert sentence
    for part in re.split(r"; (?=is|ties)", sentence[1]):
        word = "tie" if part.startswith("ties") else "better" if "better" in part.split()[:2] else "worse"
        assert set(re.findall(r"(?:^|with|and|,) (\d+) tokens", part)) == {c.split()[0] for c, v in verdicts.items() if v == word}


# --- the page --------------------------------------------------------------------------------------------------------


class Inspector(html.parser.HTMLParser):
    """Everything in a page that could run or fetch."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.bad: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag in {"script", "iframe", "object", "embed", "link", "base", "form"}:
            self.bad.append(tag)
        for key, value in attrs:
            local = key.split(":")[-1]
            if key.startswith("on") or (
                local in {"src", "href", "action", "srcset"} and not (value or "").startswith(("#", "data:image/png"))
            ):
                self.bad.append(f"{tag} {key}={value!r:.60}")
            if key == "style" and "url(" in (value or "") and "url(#" not in (value or ""):
                self.bad.append(f"{tag} {key}={value!r:.60}")


def inspected(page: str) -> Inspector:
    found = Inspector()
    found.feed(page)
    assert not found.bad
    assert "Content-Security-Policy" in page and "default-src 'none'" in page
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    return found


def test_the_page_is_whole_and_asks_nobody_for_anything(made: dict[str, Path]) -> None:
    page = made["html"].read_text("utf-8")
    assert {"svg", "table", "image"} <= inspected(page).tags
    for section in (
        "Accuracy against measured speed",
        "Tables per budget",
        "Tuning to a target speedup",
        "Training",
        "Provenance",
        "scene 2000000000",
    ):
        assert section in page
    assert "unreachable here, best is" in page and "no fused attention" in page
    assert "runs/diffprune" not in page, "paths of weights do not belong into tables"
    assert len(page) < 5_000_000


def test_the_same_records_give_the_same_bytes(full: Path, made: dict[str, Path], tmp_path: Path) -> None:
    again = report(full, tmp_path, title="Test report", masks=scenes())
    assert set(again) == set(made)
    for name, path in again.items():
        assert path.read_bytes() == made[name].read_bytes(), name


def test_an_empty_store_gives_a_page_that_says_so(tmp_path: Path) -> None:
    made = report(tmp_path / "nothing", tmp_path / "out")
    page = made["html"].read_text("utf-8")
    inspected(page)
    assert "holds no evaluated and no timed cells yet" in page
    assert "No training steps in this store" in page
    assert "holds no results yet" in summary(tmp_path / "nothing")


@pytest.mark.parametrize("only", ["answers", "times", "steps", "tuning"])
def test_missing_parts_are_named_in_their_place(only: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    {
        "answers": lambda s: evaluated(s, 4, ("gqa",), 1),
        "times": lambda s: timed(s, 5),
        "steps": lambda s: trained(s, 5),
        "tuning": tuned,
    }[only](store)
    made = report(tmp_path / "store", tmp_path / "out")
    page = made["html"].read_text("utf-8")
    inspected(page)
    assert ("No training steps in this store" in page) == (only != "steps")
    assert ("The tuner has given no answer" in page) == (only != "tuning")
    if only == "answers":
        assert "accuracy cannot be drawn against speed" in page and "has not been timed yet" in page
    if only == "times":
        assert "few_repeats" in page and "no verdict" in page


# --- what others wrote -----------------------------------------------------------------------------------------------


def test_hostile_text_is_inert_everywhere(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    for pruner, right in (("none", True), ("diffprune(weights='runs/<script>')", False), ("gumbel_topk(weights='x')", False)):
        cell = cell_of(pruner, "Keep(16)", "world(like='gqa')")
        rows = [
            Prediction(
                f"s{i}",
                f"g{i}",
                "color",
                evil[:30],
                evil,
                evil,
                evil,
                evil,
                float(right),
                TOTAL,
                16,
                20,
                2,
                evil if i == 3 and not right else "",
            )
            for i, evil in enumerate(HOSTILE)
        ]
        store.publish({"predictions": rows}, cell=cell, provenance=replace(SOURCE, versions=HOSTILE[0], hardware=HOSTILE[1]))
    failed = cell_of("grid", "Keep(16)", "world(like='gqa')")
    store.publish({"outcomes": [Outcome("failed", HOSTILE[2], 0, 1.0)]}, cell=failed, provenance=SOURCE)
    store.append(
        "choices",
        [Choice(HOSTILE[1], HOSTILE[0], 2.0, HOSTILE[0], HOSTILE[2], 0.0, 1.0, 2.0, 2.0, 1.9, 2.1, 200, 0.5, 3.0, HOSTILE[2])],
        cell=None,
        provenance=SOURCE,
    )
    made = report(tmp_path / "store", tmp_path / "out", title=HOSTILE[0], command=HOSTILE[1])
    page = made["html"].read_text("utf-8")
    assert not inspected(page).tags & {"script", "img"}
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page, "shown as text"
    for name, path in made.items():
        content = path.read_text("utf-8")
        assert "\x1b" not in content and "x" * 2000 not in content, name
        if name.startswith("csv/"):
            cells = [c for row in csv.reader(content.splitlines()) for c in row if c]
            assert not any(c[0] in "=@+|%" or (c[0] == "-" and not re.fullmatch(r"-[\d.e+-]+", c)) for c in cells), name
    assert "<script" not in made["markdown"].read_text("utf-8") and "<img" not in made["markdown"].read_text("utf-8")
    assert r"\input" not in made["latex"].read_text("utf-8")
    assert "\x1b" not in summary(tmp_path / "store")


@pytest.mark.parametrize("evil", HOSTILE)
def test_each_form_of_text_keeps_the_words_and_drops_the_power(evil: str) -> None:
    assert "\x1b" not in escape.plain(evil) and len(escape.plain(evil)) <= 160
    assert "<" not in escape.markdown(evil) and not re.search(r"(?<!\\)\|", escape.markdown(evil))
    assert escape.csv(evil)[0] not in "=+-@|"
    assert not re.search(r"\\(input|write|def)", escape.latex(evil))


def test_failures_are_listed_and_never_wrong_answers(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    cell = cell_of("diffprune(weights='w')", "Keep(16)", "world(like='gqa')")
    rows = [
        Prediction(
            f"s{i}", f"g{i}", "c", "k", "q", "a", "a", "a", 1.0 if i else 0.0, TOTAL, 16, 2, 1, "" if i else "OutOfMemory: too big"
        )
        for i in range(10)
    ]
    store.publish(
        {"predictions": rows, "outcomes": [Outcome("failed", "one answer failed", 10, 1.0)]}, cell=cell, provenance=SOURCE
    )
    made = report(tmp_path / "store", tmp_path / "out")
    found = rows_of(made["csv/failures"])
    assert {r["reason"] for r in found} >= {"one answer failed", "OutOfMemory: too big"}
    assert float(rows_of(made["csv/headline"])[0]["accuracy %"]) == 100
    assert rows_of(made["csv/headline"])[0]["accuracy % flags"] == "error_rows"
    assert "error_rows" in made["html"].read_text("utf-8")
    (row,) = rows_of(made["csv/errors"])
    assert (row["class"], row["Method"], float(row["rows"]), float(row["share of rows %"])) == ("OutOfMemory", "DiffPrune", 1, 10)


def test_weights_retrained_under_the_same_name_replace_the_old_ones(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    for sha, credit, day in (("a" * 64, 0.0, 1), ("b" * 64, 1.0, 2)):
        cell = cell_of("diffprune(weights='w')", "Keep(16)", "world(like='gqa')", pruner_hash=sha)
        rows = [Prediction(f"s{i}", f"g{i}", "c", "k", "q", "a", "a", "a", credit, TOTAL, 16, 2, 1, "") for i in range(5)]
        store.append("predictions", rows, cell=cell, provenance=replace(SOURCE, started=f"2026-01-0{day}T00:00:00+00:00"))
    made = report(tmp_path / "store", tmp_path / "out")
    assert float(rows_of(made["csv/headline"])[0]["accuracy %"]) == 100
    assert "weights or data changed under the same name" in made["html"].read_text("utf-8")


# --- names and tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelling", "label"),
    [
        ("none", "Unpruned"),
        ("diffprune(question_aware=True, weights='runs/a')", "DiffPrune, question-aware"),
        ("diffprune(denoiser=False, weights='runs/b')", "DiffPrune, without denoiser"),
        ("diffprune(attention=False, weights='runs/b')", "DiffPrune, without self-attention"),
        ("gumbel_keepdrop(weights='x')", "Gumbel keep/drop"),
        ("random(seed=2)", "Random"),
        ("replaced(method=\"diffprune(weights='x')\")", "DiffPrune"),
        ("<b>", "<b>"),
    ],
)
def test_labels(spelling: str, label: str) -> None:
    assert labels.method(spelling).label == label


def test_latex_is_a_booktabs_table_with_balanced_braces(made: dict[str, Path]) -> None:
    content = made["latex"].read_text("utf-8")
    assert content.count(r"\begin{table}") == content.count(r"\end{table}") == content.count(r"\toprule") > 5
    bare = re.sub(r"\\[{}\\]", "", content)
    assert bare.count("{") == bare.count("}")
    for body in re.findall(r"\\begin\{tabular\}\{(l r*|lr*)\}(.*?)\\end\{tabular\}", content, re.DOTALL):
        for line in body[1].splitlines():
            if line.endswith(r"\\"):
                assert len(re.findall(r"(?<!\\)&", line)) == len(body[0]) - 1


def test_scenes_refuse_what_is_no_mask(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be bool"):
        report(tmp_path / "s", tmp_path / "o", masks={SPLITS["test"].start: {"grid": np.zeros(144)}})
    with pytest.raises(ValueError, match="no square"):
        report(tmp_path / "s", tmp_path / "o", masks={SPLITS["test"].start: {"grid": np.zeros(143, bool)}})


def test_summary_is_a_plain_table(full: Path) -> None:
    lines = summary(full).splitlines()
    assert any(line.startswith("DiffPrune ") and "×" in line and "[" in line for line in lines)
    assert max(map(len, lines)) <= 120
