"""A run in the terminal: the snapshot as tables, drawn anew while the run is at work."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from diffprune.io.blob_store import open_blobs, remote
from diffprune.watch.snapshot import PAGE, Curve, Snapshot, read, standing

LOOK_S = 1.0
BARS = "▁▂▃▄▅▆▇█"
SPARK, BAR = 24, 20  # columns of a loss curve and of a bar
MOST = 14  # rows of a table; the page has all
COLOURS = {"waiting": "dim", "running": "cyan", "done": "green", "failed": "red"}


def follow(folder: Path, console: Console | None = None) -> None:
    """Show a run until it ends, or once where the output is no terminal; Ctrl-C leaves it.

    Raises:
        ValueError: no such run, or it has left no snapshot.
    """
    console = console or Console()
    seen = read(folder)
    if not console.is_terminal:
        console.print(screen(folder, seen))
        return
    try:
        with Live(screen(folder, seen), console=console, auto_refresh=False) as live:
            while (stands := standing(folder, seen)) == "running" or stands.startswith("no news"):
                time.sleep(LOOK_S)
                seen = read(folder)
                live.update(screen(folder, seen), refresh=True)
    except KeyboardInterrupt:
        console.print("left; the run goes on")


def screen(folder: Path, seen: Snapshot) -> Group:
    """Everything of a snapshot that fits a terminal. Text of others is plain: its markup counts for nothing."""
    stands = standing(folder, seen)
    head = Text.assemble((plain(seen.title or seen.run), "bold"), f"  attempt {seen.attempt}  ", (plain(stands, 400), "bold"))
    parts: list[RenderableType] = [
        head,
        *([Text(f"until then {plain(seen.restarts, 200)}", "dim")] if seen.restarts else []),
        _stages(seen),
    ]
    parts += [_curves(seen)] if seen.curves else []
    parts += [_points(seen)] if seen.points else []
    parts += [Text(plain(f"failed: {one.what}: {one.reason}", 300), "red") for one in seen.failures[:5]]
    more = seen.num_failures - len(seen.failures[:5])
    parts += [Text(f"and {more} more failures", "red")] if more > 0 else []
    page = f"{open_blobs(folder)}/{PAGE}" if remote(folder) else str((folder / PAGE).resolve())
    parts.append(Text(f"the page: {plain(page, 400)}", "dim"))
    return Group(*parts)


def plain(text: str, limit: int = 80) -> str:
    """One line of what prints: no escape sequences, no control or direction characters."""
    return "".join(mark if mark.isprintable() else " " for mark in text[: 4 * limit])[:limit]


def _table(*columns: str) -> Table:
    made = Table(box=None, padding=(0, 2, 0, 0))
    for number, name in enumerate(columns):
        made.add_column(name, justify="left" if number == 0 else "right", header_style="dim", no_wrap=True)
    return made


def _row(table: Table, *texts: str, style: str = "") -> None:
    table.add_row(*(Text(plain(text), style) for text in texts))


def _stages(seen: Snapshot) -> Table:
    made = _table("stage", "", "done", "time", "now")
    for stage in seen.stages:
        share = stage.done / stage.total if stage.total else float(stage.state == "done")
        filled = round(BAR * min(1.0, share))
        count = f"{stage.done}/{stage.total}" + (f", {stage.failed} failed" if stage.failed else "") if stage.total else stage.state
        bar = "━" * filled + "╌" * (BAR - filled)
        _row(made, stage.name, bar, count, stage.lasted(seen.written), stage.note, style=COLOURS[stage.state])
    return made


def _curves(seen: Snapshot) -> Table:
    made = _table("scorer", "step", "loss", "validation", "loss so far")
    for curve in seen.curves[-MOST:]:
        shown = [f"{value:.3f}" if value is not None else "–" for value in (curve.loss, curve.validation)]
        _row(made, curve.scorer, f"{curve.step}/{curve.steps}", *shown, spark(curve))
    return made


def spark(curve: Curve) -> str:
    """The loss as a row of bars, low to high."""
    values = [loss for _, loss in curve.points]
    groups = [values[len(values) * i // SPARK : len(values) * (i + 1) // SPARK] for i in range(min(SPARK, len(values)))]
    if len(values) < SPARK:
        groups = [[value] for value in values]
    means = [sum(group) / len(group) for group in groups if group]
    low, span = min(means, default=0.0), (max(means, default=0.0) - min(means, default=0.0)) or 1.0
    return "".join(BARS[min(len(BARS) - 1, int((mean - low) / span * len(BARS)))] for mean in means)


def _points(seen: Snapshot) -> Table:
    made = _table("method", "budget", "kept", "accuracy, %", "net speedup" + f", {plain(seen.timed)}" * bool(seen.timed))
    for point in seen.points[:MOST]:
        speedup = f"{point.speedup:.2f}" if point.speedup is not None else "–"
        _row(made, point.method, point.budget, f"{point.kept:.0f}", f"{100 * point.accuracy:.1f}", speedup)
    return made
