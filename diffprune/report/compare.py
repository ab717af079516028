"""`compare`: two runs on one page, the second minus the first, by the rule and the bootstrap of every report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffprune.report import files
from diffprune.report.analysis import records
from diffprune.report.analysis.records import Records
from diffprune.report.analysis.two_runs import TwoRuns, matched
from diffprune.report.render import html
from diffprune.report.render.forest import of_runs
from diffprune.report.render.table import Table
from diffprune.report.tables import two_runs as tables
from diffprune.report.tables.caveats import caveats


def compare(first: Path | str, second: Path | str, out: Path | str) -> tuple[dict[str, Path], list[str]]:
    """Write `compare.html`, `compare.md`, `compare.tex`, `numbers.csv`, `tables/*.csv` and `figures/*.svg` into the folder `out`.

    first, second: folders of runs, or of exported reports: those with a folder `store`.

    Returns the paths by name and the sentences that the page begins with.

    Raises:
        ValueError: a folder without a store, a run without answers, the same run twice, or `out` is a run or a report, some of
            whose files have the names of these.
    """
    places = [Path(first), Path(second)]
    if places[0].resolve() == places[1].resolve():
        raise ValueError(f"{first} and {second} are one run: name two to compare")
    if (Path(out) / "store").exists() or (Path(out) / "report.html").exists():
        raise ValueError(f"{out} holds a run or a report, whose files a comparison would replace: name another folder with --out")
    found = [_read(place) for place in places]
    names = _names(*places)
    title = f"{names[1]} against {names[0]}"
    parts = [_chapter(two) for two in matched(names, *found)]
    page = html.render(
        "compare.html.j2", title=title, parts=parts, figures=[html.drawn({"forest": p["plot"]}, i) for i, p in enumerate(parts)],
        places=[str(place) for place in places],
    )  # fmt: skip
    every = [(part["setting"], t) for part in parts for t in (part["compared"], part["differs"]) if t is not None and t.rows]
    said = [sentence for part in parts for sentence in (part["setting"], *part["lead"])]
    plots = [("forest", part["plot"]) for part in parts]
    return files.write(Path(out), "compare", title, page, every, plots, said), [s for part in parts for s in part["lead"]]


def _read(place: Path) -> Records:
    """The records of a run that has answers."""
    if not (place / "store").is_dir():
        raise ValueError(f"{place} has no folder `store`: name the folder of a run (runs/demo) or of an exported report")
    found = records.read(place / "store")
    if not (found.cells["verb"] == "evaluate").any():
        raise ValueError(f"{place} holds no answers to compare: run `diffprune evaluate` on it first")
    return found


def _names(first: Path, second: Path) -> tuple[str, str]:
    """What each run is called: its folder, and where both have one name the path to it as it was given."""
    one, two = first.resolve().name, second.resolve().name
    return (one, two) if one != two else (str(first), str(second))


def _chapter(two: TwoRuns) -> dict[str, Any]:
    """Everything that the page shows of one pair of chapters."""
    differs = tables.differs(two)
    compared: Table | None = tables.compared(two)
    return {
        "setting": _setting(two), "lead": tables.lead(two, tables.kinds(differs)), "caveats": list(_caveats(two)),
        "plot": of_runs(two), "compared": compared, "differs": differs,
    }  # fmt: skip


def _setting(two: TwoRuns) -> str:
    """What both chapters share of their setting, the model first."""
    one, other = (chapter.setting for chapter in two.two)
    return "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in one.items() if other.get(name) == value)


def _caveats(two: TwoRuns) -> Iterator[tuple[str, str]]:
    """Of both runs, those of one alone with its name."""
    first, second = (caveats(chapter) for chapter in two.two)
    yield from (caveat for caveat in first if caveat in second)
    for name, mine, theirs in ((two.names[0], first, second), (two.names[1], second, first)):
        yield from ((f"{flag}, {name}", says) for flag, says in mine if (flag, says) not in theirs)
