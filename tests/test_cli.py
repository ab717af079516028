"""The command line: help without waiting, mistakes in one sentence with exit 2 before Ray, jobs and their settings."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest
import ray
from pydantic import BaseModel

from diffprune.cli import commands, job_verbs, set_option
from diffprune.core.spec import Spec
from diffprune.io.job_files import find_job
from diffprune.job import pipeline
from diffprune.job.configure import configure
from diffprune.job.files import load_job
from diffprune.job.job import SECTIONS, Job
from diffprune.job.plan import Plan
from diffprune.train.estimate import Assumed
from diffprune.train.recipe import MethodSettings
from diffprune.vlm.load import load

ATTENTION = ("evaluate", "--pruner", "attention")
SHORT = job_verbs.SHORT


def asked(verb: str, job: str | None = None, settings: dict[str, object] | None = None, **short: object) -> Job:
    return configure(verb, job, None, {key: short.get(key) for key in SHORT}, settings or {})


def test_a_setting_of_training_holds_for_methods_that_have_one_of_their_own() -> None:
    """Unless what single methods have of their own is asked for as well."""
    plain = load_job("demo").train
    for job in (asked("run", "demo", {"train.steps": 30}), asked("run", "demo", steps=30)):
        for spec in plain.pruners:
            before, after = plain.of(spec), job.train.of(spec)
            assert after.steps == 30 and after.learning_rate == before.learning_rate != plain.learning_rate
    apart = ({"pruner": "diffprune", "steps": 7},)
    job = asked("run", "demo", {"train.steps": 30, "train.methods": apart})
    assert [job.train.of(spec).steps for spec in plain.pruners] == [7 if spec.name == "diffprune" else 30 for spec in plain.pruners]


@pytest.mark.parametrize("by_hand", [False, True])
def test_workers_are_those_of_the_verb(by_hand: bool) -> None:
    """`--workers` was without effect on training, whose processes are the recipe's; how many they are is in no key of a scorer. A
    run keeps the recipe's, which its steps and GPUs have to be enough for."""
    images = {"train.images": 8, "train.validation_images": 8}
    given = ({**images, "workers": 4}, None) if by_hand else (images, 4)
    plain = asked("run", "demo", images)
    assert plain.train and plain.workers == plain.train.workers == 2
    for verb, found in {"train": (2, 4), "evaluate": (4, 2), "run": (4, 2)}.items():
        job = asked(verb, "demo", given[0], workers=given[1])
        assert job.train and (job.workers, job.train.workers) == found, verb
        assert all(job.train.key(spec) == plain.train.key(spec) for spec in plain.train.pruners)
    assert asked("search", "tune_training", workers=4).workers == 4


def test_workers_of_the_command_line_train(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Job] = []
    monkeypatch.setattr(pipeline, "run", lambda job, *_, **__: jobs.append(job))
    line = ["--set", "train.images=8", "--set", "train.validation_images=8", "--workers", "8"]
    assert commands.call(["train", "demo", *line]) == commands.call(["run", "demo", *line]) == (0, "")
    assert [(job.workers, job.train and job.train.workers) for job in jobs] == [(2, 8), (8, 2)]
    code, sentence = commands.call(["train", "demo", "--workers", "64"])
    assert code == 2 and "each of the 64 workers needs one" in sentence and "\n" not in sentence


def test_help_does_not_wait_for_torch_or_ray() -> None:
    heavy = "[m for m in ('torch', 'ray', 'transformers') if m in sys.modules]"
    code = f"import sys, diffprune.cli.commands as c; print(c.call(['--help'])); print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("(0, '')\n[]\n"), done.stdout[-200:]
    assert "diffprune demo" in done.stdout and "compare_gumbel" in done.stdout
    assert "..." not in done.stdout.partition("Commands:")[2]  # whole sentences


@pytest.mark.parametrize("verb", [*job_verbs.HELP, "plan", "submit", "jobs", "logs", "stop", "resume", "results"])
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.call([verb, "--help"]) == (0, "")
    assert "--address" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("evalute",), "did you mean 'evaluate'"),
        (("evaluate", "--lmit", "3"), "--limit"),
        (("evaluate", "--pruner", "atention", "--budget", "3"), "did you mean 'attention'"),
        (("evaluate", "--pruner", "random(sed=1)", "--budget", "3"), "did you mean 'seed'"),
        ((*ATTENTION, "--budget", "3", "--benchmark", "world('pop')"), "did you mean 'pope'"),
        ((*ATTENTION, "--budget", "3", "--benchmark", "wrld('pope')"), "did you mean 'world'"),
        ((*ATTENTION, "--budget", "0"), "at least 1"),
        ((*ATTENTION, "--budget", "101%"), "at most 1"),
        ((*ATTENTION, "--budget", "Above(nan)"), "threshold"),
        ((*ATTENTION, "--budget", "3", "--limit", "0"), "--limit"),
        ((*ATTENTION, "--budget", "3", "--set", "evaluate.limt=3"), "did you mean 'limit'"),
        ((*ATTENTION, "--budget", "3", "--set", "evalute.limit=3"), "did you mean 'evaluate'"),
        ((*ATTENTION, "--budget", "3", "--set", "limit"), "key=value"),
        ((*ATTENTION, "--budget", "3", "--name", "../x"), "is refused"),
        ((*ATTENTION, "--budget", "3", "--name", "x" * 65), "is refused"),
        ((*ATTENTION, "--budget", "3", "--steps", "9"), "no use for train.steps"),
        (("evaluate", "--pruner", "diffprune", "--budget", "3"), "is not trained"),
        (("evaluate", "--pruner", "diffprune(weights='nowhere')", "--budget", "3"), "nowhere"),
        (("train", "--scorer", "attention"), "cannot be trained"),
        (("train", "--scorer", "diffprune", "--set", "train.stps=3"), "did you mean 'steps'"),
        (("train", "--pruner", "diffprune"), "name what to train with --scorer"),
        (("evaluate", "--scorer", "diffprune"), "train it first"),
        (("evaluate", "--pruner", "none", "--budget", "3"), "'none' is called 'unpruned' now"),
        (("evaluate", "--pruner", "replaced('attention')", "--budget", "3"), "without quotes as in replaced(attention)"),
        (("tune", "--pruner", "attention", "--target", "0"), "above 0"),
        (("tune", "--pruner", "attention", "--target", "-1"), "above 0"),
        (("tune", "--pruner", "attention", "--target", "nan"), "above 0"),
        (("tune",), "at least one method"),
        (("evaluate", "demo", "--target", "2"), "evaluate has no use for tune.targets: give it to tune"),
        (("measure", "demo", "--set", "evaluate.limit=4"), "measure has no use for evaluate.limit"),
        ((*ATTENTION, "--budget", "3", "--set", "train.steps=4"), "evaluate has no use for train.steps"),
        (
            ("tune", "--pruner", "attention", "--budget", "32", "--target", "2"),
            "tune has no use for --budget, which evaluate, measure and run use: leave it out",
        ),
        (("tune", "demo", "--set", "budgets=[7]"), "tune has no use for --set budgets, which evaluate, measure and run use"),
        (("train", "tune_training", "--workers", "1"), "job 'tune_training' has no section train"),
        (("tune", "demo", "--workers", "2"), "tune has no use for --workers, which search, train, evaluate and run use"),
        (("measure", "demo", "--workers", "2"), "measure has no use for --workers, which search, train, evaluate and run use"),
        (
            ("report", "demo", "--pruner", "random", "--budget", "8", "--steps", "5"),
            "report has no use for --pruner, which tune, evaluate, measure and run use: leave it out",
        ),
        (("report", "demo", "--budget", "8"), "report has no use for --budget, which evaluate, measure and run use"),
        (("report", "demo", "--gpus", "1"), "report has no use for --gpus, which search, train, tune, evaluate, measure and run"),
        (("report", "demo", "--steps", "5"), "report has no use for train.steps: give it to train"),
        (("report", "demo", "--scorer", "diffprune"), "report has no use for train.pruners: give it to train"),
        (("report", "demo", "--target", "2"), "report has no use for tune.targets: give it to tune"),
        (("report", "demo", "--benchmark", "world('pope')"), "report has no use for evaluate.benchmarks: give it to evaluate"),
        (("report", "demo", "--address", "auto"), "report has no use for --address"),
        (("run", "tune_training", "--set", "train.steps=5"), "tune_training has no train, so train.steps would change nothing"),
        (("run",), "diffprune run demo"),
        (("run", "dmo"), "did you mean 'demo'"),
        (("evaluate", "demo"), "is not trained yet"),
        (("submit", "dmo"), "did you mean 'demo'"),
        (("run", "demo", "--out", "/proc/here"), "nothing can be written to /proc/here/demo (No such file or directory)"),
        (("evaluate", "--pruner", "grid", "--budget", "3", "--out", "/etc/hostname/x"), "/etc/hostname is a file, but a folder is"),
        (("run", "demo", "--out", "gs://"), "'gs://' is no place: gs://bucket/folder is needed"),
        (("run", "demo", "--out", "s3://"), "'s3://' is no place"),
        (("run", "demo", "--out", "AZ://my_container/x"), "a container being 3 to 63 of a-z 0-9 and single -"),
        (("run", "demo", "--out", "az://container/x?sig=hidden"), "'az://container/x?...' is no place"),
        (("watch", "s3://bucket/x?sig=hidden"), "'s3://bucket/x?...' is no place"),
        (("run", "demo", "--out", "ftp://host/x"), "ftp:// is no storage that is known here"),
        (("verify", "gs://some-bucket/x?sig=hidden"), "gs://some-bucket/x?... lies in object storage"),
        (("verify", "s3://some-bucket/x"), "`diffprune export s3://some-bucket/x FOLDER`"),
        (("export", "s3://some-bucket/x?sig=hidden", "out"), "'s3://some-bucket/x?...' is no place"),
        (("export", "runs/x", "gs://some-bucket/x"), "this verb works in a folder of this machine"),
        (("index", "az://container/x"), "lies in object storage"),
        (("compare", "runs/x", "gs://some-bucket/x"), "lies in object storage"),
        (("measure", "demo", "--set", "measure.sessions=22"), "21"),
        (("run", "nojob"), "no job named 'nojob': choose from"),
        (("report", "runs/nope"), "there is no folder runs/nope, nor a job"),
        (("report", "."), ". is a folder, but holds no store"),
        (("report", "x" * 300), "File name too long: xxx"),
        (("run", "x" * 300 + ".py"), "File name too long: xxx"),
        ((*ATTENTION, "--budget", "3", "--benchmark", f"custom('{'x' * 300}')"), "File name too long: xxx"),
        (("report", "gs://some-bucket/RUN"), "diffprune report RUN --out gs://some-bucket"),
        (("watch", "runs/nope"), "there is no folder runs/nope: name a run below runs"),
        (("verify", "runs/nope"), "there is no folder runs/nope"),
        (("verify", "."), ". holds no report that could be verified: write it with `diffprune report .`"),
        (("export", "runs/nope", "out"), "there is no folder runs/nope"),
        (("compare", ".", "runs/nope"), "there is no folder runs/nope"),
        (("index", "nofolder"), "there is no folder nofolder"),
        (("push", "runs/nope", "user/x"), "there is no folder 'runs/nope'"),
        (("evaluate", "demo", "--set", "evaluate.limit=3", "--set", "evaluate.limit=4"), "set one thing twice"),
        (("evaluate", "demo", "--set", "evaluate.batch=true"), "must be a whole number, not true"),
        (("run", "demo", "--set", "train.data=3"), "3 is no training data: write it as text"),
        (("run", "demo", "--set", "train.data=null"), "None is no training data"),
        (("run", "demo", "--set", "budgets=[null]"), "budgets.0: None is no budget: write Keep(64)"),
        (("run", "demo", "--set", "assumed.txet=3"), "no setting 'assumed.txet': did you mean 'text'?"),
        (("run", "demo", "--set", 'train.methods=[{"pruner": "diffprune", "stepss": 3}]'), "stepss: there is no such setting"),
        (("run", "demo", "--set", "tiny.steps=3"), "tiny.steps would change nothing, as `tiny` is read from the job's file"),
        (("run", "train_llava15_7b", "--tiny", "--set", 'tiny={"train.steps": 3}'), "would change nothing"),
        (("run", "demo", "--set", "measure.rounds=1"), "measure.rounds: must be greater than or equal to 2, not 1"),
        (("run", "demo", "--set", "measure.slow_rounds=1"), "measure.slow_rounds: must be greater than or equal to 2, not 1"),
        (("run", "demo", "--set", "tune.curve_repeats=2"), "tune.curve_repeats: must be greater than or equal to 3, not 2"),
        (("run", "demo", "--set", "tune.curve_repeats=2000000000"), "must be less than or equal to 1000000000"),
        (("run", "demo", "--set", "train.seeds=0"), "seeds: must be a list, as in [1, 2]"),
        (("run", "demo", "--set", "train.steps=abc"), "steps: must be a whole number"),
        (("run", "demo", "--set", "evaluate.benchmarks=[]"), "evaluate.benchmarks: must name at least one"),
        ((*ATTENTION, "--budget", "3", "--benchmark", "custom('.', tokens='many')"), "a whole number of at least 1, the most"),
        ((*ATTENTION, "--budget", "Above(0.5, leest=2)"), "did you mean 'least'"),
        (("evaluate", "--pruner", "grid", "--budget", "3", "--budget", "Above(0.5)"), "Grid cannot meet a budget of the job"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else None,
)  # fmt: skip
def test_mistakes_end_with_2_and_one_sentence_before_ray_starts(line: tuple[str, ...], says: str) -> None:
    code, sentence = commands.call(line)
    assert (code, says in sentence, "\n" in sentence, "hidden" in sentence) == (2, True, False, False), sentence
    assert not ray.is_initialized() and not Path("runs").exists()


SETTINGS = (Job, Assumed, MethodSettings, *SECTIONS.values())
TRUTHS = (bool, bool | None)  # settings that are one


@pytest.mark.parametrize(
    ("section", "name"),
    [(one, name) for one in SETTINGS for name in one.model_fields],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_no_setting_takes_a_truth_value_for_a_number(section: type[BaseModel], name: str) -> None:
    """Of which Python makes 1: one training step, a learning rate of 1."""
    given = {"name": "x"} if section is Job else {"pruner": "diffprune"} if section is MethodSettings else {}
    for value in (True, [True], [True, True], {"a": True}):
        if section.model_fields[name].annotation in TRUTHS or (isinstance(value, dict) and name in ("tiny", "config")):
            continue
        with pytest.raises(ValueError):
            section(**given | {name: value})


def test_ctrl_c_and_faults_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", stopped)
    code, sentence = commands.call([*ATTENTION, "--budget", "3"])
    assert code == 130 and "resumes" in sentence
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: int("no number"))
    code, sentence = commands.call([*ATTENTION, "--budget", "3"])
    assert code in (1, 2) and "invalid literal" in sentence
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: {}["gone"])
    code, sentence = commands.call([*ATTENTION, "--budget", "3"])
    assert code == 1 and "Traceback" in Path(sentence.split("the traceback is in ")[1].rstrip(")")).read_text()


def test_dry_run_prints_what_would_be_run_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.call([*ATTENTION, "--budget", "32", "--budget", "1/9", "--benchmark", "world('pope')", "--dry-run"]) == (0, "")
    out = capsys.readouterr().out
    assert "evaluate: 3 cells, 3 to do" in out and "Attention  Keep(32) Share(0.111111)" in out
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    "line",
    [(*ATTENTION, "--budget", "32", "--dry-run"), ("plan", "demo"), ("report", "demo", "--dry-run")],
    ids=("evaluate", "plan", "report"),
)
@pytest.mark.parametrize("below", ["file", "folder"])
def test_a_file_where_the_run_should_be_is_refused_though_nothing_is_run(line: Sequence[str], below: str) -> None:
    Path("folder").mkdir()
    for name in ("file", "folder/look"):
        Path(name).write_text("x")
    code, sentence = commands.call([*line, "--name", "look", "--out", below])
    shown = Path(below if below == "file" else "folder/look").absolute()
    assert (code, sentence) == (2, f"{shown} is a file, but a folder is needed")
    assert sorted(str(one) for one in Path().rglob("*")) == ["file", "folder", "folder/look"]


def test_the_version_is_told_where_nothing_is_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert commands.call(["--version"]) == (0, "")
    stated = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["version"]
    assert capsys.readouterr().out == f"diffprune, version {stated}\n"


def test_a_method_of_three_seeds_has_three_times_the_cells_before_it_is_trained() -> None:
    only = {"train.pruners": ["diffprune"], "train.seeds": [0, 1, 2], "replaced": [], "tuned": [], "baselines": ["unpruned"]}
    job = asked("run", "demo", only)
    plan = Plan(job, Path("runs/demo"), load("embedded"))
    cells = plan.cells("evaluate")
    assert len({cell.key for cell in cells}) == len(cells) == 10 + 10 + 3 * 4 * 10, "unpruned, without pictures, three seeds"
    assert {(cell.method.label, cell.columns().weights_sha256) for cell in cells} == {
        ("Unpruned", ""), ("No image", ""), *(("DiffPrune", f"to be trained, seed {seed}") for seed in range(3)),
    }  # fmt: skip
    plan = Plan(asked("run", "demo", only | {"replaced": ["diffprune"]}), Path("runs/demo"), load("embedded"))
    assert len(plan.cells("evaluate")) == len(cells) + 4 * 10, "replaced: the first seed"
    assert len(plan.cells("measure")) == 4 * 5, "counts cost the same with any weights; five sessions"
    plan = Plan(asked("run", "demo", only | {"budgets": ["Above(0.5)"]}), Path("runs/demo"), load("embedded"))
    assert len(plan.cells("measure")) == 3 * 5, "a threshold lets every scorer keep other numbers"
    for method, seeds in {"atp": 3, "atp(slack=1.0)": 1}.items():
        own = {"train.pruners": [method], "budgets": ["Share(1/2)"], "train.methods": []}
        plan = Plan(asked("run", "demo", only | own), Path("runs/demo"), load("embedded"))
        assert len(plan.cells("measure")) == seeds * 5, "so do counts that are each picture's own, unless they are exact"


def names(specs: Sequence[Spec]) -> list[str]:
    return [spec.name for spec in specs]


def test_methods_put_in_place_of_the_jobs_leave_nothing_said_of_those(capsys: pytest.CaptureFixture[str]) -> None:
    """What the job says of methods that it does not run any more is no mistake of who has named others."""
    job = asked("evaluate", "demo", pruners=("attention",), budgets=("32",))
    assert names(job.tuned) == ["diffprune", "gumbel_keepdrop", "attention"] and names(job.replaced) == ["diffprune"]
    job = asked("run", "demo", scorers=("gumbel_topk",))
    assert names(job.tuned) == ["grid", "attention"] and not job.replaced
    job = asked("run", "ablation_questions", scorers=("diffprune",))
    assert names(job.wrapped) == ["dpp"] and job.subject is None
    job = asked("run", "demo", {"train": None, "subject": "grid"})
    assert names(job.tuned) == ["grid", "attention"] and not job.replaced and job.subject == Spec("grid")
    line = ["evaluate", "demo", "--pruner", "attention", "--budget", "32", "--name", "look", "--dry-run"]
    code, sentence = commands.call(line)
    assert code == 2 and "is not trained yet below runs/look" in sentence and "--set train=null" in sentence
    assert commands.call([*line, "--set", "train=null"]) == (0, "") and "Attention  Keep(32)" in capsys.readouterr().out


def test_methods_that_tune_is_given_are_tuned() -> None:
    assert names(asked("tune", "demo", pruners=("random",)).tuned) == ["diffprune", "gumbel_keepdrop", "unpruned", "random"]
    assert not asked("tune", "compare_gumbel", pruners=("random",)).tuned, "which is all of them, as before"


@pytest.mark.parametrize("wrong", [{"tuned": ["grid"]}, {"replaced": ["grid"]}, {"subject": "grid"}, {"wrapped": ["dpp(grid)"]}])
def test_what_is_said_of_methods_that_are_not_there_is_refused_where_it_is_given(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} names"):
        asked("run", "demo", wrong, pruners=("attention",))


def test_a_report_of_a_job_takes_what_says_which_chapter_is_first() -> None:
    job = asked("report", "demo", {"title": "other", "subject": "attention"}, limit=7, protocol="lmms_eval", model="owner/name")
    assert Plan(job, Path("runs/demo"), None).setting == {
        "model": "owner/name", "protocol": "lmms_eval", "split": "test", "limit": "7", "answer_tokens": "all", "batch": "64",
    }  # fmt: skip


def test_a_model_is_that_of_every_section_whatever_the_verb_reads() -> None:
    Path("both.py").write_text(
        "from diffprune.job import *\njob = Job(name='both', train=Recipe(), search=Search(), tune=Tuning())"
    )
    for verb in ("search", "train", "tune", "report", "run"):
        job = asked(verb, "both.py", model="owner/name")
        assert job.train and job.search and job.model == job.train.model == job.search.recipe.model != Spec("embedded")


def test_settings_change_a_copy_of_the_job() -> None:
    job = asked("demo", "demo", {"train.steps": 7, "title": "other"}, limit=40)
    assert job.train and job.evaluate
    assert (job.train.steps, job.evaluate.limit, job.title) == (7, 40, "other")
    assert load_job("demo").train != job.train
    found = set_option.settings_of(["a.b=1", "c=[1, 2]", "d=Keep(3)", "e=null"])
    assert found == {"a.b": 1, "c": [1, 2], "d": "Keep(3)", "e": None}


def test_the_working_directory_comes_before_the_repository() -> None:
    assert find_job("demo").is_file()
    Path("jobs").mkdir()
    Path("jobs/demo.py").write_text("from diffprune.job import Job\njob = Job(name='mine')\n")
    assert load_job("demo").name == "mine"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1", "defines no job"),
        ("from diffprune.job import Job\njob = Job(name='a', budgts=())", "did you mean 'budgets'"),
        ("from diffprune.job import Job\njob = Job(name='a', baselines=('atention',))", "did you mean 'attention'"),
        ("from diffprune.job import Job\njob = Job(name='a', replaced=('grid', 'diffprune'))", "does not run"),
        ("job = (", "SyntaxError"),
    ],
)
def test_a_broken_job_is_named_with_its_reason(text: str, says: str) -> None:
    Path("own.py").write_text(text)
    with pytest.raises(ValueError, match=r"own\.py") as refused:
        load_job("own.py")
    assert says in str(refused.value) and "\n" not in str(refused.value)
