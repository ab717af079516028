"""The search of training settings: equal budgets, trials that are ordinary trainings, winners, and one run from file to page."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffprune.cli.commands import call
from diffprune.core import registry
from diffprune.core.cell import SearchSpec
from diffprune.core.records import Outcome, SearchLook
from diffprune.core.spec import Spec
from diffprune.distributed import search as running
from diffprune.embedded import vlm as embedded
from diffprune.io.job_files import REPOSITORY
from diffprune.job.files import load_job
from diffprune.report import report
from diffprune.report.analysis import records
from diffprune.report.analysis.search import unused
from diffprune.report.tables.search import searched
from diffprune.store import Store
from diffprune.train import loop
from diffprune.train.ahead import drawn
from diffprune.train.checkpoints import read_steps
from diffprune.train.context import LocalContext
from diffprune.train.recipe import Recipe
from diffprune.train.scorer_trainer import Diverged, ScorerTrainer
from diffprune.train.search import SEARCHED, Bench, Search, SearchTrial, best, spelled, trials
from diffprune.verify import verify
from diffprune.vlm.load import load
from tests.records import model, provenance

SMALL: dict[str, Any] = {
    "pruners": ("diffprune", "gumbel_keepdrop"), "steps": 6, "images": 2, "questions": 2, "workers": 1, "calibration_images": 4,
}  # fmt: skip
BUDGET: dict[str, Any] = {"configurations": 5, "images": (4, 2, 1), "validation_images": 2}


def made(recipe: dict[str, Any] | None = None, **options: Any) -> Search:
    return Search(**{**BUDGET, "recipe": Recipe(**{**SMALL, **(recipe or {})}), **options})


def asked(search: Search) -> list[SearchTrial]:
    return trials(search, model(), "float32")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random LLaVA of the embedded model's shape."""
    folder = tmp_path_factory.mktemp("model")
    embedded.build(0).save_pretrained(folder)
    embedded.processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bench(checkpoint: str) -> Bench:
    return Bench(load(checkpoint, device="cpu"))


# --- the budget ------------------------------------------------------------------------------------------------------


def test_every_method_gets_the_same_configurations_of_the_same_training_images_and_looks() -> None:
    search = made({"steps": 100, "images": 4}, images=(4, 3, 2), configurations=30)
    assert {step for number in range(30) for step in [search.settings(number)["steps"]]} == {100, 133, 200}
    by_method = {name: [t for t in asked(search) if t.method.name == name] for name in ("diffprune", "gumbel_keepdrop")}
    for one, other in zip(*by_method.values(), strict=True):
        assert abs(one.recipe.steps * one.recipe.images - 400) < one.recipe.images
        assert (one.looks, one.number) == (other.looks, other.number) and one.looks[-1] == one.recipe.steps
        assert {name: one.settings[name] for name in SEARCHED} == {name: other.settings[name] for name in SEARCHED}
        assert {name: getattr(other.recipe, name) for name in SEARCHED} == {name: one.settings[name] for name in SEARCHED}
        assert one.recipe.seeds == other.recipe.seeds == (1000,)
    assert len({trial.cell.key for trial in asked(search)}) == 60


def test_the_first_configuration_is_the_recipes_own_and_a_method_searches_its_own_options() -> None:
    search = made({"learning_rate": 0.004, "pruners": ("gumbel_keepdrop(ratio_weight=7)", "diffprune")}, configurations=40)
    keepdrop = [t for t in asked(search) if t.method.name == "gumbel_keepdrop"]
    assert keepdrop[0].recipe.learning_rate == 0.004 and keepdrop[0].recipe.pruners == (search.recipe.pruners[0],)
    weights = [t.recipe.pruners[0].get("ratio_weight") for t in keepdrop[1:]]
    assert set(weights) == {3.0, 10.0, 30.0, None}  # 100 is the default, which is left out
    assert {t.recipe.pruners for t in asked(search) if t.method.name == "diffprune"} == {(Spec("diffprune"),)}


def test_configurations_are_drawn_in_their_ranges_by_the_seed_alone() -> None:
    search = made(configurations=50, warmup_share=(0.1, 0.2), anneal_share=(0.5, 0.6), ease_share=(0.0, 1.0))
    drawn = [search.settings(number) for number in range(1, 50)]
    assert drawn == [made(configurations=2).model_copy(update=dict(search)).settings(number) for number in range(1, 50)]
    assert drawn != [search.model_copy(update={"seed": 1}).settings(number) for number in range(1, 50)]
    for name in ("learning_rate", "warmup_share", "temperature_start", "temperature_end", "anneal_share"):
        low, high = getattr(search, name)
        values = [one[name] for one in drawn]
        assert low * 0.995 <= min(values) < max(values) <= high * 1.005 and len(set(values)) > 20
    assert {one["ease_share"] for one in drawn} == {0.0, 1.0}
    below = sum(one["learning_rate"] < math.sqrt(1e-3 * 1e-2) for one in drawn)
    assert 12 < below < 37  # half of them: the scale is logarithmic


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seeds": (0, 5)}, "seeds holds 0, a seed of the recipe"),
        ({"learning_rate": (0.1, 0.01)}, "the smaller first"),
        ({"temperature_end": (0.0, 0.1)}, "numbers above 0"),
        ({"images": (13,)}, "more than the 12 training images"),
        ({"anneal_share": (0.5, 3.0)}, "anneal_share"),
        ({"recipe": {"methods": ({"pruner": "diffprune", "steps": 8},)}}, "leave out its methods"),
    ],
)
def test_a_search_that_would_not_be_fair_is_refused_in_one_sentence(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made(**options)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["search", "--scorer", "grid"], "learns nothing and cannot be trained"),
        (["search", "--pruner", "diffprune"], "search has no use for --pruner"),
        (["search", "--set", "search.seeds=[0]"], "seeds holds 0"),
        (["search", "--set", "search.split=test"], "no setting"),
        (["search", "--set", "search.recipe.step=3"], "steps"),
    ],
)
def test_the_command_line_refuses_with_exit_code_2(arguments: list[str], said: str) -> None:
    code, sentence = call(arguments)
    assert code == 2 and said in sentence and "\n" not in sentence and not Path("runs").exists()


# --- a trial ---------------------------------------------------------------------------------------------------------


def test_a_trial_finds_what_the_ordinary_training_of_its_recipe_finds(bench: Bench, tmp_path: Path) -> None:
    search = made({"pruners": ("gumbel_topk",)}, configurations=2)
    trial = asked(search)[1]
    found = list(bench.looks(trial))
    ordinary = trial.recipe.model_copy(update={"validate_every": trial.looks[0], "validation_images": 2, "checkpoint_every": 0})
    loop.train(ordinary, LocalContext(tmp_path), lambda _: bench.vlm)
    (steps,) = read_steps(tmp_path).values()
    expected = {step.step + 1: step.validation_hard for step in steps if math.isfinite(step.validation_hard)}
    assert [row.training_step for (row,) in found] == list(trial.looks) == [trial.recipe.steps // 2, trial.recipe.steps]
    for (row,) in found:
        assert row.validation_hard == pytest.approx(expected[row.training_step], rel=1e-5)
        assert (row.training_seed, row.training_images) == (1000, row.training_step * trial.recipe.images)
        assert json.loads(row.searched_settings) == trial.settings


def test_a_trial_that_diverges_ends_at_its_next_look(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: Any) -> None:
        raise Diverged("the loss was NaN")

    monkeypatch.setattr(ScorerTrainer, "step", step)
    trial = asked(made())[0]
    ((row,),) = bench.looks(trial)
    assert row.validation_hard == math.inf and running.state(trial, [row]) == "diverged"


def look(trial: SearchTrial, which: int, value: float, seed: int = 1000) -> SearchLook:
    return SearchLook(
        trial.number, json.dumps(trial.settings), seed, trial.looks[which], trial.looks[which] * trial.recipe.images, value, "", 1.0
    )


def test_the_winner_is_best_at_the_end_of_its_training_on_the_mean_of_its_seeds() -> None:
    search = made({"pruners": ("diffprune",)}, seeds=(1000, 1001), configurations=4)
    one, other, stopped, diverged = asked(search)
    found = {
        one.cell.key: [look(one, -1, 0.1), look(one, -1, 0.9, 1001)],
        other.cell.key: [look(other, 0, 9.0), look(other, -1, 0.3), look(other, -1, 0.4, 1001)],
        stopped.cell.key: [look(stopped, 0, 0.01), look(stopped, 0, 0.01, 1001)],
        diverged.cell.key: [look(diverged, -1, math.inf), look(diverged, -1, 0.0, 1001)],
    }
    assert best([one, other, stopped, diverged], found) == {Spec("diffprune"): other}
    assert best([stopped], found) == {}


def test_winners_can_be_pasted_into_a_recipe() -> None:
    search = made(configurations=3)
    winners = [trial for trial in asked(search) if trial.number == 2]
    pasted: dict[str, Any] = eval(f"dict(\n{spelled(winners)}\n)")
    recipe = Recipe(**{**SMALL, **pasted})
    assert recipe.pruners == tuple(trial.recipe.pruners[0] for trial in winners)
    for trial in winners:
        own = recipe.of(trial.recipe.pruners[0])
        assert {name: getattr(own, name) for name in SEARCHED} == {name: trial.settings[name] for name in SEARCHED}


ALL = ("temperature_start", "temperature_end", "anneal_share")


@pytest.mark.parametrize(
    ("method", "ignored"),
    [("diffprune", ()), ("gumbel_keepdrop", ("temperature_start", "anneal_share")), ("learnpruner", ALL), ("visionselector", ALL)],
)
def test_a_setting_that_a_method_does_not_use_changes_nothing_it_learns(
    method: str, ignored: tuple[str, ...], bench: Bench, tmp_path: Path
) -> None:
    assert unused(method) == ignored

    def learnt(**changed: float) -> dict[str, torch.Tensor]:
        recipe = Recipe(**{**SMALL, "steps": 4, "pruners": (method,), **changed})
        pruner = registry.make("pruners", recipe.pruners[0])
        trainer = ScorerTrainer(LocalContext(tmp_path), bench.vlm, recipe, pruner, 0, bench.drawn)
        stream = loop.batches(trainer)
        for _ in range(2):
            trainer.step(drawn(trainer.context, lambda: next(stream)))
        return {name: value.clone() for name, value in pruner.networks.state_dict().items()}

    plain = learnt()
    for name, value in {"temperature_start": 1.0, "temperature_end": 0.4, "anneal_share": 0.4}.items():
        found = learnt(**{name: value})
        assert all(torch.equal(plain[key], found[key]) for key in plain) == (name in ignored), name


def test_of_a_method_that_is_not_installed_every_setting_is_shown() -> None:
    assert unused("nobody(knows=1)") == unused("grid") == ()
    assert unused("diffprune(temperature_end=0.2)") == ("temperature_end",)  # it brings its own


# --- records and page ------------------------------------------------------------------------------------------------


def published(store: Store, trial: SearchTrial, values: Sequence[float], **made_by: Any) -> None:
    rows = [look(trial, i, value) for i, value in enumerate(values)]
    rows = [replace(row, trial_state=running.state(trial, rows)) for row in rows]
    store.publish(
        {"search": rows, "outcomes": [Outcome("ok", "", len(rows), 2.0)]}, cell=trial.cell, provenance=provenance(**made_by)
    )


def test_what_the_store_holds_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(running, "connect", refused)
    search, store = made({"pruners": ("diffprune",)}, configurations=2), Store(tmp_path)
    first, second = asked(search)
    published(store, first, (0.9, 0.7))
    with pytest.raises(AssertionError, match="Ray was started"):
        running.search(search, [first, second], store, provenance(), workers=1)
    published(store, second, (0.8, 0.75))
    assert running.search(search, [first, second], store, provenance(), workers=1) == ({Spec("diffprune"): first}, [])


@pytest.mark.slow
def test_the_table_of_a_search_tells_what_each_method_cost_and_found(tmp_path: Path) -> None:
    search, store = made(configurations=3), Store(tmp_path)
    older = asked(search)[1]  # the same settings under other code: another cell
    subject = replace(older.cell.subject, recipe="of other code")
    published(store, replace(older, cell=replace(older.cell, subject=subject)), (0.9, 0.1), started="2020-01-01T00:00:00+00:00")
    for trial in asked(search):
        good = (0.9, 0.5) if trial.method.name == "diffprune" else (0.8,)
        values = {0: (0.9, 0.6), 1: good, 2: (math.inf,)}[trial.number]
        published(store, trial, values)
    table = searched(records.read(tmp_path))
    assert table is not None
    told = {str(row[0]): dict(zip(table.columns, map(str, row), strict=True)) for row in table.rows}
    assert list(told) == ["DiffPrune", "Gumbel keep/drop"]
    ours, theirs = told.values()
    assert (ours["trials"], ours["stopped early"], ours["diverged"]) == ("3", "0", "1")
    assert (ours["recipe's own"], ours["best"], ours["worst"]) == ("0.6000", "0.5000", "0.6000")
    assert (theirs["stopped early"], theirs["best"]) == ("1", "0.6000")
    assert float(ours["learning rate"]) == search.settings(1)["learning_rate"]
    assert (float(theirs["learning rate"]), theirs["ratio weight"], ours["ratio weight"]) == (0.003, "100", "–")
    assert "–" not in (ours["temperature start"], ours["anneal share"], theirs["temperature end"])
    assert (theirs["temperature start"], theirs["anneal share"]) == ("–", "–")  # it does not use them
    report(tmp_path, tmp_path / "page")
    Store(tmp_path).compact(tmp_path / "page" / "store")
    found = verify(tmp_path / "page")
    assert not found.differences and found.recomputed > 20, str(found)


def test_a_method_that_fails_keeps_no_other_from_its_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, store = made({"pruners": ("gumbel_keepdrop", "diffprune")}), Store(tmp_path)
    mine = asked(options)
    ended: list[int] = []

    def failures(trial: Any, num: int, given: dict[str, Any], *_: Any, **__: Any) -> dict[int, str]:
        first = given["asked"][0].method == Spec("gumbel_keepdrop")
        ended.append(num)
        return {1: "BadObjective: no loss"} if first else {}

    monkeypatch.setattr(running, "failures", failures)
    monkeypatch.setattr(running, "connect", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(running.resources, "awaited", lambda *_: None)
    monkeypatch.setattr(running, "best", lambda trials, found: {trials[0].method: trials[0]})
    won, without = running.search(options, mine, store, provenance(attempt=1), workers=1)
    assert list(won) == [Spec("diffprune")] and len(ended) == 2
    num = ended[0]
    assert without == [
        f"1 of {num} trials of gumbel_keepdrop failed, the first with BadObjective: no loss; the same command tries them again"
    ]
    (row,) = store.read("outcomes").to_dict("records")
    assert (row["status"], row["reason"], row["verb"]) == ("failed", "BadObjective: no loss", "search") and not store.done()


@pytest.mark.slow
def test_a_search_from_the_command_to_the_page(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = [
        f"model={checkpoint}", f"search.recipe.model={checkpoint}", "search.recipe.pruners=['gumbel_keepdrop']",
        "search.recipe.steps=4", "search.recipe.images=2", "search.recipe.questions=2", "search.recipe.calibration_images=4",
        "search.configurations=3", "search.images=[2, 1]", "search.validation_images=2",
    ]  # fmt: skip
    command = ["run", "tune_training", "--workers", "1", *(part for text in changed for part in ("--set", text))]
    assert call(command) == (0, "")
    store = Store("runs/tune_training/store")
    rows = store.read("search")
    assert set(rows["configuration"]) == {0, 1, 2} and set(rows["trial_state"]) <= {"complete", "stopped"}
    ended = rows[rows["trial_state"] == "complete"]
    winner = ended.sort_values("training_step").drop_duplicates("cell", keep="last").nsmallest(1, "validation_hard")
    (method,) = json.loads(Path("runs/tune_training/winners.json").read_text())["methods"]
    settings = json.loads(winner["searched_settings"].item())
    assert method == {"pruner": winner["pruner"].item(), **{name: settings[name] for name in SEARCHED}}
    page = Path("runs/tune_training/report/report.html").read_text()
    assert "Search of training settings" in page and Path("runs/tune_training/report/figures/sensitivity.svg").is_file()
    monkeypatch.setattr(running, "connect", None)
    said = capsys.readouterr().out
    assert "search: " in said and not any(word in said for word in ("detailed results", "tensorboard", "╭")), "a heading of Ray's"
    assert call(command) == (0, "") and "all 3 trials are in the store already" in capsys.readouterr().out
    assert not list(Path("runs/tune_training").glob("*ray*"))


def test_the_key_of_a_trial_names_all_that_shapes_it() -> None:
    trial = asked(made())[0]
    subject = trial.cell.subject
    assert isinstance(subject, SearchSpec)
    for change in ({"recipe": "x"}, {"seeds": (1,)}, {"validation_images": 3}, {"looks": (1,)}, {"pruner": Spec("gumbel_topk")}):
        assert replace(trial.cell, subject=replace(subject, **change)).key != trial.cell.key


@pytest.mark.parametrize(
    ("name", "search"), [("demo", "tune_training"), ("compare_gumbel", "tune_longer"), ("compare_trained", "tune_longer")]
)
def test_the_committed_jobs_carry_the_winners_of_the_committed_search(name: str, search: str) -> None:
    winners = json.loads((REPOSITORY / "reports" / search / "winners.json").read_text())
    found = {str(registry.spec("pruners", own["pruner"])): own for own in winners["methods"]}
    recipe = load_job(name).train
    assert recipe is not None and {str(own.pruner) for own in recipe.methods} == set(map(str, recipe.pruners))
    for own in recipe.methods:
        assert {**found[str(own.pruner)], "pruner": str(own.pruner)} == own.model_dump(mode="json", exclude_none=True)


def test_what_is_compared_was_looked_at_by_no_search_and_no_study() -> None:
    for name in ("compare_gumbel", "compare_trained"):
        asked = load_job(name).evaluate
        assert asked is not None and asked.split == "confirmation"
    for name in ("tune_training", "tune_longer"):
        search, compared = load_job(name).search, load_job("compare_gumbel").train
        assert search is not None and compared is not None and not set(search.seeds) & set(compared.seeds)
