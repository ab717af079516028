"""The verbs of a cluster: submit, jobs, logs, stop, resume, results. What may be refused is refused before anything is sent."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from diffprune.cli.job_verbs import configured
from diffprune.cli.places import Folder

LOCAL = "http://127.0.0.1:8265"


def _head(required: bool = True) -> Callable[[Any], Any]:
    """The options that say which head."""
    where = click.option(
        "--address",
        default=LOCAL if required else None,
        show_default=required,
        help="Of the head's dashboard."
        if required
        else "Of the head's dashboard; without it the job runs on a Ray of this machine.",
    )
    plain = click.option("--insecure", is_flag=True, help="Allow http:// to another machine; the token travels there in clear.")
    return lambda body: where(plain(body))


def _connected(address: str, insecure: bool) -> Any:
    from diffprune.distributed.head import connect

    return connect(address, insecure)


@click.command("submit", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("job")
@_head(required=False)
@click.option(
    "--env", "pairs", multiple=True, metavar="NAME=VALUE", help="Variable of the job's processes; may be repeated. No secrets."
)
@click.option("--working-dir", type=Folder(), help="Send this folder, of a checkout what git tracks there. [default: the project]")
@click.option("--image", help="Run in this container image, with what is inside it; nothing is sent.")
@click.option(
    "--timeout", "timeout_s", type=click.IntRange(min=1), help="Interrupt the job after so many seconds; it can be resumed."
)
@click.argument("rest", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def submit(context: click.Context, job: str, address: str | None, insecure: bool, rest: tuple[str, ...], **where: Any) -> None:
    """Send a job to a cluster through the Ray Jobs API, follow its log and exit with its status.

    Further options are those of `diffprune run`, checked here and applied there. Without --address the same job runs on this
    machine. The token is taken from RAY_AUTH_TOKEN or ~/.ray/auth_token.
    """
    if job.startswith("-"):
        raise ValueError(f"the job comes before options of `run`, as in `diffprune submit demo {job} ...`")
    with _as_run(context, job, rest) as run:
        if address is None:
            if given := [name for name, value in where.items() if value]:
                raise ValueError(f"--{_spelt(given[0])} is about a cluster: say which with --address")
            run.command.invoke(run)
            return
        name = _run_name(job, run.params)
    from diffprune.distributed.submit import Request, variables

    folder = where["working_dir"]
    asked = Request(name, job, rest, variables(where["pairs"]), where["image"], where["timeout_s"], str(folder) if folder else None)
    sys.exit(_send(asked, address, insecure))


def _spelt(name: str) -> str:
    return {"pairs": "env", "timeout_s": "timeout"}.get(name, name.replace("_", "-"))


def _as_run(context: click.Context, job: str, rest: Sequence[str]) -> click.Context:
    """What `diffprune run JOB REST` makes of its command line."""
    verb: click.Command = context.parent.command.commands["run"]  # type: ignore[union-attr]
    return verb.make_context("run", [job, *rest], parent=context.parent)


def _run_name(job: str, options: dict[str, Any]) -> str:
    """The name of the run, after everything that can be told without the model was checked: settings, plug-ins, budgets.

    Raises:
        ValueError: what is wrong.
    """
    from diffprune.core import registry

    found = configured("run", job, options)
    _ = found.tuning, found.measurement
    for spec in found.train.pruners if found.train else ():
        registry.make("pruners", spec)
    return found.name


def _send(asked: Any, address: str, insecure: bool) -> int:
    """Pack, show, send and follow; returns the job's exit code."""
    from diffprune.distributed import submit as jobs
    from diffprune.distributed.head import check, loopback
    from diffprune.io.project import project_of

    if asked.image and (asked.working_dir or asked.job.endswith(".py")):
        raise ValueError("--image runs what the image holds: name a job that is in it, without --working-dir")
    project = None if asked.image else project_of(asked.job, Path(asked.working_dir) if asked.working_dir else None)
    if project:
        project.check()
    check(address, insecure)
    near = _connected(address, insecure) if loopback(address) else None  # who listens there, if anybody, says if it needs --out
    asked.entrypoint(asked.job, address)
    head = near or _connected(address, insecure)
    if project:
        print(project.told(), flush=True)
    name = jobs.submit(head, address, asked, project)
    print(f"submitted {name} to {address}", flush=True)
    return jobs.follow(head, name)


@click.command("jobs")
@_head()
def jobs(address: str, insecure: bool) -> None:
    """The jobs of a head: id, status, start, and what was asked."""
    from diffprune.distributed.submit import listed

    rows = [("ID", "STATUS", "STARTED", "JOB"), *listed(_connected(address, insecure))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


@click.command("logs")
@click.argument("name", metavar="ID")
@click.option("-f", "--follow", is_flag=True, help="Until the job ends; exit with its status.")
@_head()
def logs(name: str, follow: bool, address: str, insecure: bool) -> None:
    """What a job has printed so far."""
    from diffprune.distributed import submit as jobs
    from diffprune.distributed.head import without_rays_lines

    head = _connected(address, insecure)
    jobs.found(head, name)
    if follow:
        sys.exit(jobs.follow(head, name))
    click.echo(without_rays_lines(jobs.log_of(head, name)), nl=False)


@click.command("stop")
@click.argument("name", metavar="ID")
@_head()
def stop(name: str, address: str, insecure: bool) -> None:
    """Stop a job and wait until it has ended. What it finished is kept."""
    from diffprune.distributed import submit as jobs

    click.echo(jobs.stop(_connected(address, insecure), name))


@click.command("resume")
@click.argument("name", metavar="ID")
@_head()
@click.pass_context
def resume(context: click.Context, name: str, address: str, insecure: bool) -> None:
    """Send the job of an attempt that has ended again, as its next attempt, with the files that are here now.

    It goes on from what is stored. Run it from the folder that you submitted from.
    """
    from diffprune.distributed import submit as jobs
    from diffprune.io.job_files import find_job

    sent = jobs.found(_connected(address, insecure), name)
    asked, folder = jobs.request_of(sent), (sent.metadata or {}).get("folder", ".")
    try:
        find_job(asked.job)
    except ValueError as error:
        if asked.image or Path(folder) == Path.cwd():
            raise
        raise ValueError(f"there is no job {asked.job} here: {name} was sent from {folder}, resume it there") from error
    with _as_run(context, asked.job, asked.arguments) as run:
        now = _run_name(asked.job, run.params)
    if now != asked.run:
        raise ValueError(f"{asked.job} names its run {now!r} now, and {name} was of {asked.run!r}: submit it as a run of its own")
    sys.exit(_send(asked, address, insecure))


@click.command("results")
@click.argument("name", metavar="ID")
@click.option("--to", type=Folder(), help="A new folder. [default: results/ID]")
@_head()
def results(name: str, to: Path | None, address: str, insecure: bool) -> None:
    """Bring the report and the records of a job's run here; it may be running still. Scorers stay in the shared folder."""
    from diffprune.distributed.results import fetch

    place = to or Path("results") / name
    count = fetch(_connected(address, insecure), name, place)
    click.echo(f"{count} files in {place.resolve()}")


COMMANDS = (submit, jobs, logs, stop, resume, results)
