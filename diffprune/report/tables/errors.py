"""Answers that failed, counted by the class of their error: they are left out of every accuracy and never graded wrong."""

from __future__ import annotations

from diffprune.report.analysis.comparison import Comparison
from diffprune.report.render.table import Entry, Number, Table


def by_class(chapter: Comparison) -> Table | None:
    """Class of error x method: rows, share of the rows asked, and the first message by name; None where nothing failed."""
    failed = chapter.failed
    if failed.empty:
        return None
    label = failed["cell"].astype(str).map(chapter.evaluated["label"])
    message = failed["error"].astype(str)
    frame = failed.assign(label=label, kind=message.str.partition(":")[0], message=message)
    answered = chapter.rows["cell"].astype(str).map(chapter.evaluated["label"]).value_counts()
    asked = answered.add(label.value_counts(), fill_value=0)
    rows: list[tuple[Entry, ...]] = []
    for (kind, method), part in frame.groupby(["kind", "label"], sort=True):
        share = 100 * len(part) / float(asked[method])
        rows.append((kind, method, Number(len(part), digits=0), Number(share, digits=2), min(part["message"])))
    columns = ("class", "Method", "rows", "share of rows %", "first message")
    notes = ("Rows that failed are left out of every accuracy; comparisons use the questions that both sides answered.",)
    keys = tuple(f"{row[0]} | {row[1]}" for row in rows)
    return Table("errors", "Answers that failed, by class of error", columns, tuple(rows), notes, keys=keys)
