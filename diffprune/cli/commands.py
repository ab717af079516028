"""The command line: its verbs, and how a command ends.

Mistakes of the user end with exit code 2 and one sentence on stderr, before Ray starts. Only `cli/` imports late: `--help`
must not wait for torch or Ray.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import click

from diffprune import __version__
from diffprune.cli import inventory, job_verbs, remote, runs
from diffprune.core import exits, termination
from diffprune.io import outage

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

QUERY_INTERRUPTED = "Query interrupted"  # the RuntimeError that DuckDB makes of a signal


class Verbs(click.Group):
    """A group that names the nearest verb when asked for one it lacks, and lists verbs in the order of the work."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click's own, with the whole first sentence of each."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.get_short_help_str(200)) for name, verb in self.commands.items()])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            close = get_close_matches(args[0], self.commands, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(self.commands)}"
            ctx.fail(f"no verb named {args[0]!r}: {hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=Verbs, help=OVERVIEW, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def app() -> None:
    """The command itself; `main` is what the shell calls."""


for _one in (*job_verbs.COMMANDS, *runs.COMMANDS, *remote.COMMANDS, *inventory.COMMANDS):
    app.add_command(_one)


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
    """Write the traceback of a fault of ours to a file, and say where; where none can be written, as on a full disk, say that."""
    said, path = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}", ""
    try:
        handle, path = tempfile.mkstemp(prefix="diffprune-", suffix=".txt", text=True)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write("".join(traceback.format_exception(error)))
    except OSError as full:
        if path:
            os.unlink(path)
        return f"{said} (the traceback could not be written: {full.strerror or full})"
    return f"{said} (the traceback is in {path})"


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
        if not error.filename:
            return 1, _crash(error)
        code = 2 if error.errno == errno.ENAMETOOLONG else 1  # a name that somebody typed
        return code, f"{error.strerror or error}: {error.filename}"
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
    termination.handle(outage.hurry)
    code, sentence = call()
    if sentence:
        print(f"diffprune: {sentence}", file=sys.stderr)
    sys.exit(code)
