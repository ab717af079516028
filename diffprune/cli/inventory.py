"""Verbs on what there is: data and checkpoints to fetch, scorers to publish, plug-ins to list and show, this machine to examine."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from diffprune.cli.places import Folder

WEIGHTS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")  # of a checkpoint; never pickles or code


@click.command("fetch")
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


@click.command("push")
@click.argument("scorer", type=Folder())
@click.argument("name", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="A repository that this makes can be read by everyone. [default: private]")
def push(scorer: Path, name: str, public: bool) -> None:
    """Upload the folder of a trained SCORER with its card to the Hub, as the repository OWNER/NAME."""
    from diffprune.pruning.pretrained import push_to_hub

    click.echo(push_to_hub(scorer, name, private=not public))


@click.command("list")
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


@click.command("show")
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


@click.command("doctor")
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


COMMANDS = (fetch, push, list_, show, doctor)
