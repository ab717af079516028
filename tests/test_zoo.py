"""The zoo has every method there is, at the budgets it can meet; what it finds stands in the catalogue, and is computed again."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from diffprune.cli.commands import call
from diffprune.core import registry
from diffprune.core.cell import Cell
from diffprune.core.records import Outcome, Provenance
from diffprune.core.spec import Spec
from diffprune.distributed import measure as measuring
from diffprune.evaluate.evaluator import Evaluator, evaluated
from diffprune.evaluate.main_figure import answered, main_figure
from diffprune.evaluate.transformers_backend import TransformersBackend
from diffprune.io.job_files import REPOSITORY
from diffprune.job import pipeline
from diffprune.job.files import load_job
from diffprune.job.plan import Plan
from diffprune.report.analysis import records
from diffprune.report.analysis.comparison import chapters
from diffprune.report.analysis.derived import Derived
from diffprune.report.tables import catalogue
from diffprune.store import Store
from diffprune.timing.options import Measurement
from diffprune.train.recipe import Recipe
from diffprune.verify import verify
from diffprune.vlm.load import load

NOT_OF_ITSELF = {"replaced"}  # a diagnostic of other methods


def test_every_method_there_is_takes_part() -> None:
    job = load_job("zoo")
    assert job.train is not None
    asked = [spec.name for spec in (*job.baselines, *job.train.pruners, *job.wrapped)]
    assert {*asked} == {*registry.names("pruners")} - NOT_OF_ITSELF
    assert [asked.count(name) for name in ("pore", "dpp", "btp", "attention")] == [2, 2, 1, 1]


def test_trained_methods_see_as_many_images_with_what_the_search_found_for_them() -> None:
    recipe = load_job("zoo").train
    assert recipe is not None and {recipe.of(spec).steps * recipe.of(spec).images for spec in recipe.pruners} == {1200}
    winners = json.loads((REPOSITORY / "reports" / "tune_longer" / "winners.json").read_text())["methods"]
    found = {str(own.pruner): own.model_dump(exclude_none=True, mode="json") for own in recipe.methods}
    for name, settings in found.items():
        (won,) = (won for won in winners if won["pruner"] in (name, f"{name}(slack=1.0)"))  # ATP was searched with guards
        assert {**settings, "pruner": won["pruner"]} == won
    assert len(found) == 8


def test_a_new_file_is_part_of_the_zoo_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pruners").mkdir()
    (tmp_path / "pruners" / "norms.py").write_text(
        'from diffprune.core.pruner import ScorePruner\n\nclass Norms(ScorePruner):\n    """x"""\n'
        "    def score(self, tokens):\n        return tokens.features.norm(dim=-1)\n"
    )
    monkeypatch.setenv("DIFFPRUNE_PLUGINS", str(tmp_path))
    assert "norms" in [spec.name for spec in load_job("zoo").baselines]


def test_budgets_that_a_method_cannot_meet_are_left_out_for_it_alone_or_refused(tmp_path: Path) -> None:
    job, vlm = load_job("zoo"), load("embedded")
    assert job.evaluate is not None
    few = {
        "evaluate": job.evaluate.model_copy(update={"benchmarks": job.evaluate.benchmarks[:1]}),
        "baselines": tuple(spec for spec in job.baselines if spec.name in ("unpruned", "grid", "fastv")),
        "train": Recipe(pruners=("diffprune", "btp", "atp", *("pore(attention)", "pore(fastv)")), budgets=job.budgets),
    }
    job = job.model_copy(update=few)
    found: dict[str, set[str]] = {}
    for stage in ("evaluate", "measure"):
        for cell in Plan(job, tmp_path, vlm).cells(stage):
            found.setdefault(cell.method.base, set()).add(cell.columns().budget)
    every = {str(budget) for budget in job.budgets}
    assert found["DiffPrune"] == found["Grid"] == found["PoRe of Attention"] == every
    assert found["FastV"] == found["BTP"] == found["PoRe of FastV"] == {"Share(0.5)", "Share(0.333333)"}
    assert [cell for cell in Plan(job, tmp_path, vlm).cells("measure") if cell.method.base == "ATP-LLaVA"], "counts known late"
    assert found["ATP-LLaVA"] == {"Share(0.5)", "Share(0.333333)"}
    strict = job.model_copy(update={"leave_out": False})
    for stage in ("evaluate", "measure"):
        told = r"cannot meet Share\(0\.2\d*\) on embedded: .* cannot be met by a cut after layer 1.*leave_out=true"
        with pytest.raises(ValueError, match=told):
            Plan(strict, tmp_path, vlm).cells(stage)


def alone(cells: list[Cell], store: Store, provenance: Provenance, *, model: Spec, **_: Any) -> None:
    """A sweep in this process, cell by cell as one worker goes through them."""
    backend = TransformersBackend(load(model))
    evaluator = Evaluator(backend)
    backend.encodings.expect(evaluator.needs([evaluated(cell).pruner for cell in cells]))
    for cell in cells:
        rows = evaluator.run(cell)
        figures = [main_figure(evaluated(cell).questions, answered(rows))]
        ok = Outcome("ok", "", len(rows), 1.0)
        store.publish({"predictions": rows, "figures": figures, "outcomes": [ok]}, cell=cell, provenance=provenance)
    ENCODED.append((backend.encodings.encoded, len(backend.encodings._kept)))


ENCODED: list[tuple[int, int]] = []
SMALL = ("train=null", "wrapped=[]", "evaluate.limit=6", "evaluate.benchmarks=[\"world(like='gqa')\", \"world(like='pope')\"]")


def run(*settings: str) -> None:
    changed = [part for setting in (*SMALL, *settings) for part in ("--set", setting)]
    assert call(["run", "zoo", *changed]) == (0, "")


@pytest.mark.slow
def test_what_it_finds_stands_in_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few methods that need no training, then timings of three of them, for which nothing is answered again."""
    monkeypatch.setattr(pipeline.PipelineRun, "ray", lambda self: None)
    monkeypatch.setattr(pipeline, "sweep", alone)
    monkeypatch.setattr(measuring, "connect", lambda address: nullcontext())
    monkeypatch.setattr(measuring, "exclusive", lambda call, *args, **_: call(*args))
    run("measure=null", "report=false", 'baselines=["unpruned", "random", "grid", "attention", "fastv", "visionzip"]')
    encoded, pictures = ENCODED.pop()
    assert encoded == pictures, "once for all methods, whatever they look at"
    few = 'baselines=["unpruned", "grid", "attention", "fastv"]'
    quick = Measurement(
        rounds=2, warmup=0, inputs=1, slow_rounds=2, spans=("prefill",), batches=(2,), threads=1, sessions=1
    ).model_dump()
    run(few, *(f"measure.{name}={list(value) if isinstance(value, tuple) else value!r}".replace("'", '"').replace("None", "null")
               for name, value in quick.items() if name not in ("modes", "benchmark", "split", "protocol", "limit")))  # fmt: skip
    assert not ENCODED, "nothing was answered again"
    store = Path("runs/zoo/store")
    _checked(store)
    found = verify(Path("runs/zoo"))
    assert not found.differences and found.recomputed > 100
    page = Path("README.md")
    page.write_text(f"{catalogue.START}\n{catalogue.END}")
    catalogue.RECORD.parent.mkdir(parents=True)
    store.rename(catalogue.RECORD)
    catalogue.write(page)
    assert "| overhead, % of prefill | 1/2 kept, % | 1/3 kept, % | 2/9 kept, % | 1/9 kept, % |" in page.read_text()


def _checked(store: Path) -> None:
    chapter = next(chapters(records.read(store)))
    found, derived = catalogue.Measured.of(chapter), Derived(chapter)
    assert found is not None and {*found.labels} == {"random", "grid", "attention", "fastv", "visionzip"}
    rows = {str(row[0]): row for row in catalogue.catalogue(found=found).rows}
    for name, label in found.labels.items():
        for budget, entry in zip(found.budgets, rows[name][-4:], strict=True):
            wanted = derived.relative(label, budget.spelling)
            value = entry.value  # type: ignore[union-attr]
            assert value == pytest.approx(wanted.estimate) if wanted else value != value
    assert [str(entry) for entry in rows["fastv"][-2:]] == ["–", "–"] and "–" not in map(str, rows["grid"][-4:])
    assert {name for name in found.labels if str(rows[name][-5]) != "–"} == {"grid", "attention", "fastv"}
    assert [str(entry) for entry in rows["diffprune"][-5:]] == ["–"] * 5
