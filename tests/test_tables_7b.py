"""The tables of 7B models: their very jobs on tiny instances and a few rows of our own, from training to the page."""

from __future__ import annotations

import csv
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffprune.cli import commands
from diffprune.core import budget as budgets
from diffprune.core import registry
from diffprune.core.budget import Above, Keep, Share
from diffprune.core.cell import Cell
from diffprune.core.fitted import FittedPruner
from diffprune.core.records import Provenance
from diffprune.core.site import for_images
from diffprune.core.spec import Spec
from diffprune.distributed import train as on_ray
from diffprune.evaluate.cells import TEN, Evaluation, cells
from diffprune.evaluate.evaluator import Evaluator
from diffprune.evaluate.schedule import weight
from diffprune.evaluate.transformers_backend import TransformersBackend
from diffprune.job import pipeline
from diffprune.job.configure import configure
from diffprune.job.files import load_job
from diffprune.job.job import Job
from diffprune.report.tables import published
from diffprune.store import Store
from diffprune.vlm.load import load
from tests.records import outcome

pytestmark = pytest.mark.slow

JOBS = {"table_llava15_7b": "llava", "table_llava_next_7b": "llava_next", "table_qwen25_vl_7b": "qwen2_5_vl"}
FEW = ("--budget", "1/9", "--set", 'baselines=["unpruned", "grid"]', "--set", 'train.pruners=["diffprune"]')
ONE = ("--benchmark", "mme(main='total', folder='fixture')")
NOT_OURS = {"vocollama", "vtw", "hired", "himap", "illava", "tokencarve"}


def alone(cells: list[Cell], store: Store, provenance: Provenance, *, model: Spec, **_: Any) -> None:
    """A sweep without a cluster."""
    evaluator = Evaluator(TransformersBackend(load(model)))
    for cell in cells:
        rows = evaluator.run(cell)
        store.publish({"predictions": rows, "outcomes": [outcome(len(rows))]}, cell=cell, provenance=provenance)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train's local mode and a loop in this process; `test_train_ray` and `test_sweep` cover what they stand for."""
    fit = on_ray._fit
    monkeypatch.setenv("DIFFPRUNE_DATA", "data")
    monkeypatch.setattr(on_ray, "_fit", lambda config, workers: fit(config, 0))
    monkeypatch.setattr(pipeline.PipelineRun, "ray", lambda self: None)
    monkeypatch.setattr(pipeline, "sweep", alone)


def check_store(root: Path, family: str) -> None:
    """Every question of every benchmark has an answer, graded as its benchmark grades it."""
    rows = Store(root).read("predictions")
    assert set(rows["error"]) == {""} and rows["model"].str.startswith(f"tiny(family={family!r}").all()
    assert set(rows["answer_tokens"]) == {2} and rows["generated_tokens"].max() == 2
    assert rows["revision"].str.contains("@fixture-").all()
    for text, part in rows.groupby("benchmark"):
        benchmark = registry.make("benchmarks", registry.spec("benchmarks", str(text)).at(folder="fixture"))
        samples = {s.id: s for s in benchmark.samples("test")}
        for _, cell in part.groupby("cell"):
            assert set(cell["sample"]) == set(samples) and len(cell) == len(samples)
        for row in part.head(20).itertuples():
            grade = benchmark.grade(samples[str(row.sample)], str(row.answer), "llava")
            assert (grade.credit, grade.parsed, grade.target) == (row.credit, row.parsed, row.target)
    pruned = rows[rows["method_kind"] != "bound"]
    counts = [budgets.parse(b).count(n) for b, n in zip(pruned["budget"], pruned["visual_total"], strict=True)]
    assert pruned["visual_kept"].tolist() == counts
    assert set(rows.loc[rows["blind"], "visual_kept"]) == {0}


def check_page(folder: Path) -> None:
    """It is made, has a column for each of the ten, unpruned first, MME in points, and says that none of it is a result."""
    tables = sorted((folder / "tables").glob("budget_*.csv"))
    columns = ["GQA", "MMBench", "MMBench-CN", "MME", "POPE", "ScienceQA", "SEED", "TextVQA", "VizWiz", "VQAv2"]
    for path in tables:
        rows = read_csv(path)
        assert rows[0]["Method"] == "Unpruned" and [c for c in rows[0] if c in columns] == columns
        assert all(float(r["POPE"]) <= 100 and 0 <= float(r["MME"]) <= 2800 for r in rows)
    for name in ("report.md", "report.html"):
        text = (folder / name).read_text("utf-8")
        for words in (
            "protocol llava", "tiny random instance that has learnt nothing", "not the published data", "MME: mme total",
            "answers are cut at 2 tokens", "MMBench, MMBench-CN, POPE, VizWiz, VQAv2", "as papers print it",
            "What the image contributes",
        ):  # fmt: skip
            assert words in text, (name, words)
        assert "Beside published numbers" not in text, "a random model stands beside nobody"
    assert tables


@pytest.mark.usefixtures("no_cluster")
def test_a_table_from_training_to_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """The command itself, all ten benchmarks with a few methods."""
    name = "table_llava15_7b"
    line = ["run", name, "--tiny", *FEW]
    assert commands.call(line) == (0, "")
    folder, out = Path("runs") / f"{name}-tiny", capsys.readouterr().out
    check_store(folder / "store", JOBS[name])
    check_page(folder / "report")
    assert "fixture: A few rows of our own" in out and "tiny: The model" in out
    assert commands.call(line) == (0, "") and "all 40 cells are in the store already" in capsys.readouterr().out


@pytest.mark.usefixtures("no_cluster")
@pytest.mark.parametrize("name", JOBS)
def test_every_method_of_a_table_trains_and_answers(name: str) -> None:
    """The command itself, all methods on one benchmark, at a budget that cuts inside a decoder of two layers can meet."""
    assert commands.call(["run", name, "--tiny", "--set", "report=false", *ONE]) == (0, "")
    rows = Store(Path("runs") / f"{name}-tiny" / "store").read("predictions")
    asked = {str(spec) for spec in load_job(name).baselines}
    assert set(rows["error"]) == {""} and set(rows["pruner"]) == asked and len(asked) > 25
    pruned = rows[rows["method_kind"] != "bound"]
    assert set(pruned["budget"]) == {"Share(0.666667)"} and (pruned["visual_kept"] < pruned["visual_total"]).all()


def printed(model: str) -> set[str]:
    """Methods that papers tabulate for a model, as `published` spells them, without variants of an ablation."""
    found = {p.method for p in published.read() if p.model == model and p.method != "unpruned"}
    plain = {method.removeprefix("PoRe(").partition(",")[0].rstrip(")") for method in found if " without " not in method}
    return {published._key(method) for method in plain}


@pytest.mark.parametrize("name", JOBS)
def test_a_table_asks_what_the_papers_print(name: str) -> None:
    """Ten benchmarks in MME's total, the papers' budgets, every method that we have, scorers from where the recipe leaves them."""
    job = load_job(name)
    assert job.evaluate and job.evaluate.blind and job.evaluate.limit is None and job.evaluate.protocol == "llava"
    assert tuple(asked.name for asked in job.evaluate.benchmarks) == TEN
    assert "mme(main='total')" in map(str, job.evaluate.benchmarks)
    model = published.model_of(str(job.model))
    budgets_printed = {
        (p.num_kept, round(p.share, 4)) for p in published.read()
        if p.source == "2605.28051" and p.model == model and p.share < 1 and p.benchmark == "mme"
    }  # fmt: skip
    found = {(getattr(b, "num", None), getattr(b, "share", None)) for b in job.budgets}
    for num, share in budgets_printed:
        assert any(num == n or (s and abs(s - share) < 1e-3) for n, s in found), (num, share)
    too_late = {"pyramiddrop"} if name == "table_llava_next_7b" else set()  # a quarter of the tokens is more than any budget
    assert model and printed(model) - NOT_OURS - {published._key(spec.name) for spec in job.baselines} == too_late
    recipe = load_job(name.replace("table", "train"))
    assert recipe.train and recipe.model.name == job.model.name and job.family == recipe.family == JOBS[name]
    learned = [(str(spec), spec.place("weights")) for spec in job.baselines if spec.place("weights")]
    places = recipe.scorers((Path("runs") / recipe.name).absolute())
    assert sorted(learned) == sorted((str(spec), place) for (spec, _), place in places.items())
    fitted = {n for n in registry.names("pruners") if issubclass(registry.find("pruners", n), FittedPruner)}
    assert fitted - {spec.name for spec in job.baselines} == ({"atp"} if too_late else set())
    assert sum(spec.name == "random" for spec in job.baselines) == 3


@pytest.mark.parametrize(("name", "visual"), list(zip(JOBS, (576, 2880, 256), strict=True)))
def test_every_method_of_a_table_meets_a_budget(name: str, visual: int) -> None:
    """In a decoder as deep as the model's; where a method is trained, also one of the budgets that are drawn then."""
    job, recipe = load_job(name), load_job(name.replace("table", "train"))
    assert recipe.train
    shape: Any = SimpleNamespace(layers=recipe.config["text_config"]["num_hidden_layers"], visual_tokens=visual)
    met: dict[str, set[str]] = {}
    for spec in job.baselines:
        pruner = registry.make("pruners", spec.without_places())
        for budget in {*job.budgets, *(recipe.train.budgets if spec.place("weights") else ())}:
            with suppress(ValueError):
                for_images(pruner.cuts(budget, shape), [visual])
                met.setdefault(str(spec), set()).add(str(budget))
    assert set(met) == {str(spec) for spec in job.baselines}
    for spec in recipe.train.pruners:
        assert {str(budget) for budget in recipe.train.budgets} & met[str(spec)], str(spec)
    if name == "table_llava15_7b":
        assert met["fastv"] == {"Keep(192)", "Keep(128)", "Keep(64)"} and met["pyramiddrop"] == {"Keep(192)"}
        assert met["atp"] == {"Keep(192)", "Keep(128)"}


@pytest.mark.usefixtures("no_cluster")
def test_a_first_budget_that_a_method_cannot_meet_is_left_out_for_it() -> None:
    """Nobody is refused for it before anything runs, where the job leaves such budgets out."""
    line = ["run", "table_llava15_7b", "--tiny", "--dry-run", *ONE, "--budget", "1/9", "--budget", "2/3"]
    assert commands.call(line) == (0, "")
    code, sentence = commands.call([*line, "--set", "leave_out=false"])
    assert code == 2 and "cannot meet Share(0.111111)" in sentence


def test_weights_may_come_later_but_are_looked_for_before_anything_runs() -> None:
    job = Job(name="x", evaluate={}, baselines=("unpruned", "diffprune(weights='runs/x/nowhere')"))
    assert job.baselines[1].place("weights") == Path("runs/x/nowhere").absolute() and str(job.baselines[1]) == "diffprune"
    code, sentence = commands.call(["evaluate", "--pruner", "grid", "--set", "baselines=[\"diffprune(weights='/nowhere')\"]"])
    assert code == 2 and "no scorer '/nowhere'" in sentence
    for text, says in (
        ("diffprune", "is not trained"),
        ("grid(weights='a')", "grid has no option 'weights': it takes none"),
        ("diffprune(weigths='a')", "did you mean 'weights'"),
    ):
        with pytest.raises(ValueError, match=says):
            Job(name="x", evaluate={}, baselines=(text,))


def test_a_sweep_weighs_every_cell_of_a_table_and_blind_ones_least() -> None:
    options = Evaluation(benchmarks=("world('pope')",), blind=True)
    asked = cells(load("tiny(llava)"), [Spec("unpruned"), Spec("grid")], [Share(1 / 9), Keep(4), Above(0.0)], options)
    first, *rest, last = (cell.method.label for cell in sorted(asked, key=weight, reverse=True))
    assert (first, last, set(rest)) == ("Unpruned", "No image", {"Grid"})


def test_the_protocol_is_an_option_of_the_command() -> None:
    job = configure("evaluate", None, None, {"protocol": "lmms_eval", "benchmarks": ("gqa",)}, {})
    assert job.evaluate and job.evaluate.protocol == "lmms_eval"
    code, sentence = commands.call(["evaluate", "--protocol", "lmms-eval", "--benchmark", "gqa(folder='fixture')"])
    assert code == 2 and "did you mean 'lmms_eval'" in sentence
