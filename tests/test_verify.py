"""`verify` against a report whose numbers are right, and against one with planted faults; views and compacted stores."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffprune.cli.commands import call
from diffprune.core.records import TABLES
from diffprune.report import report
from diffprune.store import Store, readme
from diffprune.store.views import connect
from diffprune.verify import forms, page, verify
from tests import test_report as made_up
from tests import test_tune as tuning
from tests.records import evaluate_cell, measure_cell, outcome, prediction, provenance, timing

pytestmark = pytest.mark.slow

REPORTS = Path(__file__).parents[1] / "reports"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers with seeds, variants, replaced tokens and without pictures; times, trainings, a whole tuning, pictures."""
    root = tmp_path_factory.mktemp("run") / "store"
    made_up.evaluated(Store(root), limit=12, seeds=2)
    made_up.blinded(Store(root), limit=12)
    made_up.timed(Store(root), rounds=7)
    made_up.trained(Store(root), steps=25)
    made_up.pictured(Store(root))
    tuning.searched(Store(root), tuning.Known())
    return root


@pytest.fixture(scope="module")
def exported(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report, and the compacted store beside it."""
    folder = tmp_path_factory.mktemp("exported")
    Store(store).compact(folder / "store")
    readme.write(folder / "store")
    report(folder / "store", folder, title="Verified")
    return folder


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copied"))


# --- every number ----------------------------------------------------------------------------------------------------


def test_every_number_of_a_report_is_computed_again(exported: Path) -> None:
    found = verify(exported)
    assert not found.differences, str(found)[:2000]
    assert found.recomputed > 1500 and found.intervals > 50
    assert all("bootstrap" in reason or "text" in reason for reason in found.left), str(found)


def test_speedups_of_seeds_and_sessions_are_computed_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    made_up.evaluated(store, limit=4, likes=("gqa",), seeds=2)
    made_up.timed(store, rounds=7, seeds=2, sessions=3)
    report(tmp_path / "store", tmp_path)
    found = verify(tmp_path)
    assert not found.differences and found.intervals > 50, str(found)[:2000]
    assert "own overhead, batch 8, 3 timing sessions: " in (tmp_path / "report.md").read_text("utf-8")


def test_a_decode_time_below_zero_is_a_dash_in_every_form(tmp_path: Path) -> None:
    """A difference of two timings that noise has turned: a reader would take -1.75 ms for a time."""
    times = {("full", "prefill"): 40.0, ("pruned", "prefill"): 20.0, ("pruned", "overhead"): 1.0, ("full", "ttft"): 50.0,
             ("pruned", "ttft"): 30.0, ("full", "decode"): 2.5, ("pruned", "decode"): -1.75}  # fmt: skip
    rows = [timing(ms, span=span, arm=arm, repetition=turn) for turn in range(7) for (arm, span), ms in times.items()]
    cell = measure_cell("grid")
    Store(tmp_path / "store").publish({"timings": rows}, cell=cell, provenance=provenance())
    report(tmp_path / "store", tmp_path)
    entries = page.read(tmp_path / "numbers.csv")
    shown = {(one.table, one.column): one.printed for one in entries if one.table == "answer_times"}
    assert shown["answer_times", "decode: full"] == "2.50" and shown["answer_times", "decode: pruned"] == "–"
    spans = {one.column: one.printed for one in entries if one.table == "latency_spans" and one.row.endswith("pruned | decode")}
    assert {spans[name] for name in ("median ms", "p10 ms", "p90 ms")} == {"–"} and spans["repeats"] == "7"
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".html", ".md", ".csv", ".tex")]
    assert files and not [path.name for path in files if "1.75" in path.read_text("utf-8")]
    assert not verify(tmp_path).differences


def test_figures_that_a_store_does_not_record_are_said_to_be_left(tmp_path: Path) -> None:
    """Six equal answers as tests make them, without the figure of the benchmark's own that evaluation records beside them."""
    for asked in ("unpruned", "grid"):
        cell = evaluate_cell(asked)
        rows = [prediction(number) for number in range(6)]
        Store(tmp_path / "store").publish({"predictions": rows}, cell=cell, provenance=provenance())
    report(tmp_path / "store", tmp_path)
    found = verify(tmp_path)
    assert not found.differences and found.recomputed > 20, str(found)
    assert found.left["figures of benchmarks' own that the store does not record"] == 10, str(found)


def _changed(name: str, old: str, new: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        text = (folder / name).read_text("utf-8")
        changed = re.sub(old, new, text, count=1, flags=re.M)
        assert changed != text, f"{old} is not in {name}"
        (folder / name).write_text(changed, "utf-8")

    return plant


def _column(table: str, column: str, change: Callable[[pd.Series], pd.Series]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        (path,) = (folder / "store" / "parts" / table).glob("*.parquet")
        rows = pq.read_table(path)
        at = rows.schema.get_field_index(column)
        field = rows.schema.field(at)
        pq.write_table(rows.set_column(at, field, pa.array(change(rows[column].to_pandas()), type=field.type)), path)

    return plant


ROW = r"headline.*DiffPrune \| Keep\(32\)"
ON_PAGE = {
    "headline, DiffPrune | Keep(16), kept tokens: report.md prints": _changed("report.md", r"^(\| DiffPrune \| )16", r"\g<1>17"),
    "headline, DiffPrune | Keep(32), kept tokens: prints '33', the store says 32": _changed(
        "numbers.csv", rf"({ROW},kept tokens,)32.0(,.*)32", r"\g<1>33.0\g<2>33"
    ),
    "headline, DiffPrune | Keep(32), accurate %: prints": _changed("numbers.csv", rf"({ROW},)accuracy %", r"\1accurate %"),
    "for 97.5": _changed("numbers.csv", r"(headline.*Unpruned \|,accuracy %,)[\d.]+", r"\g<1>97.5"),
    "which does not contain": _changed(
        "numbers.csv",
        r"(,differences,.*,Gumbel top-K,Keep\(16\),[^,]*),[^,]*,[^,]*,(.*[+−][\d.]+) \[[^,]*, [^\]]*\]",
        r"\1,98.0,99.0,\2 [+98.0, +99.0]",
    ),
    "differences, Unpruned, Keep(16): prints": _changed(
        "numbers.csv", r"(,differences,.*,Unpruned,Keep\(16\),[^,]*),[^,]*", r"\1,-99.5"
    ),
    "prints '94.7' for nan": _changed("numbers.csv", r"(,budget_.*,mean credit),[\d.]+,[\d.]+,[\d.]+,(\d),.*$", r"\1,,,,\2,94.7,,"),
}
# One figure in one form of the report alone, and what is said of it.
IN_FORMS = {
    "a number on the page": (
        "headline, Unpruned |, kept tokens: report.html prints '9",
        "report.html",
        r'(data-v="[^"]*">)\d',
        r"\g<1>9",
    ),
    "its value": ("headline, Unpruned |, kept tokens: report.html prints", "report.html", r'data-v="\d', 'data-v="9'),
    "an interval": ("headline, Unpruned |, accuracy %: report.html prints", "report.html", r'(<span class="ci">\[)\d', r"\g<1>1"),
    "a difference that would show": ("report.html prints", "report.html", r'(<span class="ci aside">)\d', r"\g<1>1"),
    "a title": ("report.html has a table 'Accuracy with 99", "report.html", r'(aria-label="Accuracy with )\d+', r"\g<1>99"),
    "what is attached": (
        "report.html holds another headline.csv",
        "report.html",
        r'(download="headline.csv" href="[^,]*,.{90})',
        r"\1AAAA",
    ),
    "a sentence": ("report.html does not", "report.html", r"(<p>Asked were )\d", r"\g<1>9"),
    "a note": ("report.md does not", "report.html", r"2,000 bootstrap draws of them", "3,000 bootstrap draws of them"),
    "a note in Markdown": ("report.md does not", "report.md", r"2,000 bootstrap draws of them", "3,000 bootstrap draws of them"),
    "a description on the page": ("report.md does not", "report.html", r'(aria-label="Forest plot.*?)\d', r"\g<1>x"),
    "a sentence in Markdown": ("report.html does not", "report.md", r"^(Asked were )\d", r"\g<1>9"),
    "a description": ("report.md does not", "report.md", r"^(!\[Forest.*)\d", r"\g<1>x"),
    "a cell cut short": ("report.md prints '94'", "report.md", r"^(\| Unpruned \| )144( \| \d+)[^|]*", r"\g<1>144\g<2> "),
    "a heading": ("report.md has a table 'Accuracy with 99", "report.md", r"^(### Accuracy with )\d+", r"\g<1>99"),
    "a table in full precision": ("tables/headline.csv has", "tables/headline.csv", r"(\nUnpruned,)\d", r"\g<1>9"),
    "an interval there": ("tables/headline.csv has", "tables/headline.csv", r"(\nUnpruned,[^,]*,[^,]*,)\d", r"\g<1>1"),
}
IN_STORE = {
    "accuracy %": _column("grades", "credit", lambda credit: 1 - credit),
    "net prefill speedup": _column("timings", "value_ms", lambda ms: 1.01 * ms + 1),
    "training, ": _column("steps", "loss", lambda loss: loss + 0.1),
    ", kept: prints": _column("scores", "score", lambda score: score + 0.2),
    ", measured: prints": _column("held_out", "spent_ms", lambda ms: ms**2),
    "pictures, ": _column("kept_tokens", "token_kept", lambda kept: ~kept),
    "cost, ": _column("costs", "prefill_flops", lambda flops: flops + 1e9),
    ", predicted: prints": _column("curve", "fitted_ms", lambda ms: ms + 1),
}


@pytest.mark.parametrize("faults", [ON_PAGE, IN_STORE], ids=["page", "store"])
def test_planted_faults_are_listed(faults: dict[str, Callable[[Path], None]], copied: Path) -> None:
    for plant in faults.values():
        plant(copied)
    found = verify(copied)
    for words in faults:
        assert any(words in one for one in found.differences), f"{words}: {found}"[:3000]
    if faults is ON_PAGE:
        assert len([one for one in found.differences if "numbers.csv" not in one]) == len(faults) - 1, str(found)[:3000]


@pytest.mark.parametrize(("words", "name", "old", "new"), IN_FORMS.values(), ids=IN_FORMS)
def test_a_figure_that_is_changed_in_one_form_alone_is_found(words: str, name: str, old: str, new: str, copied: Path) -> None:
    entries = page.read(copied / "numbers.csv")
    assert not list(forms.disagreements(copied, entries))
    _changed(name, old, new)(copied)
    found = list(forms.disagreements(copied, entries))
    assert words in found[0] and len(found) == 1 + name.startswith("tables"), found  # which the page holds, too


def test_a_table_beside_the_page_that_is_missing_or_empty_is_told(copied: Path) -> None:
    entries = page.read(copied / "numbers.csv")
    (copied / "tables" / "headline.csv").write_text("")
    assert any("tables/headline.csv has 0 entries" in one for one in forms.disagreements(copied, entries))
    (copied / "tables" / "headline.csv").unlink()
    with pytest.raises(ValueError, match=r"headline.csv is missing: write the report again"):
        list(forms.disagreements(copied, entries))


@pytest.mark.parametrize("folder", sorted(p.parent for p in REPORTS.glob("*/store")), ids=lambda p: p.name)
def test_committed_reports_are_what_their_stores_say(folder: Path) -> None:
    found = verify(folder)
    assert not found.differences and found.recomputed, str(found)[:3000]


@pytest.mark.parametrize("path", sorted(REPORTS.glob("*/figures/*.svg")), ids=lambda p: f"{p.parts[-3]}-{p.stem}")
def test_committed_figures_are_read_by_themselves(path: Path) -> None:
    """A browser forgives a page what it does not forgive a file; and nobody reads a formula that is not set."""
    assert ElementTree.parse(path).getroot().tag.endswith("svg")
    assert "mathdefault" not in path.read_text("utf-8") and "$" not in path.read_text("utf-8")


def test_the_command_says_what_differs_and_fails(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["verify", str(copied)]) == (0, "")
    assert "0 differences" in capsys.readouterr().out
    next(iter(ON_PAGE.values()))(copied)
    assert call(["verify", str(copied)]) == (1, "")
    assert "1 differences" in capsys.readouterr().out
    code, sentence = call(["verify", "nowhere"])
    assert code == 2 and sentence.startswith("there is no folder nowhere")
    shutil.rmtree(copied / "store")
    code, sentence = call(["verify", str(copied)])
    assert code == 2 and "holds no store" in sentence


# --- a compacted store -----------------------------------------------------------------------------------------------


def test_a_compacted_store_says_the_same(store: Path, exported: Path) -> None:
    whole, small = Store(store), Store(exported / "store")
    for table in TABLES:
        for coded in (False, True):
            pd.testing.assert_frame_equal(whole.read(table, coded=coded), small.read(table, coded=coded))
        pd.testing.assert_frame_equal(whole.origins(table), small.origins(table))
        cells = set(whole.read(table, ["cell"])["cell"].head(1))
        pd.testing.assert_frame_equal(whole.read(table, ["verb"], cells=cells), small.read(table, ["verb"], cells=cells))
    assert whole.done() == small.done() and whole.done("predictions") == small.done("predictions")
    files = list((exported / "store").rglob("*.parquet"))
    assert len(files) <= len(TABLES) and sum(path.stat().st_size for path in files) < 1_000_000
    with pytest.raises(ValueError, match="holds records already"):
        whole.compact(exported / "store")
    with pytest.raises(ValueError, match="holds no records"):
        Store("nothing").compact("to")


def test_export_puts_the_store_beside_the_page(store: Path) -> None:
    shutil.copytree(store, "run/store")
    code, sentence = call(["export", "run", "out"])
    assert code == 2 and "has no report" in sentence
    report("run/store", "run/report")
    Path("run/winners.json").write_text("{}", encoding="utf-8")
    assert call(["export", "run", "out"]) == (0, "")
    assert Path("out/winners.json").read_text(encoding="utf-8") == "{}"
    assert Path("out/report.html").read_bytes() == Path("run/report/report.html").read_bytes()
    assert not verify("out").differences and not verify("run").differences
    made_up.publish(Store("run/store"), evaluate_cell("grid"), outcomes=[outcome(7)])
    code, sentence = call(["export", "run", "later"])
    assert code == 2 and "`diffprune report run`" in sentence and not Path("later").exists()


# --- views and README ------------------------------------------------------------------------------------------------


def test_views_read_what_the_store_reads(tmp_path: Path) -> None:
    """Failed and repeated commits, parts without a manifest: only what counts is seen."""
    place = Store(tmp_path)
    first, second = evaluate_cell("grid"), evaluate_cell("attention")
    made_up.publish(place, first, outcomes=[outcome(0, "failed", "first")])
    made_up.publish(place, first, predictions=[prediction(0, 0.25)], outcomes=[outcome(1)])
    made_up.publish(place, first, predictions=[prediction(0, 0.75)], outcomes=[outcome(2)])
    made_up.publish(place, second, outcomes=[outcome(0, "failed", "one")])
    made_up.publish(place, second, outcomes=[outcome(0, "failed", "two")])
    part = next((tmp_path / "parts" / "grades").glob("*.parquet"))
    shutil.copy(part, part.with_name("nobody-names-it.parquet"))
    with connect(tmp_path) as data:
        assert data.execute("SELECT credit FROM predictions").fetchall() == [(0.25,)]
        seen = data.execute("SELECT cell, reason FROM outcomes ORDER BY cell").fetchall()
        assert data.execute("SELECT count(*) FROM steps").fetchall() == [(0,)]
    rows = place.read("outcomes", ["cell", "reason"])
    assert seen == sorted(rows.itertuples(index=False, name=None)) and {reason for _, reason in seen} == {"", "two"}


@pytest.mark.parametrize("where", range(3))
def test_a_damaged_part_is_told_in_a_sentence(where: int, tmp_path: Path) -> None:
    made_up.publish(Store(tmp_path), evaluate_cell("grid"), outcomes=[outcome(0)])
    (part,) = (tmp_path / "parts" / "outcomes").glob("*.parquet")
    whole = part.read_bytes()
    part.write_bytes((b"\xff\xfe" + whole, whole[: len(whole) // 2], b"")[where])
    with pytest.raises(ValueError, match=r"has a damaged file \("):
        connect(tmp_path)


def test_the_readme_names_every_column_and_its_queries_run(exported: Path) -> None:
    text = (exported / "store" / "README.md").read_text("utf-8")
    for table, kind in TABLES.items():
        assert f"### {table}\n" in text and all(f"| `{column}` |" in text for column in kind.__dataclass_fields__)
    queries = re.findall(r"```sql\n(.*?);\n```", text, re.S)
    assert len(queries) == 5 and all(len(query.splitlines()) <= 4 and "/" not in query.replace(" / ", "") for query in queries)
    with connect(exported / "store") as data:
        accuracy, speedup, paired, broken, cost = (data.execute(query).df() for query in queries)
    table = pd.read_csv(exported / "tables" / "headline.csv").set_index(["Method", "kept tokens"])
    plain = accuracy[accuracy["method"] != "No image"].drop_duplicates(["method", "kept"])
    for row in plain.itertuples():
        assert table.loc[(row.method, row.kept), "accuracy %"] == pytest.approx(row.accuracy_percent)
    for row in speedup.itertuples():
        assert table.loc[(row.method, row.kept), "net prefill speedup"] == pytest.approx(row.net_speedup)
    assert len(paired) == 3 and (paired["questions"] > 0).all() and broken["broken"].iloc[0] > 0
    assert {"train", "tune", "calibrate"} <= set(cost["verb"]) and (cost["seconds"] >= 0).all()


def test_views_show_no_path(exported: Path) -> None:
    with connect(exported / "store") as data:
        for view in ("answers", "accuracy", "changes", "spans", "rounds", "training", "spent"):
            frame = data.execute(f"SELECT * FROM {view} LIMIT 2000").df()
            assert not {"pruner", "weights_sha256"} & set(frame.columns), view
            assert {"method"} <= set(frame.columns) and len(frame), view
