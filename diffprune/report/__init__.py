"""From records to what people read: one page, tables in three formats, figures, a summary for the terminal.

Everything here is a pure function of the store: the same records give the same bytes, and every number can be computed again
from the Parquet files.
"""

from __future__ import annotations

from diffprune.report.analysis.records import read
from diffprune.report.compare import compare
from diffprune.report.files import about
from diffprune.report.index import index
from diffprune.report.make import report
from diffprune.report.render.terminal import summary

__all__ = ["about", "compare", "index", "read", "report", "summary"]
