"""`README.md` and `views.sql` beside a store: its tables, columns and units, and the first questions as queries that run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffprune.core.cell import CellColumns
from diffprune.core.records import TABLES, Provenance
from diffprune.io.blob_store import LocalBlobs
from diffprune.store.views import script

HEAD = """# Records of a run

Parquet files below `parts/`, one folder for each table; what a manifest in `manifests/` or `bundles/` names counts. `views.sql`
reads what counts with [DuckDB](https://duckdb.org) and nothing else: in this folder

    duckdb -init views.sql

or in Python

    data = duckdb.connect()
    data.execute("SET file_search_path = 'FOLDER OF THIS FILE'")
    data.execute(open("FOLDER OF THIS FILE/views.sql").read())

## The first five questions
"""
QUESTIONS = {
    "How accurate is each method?": """
SELECT method, budget, avg(kept) AS kept, avg(accuracy_percent) AS accuracy_percent
FROM (SELECT method, budget, benchmark, avg(kept) AS kept, avg(accuracy_percent) AS accuracy_percent FROM accuracy GROUP BY ALL)
GROUP BY ALL ORDER BY kept DESC, accuracy_percent DESC""",
    "How much faster is prefill, the method's own overhead charged?": """
SELECT method, budget, batch, avg(kept) AS kept, exp(avg(ln(ratio))) AS net_speedup
FROM (SELECT method, budget, batch, cell, avg(kept) AS kept, median(full_prefill_ms / (prefill_ms + overhead_ms)) AS ratio
    FROM rounds GROUP BY ALL) GROUP BY ALL ORDER BY kept DESC, net_speedup DESC""",
    "How do two methods differ on the same questions, in points?": """
SELECT a.budget, 100 * avg(a.credit - b.credit) AS points, count(*) AS questions
FROM answers a JOIN answers b USING (chapter, budget, asked, sample)
WHERE a.method = 'DiffPrune' AND b.method = 'Attention' AND NOT a.replaced AND NOT b.replaced GROUP BY ALL ORDER BY points""",
    "What did pruning break?": """
SELECT method, budget, question_type, count(*) FILTER (unpruned_credit = 1 AND credit < 1) AS broken, count(*) AS questions
FROM changes GROUP BY ALL ORDER BY broken DESC, method, budget, question_type LIMIT 20""",
    "What did it cost?": """
SELECT verb, sum(seconds) AS seconds FROM spent GROUP BY ALL ORDER BY seconds DESC""",
}
VIEWS = """
## Views for reading

| view | one row is | columns of note |
|---|---|---|
| `answers` | one graded answer | `method`, `scorer_seed`, `budget`, `kept` of `total` tokens, `credit` in [0, 1] |
| `accuracy` | one method, budget, scorer seed and benchmark | `kept`, `accuracy_percent`, `questions`, `pictures` |
| `changes` | an answer beside the unpruned model's | `credit`, `unpruned_credit`, `answer`, `unpruned_answer` |
| `spans` | one span of one round of timing | `arm`, `span`, `ms` |
| `rounds` | one round of timing of one method and budget | `kept`, `full_prefill_ms`, `prefill_ms`, `overhead_ms`, `ttft_ms` |
| `training` | one training step | `method`, `scorer_seed`, `loss` in nats per token, `step_ms` |
| `spent` | seconds of work | `verb`, `method`, `seconds` |
| `cells` | one question to a model | `cell`, `verb`, and what was asked |

`chapter` tells evaluations of other models, protocols or limits apart; `replaced` is true where tokens were replaced by their mean
instead of removed. Every table below is a view of its own columns and `cell`; `all_` before its name adds those of cell and run.
"""


def write(root: Path) -> None:
    """Both files, for the parts that are there now; safe to repeat, and where the folder is read-only nothing is lost."""
    blobs = LocalBlobs(root)
    blobs.replace("views.sql", script(root).encode())
    blobs.replace("README.md", text().encode())


def text() -> str:
    """The README."""
    queries = [f"{question}\n\n```sql{query};\n```\n" for question, query in QUESTIONS.items()]
    tables = [line for name, kind in TABLES.items() for line in _table(name, kind)]
    more = [*_table("every table: the cell", CellColumns), *_table("every table: the run", Provenance)]
    return "\n".join([HEAD, *queries, VIEWS, "## Tables\n", *tables, *more])


def _table(name: str, kind: type) -> Iterator[str]:
    """What a table holds, and its columns with the comments that stand beside them where they are declared."""
    yield f"### {name}\n\n{inspect.cleandoc(kind.__doc__ or '')}\n"
    yield "| column | type | |\n|---|---|---|"
    comments = dict(re.findall(r"^ {4}(\w+): [^#\n]*# (.*)$", inspect.getsource(kind), re.M))
    fields: dict[str, Any] = kind.__dataclass_fields__  # type: ignore[attr-defined]
    for column, field in fields.items():
        yield f"| `{column}` | {str(field.type).replace('|', 'or')} | {comments.get(column, '')} |"
    yield ""
