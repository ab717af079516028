"""The verbs of runs that are there: watch, verify, export, compare, index. They read what a run has written and need no model."""

from __future__ import annotations

import shutil
import sys
from contextlib import suppress
from pathlib import Path

import click

from diffprune.cli.places import Folder, Place

UNFINISHED = ".unfinished"  # how the name of an export that is being made ends


@click.command("watch")
@click.argument("run", type=Place())
@click.option("--out", default="runs", show_default=True, type=Place(), help="Where runs are, told by name.")
def watch(run: Path, out: Path) -> None:
    """Show what a run has done so far: stages, losses, accuracies, failures. RUN is its name, or its folder.

    A run at work is followed until it ends; Ctrl-C leaves it alone. The same as a page is live.html in the run's folder."""
    from diffprune.io.blob_store import open_blobs, remote
    from diffprune.watch.screen import follow

    if not remote(run) and not run.is_dir():
        if run.name != str(run):  # a path, not the name of a run below --out
            raise ValueError(f"there is no folder {run}: name a run below {out}, or its folder")
        run = out / run
    try:
        follow(run)
    except ValueError as error:
        raise ValueError(str(error).replace(str(run), f"{open_blobs(run)}") if remote(run) else str(error)) from None


@click.command("verify")
@click.argument("place", type=Folder())
def verify_(place: Path) -> None:
    """Compute every number of a report again from its store's Parquet files, with DuckDB alone.

    PLACE is the folder of a run, or of a report with a folder `store` beside its page. Exit code 1 where anything differs."""
    from diffprune import verify

    present(place)
    found = verify.verify(place)
    click.echo(found)
    sys.exit(bool(found.differences))


@click.command("export")
@click.argument("run", type=Place())
@click.argument("out", type=Folder())
def export(run: Path, out: Path) -> None:
    """Copy the report of a run into the folder OUT, and its store beside it, compacted to one file for each table.

    RUN is a folder, or s3://, gs:// or az://bucket/folder/run: so a run in object storage is brought here, to verify or compare."""
    from diffprune.io.blob_store import LocalBlobs, open_blobs, remote
    from diffprune.job import seen
    from diffprune.store import Store, readme

    blobs, away = open_blobs(run), remote(run) is not None
    shown, (place, _, name) = str(blobs if away else run), str(blobs).rpartition("/")
    write = f"`diffprune report JOB --name {name} --out {place}`" if away else f"`diffprune report {run}`"
    if not away:
        present(run)
    if blobs.version("report/report.html") is None:
        raise ValueError(f"{shown} has no report: write it with {write}")
    if not seen.all_of(run / "store", run / "report"):
        raise ValueError(f"{shown}: its store has records that its report has not seen: write it anew with {write}")
    to = out.resolve()  # of a link the folder it leads to
    if not away and to.is_relative_to(run.resolve()):
        raise ValueError(f"{out} lies in the run that is exported: choose a folder outside {run}")
    if to.exists() and not to.is_dir():
        raise ValueError(f"{out} is a file, but a folder is needed")
    if (to / "store").exists():
        raise ValueError(f"{out / 'store'} holds records already: choose another folder, or remove it if an export was cut short")
    half = to / UNFINISHED if to.is_dir() else to.with_name(f".{to.name}{UNFINISHED}")  # in one file system with OUT
    shutil.rmtree(half, ignore_errors=True)
    try:
        Store(run / "store").compact(half / "store")
        readme.write(half / "store")
        page, copy = open_blobs(run / "report"), LocalBlobs(half)
        for key in page.list():
            if key != seen.FILE:
                copy.replace(key, page.read(key))
        with suppress(FileNotFoundError):  # of a search alone
            copy.replace("winners.json", blobs.read("winners.json"))
        _put(half, to)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    size = sum(path.stat().st_size for path in (to / "store").rglob("*.parquet")) / 2**20
    click.echo(f"{out}: the report and its store, {size:.1f} MiB")


def _put(made: Path, out: Path) -> None:
    """A finished folder in its place, at once; into one that is there already, the store last, by which it is told that all is
    there."""
    if not out.exists():
        made.replace(out)
        return
    store = made / "store"
    for path in sorted(path for path in made.rglob("*") if path.is_file() and store not in path.parents):
        place = out / path.relative_to(made)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
    store.replace(out / "store")


def present(folder: Path) -> None:
    """Raises ValueError: there is no such folder."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: name that of a run, such as runs/demo")


@click.command("compare")
@click.argument("first", metavar="RUN", type=Folder())
@click.argument("second", metavar="RUN", type=Folder())
@click.option("--out", type=Folder(), help="Folder of the page. [default: runs/FIRST-SECOND]")
def compare(first: Path, second: Path, out: Path | None) -> None:
    """Two runs on one page: the second minus the first for every method and budget that both have, with verdicts, and what differs.

    RUN is the folder of a run, or of an exported report. Questions that both asked are compared in pairs; no model is needed."""
    from diffprune import report

    present(first)
    present(second)
    out = out or Path("runs") / f"{first.resolve().name}-{second.resolve().name}"
    made, said = report.compare(first, second, out)
    click.echo("\n".join([*said, f"page: {made['html'].resolve()}"]))


@click.command("index")
@click.argument("folder", default="runs", type=Folder())
def index(folder: Path) -> None:
    """One page over all runs of FOLDER (runs, unless named): FOLDER/index.html, with each run's verdict and a link to its page."""
    from diffprune import report

    present(folder)
    click.echo(f"page: {report.index(folder).resolve()}")


COMMANDS = (watch, verify_, export, compare, index)
