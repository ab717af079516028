"""lmms-eval's tasks on our path, and our models in its loop: with the real one where it is installed, else with a stand-in.

The stand-in has the part of its interface that is used, over the same rules. Rows are drawn by the world, so that the world's own
benchmark is the oracle: the same questions, answers and credit.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from diffprune.core import registry
from diffprune.core.benchmark import Graded
from diffprune.core.budget import Keep
from diffprune.core.spec import Spec
from diffprune.core.vlm import VLM
from diffprune.evaluate.cells import Evaluation, cells
from diffprune.evaluate.evaluator import Evaluator
from diffprune.evaluate.transformers_backend import TransformersBackend
from diffprune.integrations import lmms_eval_model
from diffprune.io import dataset_rows, lmms_eval
from diffprune.vlm.load import load

QUESTIONS, WORLD = 16, "world('pope')"
DRAWN = "lmms('drawn', folder='tasks', group='picture', category='category')"
RULES = """
def visual(doc):
    return [doc["image"].convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"] + lmms_eval_specific_kwargs["post_prompt"]

def results(doc, results):
    right = float(results[0].lower() == doc["answer"])
    return {"whole": {"score": right, "category": doc["category"]}, "exact": right}

def whole(found, args):
    assert args.output_path
    return {"all": 100 * sum(x["score"] for x in found) / len(found), "note": "no number"}
"""
YAML = """
dataset_path: parquet
dataset_kwargs: {data_files: {test: rows.parquet}}
task: drawn
test_split: test
output_type: generate_until
doc_to_visual: !function rules.visual
doc_to_text: !function rules.text
doc_to_target: answer
generation_kwargs: {max_new_tokens: 4, temperature: 0, do_sample: false}
process_results: !function rules.results
metric_list:
  - {metric: whole, aggregation: !function rules.whole, higher_is_better: true}
  - {metric: exact, aggregation: mean, higher_is_better: true}
lmms_eval_specific_kwargs: {default: {post_prompt: ""}}
"""


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return load("embedded")


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_tasks(folder: Path) -> None:
    """A folder with one task: YAML, rules, rows with pictures."""
    folder.mkdir()
    world = registry.load("benchmarks", WORLD)
    rows = [
        {
            "question": s.question, "answer": s.row["answer"], "category": s.category, "picture": s.image_id,
            "image": {"bytes": png(world.image(s)), "path": None},
        }
        for s in world.samples("test", QUESTIONS, "lmms_eval")
    ]  # fmt: skip
    if lmms_eval.broken:
        dataset_rows.write_parquet(folder / "rows.parquet", rows)
    else:  # with the type of the picture's column written down, as the hub has it
        datasets = pytest.importorskip("datasets")
        kinds = {name: datasets.Image() if name == "image" else datasets.Value("string") for name in rows[0]}
        datasets.Dataset.from_list(rows, features=datasets.Features(kinds)).to_parquet(str(folder / "rows.parquet"))
    (folder / "rules.py").write_text(RULES)
    (folder / "drawn.yaml").write_text(YAML)


class StandIn:
    """A task as lmms-eval hands it out."""

    def __init__(self, config: dict[str, Any]) -> None:
        columns = ("question", "answer", "category", "picture")
        rows = dataset_rows.read(dataset_rows.DatasetFiles((Path("tasks/rows.parquet"),), columns))
        self.eval_docs_no_media = rows.records
        images = [Image.open(io.BytesIO(rows.pictures[i]["bytes"])) for i in range(len(rows.records))]
        self.eval_docs = [record | {"image": image} for record, image in zip(rows.records, images, strict=True)]
        self.dataset = {"test": self.eval_docs}
        self.rules, self.config = config["rules"], SimpleNamespace(**config)
        self._filters = [SimpleNamespace(name="none", apply=self._first)]
        self.doc_to_visual, self.process_results = self.rules["visual"], self.rules["results"]

    @staticmethod
    def _first(instances: list[Any], docs: list[Any]) -> None:
        for instance in instances:
            instance.filtered_resps["none"] = instance.resps[0]

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int) -> str:
        return self.rules["text"](doc, {"post_prompt": ""})

    def doc_to_target(self, doc: dict[str, Any]) -> str:
        return doc["answer"]


def stand_in(patch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Put the stand-in where lmms-eval's names are imported. changes: of the task's configuration."""

    def configure(path: str, mode: str) -> dict[str, Any]:
        rules: dict[str, Any] = {}
        exec(RULES, rules)
        metrics = [{"metric": "whole", "aggregation": rules["whole"]}, {"metric": "exact", "aggregation": "mean"}]
        asked = {"max_new_tokens": 4, "temperature": 0, "do_sample": False}
        config = {"output_type": "generate_until", "num_fewshot": None, "generation_kwargs": asked, "metric_list": metrics}
        return config | changes | {"rules": rules}

    class Manager:
        def __init__(self, verbosity: str, include_path: list[str] | None, include_defaults: bool, model_name: str) -> None:
            self.task_index = {p.stem: {"yaml_path": str(p)} for f in include_path or () for p in Path(f).glob("*.yaml")}
            self.all_tasks = sorted(self.task_index)

    patch.setattr(lmms_eval, "broken", None)
    patch.setattr(lmms_eval, "TaskManager", Manager)
    patch.setattr(lmms_eval, "get_task_dict", lambda names, manager, kind: {n: StandIn(configure("", "full")) for n in names})
    patch.setattr(lmms_eval, "load_yaml_config", configure)
    patch.setattr(lmms_eval, "get_aggregation", lambda name: {"mean": lambda values: sum(values) / len(values)}.get(name))
    own = {"exact": lambda values: max(values)}  # as bleu and f1 have others than the mean
    patch.setattr(lmms_eval, "get_metric_aggregation", own.get)


@pytest.fixture(params=["real", "stand-in"])
def tasks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, own_folder: Path) -> None:
    write_tasks(own_folder / "tasks")
    if request.param == "stand-in":
        stand_in(monkeypatch)
    elif lmms_eval.broken:
        pytest.skip(f"lmms-eval cannot be imported: {lmms_eval.broken}")


quiet = pytest.mark.filterwarnings("ignore")  # of lmms-eval's own making


@quiet
def test_a_task_asks_grades_and_sums_up_by_its_own_rules(tasks: None) -> None:
    world, found = registry.load("benchmarks", WORLD), registry.load("benchmarks", DRAWN)
    asked, oracle = found.samples("test"), world.samples("test", QUESTIONS, "lmms_eval")
    assert [(s.question, s.group, s.category) for s in asked] == [(s.question, s.image_id, s.category) for s in oracle]
    assert found.image(asked[3]).tobytes() == world.image(oracle[3]).tobytes()
    assert found.new_tokens("lmms_eval") == 4 and found.splits == ("test",)
    rows = []
    for sample, twin in zip(asked, oracle, strict=True):
        grade = found.grade(sample, "Yes")
        assert grade.credit == world.grade(twin, "Yes", "lmms_eval").credit and grade.target == twin.row["answer"]
        rows.append(Graded(sample.group, sample.category, grade.credit, grade.parsed, grade.target))
    share = sum(row.credit for row in rows) / len(rows)
    assert 0 < share < 1
    without_data = registry.load("benchmarks", DRAWN)
    figures = without_data.aggregate(rows)
    assert figures == pytest.approx({"lmms_whole/all": 100 * share, "lmms_exact": share, "accuracy": 100 * share})
    assert next(iter(figures)) == "lmms_whole/all" and "_task" not in without_data.__dict__


def test_a_metric_without_an_aggregation_has_lmms_evals_own(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean, which was taken, is not that of every metric; one that has none cannot be summed up, by lmms-eval neither."""
    write_tasks(own_folder / "tasks")
    rows = [Graded(str(i), "", float(i), f'{{"exact": {i}.0}}', "yes") for i in range(2)]
    stand_in(monkeypatch, metric_list=[{"metric": "exact"}])
    assert registry.load("benchmarks", DRAWN).aggregate(rows) == {"lmms_exact": 1.0, "accuracy": 50.0}
    for metric, says in (({"metric": "other"}, "of its own for other"), ({"metric": "exact", "aggregation": "no"}, "no for exact")):
        stand_in(monkeypatch, metric_list=[metric])
        with pytest.raises(ValueError, match=f"lmms-eval has no aggregation {says}"):
            registry.load("benchmarks", DRAWN).aggregate(rows)


@quiet
def test_limit_draws_whole_groups_and_the_revision_follows_rows_and_rules(tasks: None) -> None:
    found = registry.load("benchmarks", DRAWN)
    few, every = found.samples("test", 3), found.samples("test")
    groups = {s.group for s in few}
    assert 3 <= len(few) < len(every) and [s for s in every if s.group in groups] == few
    before = found.revision
    assert registry.load("benchmarks", DRAWN).revision == before
    Path("tasks/rules.py").write_text(RULES + "# changed\n")
    assert registry.load("benchmarks", DRAWN).revision != before


@quiet
def test_on_our_path_it_answers_as_the_worlds_own_benchmark(tasks: None, vlm: VLM) -> None:
    options = Evaluation(benchmarks=(DRAWN, WORLD), protocol="lmms_eval", limit=QUESTIONS, batch=8)
    theirs, ours = [Evaluator(TransformersBackend(vlm)).run(cell) for cell in cells(vlm, [Spec("attention")], [Keep(16)], options)]
    assert [(r.answer, r.credit, r.error) for r in theirs] == [(r.answer, r.credit, r.error) for r in ours]


class Hook:
    """What lmms-eval's own model class has for its cache."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def add_partial(self, what: str, asked: Any, answer: str) -> None:
        self.seen.append(answer)


def requests_of(task: StandIn, **changes: Any) -> list[Any]:
    asked = {"max_new_tokens": 4, "until": ["\n\n"]} | changes
    return [
        SimpleNamespace(args=(doc["question"], asked, task.doc_to_visual, i, "drawn", "test"), doc_id=i, task_name="drawn")
        for i, doc in enumerate(task.eval_docs)
    ]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, own_folder: Path) -> Callable[..., tuple[lmms_eval_model.DiffPrune, list[Any]]]:
    """A model of the interface with its task, and requests in the form of the harness."""
    write_tasks(own_folder / "tasks")
    stand_in(monkeypatch)
    found = registry.load("benchmarks", DRAWN)

    def make(**changes: Any) -> tuple[lmms_eval_model.DiffPrune, list[Any]]:
        model = lmms_eval_model.DiffPrune(pretrained="embedded", pruner="attention", budget=16, batch_size=5, device="cpu")
        model.task_dict, model.cache_hook = {"drawn": found._task.dataset}, Hook()
        return model, requests_of(found._task, **changes)

    return make


def test_in_its_loop_our_model_answers_in_the_order_of_the_requests(asked, vlm: VLM) -> None:
    model, requests = asked()
    (cell,) = cells(vlm, [Spec("attention")], [Keep(16)], Evaluation(benchmarks=(WORLD,), protocol="lmms_eval", limit=QUESTIONS))
    assert model.generate_until(requests) == [row.answer for row in Evaluator(TransformersBackend(vlm)).run(cell)]
    assert len(model.cache_hook.seen) == QUESTIONS


def test_what_our_model_cannot_do_is_refused_in_one_sentence(asked, monkeypatch: pytest.MonkeyPatch) -> None:
    model, requests = asked(do_sample=True, temperature=0.7)
    with pytest.raises(ValueError, match=r"row 0 of task 'drawn' wants sampled answers"):
        model.generate_until(requests)
    with pytest.raises(ValueError, match=r"compares likelihoods"):
        model.loglikelihood(requests)
    with pytest.raises(ValueError, match=r"has several rounds"):
        model.generate_until_multi_round(requests)
    _, requests = asked()
    requests[2].args = (*requests[2].args[:2], lambda doc: [], *requests[2].args[3:])
    with pytest.raises(ValueError, match=r"row 2 of task 'drawn' shows 0 images"):
        model.generate_until(requests)
    for options, sentence in (
        ({"prunr": "none"}, "did you mean 'pruner'"),
        ({"pruner": "atention"}, "did you mean 'attention'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            lmms_eval_model.DiffPrune(**options)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="runs in one process"):
        lmms_eval_model.DiffPrune()


def test_quotes_around_a_spelling_are_lmms_evals_and_no_part_of_it(vlm: VLM) -> None:
    model = lmms_eval_model.DiffPrune(pruner='"random(seed=3)"', budget="22%", device="cpu")
    assert str(model.pruner.spec) == "random(seed=3)" and str(model.budget) == "Share(0.22)"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"output_type": "loglikelihood"}, r"asks for loglikelihood"),
        ({"num_fewshot": 2}, r"shows 2 examples first"),
        ({"generation_kwargs": {"num_beams": 4}}, r"wants sampled answers or several beams"),
    ],
)
def test_tasks_that_cannot_be_asked_are_refused(changes, sentence: str, own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tasks(own_folder / "tasks")
    stand_in(monkeypatch, **changes)
    found = registry.load("benchmarks", DRAWN)
    with pytest.raises(ValueError, match=sentence):
        found.new_tokens("lmms_eval")


@quiet
def test_mistakes_are_one_sentence(tasks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for spelling, sentence in {
        "lmms('drwan', folder='tasks')": "lmms-eval has no task 'drwan': did you mean 'drawn'",
        "lmms('drawn', folder='task')": "there is no folder .*task",
        "lmms('drawn', folder='tasks', group='pictur')": "has no column 'pictur': did you mean 'picture'",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            registry.load("benchmarks", spelling).samples("test")
    found = registry.load("benchmarks", DRAWN)
    for asked, sentence in (
        (("train",), "has no split 'train'"),
        (("test", None, "llava"), "has no protocol 'llava'"),
        (("test", 0), "limit is 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            found.samples(*asked)
    (sample, *_) = found.samples("test")
    for results, sentence in (
        ({"whole": {"prediction": "x"}, "bleu": 37.5}, "gives no credit from 0 to 1"),
        ({"exact": object()}, "cannot be kept in a record"),
    ):
        monkeypatch.setattr(found._task, "process_results", lambda doc, said, results=results: results)
        with pytest.raises(ValueError, match=sentence):
            found.grade(sample, "x")
    monkeypatch.setattr(found._task, "doc_to_visual", lambda doc: [doc["image"]] * 2)
    with pytest.raises(ValueError, match="shows 2 images: a question is asked about exactly one"):
        found.image(sample)


def test_without_lmms_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmms_eval, "broken", ModuleNotFoundError("No module named 'lmms_eval'", name="lmms_eval"))
    with pytest.raises(ValueError, match=r"lmms\('pope'\) needs lmms-eval: pip install 'diffprune\[lmms-eval\]'"):
        registry.load("benchmarks", "lmms('pope')")
    with pytest.raises(ValueError, match="pip install"):
        lmms_eval_model.manifest()
    monkeypatch.setattr(lmms_eval, "broken", RuntimeError("operator torchvision::nms does not exist\nmore"))
    with pytest.raises(ValueError, match=r"cannot be imported here \(RuntimeError: operator torchvision::nms does not exist\)"):
        registry.load("benchmarks", "lmms('pope')")


@quiet
def test_the_real_harness_runs_our_model_and_agrees_with_our_own_path(own_folder: Path, vlm: VLM) -> None:
    if lmms_eval.broken:
        pytest.skip(f"lmms-eval cannot be imported: {lmms_eval.broken}")
    evaluator: ModuleType = pytest.importorskip("lmms_eval.evaluator")
    write_tasks(own_folder / "tasks")
    rules = own_folder / "tasks" / "rules.py"
    rules.write_text(RULES.replace('{"all": 100', "100").replace('/ len(found), "note": "no number"}', "/ len(found)"))
    rules.write_text(rules.read_text().replace("(found, args)", "(found)").replace("    assert args.output_path\n", ""))
    assert lmms_eval_model.manifest().simple_class_path == "diffprune.integrations.lmms_eval_model.DiffPrune"
    model = lmms_eval_model.DiffPrune(pruner="attention", budget=16, batch_size=5, device="cpu")
    manager = lmms_eval.TaskManager("ERROR", include_path=["tasks"], include_defaults=False, model_name=lmms_eval.MODEL)
    found = evaluator.simple_evaluate(model=model, tasks=["drawn"], task_manager=manager, bootstrap_iters=0)
    (cell,) = cells(vlm, [Spec("attention")], [Keep(16)], Evaluation(benchmarks=(DRAWN,), protocol="lmms_eval"))
    credits = [row.credit for row in Evaluator(TransformersBackend(vlm)).run(cell)]
    assert found["results"]["drawn"]["exact,none"] == pytest.approx(sum(credits) / len(credits))
    assert found["results"]["drawn"]["whole,none"] == pytest.approx(100 * sum(credits) / len(credits))
