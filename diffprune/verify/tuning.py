"""The tuner's answers as SQL: what a budget keeps of the calibration pictures, predicted and measured speedups, accuracies.

A predicted speedup reads the fitted prefill at the longest row of each batch, and the overhead at its mean count: a non-decreasing
least-squares fit of the medians, in the min-max form of isotonic regression (Robertson, Wright and Dykstra 1988, "Order Restricted
Statistical Inference"), linear between points and flat outside.
"""

from __future__ import annotations

# One row per printed answer, with the cells it rests on: the overhead's (scores, lengths, overheads) and the curve's.
ANSWERS = """
CREATE TABLE answer AS
SELECT c.cell, t.model, t.dtype, t.pruner, t.weights_sha256, t.target_speedup, t.tuned_kind, c.chosen_budget, c.accuracy,
    regexp_extract(c.chosen_budget, '^\\w+\\((-?[0-9.e+-]+)', 1)::DOUBLE AS number,
    coalesce(try_cast(regexp_extract(c.chosen_budget, 'least=(\\d+)', 1) AS BIGINT), 1) AS least,
    try_cast(regexp_extract(c.chosen_budget, 'most=(\\d+)', 1) AS BIGINT) AS most,
    (SELECT arg_max(o.cell, o.started) FROM cells o WHERE o.verb = 'overhead' AND (o.model, o.dtype, o.pruner, o.weights_sha256,
        o.benchmark, o.batch) = (t.model, t.dtype, t.pruner, t.weights_sha256, t.benchmark, t.batch)) AS overhead,
    (SELECT arg_max(v.cell, v.started) FROM cells v WHERE v.verb = 'curve' AND (v.model, v.dtype, v.benchmark, v.batch)
        = (t.model, t.dtype, t.benchmark, t.batch)) AS curve
FROM choices c JOIN cells t USING (cell) WHERE c.chosen_budget <> '';

CREATE TABLE picture_kept AS
WITH above AS (
    SELECT a.cell, s.picture, count(*) FILTER (s.score > a.number::FLOAT) AS num
    FROM answer a JOIN scores s ON s.cell = a.overhead WHERE a.tuned_kind = 'threshold' GROUP BY ALL
)
SELECT a.cell, p.picture, p.batch_index, p.visual_total, p.text_tokens,
    if(a.tuned_kind = 'count', least(a.number, p.visual_total),
        least(greatest(num, a.least), least(coalesce(a.most, p.visual_total), p.visual_total))) AS kept
FROM answer a JOIN calibration p ON p.cell = a.overhead LEFT JOIN above v ON v.cell = a.cell AND v.picture = p.picture;

CREATE TABLE overhead_fit AS
WITH points AS (
    SELECT cell, visual_kept AS x, median(value_ms) AS y, row_number() OVER (PARTITION BY cell ORDER BY visual_kept) AS i
    FROM timings SEMI JOIN (SELECT overhead AS cell FROM answer) USING (cell) WHERE span = 'overhead' GROUP BY cell, visual_kept
), mean AS (
    SELECT p.cell, a.i AS j, b.i AS k, avg(p.y) AS y FROM points p JOIN points a USING (cell) JOIN points b USING (cell)
    WHERE p.i BETWEEN a.i AND b.i GROUP BY ALL
), least AS (SELECT m.cell, p.i, m.j, min(m.y) AS y FROM points p JOIN mean m ON m.cell = p.cell AND m.j <= p.i AND m.k >= p.i
    GROUP BY ALL)
SELECT p.cell, p.x, max(l.y) AS y FROM points p JOIN least l USING (cell, i) GROUP BY ALL;
CREATE TABLE prefill_fit AS SELECT cell, sequence AS x, any_value(fitted_ms) AS y FROM curve GROUP BY ALL;
CREATE MACRO clamped(x, low, high) AS least(greatest(x, low), high);

CREATE TABLE batch AS
SELECT cell, batch_index, max(visual_total + text_tokens) AS full_length, max(kept + text_tokens) AS length, avg(kept) AS kept
FROM picture_kept GROUP BY ALL;
CREATE TABLE asked AS
SELECT cell, batch_index, a.curve AS fit, 'full' AS part, full_length AS x FROM batch JOIN answer a USING (cell)
UNION ALL SELECT cell, batch_index, a.curve, 'pruned', length FROM batch JOIN answer a USING (cell)
UNION ALL SELECT cell, batch_index, a.overhead, 'overhead', kept FROM batch JOIN answer a USING (cell);
CREATE TABLE read_off AS
WITH fits AS (SELECT * FROM prefill_fit UNION ALL SELECT * FROM overhead_fit),
segments AS (SELECT cell, x, y, coalesce(lead(x) OVER w, x) AS x2, coalesce(lead(y) OVER w, y) AS y2,
    min(x) OVER (PARTITION BY cell) AS lowest, max(x) OVER (PARTITION BY cell) AS highest
    FROM fits WINDOW w AS (PARTITION BY cell ORDER BY x))
SELECT a.cell, a.batch_index, a.part, arg_max(if(s.x2 > s.x, s.y + (s.y2 - s.y) * (clamped(a.x, lowest, highest) - s.x)
    / (s.x2 - s.x), s.y), s.x) AS ms
FROM asked a JOIN segments s ON s.cell = a.fit AND s.x <= clamped(a.x, lowest, highest) GROUP BY ALL;

CREATE TABLE calibrated AS
SELECT a.cell, p."group" AS picture, count(*) AS n, sum(p.credit) AS credit
FROM answer a JOIN (
    SELECT model, dtype, pruner, weights_sha256, budget, benchmark, arg_max(cell, started) AS cell
    FROM cells WHERE verb = 'calibrate' GROUP BY ALL
) c ON (c.model, c.dtype, c.pruner, c.weights_sha256, c.budget) = (a.model, a.dtype, a.pruner, a.weights_sha256, a.chosen_budget)
JOIN predictions p ON p.cell = c.cell GROUP BY ALL;
CREATE TABLE best AS
SELECT model, dtype, target_speedup, cell FROM answer SEMI JOIN printed p ON p."table" = 'tuned' AND p."row" = cell
    AND p."column" = 'minus the best, points' AND starts_with(p.printed, 'most accurate');
"""

EXPECTED = """
INSERT INTO expected BY NAME
SELECT '' AS chapter, 'tuned' AS "table", cell AS "row", 'target' AS "column", target_speedup AS value
FROM cells WHERE verb = 'tune'
UNION ALL BY NAME
SELECT '' AS chapter, 'tuned' AS "table", cell AS "row", 'kept' AS "column", avg(kept) AS value FROM picture_kept GROUP BY ALL
UNION ALL BY NAME
SELECT '' AS chapter, 'tuned' AS "table", cell AS "row", 'predicted' AS "column",
    sum(ms) FILTER (part = 'full') / sum(ms) FILTER (part <> 'full') AS value FROM read_off GROUP BY ALL
UNION ALL BY NAME
SELECT '' AS chapter, 'tuned' AS "table", cell AS "row", 'measured' AS "column",
    sum(ms) FILTER (arm = 'full') / sum(ms) FILTER (arm = 'pruned') AS value
FROM (SELECT h.cell, arm, batch_index, median(spent_ms) AS ms FROM held_out h JOIN answer a ON a.cell = h.cell
    AND a.chosen_budget = h.tried_budget GROUP BY ALL) GROUP BY ALL
UNION ALL BY NAME
SELECT '' AS chapter, 'tuned' AS "table", cell AS "row", 'held out' AS "column", sum(num_rows) AS value
FROM (SELECT DISTINCT cell, batch_index, num_rows FROM held_out) GROUP BY ALL
UNION ALL BY NAME
SELECT '' AS chapter, 'tuned' AS "table", cell AS "row", 'held out' AS "column", 0 AS value FROM choices WHERE chosen_budget = ''
UNION ALL BY NAME
SELECT '' AS chapter, 'tuned' AS "table", cell AS "row", 'accuracy %' AS "column", 100 * sum(credit) / sum(n) AS value
FROM calibrated GROUP BY ALL
UNION ALL BY NAME
SELECT '' AS chapter, 'tuned' AS "table", own.cell AS "row", 'minus the best, points' AS "column",
    100 * sum(own.credit) / sum(own.n) - 100 * sum(top.credit) / sum(top.n) AS value
FROM calibrated own JOIN answer a USING (cell) JOIN best b USING (model, dtype, target_speedup)
JOIN calibrated top ON top.cell = b.cell AND top.picture = own.picture AND top.n = own.n WHERE own.cell <> b.cell GROUP BY own.cell
UNION ALL BY NAME
SELECT '' AS chapter, 'pictures' AS "table", picture || ' | ' || method AS "row", t.col AS "column",
    if(t.col = 'kept', count(*) FILTER (token_kept), count(*)) AS value
FROM (SELECT k.*, method, started, max(started) OVER (PARTITION BY method) AS newest FROM kept_tokens k JOIN cells USING (cell)),
    (VALUES ('kept'), ('tokens')) t(col)
WHERE started = newest GROUP BY picture, method, t.col;
"""

STATEMENTS = (ANSWERS, EXPECTED)
