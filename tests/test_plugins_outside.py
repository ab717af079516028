"""Plug-ins that nobody listed: found beside a run or in an installed distribution, run, and told right in the report."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from importlib import metadata
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffprune.cli import commands
from diffprune.core import registry
from diffprune.core.budget import Keep
from diffprune.core.cell import Cell
from diffprune.evaluate.cells import Evaluation, cells
from diffprune.evaluate.evaluator import Evaluator
from diffprune.evaluate.transformers_backend import TransformersBackend
from diffprune.report import report
from diffprune.report.analysis import records
from diffprune.report.analysis.comparison import Comparison, chapters
from diffprune.report.analysis.verdicts import best_rule
from diffprune.report.render.table import Number
from diffprune.report.tables.accuracy import per_budget
from diffprune.store import Store
from diffprune.vlm.load import load
from tests.records import evaluate_cell, method, prediction, provenance, pruner

METHOD = """
from diffprune.core.evidence import QUESTION
from diffprune.core.pruner import Kind, Pruner, ScorePruner

class {name}(ScorePruner):
    {says}
    def score(self, tokens):
        return tokens.features.float().norm(dim=-1)
"""
BENCHMARK = """
from PIL import Image

from diffprune.core.benchmark import Benchmark, Grade, Sample

class {name}(Benchmark):
    {says}

    def samples(self, split, limit=None, protocol="llava"):
        return [Sample(str(i), str(i // 2), str(i // 2), "which colour?", {{}}) for i in range(limit or 8)]

    def image(self, sample):
        return Image.new("RGB", (32, 32), (20 * int(sample.image_id), 0, 0))

    def grade(self, sample, answer, protocol="llava"):
        return Grade(float(answer == "red"), answer, "red")

    def aggregate(self, rows):
        return {{"hue_points": 1000 * sum(row.credit for row in rows) / len(rows)}}
"""
FILES = {
    "pruners/norms.py": METHOD.format(name="Norms", says="'''Keeps the tokens of largest norm.'''\n    label = 'Largest norms'"),
    "pruners/asks.py": METHOD.format(name="Asks", says="label, needs = 'Asker', frozenset({QUESTION})"),
    "pruners/learnt_a.py": METHOD.format(name="LearntA", says="kind = Kind.TRAINED"),
    "pruners/learnt_b.py": METHOD.format(name="LearntB", says="kind = Kind.TRAINED"),
    "pruners/same.py": METHOD.format(name="Same", says="label = 'Grid'"),
    "pruners/debiased.py": """
from diffprune.core.pruner import Pruner

class Debiased(Pruner):
    label = "Debiased"

    def __init__(self, method: Pruner, strength: float = 0.5) -> None:
        self.inner, self.needs = method, method.needs

    def select(self, tokens, cut):
        return self.inner.select(tokens, cut)
""",
    "pruners/_shared.py": "raise RuntimeError('a shared part is no plug-in')",
    "benchmarks/hues.py": BENCHMARK.format(name="Hues", says="label, revision = 'Colours of things', 'hues-1'"),
    "benchmarks/unnamed.py": BENCHMARK.format(name="Unnamed", says="revision = 'unnamed-1'"),
    "models/mine.py": """
from diffprune.models.llava import Llava

class Mine(Llava):
    '''A family of our own.'''
""",
}  # fmt: skip
METHODS = ("norms", "asks", "learnt_a", "learnt_b", "debiased(attention)", "debiased(norms, strength=0.7)", "same")


@pytest.fixture(autouse=True)
def folders(own_folder: Path) -> None:
    """The working directory with plug-ins."""
    for name, text in FILES.items():
        path = own_folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


# --- found -----------------------------------------------------------------------------------------------------------


def test_files_of_the_working_directory_are_found_and_say_where_they_are_from(capsys: pytest.CaptureFixture[str]) -> None:
    for name in FILES:
        kind, stem = name.split("/")[0], Path(name).stem
        if stem != "_shared":
            assert registry.sources(kind)[stem].origin == str(Path(name).absolute())
            assert registry.find(kind, stem).__name__.lower() == stem.replace("_", "")
    assert registry.sources("pruners")["grid"].origin == "diffprune" and "_shared" not in registry.names("pruners")
    assert commands.call(["list", "pruners"]) == (0, "")
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "Largest norms, rule" in lines["norms"] and str(Path("pruners/norms.py").absolute()) in lines["norms"]
    assert commands.call(["show", "debiased"]) == (0, "") and "strength [0.5]" in capsys.readouterr().out


def test_a_folder_may_be_named_for_processes_that_run_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.FOLDER, str(tmp_path))
    monkeypatch.chdir("/")
    assert "norms" in registry.names("pruners")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Any]]:
    """Entry points of distributions that this test installs: a list to add to."""
    points: list[Any] = []
    real = metadata.entry_points
    monkeypatch.setattr(metadata, "entry_points", lambda **asked: [p for p in points if p.group == asked["group"]] or real(**asked))
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    registry._installed.cache_clear()
    yield points
    registry._installed.cache_clear()
    sys.modules.pop("their_package", None)


def point(name: str, distribution: str) -> Any:
    return SimpleNamespace(
        name=name, value=f"their_package:{name.title()}", group="diffprune.pruners", dist=SimpleNamespace(name=distribution)
    )


def test_an_entry_point_is_found_and_says_its_distribution(installed: list[Any], tmp_path: Path) -> None:
    (tmp_path / "site" / "their_package.py").write_text(METHOD.format(name="Theirs", says="label = 'Theirs'"))
    installed.append(point("theirs", "their-distribution"))
    assert registry.sources("pruners")["theirs"].origin == "their-distribution"
    assert registry.load("pruners", "theirs").label == "Theirs" and method(pruner("replaced(theirs)")).label == "Theirs"


@pytest.mark.parametrize("name", ["grid", "twice"])
def test_two_distributions_with_one_plug_in_are_refused(installed: list[Any], name: str) -> None:
    installed += [point(name, "one-distribution"), point(name, "other-distribution")]
    with pytest.raises(ValueError, match=f"-distribution installs a plug-in '{name}', which .* has already"):
        registry.names("pruners")


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("grid", METHOD.format(name="Grid", says=""), "grid.py: diffprune has 'grid' already; give the file another name"),
        ("broken", "1 / 0", "broken.py cannot be imported (ZeroDivisionError: division by zero)"),
        ("broken", "class Broken(", "broken.py cannot be imported (SyntaxError"),
        ("broken", "import not_there", "broken.py cannot be imported (ModuleNotFoundError: No module named 'not_there')"),
        ("other", METHOD.format(name="Another", says=""), "other.py: defines no class named like the plug-in 'other'"),
        ("other", "from diffprune.pruners.grid import Grid as Other", "other.py: defines no class named like"),
    ],
)
def test_a_file_that_is_no_plug_in_is_refused_by_name(name: str, text: str, says: str) -> None:
    Path(f"pruners/{name}.py").write_text(text)
    with pytest.raises(ValueError) as refused:
        registry.load("pruners", name)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_method_whose_options_have_no_names_is_refused() -> None:
    body = METHOD.format(name="Other", says="def __init__(self, *args, **kw): pass")
    Path("pruners/other.py").write_text(body)
    with pytest.raises(ValueError, match=r"other.py: the class Other takes \*args or \*\*kwargs, but its options must have names"):
        registry.load("pruners", "other(kw=3)")


def test_a_file_whose_name_no_plug_in_can_have_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    Path("pruners/my-odd.py").write_text("")
    says = "my-odd.py cannot be used: a plug-in's file is named by letters, digits and underscores"
    with pytest.raises(ValueError, match=says):
        registry.find("pruners", "my-odd")
    for line, told in ((["show", "my-odd"], 2), (["list", "pruners"], 0)):
        code, sentence = commands.call(line)
        assert code == told and says in sentence + capsys.readouterr().out


AGGREGATE = "def aggregate(self, rows):"


@pytest.mark.parametrize(
    ("was", "now", "says"),
    [
        (AGGREGATE, "return 3", "aggregate gives 3, but must give figures by name"),
        (AGGREGATE, "return {}", "aggregate gives {}, but must give figures by name"),
        (AGGREGATE, "1 / 0", "no figure of one graded question: ZeroDivisionError"),
        ('def grade(self, sample, answer, protocol="llava"):', "return 7", "it gives 7, but must give a Grade"),
    ],
    ids=["aggregate a number", "aggregate nothing", "aggregate fails", "grade a number"],
)
def test_a_benchmark_that_gives_something_else_is_told_before_the_start(was: str, now: str, says: str) -> None:
    path = next(Path("benchmarks").glob("[!_]*.py"))
    text = path.read_text()
    assert was in text
    path.write_text(text.replace(was, f"{was}\n        {now}"))
    code, sentence = commands.call(["evaluate", "--pruner", "grid", "--budget", "3", "--benchmark", path.stem, "--dry-run"])
    assert (code, says in sentence, "\n" in sentence) == (2, True, False), sentence


def test_a_broken_file_is_imported_anew_when_it_was_mended() -> None:
    path = Path("pruners/broken.py")
    path.write_text("1 / 0")
    with pytest.raises(ValueError, match="cannot be imported"):
        registry.load("pruners", "broken")
    path.write_text(METHOD.format(name="Broken", says="label = 'Mended'"))
    assert registry.load("pruners", "broken").label == "Mended"


# --- run -------------------------------------------------------------------------------------------------------------


def test_methods_benchmark_and_family_run_like_any_other() -> None:
    vlm = load("tiny(mine)")
    asked = cells(vlm, list(map(pruner, ("unpruned", *METHODS))), [Keep(4)], Evaluation(benchmarks=("hues",), limit=6))
    assert len(asked) == 1 + len(METHODS) and {cell.benchmark_label for cell in asked} == {"Colours of things"}
    evaluator = Evaluator(TransformersBackend(vlm))
    for cell in asked:
        rows = evaluator.run(cell)
        assert {(row.error, row.visual_kept) for row in rows} == {("", 16 if cell.method.kind == "bound" else 4)}, cell.method
    assert {cell.model.name for cell in asked} == {"tiny"} and str(asked[0].model) == "tiny(family='mine')"


@pytest.mark.parametrize(
    ("spelling", "label", "kind"),
    [
        ("norms", "Largest norms", "rule"),
        ("learnt_a", "learnt_a", "trained"),
        ("debiased(attention)", "Debiased of Attention", "rule"),
        ("debiased(norms, strength=0.7)", "Debiased (strength 0.7) of Largest norms", "rule"),
        ("replaced(debiased(random(seed=1)))", "Debiased of Random", "diagnostic"),
        ("debiased(diffprune(denoiser=False))", "Debiased of DiffPrune, without denoiser", "rule"),
    ],
)
def test_a_method_is_called_as_it_says_and_a_wrapper_never_loses_what_it_wraps(spelling: str, label: str, kind: str) -> None:
    assert (method(pruner(spelling)).label, method(pruner(spelling)).kind) == (label, kind)


def test_a_wrapper_of_what_reads_the_question_reads_it() -> None:
    assert method(pruner("debiased(asks)")).reads_question and method(pruner("replaced(debiased(asks))")).reads_question
    assert not method(pruner("debiased(norms)")).reads_question


# --- told ------------------------------------------------------------------------------------------------------------

RIGHT = {"unpruned": 40, "norms": 24, "asks": 36, "diffprune": 12, "learnt_a": 10, "learnt_b": 8, "same": 6}  # of 40; others 4


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Made-up answers of the package's methods and of those outside."""
    spelled = (
        *METHODS,
        "unpruned",
        "diffprune",
        "gumbel_topk",
        "gumbel_keepdrop",
        "random",
        "grid",
        "attention",
        "replaced(norms)",
    )
    for text in (*spelled, "diffprune(question_aware=True)", "diffprune(denoiser=False)"):
        trained = method(pruner(text)).kind == "trained"
        for benchmark, seed in product(("hues", "unnamed"), range(3 if trained else 1)):
            about = {"weights": f"{seed}" * 20, "recipe": "r" * 20, "seed": seed} if trained else {}
            cell = evaluate_cell(text, "Keep(16)", benchmark, **about)
            right, kept = RIGHT.get(text, 4), 144 if text == "unpruned" else 16
            rows = [prediction(i, float(i < right), visual_kept=kept) for i in range(40)]
            Store(tmp_path / "store").publish({"predictions": rows}, cell=cell, provenance=provenance())
    return tmp_path / "store"


@pytest.fixture
def chapter(root: Path) -> Comparison:
    (found,) = chapters(records.read(root))
    return found


def test_an_unlisted_rule_can_be_the_best_rule(chapter: Comparison) -> None:
    found = best_rule(chapter, "Keep(16)")
    assert found and found.label == "Largest norms"


def test_a_question_reader_is_never_the_best_image_only_method(chapter: Comparison) -> None:
    shown = per_budget(chapter, chapter.budgets[0])
    rows = {row[0]: row for row in shown.rows}
    accuracy: dict[Any, float] = {label: row[-2].value for label, row in rows.items() if isinstance(row[-2], Number)}
    assert max(accuracy, key=lambda label: accuracy[label] if label != "Unpruned" else 0) == "Asker"
    bold = {label for label, row in rows.items() for entry in row if isinstance(entry, Number) and entry.best}
    assert bold == {"Largest norms"}, "the best of those that see what it sees"
    order = [row[0] for row in shown.rows]
    assert order.index("Asker") > max(order.index(label) for label in ("Largest norms", "learnt_a", "learnt_b", "Grid (grid)"))


def test_no_two_methods_are_drawn_alike(chapter: Comparison) -> None:
    drawn = {label: chapter.style(label) for label in chapter.methods}
    assert len(drawn) >= 15 and len(set(drawn.values())) == len(drawn)
    assert drawn["learnt_a"] != drawn["learnt_b"]


def test_two_plug_ins_of_one_label_are_two_methods(chapter: Comparison) -> None:
    assert {"Grid (grid)", "Grid (same)"} <= set(chapter.methods) and "Grid" not in chapter.methods
    accuracy = {label: chapter.accuracy(label, "Keep(16)") for label in ("Grid (grid)", "Grid (same)")}
    assert {label: round(found.estimate, 6) for label, found in accuracy.items() if found} == {"Grid (grid)": 10, "Grid (same)": 15}


def test_a_benchmark_has_its_own_heading_and_figure(root: Path, tmp_path: Path) -> None:
    made = report(root, tmp_path / "out")
    with made["csv/budget_keep_16"].open(newline="", encoding="utf-8") as file:
        rows = {row["Method"]: row for row in csv.DictReader(file)}
    assert float(rows["Largest norms"]["Colours of things"]) == 1000 * 24 / 40 and float(rows["Largest norms"]["unnamed"]) == 600
    assert float(rows["Largest norms"]["avg %"]) == 60
    assert "Colours of things: hue points" in made["html"].read_text("utf-8")
    with made["csv/replaced"].open(newline="", encoding="utf-8") as file:
        assert [row["Method"] for row in csv.DictReader(file)] == ["Largest norms"]


@pytest.mark.slow
def test_a_report_needs_none_of_the_plug_ins(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows say what tables must know; a benchmark that is not installed is shown as mean credit, which is said."""
    monkeypatch.chdir("/")
    (chapter,) = chapters(records.read(root))
    found = best_rule(chapter, "Keep(16)")
    assert found and found.label == "Largest norms" and set(map(chapter.heading, chapter.unknown)) == {
        "Colours of things", "unnamed",
    }  # fmt: skip
    assert "Not installed here" in report(root, tmp_path / "out")["html"].read_text("utf-8")


def test_cells_of_a_plug_in_are_values_like_any_other() -> None:
    cell: Cell = evaluate_cell("debiased(norms)")
    assert cell == evaluate_cell("debiased(method=norms, strength=0.5)") != evaluate_cell("debiased(norms, strength=0.6)")
