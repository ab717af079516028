"""The page `live.html` of a snapshot: opens offline, loads itself anew every few seconds, says by itself when news stay away."""

from __future__ import annotations

from datetime import UTC, datetime

from markupsafe import Markup

from diffprune.report.render import html
from diffprune.watch.drawing import accuracies, losses, pareto
from diffprune.watch.snapshot import SLACK_S, Snapshot


def page(seen: Snapshot) -> str:
    """The whole page. What others wrote is escaped; drawings are ours and escape it themselves."""
    running = seen.state == "running"
    return html.render(
        "live.html.j2",
        title=seen.title or seen.run,
        run=seen,
        running=running,
        standing=f"{seen.state}{f': {seen.reason}' if seen.reason else ''}",
        limit=seen.every_s + SLACK_S if running else 0,
        began=clock(seen.began),
        written=clock(seen.written),
        stages=[(stage, stage.lasted(seen.written)) for stage in seen.stages],
        curves=seen.curves,
        points=seen.points,
        losses=Markup(losses(seen.curves)),
        accuracies=Markup(accuracies(seen.points)),
        pareto=Markup(pareto(seen.points)),
    )


def clock(seconds: float) -> str:
    """Date and time of the universal clock."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
