"""`index`: one page over several runs, a row for each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from diffprune.io.blob_store import LocalBlobs
from diffprune.report import files
from diffprune.report.analysis import records, speed
from diffprune.report.analysis.comparison import FULL, Comparison, chapters
from diffprune.report.render import html
from diffprune.report.render.table import Entry, Number, Table
from diffprune.report.tables import verdict
from diffprune.report.tables.accuracy import kept_entry, net_speedup, shown
from diffprune.report.tables.caveats import caveats

PAGES = ("report/report.html", "report.html")  # of a run's folder, and of an exported report


@dataclass(frozen=True)
class Run:
    """A folder with a store. page: its report, relative to the index, "" where there is none yet."""

    name: str
    folder: Path
    page: str


def index(folder: Path | str) -> Path:
    """Write `index.html` into a folder of runs or of exported reports, and return it.

    Raises:
        ValueError: there is no run in it.
    """
    root = Path(folder)
    found = list(runs(root))
    if not found:
        raise ValueError(f"{root} has no runs: an index is of a folder with folders that have a `store`, such as runs or reports")
    rows, links = [], []
    for run in found:
        for row in _rows(run):
            rows.append(row)
            links.append(quote(run.page))
    columns = (
        *("Run", "made", "Model", "questions", "pictures", "Against trained methods", "unpruned %"),
        *("Method", "its %", "kept tokens", "net prefill speedup", "Caveats"),
    )
    title = f"Runs in {root.resolve().name}"
    notes = ("The method is the one that the run's own page is about, at the middle of the budgets at which it was asked.",)
    page = html.render(
        "index.html.j2", title=title, runs=Table("runs", title, columns, tuple(rows), notes), links=links, num=len(found)
    )
    LocalBlobs(root).replace("index.html", page.encode())
    return root / "index.html"


def runs(root: Path) -> Iterator[Run]:
    """The folders of `root` that have a store, by name; none with a leading dot, as exports that were cut short have."""
    folders = (one for one in root.iterdir() if one.name[0] != "." and (one / "store").is_dir()) if root.is_dir() else ()
    for place in sorted(folders):
        page = next((page for page in PAGES if (place / page).is_file()), "")
        yield Run(place.name, place, f"{place.name}/{page}" if page else "")


def _rows(run: Run) -> Iterator[tuple[Entry, ...]]:
    """One for each chapter of a run; of a run that cannot be read, or has no results, one that says so."""
    empty: tuple[Entry, ...] = (None,) * 5
    try:
        found = records.read(run.folder / "store", files.about((run.folder.parent / run.page).parent) if run.page else "")
        there = list(chapters(found))
    except (ValueError, OSError) as error:
        yield run.name, "", "", *empty[:2], f"cannot be read: {error}", *empty, ""
        return
    if not there:
        done = ", ".join(sorted(set(found.cells["verb"]))) or "nothing"
        yield run.name, _made(found.cells["started"]), "", *empty[:2], f"nothing was evaluated or timed; done: {done}", *empty, ""
    for chapter in there:
        yield _row(run, chapter)


def _made(started: object) -> str:
    """The last day on which a record was made."""
    return max(map(str, started), default="")[:10]  # type: ignore[call-overload]


def _row(run: Run, chapter: Comparison) -> tuple[Entry, ...]:
    cells = chapter.evaluated if len(chapter.evaluated) else chapter.measured
    about = chapter.about
    budgets = [b for b in chapter.budgets if (about, b.spelling) in chapter.arms]
    middle = budgets[len(budgets) // 2] if budgets else None
    accuracy = chapter.accuracy(about, middle.spelling) if middle else None
    questions, pictures = chapter.asked if len(chapter.rows) else (0, 0)
    fast = speed.of(chapter)[1].get((about, middle.spelling)) if middle else None
    return (
        run.name, _made(cells["started"]), str(chapter.setting["model"]), Number(questions, digits=0),
        Number(pictures, digits=0), verdict.tally(chapter),
        shown(chapter.accuracy(FULL, "")), about if middle else None, shown(accuracy),
        kept_entry(chapter, about, middle.spelling) if middle else None,
        net_speedup(chapter, fast, set(fast.flags)) if fast else None, ", ".join(flag for flag, _ in caveats(chapter)),
    )  # fmt: skip
