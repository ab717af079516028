"""Times, costs and training as SQL: medians of times and of ratios with their intervals, FLOPs, the training table.

The interval of a median of ratios is that of order statistics, interpolated after Hettmansperger and Sheather (1986); the binomial
probabilities in it come from `lgamma`. Quantiles of Student's distribution, for up to 21 sessions, are a table.
"""

from __future__ import annotations

TIMES = """
CREATE TABLE timed AS
WITH measured AS (SELECT * FROM cells WHERE verb = 'measure'),
newest AS (
    SELECT model, dtype, arg_max((benchmark, protocol, split, limit_text), (started, cell)) AS pictures FROM measured GROUP BY ALL
), chapters AS (
    SELECT DISTINCT chapter, model, dtype FROM cells WHERE verb = 'evaluate'
    UNION ALL BY NAME
    SELECT DISTINCT model || ' | ' || dtype AS chapter, model, dtype FROM measured
    ANTI JOIN (SELECT model FROM cells WHERE verb = 'evaluate') e USING (model)
)
SELECT chapters.chapter, m.cell, m.method, m.budget, m.batch, m.mode FROM measured m JOIN newest USING (model, dtype)
JOIN chapters USING (model, dtype) WHERE pictures = (m.benchmark, m.protocol, m.split, m.limit_text);

CREATE TABLE span AS
SELECT cell, arm, span, repetition, avg(value_ms) AS ms FROM timings SEMI JOIN timed USING (cell) GROUP BY ALL;
CREATE TABLE speed_flags AS
SELECT chapter, method, budget, batch, mode, bool_or(contains(flags, 'overhead_excluded') AND span NOT IN ('ttft', 'decode'))
    AS excluded
FROM timings JOIN timed USING (cell) GROUP BY ALL;
CREATE TABLE medians AS
SELECT chapter, method, budget, batch, mode, arm, span, median(ms) AS median, quantile_cont(ms, 0.1) AS p10,
    quantile_cont(ms, 0.9) AS p90, min(n) AS repeats
FROM (SELECT *, count(*) OVER (PARTITION BY cell, arm, span) AS n FROM span) JOIN timed USING (cell) GROUP BY ALL;
CREATE TABLE kept_of AS
SELECT chapter, method, budget, batch, mode, avg(visual_kept) AS kept FROM timings JOIN timed USING (cell) WHERE arm = 'pruned'
GROUP BY ALL;

CREATE TABLE round_of AS
SELECT cell, repetition, max(ms) FILTER (arm = 'full' AND span = 'prefill') AS full_ms,
    max(ms) FILTER (arm = 'pruned' AND span = 'prefill') + max(ms) FILTER (arm = 'pruned' AND span = 'overhead') AS net_ms,
    max(ms) FILTER (arm = 'native' AND span = 'prefill') AS native_ms,
    coalesce(max(ms) FILTER (arm = 'full' AND span = 'encoder'), max(ms) FILTER (arm = 'pruned' AND span = 'encoder'))
        AS encoder_ms,
    max(ms) FILTER (arm = 'full' AND span = 'ttft') AS full_ttft_ms, max(ms) FILTER (arm = 'pruned' AND span = 'ttft') AS ttft_ms
FROM span GROUP BY ALL;
CREATE TABLE pairs AS
SELECT cell, 'net' AS ratio, repetition, full_ms AS above, net_ms AS below FROM round_of WHERE full_ms / net_ms IS NOT NULL
UNION ALL SELECT cell, 'encoded', repetition, encoder_ms + full_ms AS f, encoder_ms + net_ms AS p FROM round_of
WHERE f / p IS NOT NULL
UNION ALL SELECT cell, 'native', repetition, net_ms, native_ms FROM round_of WHERE net_ms / native_ms IS NOT NULL
UNION ALL SELECT cell, 'ttft', repetition, full_ttft_ms, ttft_ms FROM round_of WHERE full_ttft_ms / ttft_ms IS NOT NULL;

CREATE TABLE session_of AS
SELECT cell, dense_rank() OVER (ORDER BY times) AS session FROM (
    SELECT cell, list(full_ms ORDER BY repetition) FILTER (full_ms IS NOT NULL) AS times FROM round_of GROUP BY cell);
CREATE TABLE ratio_of_cell AS
SELECT cell, ratio, median(above / below) AS value FROM pairs GROUP BY ALL HAVING count(*) >= 2;
CREATE TABLE session_value AS
SELECT chapter, method, budget, batch, mode, ratio, session, count(*) AS num, avg(value) AS value
FROM ratio_of_cell JOIN timed USING (cell) JOIN session_of USING (cell) GROUP BY ALL;
CREATE TABLE session_round AS
WITH shared AS (
    SELECT chapter, method, budget, batch, mode, ratio, session, repetition, avg(above / below) AS r, count(*) AS num
    FROM pairs SEMI JOIN ratio_of_cell USING (cell, ratio) JOIN timed USING (cell) JOIN session_of USING (cell) GROUP BY ALL
)
SELECT *, row_number() OVER (PARTITION BY chapter, method, budget, batch, mode, ratio, session ORDER BY r) AS rank,
    count(*) OVER (PARTITION BY chapter, method, budget, batch, mode, ratio, session) AS n
FROM shared SEMI JOIN session_value USING (chapter, method, budget, batch, mode, ratio, session, num);

CREATE TABLE ranks AS
WITH sizes AS (SELECT DISTINCT n FROM session_round),
mass AS (
    SELECT n, i, sum(exp(lgamma(n + 1) - lgamma(i + 1) - lgamma(n - i + 1) - n * ln(2))) OVER (PARTITION BY n ORDER BY i) AS below
    FROM sizes, generate_series(0, n // 2) s(i)
), level AS (SELECT n, i + 1 AS k, 1 - 2 * below AS level FROM mass UNION ALL SELECT n, 0, 1.0 FROM sizes),
picked AS (
    SELECT a.n, a.k, (a.level - 0.95) / (a.level - b.level) AS step FROM level a JOIN level b ON a.n = b.n AND b.k = a.k + 1
    WHERE a.level >= 0.95 QUALIFY row_number() OVER (PARTITION BY a.n ORDER BY a.k DESC) = 1
)
SELECT n, k, (n - k) * step / (k + (n - 2 * k) * step) AS share FROM picked;

CREATE TABLE session_interval AS
SELECT chapter, method, budget, batch, mode, ratio, session, any_value(value) AS value,
    least(any_value(value), if(any_value(n) < 6, min(r), sum(CASE rank WHEN k THEN (1 - share) * r WHEN k + 1 THEN share * r END)))
        AS low,
    greatest(any_value(value),
        if(any_value(n) < 6, max(r), sum(CASE rank WHEN n + 1 - k THEN (1 - share) * r WHEN n - k THEN share * r END))) AS high
FROM session_value LEFT JOIN session_round USING (chapter, method, budget, batch, mode, ratio, session) LEFT JOIN ranks USING (n)
GROUP BY ALL;
CREATE TABLE student AS
SELECT generate_subscripts(t, 1) AS free, unnest(t) AS t FROM (SELECT [
    12.706204736432095, 4.302652729696142, 3.182446305284263, 2.776445105197793, 2.570581835636314, 2.446911848791681,
    2.364624251592784, 2.306004135204166, 2.262157162798205, 2.228138851986274, 2.200985160082949, 2.178812829663418,
    2.160368656461013, 2.144786687916925, 2.131449545559323, 2.119905299221011, 2.109815577833181, 2.100922040240960,
    2.093024054408263, 2.085963447265837] AS t);
CREATE TABLE speedup AS
WITH sessions AS (
    SELECT chapter, method, budget, batch, mode, ratio, count(*) AS num, avg(ln(value)) AS value, any_value(low) AS low,
        any_value(high) AS high, stddev_samp(ln(value)) / sqrt(count(*)) AS error
    FROM session_interval JOIN speed_flags USING (chapter, method, budget, batch, mode) WHERE ratio = 'ttft' OR NOT excluded
    GROUP BY ALL
)
SELECT chapter, method, budget, batch, mode, ratio, exp(value) AS value, if(num = 1, low, exp(value - t * error)) AS low,
    if(num = 1, high, exp(value + t * error)) AS high
FROM sessions LEFT JOIN student ON free = num - 1;
CREATE TABLE headline AS
WITH counted AS (SELECT chapter, batch, mode, count(*) AS num FROM speedup WHERE ratio = 'net' GROUP BY ALL),
size AS (
    SELECT chapter, arg_max(batch, (num, batch)) AS batch FROM (
        SELECT chapter, batch, sum(num) AS num FROM counted GROUP BY ALL) GROUP BY ALL)
SELECT chapter, batch, arg_max(mode, (num, mode = 'eager')) AS mode FROM counted JOIN size USING (chapter, batch) GROUP BY ALL;

CREATE TABLE cost_row AS
WITH mean AS (
    SELECT chapter, arm, visual_kept, method, avg(nullif(text_tokens, 'nan')) AS text_tokens,
            avg(nullif(prefill_flops, 'nan')) AS prefill_flops, avg(nullif(encoder_flops, 'nan')) AS encoder_flops,
            avg(nullif(counted_flops, 'nan')) AS counted_flops, avg(nullif(kv_bytes, 'nan')) AS kv_bytes,
            avg(nullif(kv_measured_bytes, 'nan')) AS kv_measured_bytes, avg(nullif(peak_bytes, 'nan')) AS peak_bytes
    FROM costs JOIN timed USING (cell) GROUP BY ALL
)
SELECT chapter, arm || ' | ' || format('{:.3f}', visual_kept) || ' | ' || min(method) OVER (
        PARTITION BY chapter, arm, visual_kept, round(text_tokens, 6), round(prefill_flops, 6), round(encoder_flops, 6),
            round(counted_flops, 6), round(kv_bytes, 6), round(kv_measured_bytes, 6), round(peak_bytes, 6)) AS "row",
    *, max(prefill_flops) OVER (PARTITION BY chapter) AS most
FROM mean;
"""

TRAINING = """
CREATE TABLE training_row AS
WITH placed AS (
    SELECT *, count(*) OVER (PARTITION BY method, scorer_seed) AS n,
        row_number() OVER (PARTITION BY method, scorer_seed ORDER BY step DESC) AS back FROM training
), lasts AS (
    SELECT method, scorer_seed, arg_max(validation_soft, step) FILTER (NOT isnan(validation_soft)) AS soft,
        arg_max(validation_hard, step) FILTER (NOT isnan(validation_hard)) AS hard FROM training GROUP BY ALL
), ends AS (SELECT method, avg(soft) AS soft, avg(hard) AS hard FROM lasts GROUP BY ALL)
SELECT method, count(DISTINCT scorer_seed) AS seeds, count(DISTINCT step) AS steps, median(step_ms) AS step_ms,
    quantile_cont(step_ms, 0.1) AS p10, quantile_cont(step_ms, 0.9) AS p90, median(grad_norm) AS norm,
    quantile_cont(grad_norm, 0.1) AS norm10, quantile_cont(grad_norm, 0.9) AS norm90, 100 * avg(clipped::INT) AS clipped,
    avg(loss) FILTER (back <= greatest(1, n // 10)) AS loss, avg(grad_cosine) FILTER (NOT isnan(grad_cosine)) AS cosine,
    any_value(soft) AS soft, any_value(hard) AS hard, max(workers) AS workers
FROM placed JOIN ends USING (method) GROUP BY method;
"""

SEARCH = """
CREATE TABLE search_trial AS
WITH last AS (SELECT s.*, c.method, training_step = max(training_step) OVER (PARTITION BY cell) AS ended
    FROM search s JOIN cells c USING (cell) QUALIFY c.started = max(c.started) OVER (PARTITION BY c.method, s.configuration))
SELECT cell, method, any_value(configuration) AS configuration, any_value(trial_state) AS state, sum(spent_s) AS spent_s,
    avg(validation_hard) FILTER (ended) AS hard, any_value(searched_settings) AS settings FROM last GROUP BY ALL;
INSERT INTO expected BY NAME
WITH own AS (SELECT DISTINCT unnest(json_keys(settings)) AS name FROM search_trial), best AS (
    SELECT method, arg_min(settings, hard) AS settings FROM search_trial WHERE state = 'complete' GROUP BY method)
SELECT '' AS chapter, 'search' AS "table", method AS "row", replace(name, '_', ' ') AS "column",
    CAST(json_extract(settings, '$.' || name) AS DOUBLE) AS value FROM best, own
UNION ALL BY NAME
SELECT '' AS chapter, 'search' AS "table", method AS "row", t.col AS "column", CASE t.col WHEN 'trials' THEN count(*)
    WHEN 'stopped early' THEN count(*) FILTER (state = 'stopped') WHEN 'diverged' THEN count(*) FILTER (state = 'diverged')
    WHEN 'recipe''s own' THEN max(hard) FILTER (state = 'complete' AND configuration = 0)
    WHEN 'best' THEN min(hard) FILTER (state = 'complete') WHEN 'worst' THEN max(hard) FILTER (state = 'complete')
    ELSE sum(spent_s) / 60 END AS value
FROM search_trial, (VALUES ('trials'), ('stopped early'), ('diverged'), ('recipe''s own'), ('best'), ('worst'), ('minutes')) t(col)
GROUP BY method, t.col;
"""

EXPECTED = """
INSERT INTO expected BY NAME
SELECT chapter, t.name AS "table", method || ' | ' || budget AS "row", 'net prefill speedup' AS "column", value, low, high
FROM speedup JOIN headline USING (chapter, batch, mode), (VALUES ('headline'), ('thresholds')) t(name) WHERE ratio = 'net'
UNION ALL BY NAME
SELECT chapter, 'headline' AS "table", method || ' | ' || budget AS "row", 'overhead ms' AS "column", median AS value
FROM medians JOIN headline USING (chapter, batch, mode) WHERE arm = 'pruned' AND span = 'overhead'
UNION ALL BY NAME
SELECT chapter, 'headline' AS "table", method || ' | ' || budget AS "row", 'kept tokens' AS "column", kept AS value
FROM kept_of JOIN headline USING (chapter, batch, mode) ANTI JOIN arms USING (chapter, method, budget)
UNION ALL BY NAME
SELECT chapter, 'methods' AS "table", o.method AS "row", 'overhead | ' || o.budget AS "column", 100 * o.median / f.median AS value
FROM medians o JOIN medians f USING (chapter, method, budget, batch, mode) JOIN headline USING (chapter, batch, mode)
WHERE o.arm = 'pruned' AND o.span = 'overhead' AND f.arm = 'full' AND f.span = 'prefill'
UNION ALL BY NAME
SELECT chapter, t.name AS "table", concat_ws(' | ', method, budget, batch, mode) AS "row", t.col AS "column", median AS value
FROM medians JOIN (VALUES ('latency', 'encoder', 'pruned', 'encoder'), ('latency', 'overhead', 'pruned', 'overhead'),
    ('latency', 'prefill: full', 'full', 'prefill'), ('latency', 'pruned', 'pruned', 'prefill'),
    ('latency', 'native', 'native', 'prefill'), ('answer_times', 'TTFT: full', 'full', 'ttft'),
    ('answer_times', 'pruned', 'pruned', 'ttft'), ('answer_times', 'decode: full', 'full', 'decode'),
    ('answer_times', 'decode: pruned', 'pruned', 'decode')) t(name, col, arm, span) USING (arm, span)
UNION ALL BY NAME
SELECT chapter, t.name AS "table", concat_ws(' | ', method, budget, batch, mode) AS "row", t.col AS "column", value, low, high
FROM speedup JOIN (VALUES ('latency', 'net speedup', 'net'), ('latency', 'with encoder', 'encoded'),
    ('latency', 'to native', 'native'),
    ('answer_times', 'TTFT speedup', 'ttft')) t(name, col, ratio) USING (ratio)
UNION ALL BY NAME
SELECT chapter, t.name AS "table", concat_ws(' | ', method, budget, batch, mode) AS "row", t.col AS "column",
    if(t.col = 'kept', kept, batch) AS value
FROM kept_of, (VALUES ('latency', 'kept'), ('latency', 'batch'), ('answer_times', 'kept'), ('answer_times', 'batch')) t(name, col)
UNION ALL BY NAME
SELECT chapter, 'latency' AS "table", concat_ws(' | ', method, budget, batch, mode) AS "row", 'repeats' AS "column",
    min(repeats) AS value FROM medians WHERE span NOT IN ('ttft', 'decode') GROUP BY ALL
UNION ALL BY NAME
SELECT chapter, 'latency_spans' AS "table", concat_ws(' | ', method, budget, batch, mode, arm, span) AS "row", t.col AS "column",
    CASE t.col WHEN 'median ms' THEN median WHEN 'p10 ms' THEN p10 WHEN 'p90 ms' THEN p90 ELSE repeats END AS value
FROM medians, (VALUES ('median ms'), ('p10 ms'), ('p90 ms'), ('repeats')) t(col)
UNION ALL BY NAME
SELECT DISTINCT chapter, 'cost' AS "table", "row", t.col AS "column", CASE t.col WHEN 'visual tokens' THEN visual_kept
    WHEN 'text tokens' THEN text_tokens WHEN 'prefill GFLOP' THEN prefill_flops / 1e9 WHEN 'counted GFLOP' THEN counted_flops / 1e9
    WHEN 'FLOP ratio' THEN most / prefill_flops WHEN 'encoder GFLOP' THEN encoder_flops / 1e9 WHEN 'KV KiB' THEN kv_bytes / 1024
    WHEN 'KV measured' THEN kv_measured_bytes / 1024 ELSE peak_bytes / 1048576 END AS value
FROM cost_row, (VALUES ('visual tokens'), ('text tokens'), ('prefill GFLOP'), ('counted GFLOP'), ('FLOP ratio'), ('encoder GFLOP'),
    ('KV KiB'), ('KV measured'), ('peak MiB')) t(col)
UNION ALL BY NAME
SELECT '' AS chapter, 'training' AS "table", method AS "row", t.col AS "column", CASE t.col WHEN 'seeds' THEN seeds
    WHEN 'steps' THEN steps WHEN 'step ms' THEN step_ms WHEN 'loss' THEN loss WHEN 'gradient norm' THEN norm
    WHEN 'clipped %' THEN clipped WHEN 'gradient cosine' THEN cosine
    WHEN 'validation soft' THEN soft WHEN 'validation hard' THEN hard ELSE workers END AS value,
    CASE t.col WHEN 'step ms' THEN p10 WHEN 'gradient norm' THEN norm10 END AS low,
    CASE t.col WHEN 'step ms' THEN p90 WHEN 'gradient norm' THEN norm90 END AS high
FROM training_row, (VALUES ('seeds'), ('steps'), ('step ms'), ('loss'), ('gradient norm'),
    ('clipped %'), ('gradient cosine'), ('validation soft'),
    ('validation hard'), ('workers')) t(col);

INSERT INTO expected BY NAME
SELECT chapter, 'latency' AS "table", concat_ws(' | ', method, budget, batch, mode) AS "row", 'encoder' AS "column", median AS value
FROM medians m WHERE arm = 'full' AND span = 'encoder' AND NOT EXISTS (SELECT 1 FROM medians o WHERE o.arm = 'pruned'
    AND o.span = 'encoder' AND (o.chapter, o.method, o.budget, o.batch, o.mode) = (m.chapter, m.method, m.budget, m.batch, m.mode));
"""

STATEMENTS = (TIMES, TRAINING, SEARCH, EXPECTED)
