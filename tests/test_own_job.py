"""A user's own job: benchmarks of its own for every verb, methods that cannot run, scorers of another model, changed settings."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from PIL import Image

from diffprune.cli import commands, job_verbs
from diffprune.cli.listing import shown
from diffprune.core import registry
from diffprune.core.budget import Above, Keep
from diffprune.core.cell import Cell, EvaluateSpec, Questions, TuneSpec, describe
from diffprune.core.evidence import EvidenceKind
from diffprune.core.pruner import TrainedOn
from diffprune.core.records import Choice, CurvePoint, Outcome, Prediction, Provenance, Timing, told_verdict
from diffprune.core.site import ENCODED, Cut
from diffprune.core.spec import Spec
from diffprune.core.vlm import VLM
from diffprune.data import SOURCES
from diffprune.distributed.sweep import SweepFailed
from diffprune.evaluate.cells import Evaluation
from diffprune.evaluate.cells import cells as evaluation_cells
from diffprune.io.job_files import known, run_name
from diffprune.io.run_lock import lock
from diffprune.job import pipeline, settings
from diffprune.job import plan as planning
from diffprune.job.configure import configure
from diffprune.job.files import load_job
from diffprune.job.job import SECTIONS, Job
from diffprune.job.plan import Plan
from diffprune.measure import measure as measuring
from diffprune.pruning.pretrained import check_model
from diffprune.report import report, summary
from diffprune.report.analysis import records
from diffprune.report.analysis.comparison import chapters
from diffprune.report.tables.speed import tuned
from diffprune.store import Store
from diffprune.store.views import connect
from diffprune.timing.options import Measurement
from diffprune.train.recipe import Recipe
from diffprune.tune import cells as tuning
from diffprune.tune.calibration import Scored
from diffprune.tune.options import Tuning
from diffprune.tune.search import Failed, Search
from diffprune.tune.solver import Accuracy, MeasuredSpeedup
from diffprune.vlm.load import load
from tests.records import evaluate_cell, measure_cell

HOUSE = Path(__file__).parent.parent
SHELF = {"red": (200, 0, 0), "blue": (0, 0, 200)}


@pytest.fixture(scope="module")
def embedded() -> VLM:
    return load("embedded")


def shelves(folder: Path, *splits: str, rows: int = 8) -> Path:
    """An image folder of a user, one sub-folder per split; no picture is there twice."""
    for number, split in enumerate(splits):
        (folder / split).mkdir(parents=True)
        lines = []
        for i, word in zip(range(rows), list(SHELF) * rows, strict=False):
            pixels = np.full((96, 96, 3), SHELF[word], np.uint8)
            pixels[: 2 + i, : 2 + number] = 255
            Image.fromarray(pixels).save(folder / split / f"{i}.png")
            lines.append(json.dumps({"file_name": f"{i}.png", "question": "what color is it ?", "answer": word}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def provenance(run: str = "mine", started: str = "2026-01-01T00:00:00+00:00") -> Provenance:
    return Provenance(run, 0, "", False, "{}", "{}", 0, started)


def cell(vlm_name: str = "m", limit: int | None = None, pruner: str = "random", benchmark: str = "world('gqa')") -> Cell:
    made = registry.load("pruners", pruner)
    questions = Questions(registry.spec("benchmarks", benchmark), f"{benchmark}@1", limit=limit)
    return Cell(Spec(vlm_name), "float32", EvaluateSpec(made.spec, Keep(8), questions, 8), describe(made), benchmark)


def answers(num: int, failed: int = 0, parsed: str = "a") -> list[Prediction]:
    return [
        Prediction(str(i), str(i), "", "", "q", "a", parsed, "a", float(i % 2), 16, 8, 5, 1, "ValueError: no" if i < failed else "")
        for i in range(num)
    ]


def publish(store: Store, one: Cell, rows: list[Prediction], **made: str) -> None:
    outcome = Outcome("ok", "", len(rows), 0.0)
    store.publish({"predictions": rows, "outcomes": [outcome]}, cell=one, provenance=provenance(**made))


# --- benchmarks of the job's own -------------------------------------------------------------------------------------


def test_tune_and_measure_ask_what_the_job_is_evaluated_on(embedded: VLM) -> None:
    mine = registry.spec("benchmarks", f"custom('{shelves(Path('shelves'), 'calibration', 'test')}')")
    job = Job(
        name="mine", evaluate=Evaluation(benchmarks=(mine,), protocol="lmms_eval"), tune=Tuning(), measure=Measurement(batches=(4,))
    )
    assert job.tuning and job.measurement
    (asked,) = tuning.settings(job.tuning).questions
    known = registry.sourced("benchmarks", mine)
    assert (asked.benchmark, asked.split, asked.protocol) == (known, "calibration", "lmms_eval")
    timed = measuring.cells(embedded, [Spec("random")], [Keep(8)], job.measurement)
    assert {(measuring.measured(c).questions.benchmark, measuring.measured(c).questions.protocol) for c in timed} == {
        (known, "lmms_eval")
    }
    with pytest.raises(ValueError, match=r"8 samples .* a batch takes 9"):
        measuring.cells(embedded, [Spec("random")], [Keep(8)], job.measurement.model_copy(update={"batches": (4, 9)}))


MINE = """from diffprune.job import *
job = Job(
    name="mine", baselines=("unpruned", "random"), budgets=("Keep(8)",), evaluate=Evaluation(protocol="lmms_eval"),
    tune=Tuning({tune}), measure=Measurement(),
)"""


@pytest.mark.parametrize(
    ("short", "given", "found"),
    [
        ({}, {}, ("lmms_eval",) * 3),
        ({"protocol": "llava"}, {}, ("llava",) * 3),
        ({}, {"measure.protocol": "llava"}, ("lmms_eval", "lmms_eval", "llava")),
        ({}, {"tune.repeats": 1, "measure.rounds": 7}, ("lmms_eval",) * 3),
    ],
)
def test_the_protocol_of_the_job_is_that_of_tune_and_measure(
    short: dict[str, Any], given: dict[str, Any], found: tuple[str, str, str]
) -> None:
    """The way of every command line: it made a copy in which every default had been given."""
    Path("mine.py").write_text(MINE.format(tune=""))
    job = configure("run", "mine.py", None, short, given)
    assert job.evaluate and job.tuning and job.measurement
    assert (job.evaluate.protocol, job.tuning.protocol, job.measurement.protocol) == found
    noted = settings.noted(job)
    assert (noted["tune"]["protocol"], noted["measure"]["protocol"]) == found[1:]


def test_a_protocol_of_its_own_stays_that_of_tune() -> None:
    Path("mine.py").write_text(MINE.format(tune="protocol='llava'"))
    job = configure("run", "mine.py", None, {}, {})
    assert job.tuning and job.measurement and (job.tuning.protocol, job.measurement.protocol) == ("llava", "lmms_eval")


def test_settings_within_settings_that_a_job_leaves_to_their_defaults_can_be_set() -> None:
    Path("mine.py").write_text(MINE.format(tune=""))
    assert configure("run", "mine.py", None, {}, {"assumed.visual": 240, "config.model_type": "llava"}).assumed.visual == 240


@pytest.mark.parametrize(
    ("there", "evaluated", "given", "found"),
    [
        (("test", "calibration", "train"), "test", "", "calibration"),
        (("test", "train", "validation"), "test", "", "validation"),
        (("validation", "train"), "validation", "", "train"),
        (("test",), "test", "", None),
        (("test", "train"), "test", "test", None),
        (("test", "train"), "test", "train", "train"),
    ],
)
def test_nothing_is_tuned_on_the_split_that_is_evaluated(
    there: tuple[str, ...], evaluated: str, given: str, found: str | None
) -> None:
    benchmark = registry.load("benchmarks", f"custom('{shelves(Path('shelves'), *there, rows=1)}')")
    options = Tuning(split=given, tested=evaluated)
    if found is None:
        with pytest.raises(ValueError, match="tuned on its test split 'test'"):
            tuning.calibration_split(benchmark, options)
    else:
        assert tuning.calibration_split(benchmark, options) == found


def test_the_demo_asks_what_it_asked(embedded: VLM) -> None:
    job = load_job("demo")
    assert job.tuning and job.measurement and job.measurement.benchmark == Spec("world").with_options(like="gqa")
    asked = [(str(q.benchmark), q.split, q.protocol) for q in tuning.settings(job.tuning).questions]
    assert asked == [(f"world(like={name!r})", "calibration", "llava") for name in ("gqa", "textvqa", "pope")]


def test_a_model_of_ones_own_is_not_asked_the_embedded_world() -> None:
    for verb in ("tune", "measure"):
        job = configure(verb, None, None, {"model": "owner/name", "pruners": ("random",)}, {})
        with pytest.raises(ValueError, match="nothing says what to ask owner/name"):
            _ = job.tuning if verb == "tune" else job.measurement
        own = f"custom('{shelves(Path(verb), 'test', 'train', rows=1)}')"
        job = configure(verb, None, None, {"model": "owner/name", "pruners": ("random",), "benchmarks": (own,)}, {})
        assert registry.spec("benchmarks", own) in ((*job.tuning.benchmarks,) if job.tuning else (job.measurement.benchmark,))


def test_the_page_on_ones_own_model_and_data_works_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """The README's job file, with the embedded model under the user's name and rows of the columns it names."""
    page = (HOUSE / "README.md").read_text().partition("## Your own model and data")[2].partition("\n## ")[0]
    Path("jobs").mkdir()
    Path("jobs/mine.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    Path("models").mkdir()
    Path("models/my-llava").symlink_to(HOUSE / "diffprune/embedded/checkpoint")
    shelves(Path("shelves"), "calibration", "test", "train", rows=80)
    for path in Path("shelves").rglob("metadata.jsonl"):
        path.write_text(path.read_text().replace('"question"', '"text"').replace('"answer"', '"label"'))
    Path("shelves/train").rename("pictures")
    Path("train.jsonl").write_text(Path("pictures/metadata.jsonl").read_text().replace("file_name", "image"))
    lines = [line.split("#")[0].split() for line in page.splitlines() if line.startswith("    diffprune run")]
    assert len(lines) == 3
    for line in lines:
        assert commands.call([*line[1:], *([] if "--dry-run" in line else ["--dry-run"])]) == (0, "")
    assert "train: 6 scorers of 400 steps" in capsys.readouterr().out and not Path("runs").exists()


# --- paths and names -------------------------------------------------------------------------------------------------


def test_paths_of_a_job_are_absolute_and_no_part_of_what_is_asked(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for place in ("here", "there"):
        (own_folder / place / "my" / "model").mkdir(parents=True)
        (own_folder / place / "rows.jsonl").write_text("{}")
        monkeypatch.chdir(own_folder / place)
        data = {"train.model": "my/model", "train.data": "jsonl('rows.jsonl')", "evaluate.benchmarks": ["custom('rows.jsonl')"]}
        job = configure("run", None, None, {"model": "my/model", "scorers": ("diffprune",)}, data)
        assert job.train and job.train.model.place("folder") == own_folder / place / "my/model" == job.model.place("folder")
        assert job.train.data.place("file") == own_folder / place / "rows.jsonl"
        found.append(job)
    assert found[0] == found[1] and "here" not in json.dumps(found[0].model_dump(mode="json"))


def test_the_name_of_a_run_is_read_from_the_text_of_its_job() -> None:
    assert {name: run_name(path) for name, path in known().items()} == {name: load_job(name).name for name in known()}
    for text in ("job = (", "job = Job(name=f'{1}')", "\0", "x = 1"):
        Path("odd.py").write_text(text)
        assert run_name(Path("odd.py")) is None


def test_a_held_name_is_refused_before_torch_is_imported() -> None:
    code = "import sys; from diffprune.cli.commands import call; print(call(sys.argv[1:]), 'torch' in sys.modules)"
    with lock("runs/demo/store", "demo"), lock("runs/look/store", "look"):
        for line in (["demo"], ["evaluate", "demo"], ["evaluate", "--pruner", "random", "--budget", "3", "--name", "look"]):
            done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True, check=True)
            assert done.stdout.startswith("(2, ") and "is held by process" in done.stdout and done.stdout.endswith(" False\n")
    assert commands.call(["run", "demo", "--dry-run", "--set", "tune=null", "--set", "replaced=[]", "--set", "budgets=[7]"]) == (
        0,
        "",
    )


# --- what is named twice, and data that cannot be asked ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ('baselines=["unpruned", "random", "random(seed=0)"]', "baselines: 'random' is named twice"),
        ('budgets=["Share(1/4)", "25%"]', "budgets: 'Share(0.25)' is named twice"),
        ("tune.targets=[1.5, 1.5]", "tune.targets: '1.5' is named twice"),
        ("tune.benchmarks=[\"world('gqa')\", \"world('gqa')\"]", "tune.benchmarks: \"world(like='gqa')\" is named twice"),
    ],
)
def test_what_is_named_twice_is_refused(setting: str, says: str) -> None:
    """Merged silently, a table had a row less than its job; of a benchmark tuned on, every question counted twice."""
    code, sentence = commands.call(["run", "demo", "--dry-run", "--set", setting])
    assert (code, says in sentence, "\n" in sentence) == (2, True, False), sentence


def test_a_mistyped_setting_is_told_before_the_one_that_it_leaves_missing(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from diffprune.job import Job\njob = Job(nam='t')\n")
    code, sentence = commands.call(["run", str(tmp_path / "mine.py"), "--dry-run"])
    assert code == 2 and "no setting 'nam'" in sentence and "'name'" in sentence


def test_two_data_sets_of_one_spelling_need_titles(embedded: VLM) -> None:
    """Paths are no part of what is asked, so both would be `custom` in the tables, and one of them left out as the older."""
    one, two = (shelves(Path(name), "test") for name in ("one", "two"))
    Image.new("RGB", (96, 96), "green").save(two / "test" / "0.png")
    methods = [Spec("unpruned"), Spec("grid")]
    with pytest.raises(ValueError, match=r"one and .*two are two data sets of one name, 'custom', which tables would take for one"):
        evaluation_cells(embedded, methods, [Keep(3)], Evaluation(benchmarks=(f"custom('{one}')", f"custom('{two}')")))
    titled = Evaluation(benchmarks=(f"custom('{one}', title='shop')", f"custom('{two}', title='store')"))
    asked, store = evaluation_cells(embedded, methods, [Keep(3)], titled), Store("told")
    for cell in asked:
        rows = [
            Prediction(str(i), str(i), "", "", "what ?", "red", "red", "red", float(i % 2), 144, 3, 20, 2, "") for i in range(6)
        ]
        store.publish({"predictions": rows, "outcomes": [Outcome("ok", "", 6, 0.1)]}, cell=cell, provenance=provenance())
    found = records.read(Path("told"))
    assert len(found.cells) == len(asked) == 4 and not found.problems
    assert set(found.cells["benchmark_label"]) == {"shop", "store"}


def test_methods_asked_about_other_data_share_no_table() -> None:
    """Of two files under one name, asked by two commands, the newest counts, for every method."""
    store = Store("told")
    for day, (revision, methods) in enumerate(
        (("custom@1", ("unpruned", "random", "grid")), ("custom@2", ("unpruned", "grid"))), 1
    ):
        for method in methods:
            rows = [Prediction(str(i), str(i), "", "", "?", "red", "red", "red", 1.0, 144, 144, 20, 2, "") for i in range(6)]
            made = provenance(started=f"2026-01-0{day}T00:00:00+00:00")
            asked = evaluate_cell(method, benchmark="custom('rows.jsonl')", revision=revision)
            store.publish({"predictions": rows, "outcomes": [Outcome("ok", "", 6, 0.1)]}, cell=asked, provenance=made)
    found = records.read(Path("told"))
    assert set(found.cells["revision"]) == {"custom@2"} and set(found.cells["label"]) == {"Unpruned", "Grid"}
    assert "1 cell of Random left out: other data than those that custom was asked about last" in found.problems
    told = connect(Path("told")).sql("SELECT DISTINCT revision, method FROM cells ORDER BY method").fetchall()
    assert told == [("custom@2", "Grid"), ("custom@2", "Unpruned")], "and so it is in the views, by which pages are verified"


def test_figures_of_ones_own_data_are_the_rules_own() -> None:
    """The store has no path, without which the benchmark was taken for one that is not installed: no F1, and a false sentence."""
    store, said = Store("told"), ["yes", "yes", "yes", "no", "no", "no"]
    asked = evaluate_cell("unpruned", benchmark="custom('rows.jsonl', grader='yes_no')", revision="custom@1")
    rows = [
        Prediction(str(i), str(i), "", "", "?", word, word, target, float(word == target), 144, 144, 20, 2, "")
        for i, (word, target) in enumerate(zip(said, ["yes", "yes", "no", "no", "no", "yes"], strict=True))
    ]
    store.publish({"predictions": rows, "outcomes": [Outcome("ok", "", 6, 0.1)]}, cell=asked, provenance=provenance())
    (chapter,) = chapters(records.read(Path("told")))
    (figures,) = chapter.native.values()
    assert not chapter.unknown and next(iter(figures)) == "accuracy"
    assert figures["f1_mean"] == pytest.approx(200 / 3) and figures["yes_ratio"] == 50
    assert "Not installed here" not in report(Path("told"), Path("page"))["html"].read_text("utf-8")


@pytest.mark.parametrize("verb", ["evaluate", "tune", "measure"])
def test_a_truncated_picture_is_told_before_the_start(verb: str) -> None:
    place = shelves(Path("mine"), "test", "calibration")
    broken = place / ("calibration" if verb == "tune" else "test") / "6.png"
    broken.write_bytes(broken.read_bytes()[:-40])
    line = [verb, "--pruner", "grid", "--benchmark", "custom('mine')", "--dry-run"]
    more = ["--set", "tune.calibration=4", "--set", "tune.held_out=4"] if verb == "tune" else ["--budget", "3"]
    code, sentence = commands.call(line + more)
    assert (code, "\n" in sentence) == (2, False), sentence
    assert "metadata.jsonl line 7 is damaged or cut short" in sentence


@pytest.mark.parametrize("verb", ["evaluate", "tune"])
@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("def same(answer):\n    return 1\n", "fails on the answer 'red' to question 0: TypeError: same() takes 1 positional"),
        ("def same(answer, answers, row):\n    return 7\n", "answered 7: a credit from 0 to 1"),
        ("def some(answer, answers, row):\n    return 1\n", "my_rule has no function 'same'"),
    ],
)
def test_a_grader_that_fails_is_told_before_the_start(
    verb: str, body: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelves(Path("mine"), "test", "calibration")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "my_rule.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.delitem(sys.modules, "my_rule", raising=False)
    benchmark = "custom('mine', grader='my_rule:same')"
    line = [verb, "--pruner", "grid", "--benchmark", benchmark, "--dry-run"]
    more = ["--set", "tune.calibration=4", "--set", "tune.held_out=4"] if verb == "tune" else ["--budget", "3"]
    code, sentence = commands.call(line + more)
    monkeypatch.delitem(sys.modules, "my_rule", raising=False)
    assert (code, says in sentence, "\n" in sentence) == (2, True, False), sentence


# --- methods that cannot run -----------------------------------------------------------------------------------------

BROKEN = """
from diffprune.core.pruner import Kind, ScorePruner

class Broken(ScorePruner):
    label, kind = "Broken", Kind.RULE

    def score(self, tokens):
        {body}
"""


def broken(body: str) -> None:
    Path("pruners").mkdir(exist_ok=True)
    Path("pruners/broken.py").write_text(BROKEN.format(body=body))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            "raise RuntimeError('no such layer\\n  ^^^^')",
            "Broken cannot run on embedded: RuntimeError: no such layer; do without it",
        ),
        ("return tokens.features[..., 0] * float('nan')", "Broken gives scores that are NaN"),
        ("return tokens.features", "Broken cannot run on embedded"),
    ],
)
@pytest.mark.parametrize("verb", ["evaluate", "tune", "measure"])
def test_a_method_that_cannot_run_is_told_before_the_start(verb: str, body: str, says: str) -> None:
    broken(body)
    more = [] if verb == "tune" else ["--budget", "3"]
    code, sentence = commands.call([verb, "--pruner", "random", "--pruner", "broken", *more])
    assert (code, says in sentence, "\n" in sentence) == (2, True, False), sentence
    assert not Path("runs").exists()


def test_no_budget_of_the_job_keeps_a_method_from_being_tuned() -> None:
    """Tuning finds budgets itself: three tokens, which two whole layers see more than, are nothing it would ask for."""
    Path("mine.py").write_text(
        "from diffprune.job import *\njob = Job(name='mine', baselines=('unpruned', 'fastv'), budgets=('Keep(3)',),\n"
        "    tune=Tuning(targets=(1.5,), benchmarks=(\"world('pope')\",)), evaluate=Evaluation())"
    )
    code, sentence = commands.call(["evaluate", "mine.py", "--dry-run"])
    assert code == 2 and "cannot meet Keep(3)" in sentence
    assert commands.call(["tune", "mine.py", "--dry-run"]) == (0, "")


def test_a_report_of_a_job_asks_nothing_of_its_scorers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run with other settings of training, of which the verb takes none, it writes the page of what is there."""
    publish(Store("runs/demo/store"), cell(), answers(6))

    def otherwise(*_: Any) -> Any:
        raise ValueError("was trained with other settings")

    monkeypatch.setattr(planning, "missing", otherwise)
    assert commands.call(["evaluate", "demo"]) == (2, "was trained with other settings")
    assert commands.call(["report", "demo"]) == (0, "") and Path("runs/demo/report/report.html").is_file()


@pytest.mark.parametrize("spelling", ["random", "grid", "attention"])
def test_nan_scores_are_refused_whatever_the_budget(embedded: VLM, spelling: str) -> None:
    made, tokens = (
        registry.load("pruners", spelling),
        embedded.encode(embedded.pixels([Image.new("RGB", (96, 96))] * 2), registry.load("pruners", spelling).needs),
    )
    if not hasattr(made, "score"):
        pytest.skip("chooses by no score")
    scores = made.score(tokens).float()
    scores[1, 3] = torch.nan
    object.__setattr__(made, "score", lambda _: scores)
    for budget in (Keep(5), Above(0.0)):
        with pytest.raises(ValueError, match=f"{made.label} gives scores that are NaN"):
            made.select(tokens, Cut(ENCODED, budget))
        padded = replace(tokens, valid=tokens.valid & ~scores.isnan())
        assert made.select(padded, Cut(ENCODED, budget)).keep.any(1).all(), "padding may hold anything"


def test_stages_go_to_their_end_when_cells_of_one_have_no_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """tune fails; evaluate, measure and report run; the exit code is 1 and the sentence the cause."""
    ran = []

    def stage(name: str) -> Any:
        def body(self: pipeline.PipelineRun) -> None:
            ran.append(name)
            if name == "tune":
                raise SweepFailed("2 of 4 cells could not be tuned; first Attention: ValueError: no [CLS]")

        return body

    for name in ("tune", "evaluate", "measure", "report"):
        monkeypatch.setattr(pipeline.PipelineRun, name, stage(name))
    Path("mine.py").write_text(
        "from diffprune.job import *\njob = Job(name='mine', tune=Tuning(), measure=Measurement(), budgets=('7',),\n"
        "    baselines=('unpruned', 'random'), evaluate=Evaluation(benchmarks=(\"world('pope')\",)))"
    )
    code, sentence = commands.call(["run", "mine.py"])
    assert ran == ["tune", "evaluate", "measure", "report"] and code == 1
    assert sentence == "tune: 2 of 4 cells could not be tuned; first Attention: ValueError: no [CLS]"
    assert sentence in capsys.readouterr().out


class Known:
    """Probes with known answers, of which one method has none."""

    def curve(self) -> tuple[list[CurvePoint], list[Timing]]:
        return [CurvePoint(1, 10 + n, n, 10.0 + n, 0.0, 0.0, 3, 10.0 + n) for n in (1, 50, 100)], []

    def overhead(self, pruner: Spec) -> list[Timing]:
        if pruner.name == "attention":
            raise Failed("ValueError: no [CLS]")
        return [Timing("overhead", "pruned", 0, 0.1, kept, 20, "") for kept in (1.0, 100.0)]

    def scores(self, pruner: Spec) -> Scored:
        return Scored(np.array([100, 100]), np.array([10, 10]), np.array([0]))

    def accuracy(self, pruner: Spec, budget: Any) -> Accuracy:
        return Accuracy(0.5, 0.4, 0.6)

    def answers(self, pruner: Spec, budget: Any) -> list[Any]:
        return []

    def check(self, asked: Any) -> list[MeasuredSpeedup]:
        return [MeasuredSpeedup(2.0, 1.9, 2.1, 2) for _ in asked]


@pytest.mark.parametrize("trials_fail", [False, True])
def test_a_method_that_cannot_be_tuned_leaves_the_others_theirs(embedded: VLM, trials_fail: bool) -> None:
    options = Tuning(targets=(2.0,), kinds=("count",), benchmarks=("world('pope')",), corrections=0)
    asked = tuning.cells(embedded, [Spec("attention"), Spec("grid"), Spec("random")], options)

    def trials(candidates: Any, found: Any) -> None:
        for one in candidates:
            if not (trials_fail and one[0].name == "random"):
                found(one, Accuracy(0.5, 0.4, 0.6))
        if trials_fail:
            raise Failed("1 of 2 trials failed")

    store = Store("store")
    search = Search(asked, options, store, provenance(), Known(), trials)
    search.go()
    failed = {c.method.label: reason for c, reason in search.failed.items()}
    assert failed == {"Attention": "ValueError: no [CLS]"} | ({"Random": "1 of 2 trials failed"} if trials_fail else {})
    assert {c.pruner.name for c in asked if c.key in store.done() and c.pruner} == {"grid", "random"} - (
        {"random"} if trials_fail else set()
    )
    assert set(store.read("outcomes").query("status == 'failed'")["reason"]) == set(failed.values())


@pytest.mark.slow
def test_a_method_without_its_evidence_leaves_the_others_their_timings(embedded: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Measurement(batches=(2,), rounds=2, warmup=0, slow_rounds=2, inputs=1, spans=(), benchmark="world('pope')")
    asked = measuring.cells(embedded, [Spec("attention"), Spec("grid")], [Keep(8)], options)
    encode = embedded.encode

    def without_attention(pixels: Any, needs: Any = frozenset()) -> Any:
        if any(one.kind is EvidenceKind.ENCODER_ATTENTION for one in needs):
            raise ValueError("no [CLS]")
        return encode(pixels, needs)

    monkeypatch.setattr(embedded, "encode", without_attention)
    found = {c.method.label: one.outcome for c, one in measuring.measure(embedded, asked, options).items()}
    assert (found["Attention"].status, found["Attention"].reason, found["Grid"].status) == ("failed", "ValueError: no [CLS]", "ok")


# --- scorers of another model ----------------------------------------------------------------------------------------


def test_a_scorer_of_another_model_is_refused_unless_it_is_meant(embedded: VLM) -> None:
    other = TrainedOn("owner/other", "0" * 20, embedded.dtype)
    for spelling in ("diffprune", "replaced(diffprune)"):
        made = registry.load("pruners", spelling)
        (made.inner or made).trained_on = TrainedOn("elsewhere/renamed", embedded.weights_hash, embedded.dtype)
        check_model(made, embedded)
        (made.inner or made).trained_on = other
        with pytest.raises(ValueError, match=r"trained on owner/other .* this is embedded .* other_model=True"):
            check_model(made, embedded)
    meant = registry.load("pruners", "diffprune(other_model=True)")
    meant.trained_on = other
    check_model(meant, embedded)
    assert describe(meant).label == "DiffPrune, trained on another model"


def test_every_verb_asks_whose_scorer_it_is(embedded: VLM) -> None:
    made = registry.load("pruners", "diffprune")
    made.build(embedded.encode(embedded.pixels([Image.new("RGB", (96, 96))])))
    made.save_pretrained("scorer", model="owner/other", model_hash="0" * 20, dtype=embedded.dtype, recipe_key="", seed=0)
    own = registry.spec("pruners", "diffprune(weights='scorer')")
    options = Evaluation(benchmarks=("world('pope')",), limit=1)
    for ask in (
        lambda spec: evaluation_cells(embedded, [spec], [Keep(8)], options),
        lambda spec: tuning.cells(embedded, [spec], Tuning()),
        lambda spec: measuring.cells(embedded, [spec], [Keep(8)], Measurement()),
    ):
        with pytest.raises(ValueError, match="trained on owner/other"):
            ask(own)
        assert ask(own.with_options(other_model=True))
    store = Store("store")
    (found,) = evaluation_cells(embedded, [own.with_options(other_model=True)], [Keep(8)], options)
    publish(store, found, answers(4))
    assert "trained on another model" in summary("store") and "other_model: Scorers that were trained" in summary("store")


# --- what is said at the end -----------------------------------------------------------------------------------------


def test_the_headline_follows_the_jobs_own_settings_and_full_comes_before_limited() -> None:
    store = Store("store")
    publish(store, cell(limit=60), answers(6))
    publish(store, cell(limit=60, pruner="grid"), answers(6))
    publish(store, cell(), answers(20))
    order = [c.setting["limit"] for c in chapters(records.read("store"))]
    assert order == ["all", "60"], "a quick look has more cells, and is no full run"
    assert [c.setting["limit"] for c in chapters(records.read("store"), {"limit": "60"})] == ["60", "all"]
    plan = Plan(Job(name="m", model=Spec("m"), evaluate=Evaluation(limit=60, batch=8)), Path("."), None)
    assert re.findall(r"at most (\d+)", plan.summary()) == ["60"] and plan.summary().index("at most") < len(plan.summary()) / 2
    first = report("store", "page", asked=plan.setting)["markdown"].read_text()
    assert first.index("limit 60") < first.index("limit all")


@pytest.mark.parametrize("failed", [0, 3, 20])
def test_every_verb_ends_with_the_number_of_failed_questions(failed: int, capsys: pytest.CaptureFixture[str]) -> None:
    publish(Store("runs/m/store"), cell(), answers(20, failed))
    job = Job(name="m", model=Spec("m"), evaluate=Evaluation())
    plan = Plan(job, Path("runs/m"), None)
    pipeline.PipelineRun(plan, provenance(), None, None).go([])  # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert f"questions failed: {failed} of 20" in said and ("first ValueError: no" in said) == (failed > 0)


def test_failed_cells_are_told_with_the_first_reason() -> None:
    outcome = Outcome("failed", "ValueError: no [CLS]", 0, 0.0)
    Store("store").publish({"outcomes": [outcome]}, cell=cell(), provenance=provenance())
    assert "1 cell failed; first Random Keep(8) world(like='gqa'): ValueError: no [CLS]" in summary("store")


def test_answers_that_the_rule_cannot_read_are_remarked_on() -> None:
    publish(Store("a"), cell(pruner="unpruned"), answers(20, parsed=""))
    publish(Store("b"), cell(pruner="unpruned"), answers(20))
    assert "unread: The rule reads almost none" in summary("a") and "unread" not in summary("b")


def choices(store: Store, target: float, measured: float, started: str, **settings: int) -> None:
    options = Tuning(**settings, benchmarks=("world('pope')",))  # type: ignore[arg-type]
    asked = TuneSpec(Spec("random"), "count", target, tuning.settings(options))
    made = Cell(Spec("m"), "float32", asked, describe(registry.load("pruners", "random")), "POPE")
    found = Choice("reached", "Keep(8)", 8.0, 8.0, 2.0, measured, measured, measured, 8, 0.5, 3.0, "")
    store.publish({"choices": [found], "outcomes": [Outcome("ok", "", 1, 0.0)]}, cell=made, provenance=provenance(started=started))


def test_a_target_far_exceeded_overshoots_and_other_settings_are_not_mixed() -> None:
    store = Store("store")
    choices(store, 1.3, 1.75, "2026-01-01")
    choices(store, 1.5, 1.52, "2026-01-01")
    choices(store, 1.5, 1.49, "2026-01-02", repeats=9)
    table = tuned(records.read("store"))
    assert table is not None
    words = [(str(row[0]), row[3], str(row[7])) for row in table.rows]
    assert [(target, word) for target, word, _ in words] == [("1.30×", "overshoots"), ("1.50×", "reached")]
    assert "1.49" in words[1][2] and any("1 older answers" in note for note in table.notes)
    assert "overshoots" in summary("store")


@pytest.mark.parametrize(("measured", "word"), [(1.25, "missed"), (1.3, "reached"), (1.377, "reached"), (1.379, "overshoots")])
def test_progress_and_table_have_one_word_for_it(measured: float, word: str) -> None:
    assert told_verdict("missed" if word == "missed" else "reached", measured, 1.3) == word


def test_timings_on_other_pictures_are_left_out_and_told() -> None:
    store = Store("store")
    for benchmark, day, ms in (("world('pope')", 1, 50.0), ("world('gqa')", 2, 10.0)):
        spec = registry.spec("benchmarks", benchmark)
        subject = measuring.MeasureSpec(Spec("random"), Keep(8), Questions(spec, "world@1"), 8)
        made = Cell(Spec("m"), "float32", subject, describe(registry.load("pruners", "random")), benchmark)
        spans = [("encoder", "full"), ("prefill", "full"), ("prefill", "pruned"), ("prefill", "native"), ("overhead", "pruned")]
        rows = [Timing(span, arm, i, ms + i, 8.0, 20, "") for span, arm in spans for i in range(3)]
        store.publish({"timings": rows}, cell=made, provenance=provenance(started=f"2026-01-0{day}"))
    (chapter,) = chapters(records.read("store"))
    assert set(chapter.measured["benchmark"]) == {"world(like='gqa')"}
    assert chapter.other_pictures == "1 cells timed on other pictures than world(like='gqa')"


@pytest.mark.parametrize(("other", "told"), [('{"cpu": "b"}', True), ('{"cpu": "a", "threads": 2}', False)])
def test_timings_of_another_machine_are_left_out_and_told(other: str, told: bool) -> None:
    store = Store("store")
    for number, hardware in enumerate((other, '{"cpu": "a", "threads": 1}', '{"cpu": "a", "threads": 1}')):
        about = replace(provenance(), hardware=hardware)
        rows = {"timings": [Timing("prefill", "full", 0, 1.0, 8.0, 20, "")]}
        store.publish(rows, cell=measure_cell(("random", "grid", "attention")[number]), provenance=about)
    found = records.read("store")
    assert {*found.cells["label"]} == ({"Grid", "Attention"} if told else {"Random", "Grid", "Attention"})
    said = [problem for problem in found.problems if "machine" in problem]
    assert said == told * [
        "timings of Random on another machine (b) left out: ratios between machines are no speedups, so measure all methods on one"
    ]


def test_runs_merged_into_one_store_are_told() -> None:
    store = Store("store")
    publish(store, cell(), answers(6))
    assert not [p for p in records.read("store").problems if "runs" in p]
    publish(store, cell(pruner="grid"), answers(6), run="other")
    assert "records of 2 runs stand in this store: mine, other" in records.read("store").problems
    assert "records of 2 runs" in report("store", "page")["markdown"].read_text()


def test_a_report_is_made_of_a_run_folder_alone_and_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    publish(Store("copied/store"), cell(), answers(6))
    before = sorted(Path("copied").rglob("*"))
    assert commands.call(["report", "copied", "--out", "page"]) == (0, "")
    assert Path("page/report.html").is_file() and sorted(Path("copied").rglob("*")) == before
    assert "questions failed: 0 of 6" in capsys.readouterr().out


@pytest.mark.slow
def test_the_page_again_of_a_folder_is_that_of_its_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Its title, and of several settings the chapter of its own first; the folder's name where no title was noted."""
    for limit in (None, 60):
        for pruner in ("unpruned", "grid"):
            publish(Store("runs/mine/store"), cell("embedded", limit, pruner), answers(20))
    Path("mine.py").write_text(
        "from diffprune.job import *\njob = Job(name='mine', title='Mine and yours', evaluate=Evaluation(limit=60, batch=8))"
    )
    settings.keep(load_job("mine.py"), Path("runs/mine"), ["evaluate"])
    found = []
    for line, place in ((["mine.py"], Path("runs/mine/report")), (["runs/mine", "--out", "page"], Path("page"))):
        assert commands.call(["report", *line]) == (0, "")
        page = re.sub("<pre>diffprune (run mine|report STORE --out FOLDER)</pre>", "", (place / "report.html").read_text())
        found.append((page, (place / "report.md").read_text(), capsys.readouterr().out.partition("report:")[0]))
    assert found[0] == found[1]
    _, text, _ = found[0]
    assert text.startswith("# Mine and yours\n") and text.index("limit 60") < text.index("limit all")
    assert commands.call(["report", "runs/mine", "--out", "page", "--name", "other"]) == (0, "")
    assert Path("page/report.md").read_text().startswith("# other\n")
    note = json.loads(Path("runs/mine").rename("copied").joinpath("job.json").read_text())
    older = {key: value for key, value in note.items() if key != "title"}
    for noted, named in ({**note, "title": ""}, "mine"), (older, "copied"), ({"evaluate": 3}, "copied"):
        Path("copied/job.json").write_text(json.dumps(noted))
        assert commands.call(["report", "copied", "--out", "page"]) == (0, "")
        assert Path("page/report.md").read_text().startswith(f"# {named}\n")


# --- settings --------------------------------------------------------------------------------------------------------


def test_a_changed_setting_under_an_old_name_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    job, folder = Job(name="mine", evaluate=Evaluation(limit=80), measure=Measurement()), Path("runs/mine")
    settings.keep(job, folder, ["evaluate", "measure"])
    settings.keep(job.model_copy(update={"workers": 7, "title": "other"}), folder, ["evaluate"])
    assert capsys.readouterr().out == "", "nothing before, and nothing that changes a result"
    changed = configure("run", None, "mine", {}, {"evaluate.limit": 60, "measure.rounds": 50})
    new = Job(name="mine", evaluate=changed.evaluate, measure=changed.measure)
    assert list(settings.told(json.loads((folder / "job.json").read_text()), settings.noted(new), ["report"])) == []
    settings.keep(new, folder, ["evaluate"])
    assert "measure.rounds" not in capsys.readouterr().out and "evaluate.limit 80" not in (folder / "job.json").read_text()
    settings.keep(job, folder, ["evaluate"])
    assert "evaluate.limit 60 -> 80" in capsys.readouterr().out
    settings.keep(new, folder, ["evaluate", "measure"])
    said = capsys.readouterr().out
    assert "settings changed since the last run of 'mine'" in said
    assert "evaluate.limit 80 -> 60; the old results stay, apart" in said
    assert "measure.rounds 10 -> 50; that holds for what is still to be done, and what is done stays as it is" in said
    settings.keep(new.model_copy(update={"name": "copy"}), folder, ["evaluate"])
    assert "made by the run 'mine', not by 'copy'" in capsys.readouterr().out
    for damage in (b"", b"[]", b"{", b"[" * 100_000):
        (folder / "job.json").write_bytes(damage)
        settings.keep(new, folder, ["evaluate"])
        assert json.loads((folder / "job.json").read_text())["name"] == "mine"


PLUGINS = [name for kind in registry.KINDS for name in registry.names(kind)]


@pytest.mark.parametrize("name", [*SECTIONS, "job", *SOURCES, *PLUGINS])
def test_show_prints_every_setting_with_its_meaning(name: str) -> None:
    found = shown(name)
    assert found and not [option.name for _, _, options in found for option in options if not option.meaning]
    assert name in (*SOURCES, *PLUGINS) or all(options for _, _, options in found)


def test_show_prints_defaults_and_settings_within_settings() -> None:
    ((_, _, train),), ((_, _, job),), ((_, _, rows),) = map(shown, ("train", "job", "hub"))
    defaults = {option.name: option.default for option in (*train, *job, *rows)}
    assert (defaults["steps"], defaults["seeds"], defaults["assumed.text"], defaults["split"]) == ("200", "0", "0", "'train'")


def test_show_prints_training_data_and_help_names_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.call(["show", "jsonl"]) == (0, "") and "images" in capsys.readouterr().out
    for verb in job_verbs.HELP:
        assert commands.call([verb, "--help"]) == (0, "") and "diffprune show train" in " ".join(capsys.readouterr().out.split())


def arguments(command: click.Command) -> list[click.Parameter]:
    return [parameter for parameter in command.params if isinstance(parameter, click.Argument)]


BUDGET = ("evaluate", "--pruner", "random", "--budget", "3", "--benchmark", "world('pope')")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ((*BUDGET, "--set", f"evaluate.limit={'[' * 5000}"), "nested deeper"),
        ((*BUDGET, "--set", f"evaluate.limit={'[' * 200}{']' * 200}"), "nested deeper"),
        ((*BUDGET, "--set", f"evaluate.limit={'(' * 5000}"), "evaluate.limit"),
        ((*BUDGET, "--set", "evaluate.limit=1e20"), "evaluate.limit"),
        ((*BUDGET, "--set", "evaluate.batch=1e20"), "evaluate.batch"),
        ((*BUDGET, "--set", "workers=1e9"), "workers"),
        ((*BUDGET, "--set", "seed=-1"), "seed"),
        ((*BUDGET, "--workers", "1000000000"), "--workers"),
        (("train", "--scorer", "diffprune", "--set", "train.seeds=[-1]"), "seeds"),
        (("train", "--scorer", "diffprune", "--set", "train.seeds=[1e20]"), "seeds"),
        (("train", "--scorer", "diffprune", "--set", "train.steps=1e20"), "steps"),
        (("train", "--scorer", "diffprune", "--set", "train.workers=1e9"), "workers"),
        (("train", "--scorer", "diffprune", "--set", "train.data=jsonl('a\\0b')"), "no path"),
        (("tune", "--pruner", "random", "--set", "tune.calibration=1e20"), "tune.calibration"),
        (("measure", "--pruner", "random", "--budget", "3", "--set", "measure.rounds=1e20"), "measure.rounds"),
        ((*BUDGET, "--out", "a\0b"), "whole characters"),
        ((*BUDGET, "--out", "a\udcffb"), "whole characters"),
        ((*BUDGET, "--model", "a\udcffb"), "whole characters"),
        (("evaluate", "a\0b.py"), "whole characters"),
        ((*BUDGET, "--benchmark", "custom('a\udc00')"), "whole characters"),
    ],
    ids=lambda value: ascii(" ".join(value))[-60:] if isinstance(value, tuple) else None,
)  # fmt: skip
@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["", "dry"])
def test_values_out_of_all_ranges_end_with_2_and_one_sentence(line: tuple[str, ...], says: str, more: tuple[str, ...]) -> None:
    code, sentence = commands.call([*line, *more])
    assert (code, says in sentence, "\n" in sentence) == (2, True, False), sentence
    sentence.encode()
    assert not Path("runs").exists()


def test_seeds_and_counts_stand_in_their_ranges() -> None:
    for wrong in ({"seeds": (-1,)}, {"seeds": (2**31,)}, {"workers": 10**9}, {"steps": 10**20}, {"micro_images": 10**20}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Recipe(**wrong)


@pytest.mark.parametrize("name", [name for name, command in commands.app.commands.items() if arguments(command)])
@pytest.mark.parametrize("hostile", ["a\0b", "\udcff", "nowhere/x"], ids=ascii)
def test_every_command_refuses_what_no_file_has(name: str, hostile: str) -> None:
    command = commands.app.commands[name]
    dry = ["--dry-run"] if any("--dry-run" in option.opts for option in command.params) else []
    code, sentence = commands.call([name, *[hostile] * len(arguments(command)), *dry])
    assert (code, "\n" in sentence) == (2, False) and len(sentence) < 1000, sentence
    assert not list(Path.cwd().iterdir())
