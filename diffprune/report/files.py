"""What lies beside a page: the same tables and figures as Markdown, LaTeX, CSV and SVG."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffprune.io.blob_store import open_blobs
from diffprune.report.render import escape, latex, table
from diffprune.report.render.svg import Plot
from diffprune.report.render.table import Table

DIFFERENCES, MINUS = "differences", " minus"  # the table of paired differences, and what its first column ends with
DETAILS = ("latency_spans", "benchmarks_", "pictures")  # tables that repeat others in detail: beside the page as CSV, not on it


def write(
    out: Path, stem: str, title: str, page: str, chapters: Sequence[tuple[str, Table]], plots: Sequence[tuple[str, Plot | None]],
    said: Sequence[str],
) -> dict[str, Path]:  # fmt: skip
    """Write everything into the folder `out`; returns the paths by name ("html", "markdown", "csv/<table>", ...).

    stem: of the names of page, Markdown and LaTeX; chapters: (chapter, table); said: sentences before the tables. Names are
    numbered where two chapters have a table or a figure of one name.

    Raises:
        OSError: names the file that could not be written.
    """
    tables = [t for _, t in chapters]
    texts: dict[str, tuple[Path, str]] = {"html": (out / f"{stem}.html", page)}
    texts["numbers"] = (out / "numbers.csv", table.numbers(chapters))
    read = [t for t in tables if not t.name.startswith(DETAILS)]
    pictures = []
    for name, plot in plots:
        if plot:
            name = _free("svg", name, texts)
            texts[f"svg/{name}"] = (out / "figures" / f"{name}.svg", '<?xml version="1.0" encoding="utf-8"?>\n' + plot.file)
            pictures.append(f"![{escape.markdown(plot.alt, 1500)}](figures/{name}.svg)\n")
    document = [
        f"# {escape.markdown(title)}", "", *(f"{escape.markdown(s, 1200)}\n" for s in said), *pictures, *map(table.markdown, read),
    ]  # fmt: skip
    texts["markdown"] = (out / f"{stem}.md", "\n".join(document))
    texts["latex"] = (out / f"{stem}.tex", latex.document(title, read))
    for t in tables:
        name = _free("csv", t.name, texts)
        texts[f"csv/{name}"] = (out / "tables" / f"{name}.csv", table.to_csv(t))
    blobs = open_blobs(out)
    for path, content in texts.values():
        blobs.replace(path.relative_to(out).as_posix(), content.encode())
    return {name: path for name, (path, _) in texts.items()}


def about(folder: Path) -> str:
    """Label of the method that the page in a folder is about: whose differences it prints. "" of a page without any, and of a
    damaged one, which is no reason not to write it anew."""
    place = folder / "numbers.csv"
    if not place.is_file():
        return ""
    try:
        with place.open(encoding="utf-8", newline="") as file:
            columns = (row["column"] for row in csv.DictReader(file) if row.get("table") == DIFFERENCES and row.get("column"))
            return next((column.removesuffix(MINUS) for column in columns if column.endswith(MINUS)), "")
    except (csv.Error, UnicodeDecodeError):
        return ""


def _free(kind: str, stem: str, taken: Mapping[str, object]) -> str:
    """`stem`, numbered where it is taken."""
    return next(name for name in (stem, *(f"{stem}_{i}" for i in range(2, 1000))) if f"{kind}/{name}" not in taken)
