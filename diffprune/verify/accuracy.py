"""Figures of answers as SQL: accuracies, paired differences, native figures, retention, changed answers.

An arm is one method at one budget; its replicates are scorer seeds. What is compared is compared on the pictures about which all
arms and replicates have answered equally many questions. Every statement ends in rows of `expected`.
"""

from __future__ import annotations

CHOSEN = "('best training-free rule', 'best rule that reads the question')"  # rows that name another at each budget

ARMS = """
CREATE TABLE arm AS
SELECT DISTINCT chapter, method, method_kind, budget, replaced, replicate, asked AS benchmark, cell FROM answers;
CREATE TABLE arms AS SELECT DISTINCT chapter, method, method_kind, budget, replaced FROM arm;
CREATE TABLE own_kept AS
SELECT chapter, method, budget, avg(kept) AS kept FROM (
    SELECT chapter, method, budget, cell, avg(kept) AS kept FROM answers WHERE NOT replaced GROUP BY ALL
) GROUP BY ALL;
CREATE TABLE whole AS
SELECT chapter, max(total) AS total FROM (SELECT chapter, cell, avg(total) AS total FROM answers GROUP BY ALL) GROUP BY ALL;
CREATE TABLE together AS
SELECT chapter, count(*) > 1 AND sum(pictures) > any_value(distinct_pictures) AS together FROM (
    SELECT chapter, asked, count(DISTINCT picture) AS pictures FROM answers GROUP BY ALL
) JOIN (SELECT chapter, count(DISTINCT picture) AS distinct_pictures FROM answers GROUP BY ALL) USING (chapter) GROUP BY ALL;

CREATE TABLE subject AS
SELECT DISTINCT chapter, regexp_replace("column", ' minus$', '') AS method FROM printed
WHERE "table" = 'differences' AND "column" LIKE '% minus';

CREATE TABLE side AS
WITH pruned AS (SELECT * FROM arms WHERE method_kind <> 'bound'), other AS (SELECT * FROM arms WHERE NOT replaced)
SELECT 'alone' AS kind, chapter, method, budget, replaced, '' AS other, 1 AS side, method AS m, budget AS b, replaced AS r FROM arms
UNION ALL BY NAME
SELECT 'pair' AS kind, p.chapter, p.method, p.budget, false AS replaced, o.method AS other, unnest([1, 2]) AS side,
    unnest([p.method, o.method]) AS m, unnest([p.budget, o.budget]) AS b, false AS r
FROM pruned p JOIN other o ON p.chapter = o.chapter AND NOT p.replaced AND o.method <> p.method
    AND o.budget = if(o.method_kind = 'bound', '', p.budget)
WHERE (p.chapter, p.method) IN (FROM subject) OR o.method = 'Unpruned' OR p.method LIKE o.method || ',%'
UNION ALL BY NAME
SELECT 'blind' AS kind, p.chapter, p.method, p.budget, false AS replaced, '' AS other, unnest([1, 2, 3]) AS side,
    unnest([p.method, 'Unpruned', 'No image']) AS m, unnest([p.budget, '', '']) AS b, false AS r
FROM pruned p WHERE NOT p.replaced
UNION ALL BY NAME
SELECT 'gap' AS kind, chapter, method, '' AS budget, false AS replaced, '' AS other, unnest([1, 2]) AS side,
    unnest(['Unpruned', 'No image']) AS m, '' AS b, false AS r
FROM arms WHERE method = 'No image'
UNION ALL BY NAME
SELECT 'removal' AS kind, p.chapter, p.method, p.budget, false AS replaced, '' AS other, unnest([1, 2]) AS side,
    p.method AS m, p.budget AS b, unnest([false, true]) AS r
FROM pruned p JOIN pruned o ON p.chapter = o.chapter AND p.method = o.method AND p.budget = o.budget AND o.replaced
WHERE NOT p.replaced;

CREATE TABLE member AS
WITH there AS (
    SELECT s.* EXCLUDE (m, b, r), a.replicate, a.benchmark, a.cell FROM side s
    JOIN arm a ON a.chapter = s.chapter AND a.method = s.m AND a.budget = s.b AND a.replaced = s.r
), counted AS (
    SELECT *, count(*) OVER (PARTITION BY kind, chapter, method, budget, replaced, other, benchmark) AS here,
        count(DISTINCT side || ' ' || replicate) OVER (PARTITION BY kind, chapter, method, budget, replaced, other) AS needed,
        max(side) OVER (PARTITION BY kind, chapter, method, budget, replaced, other) AS sides
    FROM there
)
SELECT *, dense_rank() OVER (ORDER BY kind, chapter, method, budget, replaced, other, benchmark) AS task FROM counted
WHERE here = needed AND sides = CASE kind WHEN 'alone' THEN 1 WHEN 'blind' THEN 3 ELSE 2 END;

CREATE TABLE tasks AS SELECT DISTINCT task, kind, chapter, method, budget, replaced, other, benchmark FROM member;

CREATE TABLE unit AS
SELECT cell, picture, category, count(*) AS n, sum(credit) AS credit, min(credit) = 1 AS all_right,
    count(*) FILTER (target = 'yes' AND parsed = 'yes') AS hits, count(*) FILTER (target = 'no' AND parsed = 'yes') AS false_alarms,
    count(*) FILTER (target = 'yes' AND parsed IN ('no', 'unknown')) AS missed
FROM answers GROUP BY ALL;
CREATE TABLE picture AS SELECT cell, picture, sum(n) AS n, sum(credit) AS credit FROM unit GROUP BY ALL;
CREATE TABLE shared AS
SELECT task, picture FROM member JOIN picture USING (cell)
GROUP BY ALL HAVING count(*) = any_value(needed) AND min(n) = max(n);
"""

CREDIT = """
CREATE TABLE credit_of AS
SELECT kind, chapter, method, budget, replaced, other, side, avg(value) AS value FROM (
    SELECT task, side, avg(value) AS value FROM (
        SELECT task, side, replicate, 100 * sum(p.credit) / sum(p.n) AS value
        FROM member m JOIN picture p USING (cell) JOIN shared USING (task, picture) GROUP BY ALL
    ) GROUP BY ALL
) JOIN tasks USING (task) GROUP BY ALL;
CREATE TABLE pictures_of AS
SELECT kind, chapter, method, budget, replaced, other, if(any_value(together), count(DISTINCT picture), count(*)) AS pictures
FROM shared JOIN tasks USING (task) JOIN together USING (chapter) GROUP BY ALL;
CREATE TABLE difference AS
SELECT one.* EXCLUDE (value, side), one.value - two.value AS value
FROM credit_of one JOIN credit_of two USING (kind, chapter, method, budget, replaced, other) WHERE one.side = 1 AND two.side = 2;
"""

# The four formulas of `core.benchmark.Formula` over units (a picture's rows of one category).
FIGURE = """
    CASE formula
        WHEN 'mean' THEN 100 * sum(credit) / sum(n)
        WHEN 'f1_mean' THEN 100 * avg(f1)
        WHEN 'paired_sum' THEN sum(100 * credit / n + 100 * pairs / units)
        ELSE 100 * any_value(circular) END"""
BY_CATEGORY = """sum(n) AS n, sum(credit) AS credit, count(*) AS units, count(*) FILTER (all_right) AS pairs,
    coalesce(2 * sum(hits) / nullif(2 * sum(hits) + sum(false_alarms) + sum(missed), 0), 0) AS f1"""
COUNTS = "(formula_categories = '' OR list_contains(string_split(formula_categories, ','), category))"
NATIVE = f"""
CREATE TABLE native_cell AS
WITH counted AS (SELECT * FROM unit JOIN figures USING (cell) WHERE {COUNTS}),
circular AS (
    SELECT cell, avg(r::INT) AS circular FROM (SELECT cell, picture, bool_and(all_right) AS r FROM counted GROUP BY ALL)
    GROUP BY ALL
), by_category AS (SELECT cell, formula, category, {BY_CATEGORY} FROM counted GROUP BY ALL),
found AS (SELECT cell, {FIGURE} AS value FROM by_category JOIN circular USING (cell) GROUP BY cell, formula)
SELECT f.cell, f.figure, f.figure_value, coalesce(abs(v.value - f.figure_value) <= 1e-6 * greatest(1, abs(f.figure_value)), false)
    AS exact, if(exact, v.value, f.figure_value) AS value
FROM figures f LEFT JOIN found v USING (cell);
CREATE TABLE native_arm AS
SELECT a.chapter, a.method, a.budget, a.benchmark, any_value(n.figure) AS figure, avg(n.value) AS value, bool_and(n.exact) AS exact
FROM arm a JOIN native_cell n USING (cell) WHERE NOT a.replaced GROUP BY ALL;

CREATE TABLE native_of AS
WITH asked AS MATERIALIZED (
    SELECT *, row_number() OVER () AS id FROM member JOIN figures USING (cell) WHERE kind IN ('pair', 'blind', 'gap')
), counted AS MATERIALIZED (
    SELECT id, formula, u.* FROM asked JOIN unit u USING (cell)
    JOIN shared USING (task, picture) WHERE {COUNTS}
), circular AS (
    SELECT id, avg(r::INT) AS circular FROM (SELECT id, picture, bool_and(all_right) AS r FROM counted GROUP BY ALL) GROUP BY ALL
), by_category AS (SELECT id, formula, category, {BY_CATEGORY} FROM counted GROUP BY ALL),
found AS (SELECT id, {FIGURE} AS value FROM by_category JOIN circular USING (id) GROUP BY id, formula)
SELECT kind, chapter, method, budget, other, side, benchmark, avg(value) AS value FROM found JOIN asked USING (id) GROUP BY ALL;
CREATE TABLE ratio AS
SELECT one.chapter, one.method, one.budget, one.benchmark, 100 * one.value / two.value AS value
FROM native_of one JOIN native_of two USING (kind, chapter, method, budget, other, benchmark)
WHERE kind = 'pair' AND other = 'Unpruned' AND one.side = 1 AND two.side = 2 AND two.value <> 0;
CREATE TABLE relative AS
SELECT chapter, p.method, p.budget, 100 * avg(p.value / f.value) AS value
FROM native_arm p JOIN native_arm f USING (chapter, benchmark) WHERE f.method = 'Unpruned' AND f.value <> 0
GROUP BY ALL HAVING count(*) = (SELECT count(*) FROM native_arm x WHERE x.chapter = p.chapter AND x.method = 'Unpruned'
    AND x.value <> 0);
CREATE TABLE retained AS
SELECT a.chapter, a.method, a.budget, a.benchmark, 100 * (a.value - c.value) / (b.value - c.value) AS value
FROM native_of a JOIN native_of b USING (kind, chapter, method, budget, other, benchmark)
JOIN native_of c USING (kind, chapter, method, budget, other, benchmark)
WHERE kind = 'blind' AND a.side = 1 AND b.side = 2 AND c.side = 3;
"""

# Answers held against the unpruned model's, question by question.
CHANGED = """
CREATE TABLE changed AS
SELECT a.chapter, a.method, a.budget, a.replicate, a.asked AS benchmark, a.cell, a.picture,
    (a.parsed = f.parsed)::INT AS same, (f.credit = 1 AND a.credit <> 1)::INT AS harm, (a.credit = 1 AND f.credit <> 1)::INT AS gain
FROM answers a JOIN answers f ON f.chapter = a.chapter AND f.asked = a.asked AND f.sample = a.sample AND f.method = 'Unpruned'
WHERE NOT a.replaced;
CREATE TABLE agreeing AS
WITH by_picture AS (SELECT chapter, method, budget, benchmark, replicate, picture, count(*) AS n, sum(same) AS same
    FROM changed GROUP BY ALL),
known AS (
    SELECT chapter, method, budget, benchmark, picture FROM by_picture
    JOIN (SELECT chapter, method, budget, count(DISTINCT replicate) AS needed FROM changed GROUP BY ALL)
        USING (chapter, method, budget)
    GROUP BY ALL HAVING count(*) = any_value(needed) AND min(n) = max(n)
)
SELECT chapter, method, budget, avg(value) AS value FROM (
    SELECT chapter, method, budget, benchmark, avg(value) AS value FROM (
        SELECT chapter, method, budget, benchmark, replicate, 100 * sum(same) / sum(n) AS value
        FROM by_picture JOIN known USING (chapter, method, budget, benchmark, picture) GROUP BY ALL
    ) GROUP BY ALL
) GROUP BY ALL;
CREATE TABLE shares AS
WITH by_cell AS (SELECT chapter, method, budget, cell, avg(harm) AS harm, avg(gain) AS gain FROM changed GROUP BY ALL),
by_group AS (SELECT chapter, method, budget, cell, picture, min(same) AS same FROM changed GROUP BY ALL),
grouped AS (SELECT chapter, method, budget, cell, avg(same) AS same FROM by_group JOIN figures USING (cell)
    WHERE formula IN ('circular', 'paired_sum') GROUP BY ALL)
SELECT chapter, method, budget, 100 * avg(harm) AS harm, 100 * avg(gain) AS gain, 100 * avg(same) AS whole_groups
FROM by_cell LEFT JOIN grouped USING (chapter, method, budget, cell) GROUP BY ALL;
"""

KINDS = """
CREATE TABLE kinds AS
WITH asked AS (
    SELECT chapter, method, budget, replicate, coalesce(nullif(question_type, ''), 'other') AS kind,
        if(together, picture, asked || chr(9) || picture) AS picture, count(*) AS n, sum(credit) AS credit
    FROM answers JOIN together USING (chapter) WHERE NOT replaced AND method <> 'No image' GROUP BY ALL
), known AS (
    SELECT chapter, method, budget, kind, picture, any_value(n) AS n FROM asked
    JOIN (SELECT chapter, method, budget, kind, count(DISTINCT replicate) AS needed FROM asked GROUP BY ALL)
        USING (chapter, method, budget, kind)
    GROUP BY ALL HAVING count(*) = any_value(needed) AND min(n) = max(n)
), found AS (
    SELECT chapter, method, budget, kind, replicate, 100 * sum(a.credit) / sum(a.n) AS value
    FROM asked a JOIN known USING (chapter, method, budget, kind, picture) GROUP BY ALL
)
SELECT f.chapter, f.method, f.budget, f.kind, avg(f.value) AS value, any_value(s.questions) AS questions,
    any_value(s.pictures) AS pictures
FROM found f JOIN (SELECT chapter, method, budget, kind, sum(n) AS questions, count(*) AS pictures FROM known GROUP BY ALL) s
    USING (chapter, method, budget, kind) GROUP BY ALL;
"""

EXPECTED = f"""
INSERT INTO expected BY NAME
WITH known AS (SELECT * FROM own_kept WHERE regexp_matches(budget, '^(Keep|Share)\\(')
    UNION ALL BY NAME SELECT chapter, 'Unpruned' AS method, '' AS budget, total AS kept FROM whole),
alone AS (SELECT * FROM credit_of WHERE kind = 'alone')
SELECT chapter, t.name AS "table", method || ' | ' || budget AS "row", t.col AS "column", kept AS value
FROM known, (VALUES ('headline', 'kept tokens'), ('relative', 'kept'), ('changed', 'kept')) t(name, col)
UNION ALL BY NAME
SELECT chapter, t.name AS "table", method || ' | ' || budget AS "row", t.col AS "column", value
FROM alone, (VALUES ('headline', 'accuracy %'), ('budget', 'mean credit'), ('thresholds', 'accuracy %')) t(name, col)
WHERE NOT replaced
UNION ALL BY NAME
SELECT chapter, t.name AS "table", method || ' | ' || budget AS "row", 'avg %' AS "column", value
FROM relative, (VALUES ('headline'), ('budget'), ('thresholds')) t(name)
UNION ALL BY NAME
SELECT chapter, 'methods' AS "table", method AS "row", budget AS "column", value FROM relative
UNION ALL BY NAME
SELECT chapter, 'budget' AS "table", method || ' | ' || budget AS "row", 'seeds' AS "column", count(DISTINCT replicate) AS value
FROM arm WHERE NOT replaced GROUP BY ALL
UNION ALL BY NAME
SELECT chapter, t.name AS "table", t.start || method || ' | ' || budget AS "row", benchmark AS "column", value,
    if(exact, NULL, 'a figure by a formula of the benchmark''s own, as it was recorded') AS reason
FROM native_arm, (VALUES ('budget', ''), ('published', 'ours | ')) t(name, start)
UNION ALL BY NAME
SELECT chapter, t.name AS "table", t.start || method || ' | ' || budget AS "row", t.col AS "column", kept AS value
FROM own_kept,
    (VALUES ('thresholds', '', 'kept, mean'), ('published', 'ours | ', 'kept'), ('replaced', '', 'kept')) t(name, start, col)
UNION ALL BY NAME
SELECT chapter, 'differences' AS "table", other AS "row", budget AS "column", value FROM difference
WHERE kind = 'pair' AND (chapter, method) IN (FROM subject)
UNION ALL BY NAME
SELECT chapter, 'differences' AS "table", other AS "row", 'pictures' AS "column", max(pictures) AS value FROM pictures_of
WHERE kind = 'pair' AND (chapter, method) IN (FROM subject) GROUP BY ALL
UNION ALL BY NAME
SELECT r.chapter, 'differences' AS "table", r."row", 'pictures' AS "column", max(pictures) AS value
FROM printed r JOIN pictures_of p ON p.chapter = r.chapter AND p.budget = r."column" AND p.other = split_part(r.note, ';', 1)
WHERE r."table" = 'differences' AND r."row" IN {CHOSEN} AND p.kind = 'pair' AND (p.chapter, p.method) IN (FROM subject) GROUP BY ALL
UNION ALL BY NAME
SELECT r.chapter, 'differences' AS "table", r."row", r."column", d.value
FROM printed r JOIN difference d ON d.chapter = r.chapter AND d.budget = r."column" AND d.other = split_part(r.note, ';', 1)
WHERE r."table" = 'differences' AND r."row" IN {CHOSEN} AND d.kind = 'pair' AND (d.chapter, d.method) IN (FROM subject)
UNION ALL BY NAME
SELECT chapter, 'headline' AS "table", 'Unpruned |' AS "row", 'net prefill speedup' AS "column", 1 AS value FROM whole
UNION ALL BY NAME
SELECT chapter, 'variants' AS "table", method || ' | ' || other AS "row", budget AS "column", value
FROM difference WHERE kind = 'pair'
UNION ALL BY NAME
SELECT chapter, 'variants' AS "table", p.method || ' | ' || p.other AS "row", 'seeds' AS "column",
    max(seeds) AS value
FROM (SELECT DISTINCT chapter, method, other FROM difference WHERE kind = 'pair') p
JOIN (SELECT chapter, method, budget, count(DISTINCT replicate) AS seeds FROM arm WHERE NOT replaced GROUP BY ALL) s USING (chapter)
WHERE s.method IN (p.method, p.other) GROUP BY ALL
UNION ALL BY NAME
SELECT chapter, 'replaced' AS "table", method || ' | ' || budget AS "row",
    if(replaced, 'replaced by mean, %', 'removed, %') AS "column", value FROM alone
UNION ALL BY NAME
SELECT chapter, 'replaced' AS "table", method || ' | ' || budget AS "row", 'removed − replaced, points' AS "column", value
FROM difference WHERE kind = 'removal'
UNION ALL BY NAME
SELECT chapter, 'relative' AS "table", method || ' | ' || budget AS "row", 'relative accuracy %' AS "column", avg(value) AS value
FROM ratio GROUP BY ALL
UNION ALL BY NAME
SELECT chapter, 'relative' AS "table", method || ' | ' || budget AS "row", 'each capped at 100 %' AS "column",
    avg(least(value, 100)) AS value FROM ratio GROUP BY ALL
UNION ALL BY NAME
SELECT chapter, 'relative' AS "table", method || ' | ' || budget AS "row", 'worst benchmark %' AS "column", min(value) AS value
FROM ratio GROUP BY ALL
UNION ALL BY NAME
SELECT chapter, 'relative' AS "table", method || ' | ' || budget AS "row", 'blind-corrected %' AS "column", avg(value) AS value
FROM retained SEMI JOIN printed p ON p."table" = 'blind' AND p.chapter = retained.chapter AND p."row" = retained.benchmark
    AND p."column" = 'the image''s part' AND p.note = '' GROUP BY ALL
UNION ALL BY NAME
SELECT chapter, 'changed' AS "table", method || ' | ' || budget AS "row", t.col AS "column",
    CASE t.col WHEN 'harm %' THEN harm WHEN 'gain %' THEN gain ELSE whole_groups END AS value
FROM shares, (VALUES ('harm %'), ('gain %'), ('whole groups %')) t(col)
UNION ALL BY NAME
SELECT chapter, 'changed' AS "table", method || ' | ' || budget AS "row", 'agreement %' AS "column", value FROM agreeing
UNION ALL BY NAME
SELECT chapter, 'blind' AS "table", benchmark AS "row", if(side = 1, 'Unpruned', 'No image') AS "column", value
FROM native_of WHERE kind = 'gap'
UNION ALL BY NAME
SELECT chapter, 'blind' AS "table", benchmark AS "row", 'the image''s part' AS "column", one.value - two.value AS value
FROM native_of one JOIN native_of two USING (kind, chapter, benchmark) WHERE kind = 'gap' AND one.side = 1 AND two.side = 2
UNION ALL BY NAME
SELECT chapter, 'blind' AS "table", benchmark AS "row", budget AS "column", value FROM retained
WHERE (chapter, method) IN (FROM subject)
UNION ALL BY NAME
SELECT chapter, 'benchmarks' AS "table", other || ' | ' || benchmark AS "row", budget AS "column", one.value - two.value AS value
FROM native_of one JOIN native_of two USING (kind, chapter, method, budget, other, benchmark)
WHERE kind = 'pair' AND (chapter, method) IN (FROM subject) AND one.side = 1 AND two.side = 2
UNION ALL BY NAME
SELECT chapter, 'kinds' AS "table", kind || ' | ' || method || ' | ' || budget AS "row", t.col AS "column",
    CASE t.col WHEN 'accuracy %' THEN k.value WHEN 'questions' THEN questions WHEN 'pictures' THEN pictures
        ELSE if(k.method = 'Unpruned', w.total, o.kept) END AS value
FROM kinds k JOIN whole w USING (chapter) JOIN own_kept o USING (chapter, method, budget),
    (VALUES ('accuracy %'), ('questions'), ('pictures'), ('kept tokens')) t(col);

INSERT INTO expected BY NAME
SELECT chapter, 'errors' AS "table", split_part(error, ':', 1) || ' | ' || method AS "row", t.col AS "column",
    if(t.col = 'rows', count(*), 100 * count(*) / any_value(asked)) AS value
FROM predictions JOIN cells USING (cell) JOIN (
    SELECT chapter, method, count(*) AS asked FROM predictions JOIN cells USING (cell) WHERE verb = 'evaluate' GROUP BY ALL
) USING (chapter, method), (VALUES ('rows'), ('share of rows %')) t(col)
WHERE verb = 'evaluate' AND error <> '' GROUP BY chapter, split_part(error, ':', 1), method, t.col;
"""

# Cells that record no figure of their benchmark's own (evaluation always does): then nothing that rests on one is computed again.
UNRECORDED = """
INSERT INTO expected BY NAME
SELECT chapter, "table", "row", "column", value, 'figures of benchmarks'' own that the store does not record' AS reason FROM printed
WHERE chapter IN (SELECT chapter FROM arm ANTI JOIN figures USING (cell)) AND "column" <> 'kept' AND ("column" = 'avg %'
    OR "table" = 'budget' AND "column" NOT IN ('seeds', 'mean credit') OR "table" = 'changed' AND "column" = 'whole groups %'
    OR "table" IN ('relative', 'blind', 'benchmarks', 'published') OR "table" = 'methods' AND "column" NOT LIKE 'overhead%');
"""

STATEMENTS = (ARMS, CREDIT, NATIVE, CHANGED, KINDS, EXPECTED, UNRECORDED)
