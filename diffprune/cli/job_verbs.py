"""The verbs on a job, one grammar: `diffprune VERB [JOB] [options]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from diffprune.cli.places import Place
from diffprune.cli.set_option import settings_of
from diffprune.core import garbage

HELP = {
    "search": "Search the settings of every method's training, equal budget for each, on held-out images; never on test questions.",
    "train": "Train scorers: every method x seed of a job, or the methods given with --scorer.",
    "tune": "Find the threshold and the count that reach each --target prefill speedup on this machine, then verify by measuring.",
    "evaluate": "Accuracy: every pruner x budget x benchmark, one graded answer per question.",
    "measure": "Latency: encoder, overhead, prefill, TTFT and decode apart; memory and FLOPs.",
    "report": "Write the page and the tables from what is in the store; no model. JOB may be a run's folder; --out is where.",
    "run": "All of a job: search, train, tune, evaluate, measure, report. Resumes; what is done is not done again.",
    "demo": "The same as `diffprune run demo`: the whole path on the embedded model, offline, in minutes.",
}
EPILOGUE = (
    "Any setting of a job can be changed with --set, as in --set train.steps=50 --set evaluate.limit=40. `diffprune show train` "
    "lists those of training with default and meaning; so with tune, evaluate, measure, job, jsonl (data), custom (benchmark)."
)


SHORT = (
    "model", "scorers", "pruners", "budgets", "benchmarks", "limit", "protocol", "steps", "targets", "trackers", "workers", "gpus",
)  # fmt: skip
OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.argument("job", required=False),
    click.option("--name", help="Of the run: its folder below --out. [default: the job's name]"),
    click.option(
        "--out",
        default="runs",
        show_default=True,
        type=Place(),
        help="Folder, or s3://, gs:// or az://bucket/folder, where everything is written.",
    ),
    click.option("--model", help="'embedded', a folder, or a hub checkpoint."),
    click.option("--scorer", "scorers", multiple=True, help="Method to train, e.g. diffprune; may be repeated."),
    click.option("--pruner", "pruners", multiple=True, help='Method that is ready, e.g. "random(seed=3)"; may be repeated.'),
    click.option("--budget", "budgets", multiple=True, help="Tokens to keep, e.g. 32, 22% or 'Above(0.5)'; may be repeated."),
    click.option("--benchmark", "benchmarks", multiple=True, help="E.g. \"world('pope')\"; may be repeated."),
    click.option("--limit", type=click.IntRange(min=1), help="Questions per benchmark, rounded up to whole groups."),
    click.option("--protocol", help="Whose prompts and rules: llava (as papers) or lmms_eval (as the harness)."),
    click.option("--steps", type=click.IntRange(min=1), help="Training steps."),
    click.option("--target", "targets", type=float, multiple=True, help="Prefill speedup to tune for, e.g. 2; may be repeated."),
    click.option("--set", "pairs", multiple=True, metavar="KEY=VALUE", help="Change any setting of the job, e.g. train.steps=50."),
    click.option("--tracker", "trackers", multiple=True, help="Told beside TensorBoard: wandb or mlflow; may be repeated."),
    click.option(
        "--workers",
        type=click.IntRange(1, 4096),
        help="Processes that share the trials of search, the training of train and the questions of evaluate; run trains with "
        "train.workers. [default: the job's]",
    ),
    click.option("--gpus", type=click.FloatRange(0, 64), help="Of every worker; a share, as 0.5, where several use one."),
    click.option("--address", help="Of a running Ray cluster; without it one is started on this machine and stopped at the end."),
    click.option("--tiny", is_flag=True, help="The job on its family's tiny random instance, a few steps: tries the very code."),
    click.option("--dry-run", is_flag=True, help="Print the cells that would be run, and how many are done; run nothing."),
)


def flag(key: str) -> str:
    """An option as it is typed: `--set` for `pairs`."""
    named = {"scorers": "scorer", "pruners": "pruner", "budgets": "budget", "benchmarks": "benchmark", "targets": "target"}
    named |= {"trackers": "tracker", "pairs": "set"}
    return f"--{named.get(key, key).replace('_', '-')}"


def _perform(verb: str, options: dict[str, Any]) -> None:
    """Read the job, apply the options, run the stages of the verb."""
    asked = options["job"] or ("demo" if verb == "demo" else None)
    if verb == "report" and asked and (folder := _run_folder(asked)):
        return _report(folder, options)
    if asked is None and verb == "run":
        raise ValueError("run needs a job: diffprune run demo")
    if verb == "report" and options["address"]:
        raise ValueError("report has no use for --address, which only the verbs that start Ray use: leave it out")
    if not options["dry_run"]:
        _refuse_if_held(verb, asked, options)
    with garbage.looked_for_seldom():
        from diffprune.job import pipeline

    stages = (verb,) if verb in pipeline.STAGES else pipeline.STAGES
    job = configured(verb, asked, options)
    pipeline.run(job, options["out"], stages=stages, address=options["address"], dry_run=options["dry_run"])


def configured(verb: str, asked: str | None, options: Mapping[str, Any]) -> Any:
    """The `Job` of a command line.

    Raises:
        ValueError: the first thing that is wrong.
    """
    from diffprune.job.configure import configure

    short = {key: options[key] for key in SHORT}
    return configure(verb, asked, options["name"], short, settings_of(options["pairs"]), options["tiny"])


def _run_folder(asked: str) -> Path | None:
    """The folder of a run that `report` is given; None of a job.

    Raises:
        ValueError: a place that is no folder of a run.
    """
    from diffprune.io.blob_store import open_blobs, remote
    from diffprune.io.job_files import known

    if remote(asked):
        place, _, name = str(open_blobs(asked)).rpartition("/")
        raise ValueError(f"the report of a run in object storage is asked for by its job: diffprune report {name} --out {place}")
    folder = Path(asked)
    if (folder / "store").is_dir():
        return folder
    if asked in known() or folder.suffix == ".py":
        return None
    if folder.is_dir():
        raise ValueError(f"{asked} is a folder, but holds no store of a run: name one that has run, such as runs/demo, or a job")
    if folder.name != asked:
        raise ValueError(
            f"there is no folder {asked}, nor a job of this name: name the folder of a run, such as runs/demo, or a job"
        )
    return None


def _report(folder: Path, options: Mapping[str, Any]) -> None:
    """The report of a run's folder, which may be read-only, into --out if that was given: under the run's own title, the chapter of
    its own setting first, and about the method that the page which is there is about, unless `--set subject=...` names another, by
    its label or its spelling.

    Raises:
        ValueError: an option that a report of what is there has no use for, or no results of the subject.
    """
    from diffprune import report
    from diffprune.io.blob_store import open_blobs, remote
    from diffprune.job import seen, settings

    idle = [key for key, value in options.items() if key not in ("job", "name", "out", "pairs") and value not in (None, (), False)]
    pairs = dict(pair.partition("=")[::2] for pair in options["pairs"])
    if idle or {*pairs} - {"subject"}:
        others = [*map(flag, idle), *(f"--set {key}" for key in pairs if key != "subject")]
        takes = "takes --name, --out and --set subject=LABEL alone"
        raise ValueError(f"the report of the folder {folder} {takes}: leave out {', '.join(others)}")
    given = click.get_current_context().get_parameter_source("out") is not ParameterSource.DEFAULT
    out = options["out"] if given else folder / "report"
    if not remote(out) and (out / "store").exists() and out.resolve() != folder.resolve():
        raise ValueError(f"{out} has a store of its own, of which this page would not be: name another folder with --out")
    before = seen.commits(folder / "store")
    there = next((place for place in (folder / "report", folder) if (place / "numbers.csv").is_file()), folder)
    noted = settings.read(folder)
    subject = _label(pairs["subject"]) if "subject" in pairs else report.about(there) or _label(str(noted.get("subject") or ""))
    found = report.read(folder / "store", subject)
    if "subject" in pairs and found.subject.label not in found.methods:
        known = ", ".join(label for label, method in found.methods.items() if method.kind != "bound")
        raise ValueError(f"a report about {pairs['subject']!r} needs results of it: {folder} has those of {known or 'no method'}")
    title, asked = options["name"] or settings.title(noted) or folder.resolve().name, settings.chapter(noted)
    made = report.report(found, out, title=title, asked=asked)
    seen.note(out, before)
    print(f"\n{report.summary(found, asked)}\n\nreport: {open_blobs(out)}/{made['html'].name}", flush=True)


def _label(subject: str) -> str:
    """How a page names a method that is asked for by its label or, as in a job, by its spelling."""
    from diffprune.core import registry
    from diffprune.core.cell import describe

    try:
        return describe(registry.load("pruners", subject)).label
    except ValueError:
        return subject


def _refuse_if_held(verb: str, asked: str | None, options: Mapping[str, Any]) -> None:
    """Before torch is imported and anything planned: whether another process runs this name, and its folder can be written, as far
    as the job's text tells it."""
    from diffprune.io.blob_store import refuse_if_unwritable
    from diffprune.io.job_files import find_job, run_name
    from diffprune.io.run_lock import refuse_if_held

    name = options["name"] or (run_name(find_job(asked)) if asked else verb)
    if name and options["tiny"] and not options["name"]:
        name += "-tiny"
    if name:
        refuse_if_held(options["out"] / name / "store", name)
        if verb != "report":
            refuse_if_unwritable(options["out"] / name)


def _command(verb: str) -> click.Command:
    def body(**options: Any) -> None:
        _perform(verb, options)

    for option in reversed(OPTIONS):
        body = option(body)
    return click.command(verb, help=HELP[verb], short_help=HELP[verb], epilog=EPILOGUE)(body)


def _cost(gpu: str | None, rates: Path | None, **options: Any) -> None:
    """What JOB would cost on a cluster of --workers: cells, answers, hours, bytes and files that are left.

    Hours come from rates that were measured: --rates names a run or an exported report, the job's own run without it. Whatever is
    assumed instead is said beside the figure. Nothing is run."""
    from diffprune.job import cost, pipeline

    if options["job"] is None:
        raise ValueError("plan needs a job: diffprune plan demo")
    job = configured("run", options["job"], options)
    own = options["out"] / job.name
    known = cost.read(rates or own, gpu) if rates or gpu else cost.own(own)
    pipeline.run(
        job, options["out"], dry_run=True,
        tell=lambda plan, stages: click.echo("\n".join(cost.lines(plan, stages, known))),
    )  # fmt: skip


for _option in (
    click.option("--rates", type=Place(), help="Run or report whose cells tell how long such cells take."),
    click.option("--gpu", metavar="KIND", help="The GPU whose rates count, as in H100: refused where none was measured."),
    *reversed(OPTIONS),
):
    _cost = _option(_cost)

COMMANDS = (*map(_command, HELP), click.command("plan", epilog=EPILOGUE)(_cost))
