"""A store as SQL: views of DuckDB over its Parquet parts, as its manifests publish them, with words a reader knows as columns.

The text needs nothing but DuckDB and the store's folder: `views.sql` beside the parts is this text.
"""

from __future__ import annotations

from pathlib import Path

import duckdb

from diffprune.core.cell import CellColumns
from diffprune.core.records import GRADED, TABLES
from diffprune.store.columns import columns

TYPES = {str: "VARCHAR", int: "BIGINT", float: "DOUBLE", bool: "BOOLEAN"}

# Which part counts: of a cell's commits the newest attempt's first that did not fail, of failed ones alone its last; of grades the
# newest ones of the answers that count.
PUBLISHED = """
CREATE OR REPLACE TEMP TABLE published AS
WITH manifest AS (
    SELECT * FROM ({manifests}) QUALIFY row_number() OVER (PARTITION BY name ORDER BY published) = 1
), part AS (
    SELECT cell, status = 'failed' AS failed, published AS moment, attempt, name AS commit_name,
        coalesce(nullif(answers, ''), name) AS graded, unnest(parts, recursive := true) FROM manifest
), own AS (
    SELECT * FROM part WHERE "table" NOT IN ({graded})
    QUALIFY row_number() OVER (
        PARTITION BY "table", cell ORDER BY failed, attempt DESC, if(failed, -moment, moment), commit_name) = 1
), grading AS (
    SELECT * FROM part WHERE "table" = 'grades'
    AND graded IN (SELECT commit_name FROM own WHERE "table" = 'answers')
    QUALIFY row_number() OVER (PARTITION BY graded ORDER BY moment DESC, commit_name DESC) = 1
)
SELECT "table" AS of_table, cell, name AS part FROM own
UNION ALL
SELECT "table", cell, name FROM part WHERE "table" IN ({graded}) AND commit_name IN (SELECT commit_name FROM grading);
"""
MANIFESTS = {  # of one commit each, and of bundles, whose commits share parts
    "manifests": """
    SELECT unnest(commit) FROM read_json('manifests/*.json', columns = {commit: 'STRUCT(cell VARCHAR, status VARCHAR,
        published BIGINT, attempt BIGINT, name VARCHAR, answers VARCHAR, parts STRUCT("table" VARCHAR, name VARCHAR)[])'})
""",
    "bundles": """
    SELECT one.cell, one.status, one.published, one.attempt, one.name, one.answers,
        [part for part in shared if map_contains(one.rows, part."table")] AS parts
    FROM (SELECT bundle.parts AS shared, unnest(bundle.commits) AS one FROM read_json('bundles/*.json', columns = {bundle:
        'STRUCT(parts STRUCT("table" VARCHAR, name VARCHAR)[], commits STRUCT(cell VARCHAR, status VARCHAR, published BIGINT,
        attempt BIGINT, name VARCHAR, answers VARCHAR, rows MAP(VARCHAR, BIGINT))[])'}))
""",
}
NOTHING = "CREATE OR REPLACE TEMP TABLE published AS SELECT '' AS of_table, '' AS cell, '' AS part WHERE false;\n"

# A method's label is told apart by its plug-in and its recipe where several share it; of what was made anew the newest counts, and
# of timings those of the machine on which most methods were timed.
CELLS = """
CREATE OR REPLACE TEMP TABLE every_cell AS
WITH told AS ({told}), one AS (
    SELECT * FROM told QUALIFY row_number() OVER (PARTITION BY cell ORDER BY place, started DESC) = 1
), named AS (
    SELECT *, coalesce(nullif(recipe, ''), weights_sha256) AS trained_as,
        CASE method_kind WHEN 'bound' THEN '' WHEN 'diagnostic' THEN regexp_extract(pruner, '\\w+=([a-z]\\w*)', 1)
            ELSE split_part(pruner, '(', 1) END AS plugin
    FROM one
), counted AS (
    SELECT *, count(DISTINCT nullif(plugin, '')) OVER (PARTITION BY method) AS plugins,
        count(DISTINCT nullif(trained_as, '')) OVER (PARTITION BY method) AS trainings
    FROM named
)
SELECT * EXCLUDE (method, plugins, trainings, place), method AS plain_label,
    method || if(plugins > 1 AND plugin <> '', ' (' || plugin || ')', '')
        || if(trainings > 1 AND trained_as <> '', ' (recipe ' || left(trained_as, 6) || ')', '') AS method,
    method_kind = 'diagnostic' AS replaced,
    coalesce(limit_questions::VARCHAR, 'all') AS limit_text, coalesce(answer_tokens::VARCHAR, 'all') AS answer_text,
    CASE WHEN method_kind = 'bound' THEN '' ELSE coalesce(lpad(scorer_seed::VARCHAR, 9, '0'), '') || ' ' || weights_sha256 END
        AS replicate
FROM counted;

CREATE OR REPLACE TEMP TABLE cells AS
WITH last AS (
    SELECT *, first_value(model_sha256 || weights_sha256 || revision || code) OVER (
        PARTITION BY verb, model, protocol, split, limit_text, dtype, answer_tokens, batch, mode, pruner, trained_as, scorer_seed,
            benchmark
        ORDER BY started DESC, cell DESC) AS newest
    FROM every_cell
), current AS (
    SELECT *, first_value(revision) OVER (
        PARTITION BY verb, model, protocol, split, limit_text, dtype, answer_tokens, batch, benchmark
        ORDER BY started DESC, cell DESC) AS data
    FROM last WHERE newest = model_sha256 || weights_sha256 || revision || code
), placed AS (
    SELECT *, concat_ws(' | ', model, protocol, split, limit_text, dtype, answer_text, batch, mode) AS timed_as,
        concat_ws(' ', hardware::JSON->>'cpu', hardware::JSON->'gpus') AS machine
    FROM current WHERE revision IS NOT DISTINCT FROM data
), main AS (
    SELECT timed_as, machine FROM placed WHERE verb = 'measure' GROUP BY timed_as, machine
    QUALIFY row_number() OVER (PARTITION BY timed_as ORDER BY count(DISTINCT method) DESC, max(started) DESC) = 1
)
SELECT * EXCLUDE (newest, data, plugin, trained_as, hardware, timed_as, machine),
    if(verb = 'evaluate', concat_ws(' | ', model, protocol, split, limit_text, dtype, answer_text, batch), '') AS chapter
FROM placed WHERE verb <> 'measure' OR (timed_as, machine) IN (SELECT (timed_as, machine) FROM main);
"""

PREDICTIONS = """
CREATE OR REPLACE TEMP VIEW predictions AS
SELECT a.* EXCLUDE (error), g.parsed, g.target, g.credit, if(a.error = '', g.grade_error, a.error) AS error
FROM answers_given a JOIN grades g USING (cell, sample);
"""

READING = """
CREATE OR REPLACE TEMP VIEW answers AS
SELECT c.chapter, c.method, c.method_kind, c.scorer_seed, if(c.method_kind = 'bound', '', c.budget) AS budget, c.replaced,
    c.replicate, coalesce(nullif(c.benchmark_label, ''), c.benchmark) AS benchmark, c.benchmark AS asked, p.sample,
    p."group" AS picture, p.category, p.question_type, p.question, p.answer, p.parsed, p.target, p.credit, p.visual_total AS total,
    p.visual_kept AS kept, p.cell
FROM predictions p JOIN cells c USING (cell) WHERE c.verb = 'evaluate' AND p.error = '';

CREATE OR REPLACE TEMP VIEW accuracy AS
SELECT chapter, method, budget, scorer_seed, benchmark, avg(kept) AS kept, avg(total) AS total, count(*) AS questions,
    count(DISTINCT picture) AS pictures, 100 * avg(credit) AS accuracy_percent
FROM answers WHERE NOT replaced GROUP BY ALL;

CREATE OR REPLACE TEMP VIEW changes AS
SELECT a.chapter, a.method, a.budget, a.scorer_seed, a.kept, a.benchmark, a.question_type, a.sample, a.picture, a.question,
    f.answer AS unpruned_answer, a.answer, f.credit AS unpruned_credit, a.credit
FROM answers a JOIN answers f ON f.chapter = a.chapter AND f.asked = a.asked AND f.sample = a.sample AND f.method = 'Unpruned'
WHERE a.method_kind <> 'bound' AND NOT a.replaced;

CREATE OR REPLACE TEMP VIEW spans AS
SELECT c.method, c.budget, c.scorer_seed, c.model, c.dtype, c.batch, c.mode, t.arm, t.span, t.repetition AS round,
    avg(t.value_ms) AS ms, any_value(t.visual_kept) AS kept, any_value(t.sequence) AS sequence, any_value(t.flags) AS flags, t.cell
FROM timings t JOIN cells c USING (cell) WHERE c.verb = 'measure' GROUP BY ALL;

CREATE OR REPLACE TEMP VIEW rounds AS
SELECT method, budget, scorer_seed, model, dtype, batch, mode, round, cell,
    max(kept) FILTER (arm = 'pruned') AS kept,
    max(ms) FILTER (arm = 'full' AND span = 'prefill') AS full_prefill_ms,
    max(ms) FILTER (arm = 'pruned' AND span = 'prefill') AS prefill_ms,
    max(ms) FILTER (arm = 'pruned' AND span = 'overhead') AS overhead_ms,
    max(ms) FILTER (arm = 'native' AND span = 'prefill') AS native_prefill_ms,
    max(ms) FILTER (arm = 'full' AND span = 'ttft') AS full_ttft_ms,
    max(ms) FILTER (arm = 'pruned' AND span = 'ttft') AS ttft_ms
FROM spans GROUP BY ALL;

CREATE OR REPLACE TEMP VIEW training AS
SELECT c.method, c.scorer_seed, s.* EXCLUDE (cell), s.cell FROM steps s JOIN cells c USING (cell);

CREATE OR REPLACE TEMP VIEW spent AS
SELECT c.verb, c.method, o.seconds FROM outcomes o JOIN cells c USING (cell) WHERE c.verb <> 'train'
UNION ALL BY NAME
SELECT 'train' AS verb, method, step_ms / 1000 AS seconds FROM training;
"""


def connect(root: Path) -> duckdb.DuckDBPyConnection:
    """A connection with every view of the store in this folder, in memory; it reads no other file.

    Raises:
        ValueError: there is no store, or a file of it cannot be read.
    """
    if not _there(root):
        raise ValueError(f"{root} holds no store: name the folder of a run, or a report with a folder `store` beside its page")
    found = duckdb.connect()
    found.execute("SET file_search_path = ?", [str(root.resolve())])
    found.execute("SET autoinstall_known_extensions = false")
    found.execute("SET TimeZone = 'UTC'")
    try:
        found.execute(script(root))
    except (duckdb.InterruptException, duckdb.OutOfMemoryException):
        raise
    except duckdb.Error as error:  # of a damaged footer it raises no class of its own
        told = " ".join(str(error).split())[:300]
        raise ValueError(f"{root} has a damaged file ({told}): `diffprune report` sets it aside and says so") from None
    return found


def script(root: Path) -> str:
    """The text of all views, for the parts that a store has now; a table without parts is empty."""
    graded = ", ".join(f"'{table}'" for table in GRADED)
    manifests = "UNION ALL BY NAME".join(MANIFESTS[folder] for folder in _there(root))
    return "\n".join(
        [
            PUBLISHED.replace("{manifests}", manifests).replace("{graded}", graded) if manifests else NOTHING,
            *(_table(root, table) for table in TABLES),
            PREDICTIONS,
            _cells(),
            READING,
        ]
    )


def _there(root: Path) -> list[str]:
    """The folders of manifests that have any."""
    return [folder for folder in MANIFESTS if any((root / folder).glob("*.json"))]


def _table(root: Path, table: str) -> str:
    """The rows of one table that count: the record's own columns and the cell."""
    own = [column.name for column in columns(table) if column.owner == "record"]
    if any((root / "parts" / table).glob("*.parquet")):
        about = ", ".join(f'"{column.name}"{_renamed(column.name)}' for column in columns(table))
        body = (
            f"SELECT {about} FROM read_parquet('parts/{table}/*.parquet', filename = true) WHERE (parse_filename(filename), cell) "
            f"IN (SELECT (part, cell) FROM published WHERE of_table = '{table}') OR parse_filename(filename) IN "
            f"(SELECT part FROM published WHERE of_table = '{table}' AND cell = '')"
        )
    else:
        about = ", ".join(
            f'NULL::{TYPES[column.type]} AS "{_renamed(column.name)[4:] or column.name}"' for column in columns(table)
        )
        body = f"SELECT {about} WHERE false"
    listed = ", ".join(f'"{name}"' for name in own)
    name = "answers_given" if table == "answers" else table  # `answers` is the view for reading, with grades
    return (
        f"CREATE OR REPLACE TEMP TABLE all_{table} AS {body};\n"
        f"CREATE OR REPLACE TEMP VIEW {name} AS SELECT cell, {listed} FROM all_{table};\n"
    )


def _renamed(column: str) -> str:
    """`limit` is a word of SQL."""
    return " AS limit_questions" if column == "limit" else ""


def _cells() -> str:
    about = ", ".join("limit_questions" if name == "limit" else name for name in CellColumns.__dataclass_fields__)
    told = " UNION ALL ".join(
        f"SELECT DISTINCT cell, {about}, started, hardware, {place} AS place FROM all_{table}" for place, table in enumerate(TABLES)
    )
    return CELLS.replace("{told}", told)
