"""The verbs on the command line, one grammar: `diffprune VERB [JOB] [options]`.

Mistakes of the user end with exit code 2 and one sentence on stderr, before Ray starts. Only `cli/` imports late: `--help`
must not wait for torch or Ray.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from diffprune.cli import remote, runs
from diffprune.cli.places import Folder, Place
from diffprune.core import exits, termination

OVERVIEW = """Train, tune, measure and honestly compare visual-token pruners.

\b
A job is a Python file under jobs/ that defines `job`; each verb does its part of it:
  diffprune demo                        everything in jobs/demo.py, resuming where it stopped
  diffprune run compare_gumbel          everything in jobs/compare_gumbel.py
  diffprune evaluate demo               only the accuracy of jobs/demo.py
  diffprune run demo --dry-run          what would be run, and what is already done

\b
Without a job a verb takes options:
  diffprune train --scorer diffprune --steps 200
  diffprune evaluate --pruner attention --budget 32 --benchmark "world('pope')" --limit 100
  diffprune evaluate --pruner "diffprune(weights='runs/demo/scorers/diffprune-0')" --budget 22%
  diffprune tune --pruner "diffprune(weights='...')" --target 1.5 --target 2
  diffprune measure --pruner attention --budget 16 --budget 32

\b
Words: a budget says how many visual tokens of an image are kept:
  Keep(32) or 32, Share(1/9) or 11%, Above(0.5) for scores above half a standard deviation.
`unpruned` is the model as it is. Everything is written below --out and never done twice."""

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
    "model", "scorers", "pruners", "budgets", "benchmarks", "limit", "protocol", "steps", "targets", "trackers", "gpus",
)  # fmt: skip
MOST_NESTED = 12
QUERY_INTERRUPTED = "Query interrupted"  # the RuntimeError that DuckDB makes of a signal
NESTED = "--set: {!r:.60} is nested deeper than any setting"


def value_of(text: str) -> Any:
    """The value of `--set key=value`: JSON or a Python literal, else the text itself."""
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError):
            continue
        except (RecursionError, MemoryError):
            raise ValueError(NESTED.format(text)) from None
        if _depth(found) > MOST_NESTED:
            raise ValueError(NESTED.format(text))
        return found
    return text


def _depth(value: Any) -> int:
    """How deep lists and mappings lie in each other."""
    level, depth = [value], 0
    while level:
        level = [one for item in level for one in _within(item)]
        depth += 1
    return depth - 1


def _within(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, list | tuple | set) else []


def settings_of(pairs: Sequence[str]) -> dict[str, Any]:
    """`["train.steps=50"]` -> `{"train.steps": 50}`.

    Raises:
        ValueError: a pair without an equals sign, or two of one key.
    """
    found: dict[str, Any] = {}
    written: dict[str, str] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {pair}: write key=value, as in --set train.steps=50")
        key = key.strip()
        if key in found:
            raise ValueError(f"--set {written[key]} and --set {pair} set one thing twice: leave one of them out")
        found[key], written[key] = value_of(text.strip()), pair
    return found


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
    click.option("--workers", type=click.IntRange(1, 4096), help="Processes that share the work. [default: the job's]"),
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
    if not options["dry_run"]:
        _refuse_if_held(verb, asked, options)
    from diffprune.job import pipeline

    stages = (verb,) if verb in pipeline.STAGES else pipeline.STAGES
    job = configured(verb, asked, options)
    pipeline.run(
        job, options["out"], stages=stages, workers=options["workers"], address=options["address"], dry_run=options["dry_run"]
    )


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
    """The report of a run's folder, which may be read-only, into --out if that was given.

    Raises:
        ValueError: an option that a report of what is there has no use for.
    """
    from diffprune import report
    from diffprune.io.blob_store import open_blobs, remote
    from diffprune.job import seen

    idle = [key for key, value in options.items() if key not in ("job", "name", "out") and value not in (None, (), False)]
    if idle:
        raise ValueError(f"the report of the folder {folder} takes --name and --out alone: leave out {', '.join(map(flag, idle))}")
    given = click.get_current_context().get_parameter_source("out") is not ParameterSource.DEFAULT
    out = options["out"] if given else folder / "report"
    if not remote(out) and (out / "store").exists() and out.resolve() != folder.resolve():
        raise ValueError(f"{out} has a store of its own, of which this page would not be: name another folder with --out")
    before = seen.commits(folder / "store")
    made = report.report(folder / "store", out, title=options["name"] or folder.resolve().name)
    if not remote(out):
        seen.note(out, before)
    print(f"\n{report.summary(folder / 'store')}\n\nreport: {open_blobs(out)}/{made['html'].name}", flush=True)


def _refuse_if_held(verb: str, asked: str | None, options: Mapping[str, Any]) -> None:
    """Before torch is imported and anything planned: whether another process runs this name, as far as the job's text tells it."""
    from diffprune.io.job_files import find_job, run_name
    from diffprune.io.run_lock import refuse_if_held

    name = options["name"] or (run_name(find_job(asked)) if asked else verb)
    if name and options["tiny"] and not options["name"]:
        name += "-tiny"
    if name:
        refuse_if_held(options["out"] / name / "store", name)


def _command(verb: str) -> click.Command:
    def body(**options: Any) -> None:
        _perform(verb, options)

    for option in reversed(OPTIONS):
        body = option(body)
    return click.command(verb, help=HELP[verb], short_help=HELP[verb], epilog=EPILOGUE)(body)


class Verbs(click.Group):
    """A group that names the nearest verb when asked for one it lacks, and lists verbs in the order of the work."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            close = get_close_matches(args[0], self.commands, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(self.commands)}"
            ctx.fail(f"no verb named {args[0]!r}: {hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=Verbs, help=OVERVIEW, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="diffprune")
def app() -> None:
    """The command itself; `main` is what the shell calls."""


for _verb in HELP:
    app.add_command(_command(_verb))


for _one in (*runs.COMMANDS, *remote.COMMANDS):
    app.add_command(_one)


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
        job, options["out"], workers=options["workers"], dry_run=True,
        tell=lambda plan, stages: click.echo("\n".join(cost.lines(plan, stages, known))),
    )  # fmt: skip


for _option in (
    click.option("--rates", type=Place(), help="Run or report whose cells tell how long such cells take."),
    click.option("--gpu", metavar="KIND", help="The GPU whose rates count, as in H100: refused where none was measured."),
    *reversed(OPTIONS),
):
    _cost = _option(_cost)
app.command("plan", epilog=EPILOGUE)(_cost)


WEIGHTS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")  # of a checkpoint; never pickles or code


@app.command("fetch")
@click.argument("names", nargs=-1, required=True)
@click.option("--out", type=Folder(), help="Download below this folder. [default: DIFFPRUNE_DATA or ~/.cache/diffprune]")
def fetch(names: tuple[str, ...], out: Path | None) -> None:
    """Download and check data ahead of a run: benchmarks (gqa, "mmbench(edition='20230712')") and checkpoints (owner/name or
    owner/name@commit). What is there is not loaded again; a folder, as in "gqa(folder='data')", is only checked."""
    from diffprune.core import registry
    from diffprune.io import hub

    made = [(name, None if "/" in name.partition("(")[0] else registry.load("benchmarks", name)) for name in names]
    for name, benchmark in made:
        if benchmark is None:
            repository, _, commit = name.partition("@")
            files = hub.files(repository, commit or "main", WEIGHTS, kind="model")
            size = sum(path.stat().st_size for path in files) / 2**20
            click.echo(f"{name}: {len(files)} files, {size:,.1f} MiB, in {files[0].parent}")
        else:
            source = getattr(benchmark, "source", None)
            click.echo(benchmark.fetch(out / source.name if out and source else None))


@app.command("push")
@click.argument("scorer", type=Folder())
@click.argument("name", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="A repository that this makes can be read by everyone. [default: private]")
def push(scorer: Path, name: str, public: bool) -> None:
    """Upload the folder of a trained SCORER with its card to the Hub, as the repository OWNER/NAME."""
    from diffprune.pruning.pretrained import push_to_hub

    click.echo(push_to_hub(scorer, name, private=not public))


@app.command("list")
@click.argument("kind", metavar="pruners|models|benchmarks|jobs")
@click.option("--readme", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Write the package's methods into it.")
def list_(kind: str, readme: Path | None) -> None:
    """What there is, one line each: of the package, of the folders `pruners/`, `models/`, `benchmarks/` and `jobs/` here, and of
    installed distributions."""
    from diffprune.cli.listing import listed

    lines = listed(kind)
    if readme is not None:
        from diffprune.report.tables import catalogue

        if kind != "pruners":
            raise ValueError(f"--readme writes the catalogue of methods: write list pruners, not list {kind}")
        catalogue.write(readme)
    widths = [max((len(line[i]) for line in lines), default=0) for i in (0, 1, 2)]
    for line in lines:
        click.echo("  ".join([*(text.ljust(width) for text, width in zip(line[:3], widths, strict=True)), line.origin]).rstrip())


@app.command("show")
@click.argument("spec")
def show(spec: str) -> None:
    """Options of a pruner, a model family, a benchmark or training data with their meaning; of `train`, `tune`, `evaluate`,
    `measure` or `job` the settings that --set changes."""
    from diffprune.cli.listing import shown

    for heading, description, options in shown(spec):
        click.echo(f"{heading}\n  {description}")
        for option in options:
            default = f" [{option.default}]" if option.default else ""
            click.echo(f"    {option.name}{default}" + (f": {option.meaning}" if option.meaning else ""))


@app.command("doctor")
def doctor() -> None:
    """What this machine can do: versions, GPU, attention kernels, families, extras. Exit code 1 if something is missing."""
    from rich.console import Console
    from rich.table import Table

    from diffprune.cli import doctor as diagnosis

    table = Table(box=None, show_header=False, padding=(0, 1))
    colours = {diagnosis.GOOD: "green", diagnosis.WORSE: "yellow", diagnosis.BAD: "red"}
    found = diagnosis.examine()
    for finding in found:
        table.add_row(finding.what, f"[{colours[finding.state]}]{finding.state}[/]", finding.detail)
    Console().print(table)
    sys.exit(any(finding.state == diagnosis.BAD for finding in found))


def _sentence(error: BaseException) -> str:
    if type(error).__module__.startswith("pydantic"):
        from diffprune.job.job import explain

        return explain(error)  # type: ignore[arg-type]
    return " ".join(str(error).split()) or type(error).__name__


def _usage(error: click.ClickException) -> str:
    """One sentence, with the command whose help shows what would be right."""
    context = getattr(error, "ctx", None)
    where = context.command_path if context else "diffprune"
    return f"{error.format_message().rstrip('.')} (see {where} --help)"


def _crash(error: BaseException) -> str:
    """Write the traceback of a fault of ours to a file, and say where."""
    handle, path = tempfile.mkstemp(prefix="diffprune-", suffix=".txt", text=True)
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write("".join(traceback.format_exception(error)))
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]} (the traceback is in {path})"


def call(arguments: Sequence[str] | None = None) -> tuple[int, str]:
    """Run one command line; returns (exit code, sentence for stderr, "" if all went well)."""
    for text in sys.argv[1:] if arguments is None else arguments:
        if "\0" in text or any("\ud800" <= mark <= "\udfff" for mark in text):  # which no file system and no table takes
            return 2, f"the argument {text!a:.80} must be text of whole characters, without NUL"
    try:
        app.main(args=arguments, prog_name="diffprune", standalone_mode=False)
    except click.ClickException as error:
        return 2, _usage(error)
    except (click.Abort, KeyboardInterrupt):  # click puts an Abort in its place
        return _interrupted()
    except SystemExit as error:
        return int(error.code or 0), ""
    except Exception as error:
        return _failed(error)
    return 0, ""


def _interrupted() -> tuple[int, str]:
    how = "terminated" if termination.asked() else "interrupted"
    return exits.exit_code(KeyboardInterrupt()), f"{how}; what was finished is kept, the same command resumes it"


def _failed(error: Exception) -> tuple[int, str]:
    """Exit code and sentence of an error. What a foreign library makes of Ctrl-C or SIGTERM that comes while it is at work in C is
    an interruption like any other: DuckDB raises an error of its own."""
    if termination.asked() or type(error).__name__ == "InterruptException" or str(error) == QUERY_INTERRUPTED:
        return _interrupted()
    if isinstance(error, ValueError):
        return (2, _sentence(error)) if exits.ours(error) else (1, _crash(error))
    if isinstance(error, RuntimeError):
        return 1, _sentence(error) if exits.ours(error) else _crash(error)
    if isinstance(error, OSError):
        return 1, f"{error.strerror or error}: {error.filename}" if error.filename else _crash(error)
    return 1, _crash(error)


def environment() -> Mapping[str, str]:
    """What must be set before torch or Ray is imported: one thread per process, no telemetry."""
    return {
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def main() -> None:
    """Entry point of the `diffprune` command."""
    for key, value in environment().items():
        os.environ.setdefault(key, value)
    termination.handle()
    code, sentence = call()
    if sentence:
        print(f"diffprune: {sentence}", file=sys.stderr)
    sys.exit(code)
