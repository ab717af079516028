
CREATE OR REPLACE TEMP TABLE published AS
WITH manifest AS (
    SELECT * FROM (
    SELECT unnest(commit) FROM read_json('manifests/*.json', columns = {commit: 'STRUCT(cell VARCHAR, status VARCHAR,
        published BIGINT, attempt BIGINT, name VARCHAR, answers VARCHAR, parts STRUCT("table" VARCHAR, name VARCHAR)[])'})
) QUALIFY row_number() OVER (PARTITION BY name ORDER BY published) = 1
), part AS (
    SELECT cell, status = 'failed' AS failed, published AS moment, attempt, name AS commit_name,
        coalesce(nullif(answers, ''), name) AS graded, unnest(parts, recursive := true) FROM manifest
), own AS (
    SELECT * FROM part WHERE "table" NOT IN ('grades', 'figures')
    QUALIFY row_number() OVER (
        PARTITION BY "table", cell ORDER BY failed, attempt DESC, if(failed, -moment, moment), commit_name) = 1
), grading AS (
    SELECT * FROM part WHERE "table" = 'grades'
    AND graded IN (SELECT commit_name FROM own WHERE "table" = 'answers')
    QUALIFY row_number() OVER (PARTITION BY graded ORDER BY moment DESC, commit_name DESC) = 1
)
SELECT "table" AS of_table, cell, name AS part FROM own
UNION ALL
SELECT "table", cell, name FROM part WHERE "table" IN ('grades', 'figures') AND commit_name IN (SELECT commit_name FROM grading);

CREATE OR REPLACE TEMP TABLE all_answers AS SELECT "sample", "group", "category", "question_type", "question", "answer", "visual_total", "visual_kept", "text_tokens", "generated_tokens", "error", "cell", "verb", "model", "model_sha256", "dtype", "method", "base_method", "method_kind", "reads_question", "reference", "pruner", "weights_sha256", "recipe", "scorer_seed", "code", "budget", "benchmark", "benchmark_label", "revision", "protocol", "split", "limit" AS limit_questions, "batch", "blind", "answer_tokens", "mode", "tuned_kind", "target_speedup", "run", "attempt", "commit", "dirty", "versions", "hardware", "job_seed", "started" FROM read_parquet('parts/answers/*.parquet', filename = true) WHERE (parse_filename(filename), cell) IN (SELECT (part, cell) FROM published WHERE of_table = 'answers') OR parse_filename(filename) IN (SELECT part FROM published WHERE of_table = 'answers' AND cell = '');
CREATE OR REPLACE TEMP VIEW answers_given AS SELECT cell, "sample", "group", "category", "question_type", "question", "answer", "visual_total", "visual_kept", "text_tokens", "generated_tokens", "error" FROM all_answers;

CREATE OR REPLACE TEMP TABLE all_grades AS SELECT "sample", "parsed", "target", "credit", "grade_error", "grader", "cell", "verb", "model", "model_sha256", "dtype", "method", "base_method", "method_kind", "reads_question", "reference", "pruner", "weights_sha256", "recipe", "scorer_seed", "code", "budget", "benchmark", "benchmark_label", "revision", "protocol", "split", "limit" AS limit_questions, "batch", "blind", "answer_tokens", "mode", "tuned_kind", "target_speedup", "run", "attempt", "commit", "dirty", "versions", "hardware", "job_seed", "started" FROM read_parquet('parts/grades/*.parquet', filename = true) WHERE (parse_filename(filename), cell) IN (SELECT (part, cell) FROM published WHERE of_table = 'grades') OR parse_filename(filename) IN (SELECT part FROM published WHERE of_table = 'grades' AND cell = '');
CREATE OR REPLACE TEMP VIEW grades AS SELECT cell, "sample", "parsed", "target", "credit", "grade_error", "grader" FROM all_grades;

CREATE OR REPLACE TEMP TABLE all_figures AS SELECT "figure", "figure_value", "formula", "formula_categories", "cell", "verb", "model", "model_sha256", "dtype", "method", "base_method", "method_kind", "reads_question", "reference", "pruner", "weights_sha256", "recipe", "scorer_seed", "code", "budget", "benchmark", "benchmark_label", "revision", "protocol", "split", "limit" AS limit_questions, "batch", "blind", "answer_tokens", "mode", "tuned_kind", "target_speedup", "run", "attempt", "commit", "dirty", "versions", "hardware", "job_seed", "started" FROM read_parquet('parts/figures/*.parquet', filename = true) WHERE (parse_filename(filename), cell) IN (SELECT (part, cell) FROM published WHERE of_table = 'figures') OR parse_filename(filename) IN (SELECT part FROM published WHERE of_table = 'figures' AND cell = '');
CREATE OR REPLACE TEMP VIEW figures AS SELECT cell, "figure", "figure_value", "formula", "formula_categories" FROM all_figures;

CREATE OR REPLACE TEMP TABLE all_timings AS SELECT "span", "arm", "repetition", "value_ms", "visual_kept", "sequence", "flags", "cell", "verb", "model", "model_sha256", "dtype", "method", "base_method", "method_kind", "reads_question", "reference", "pruner", "weights_sha256", "recipe", "scorer_seed", "code", "budget", "benchmark", "benchmark_label", "revision", "protocol", "split", "limit" AS limit_questions, "batch", "blind", "answer_tokens", "mode", "tuned_kind", "target_speedup", "run", "attempt", "commit", "dirty", "versions", "hardware", "job_seed", "started" FROM read_parquet('parts/timings/*.parquet', filename = true) WHERE (parse_filename(filename), cell) IN (SELECT (part, cell) FROM published WHERE of_table = 'timings') OR parse_filename(filename) IN (SELECT part FROM published WHERE of_table = 'timings' AND cell = '');
CREATE OR REPLACE TEMP VIEW timings AS SELECT cell, "span", "arm", "repetition", "value_ms", "visual_kept", "sequence", "flags" FROM all_timings;

CREATE OR REPLACE TEMP TABLE all_costs AS SELECT "arm", "visual_kept", "text_tokens", "prefill_flops", "encoder_flops", "counted_flops", "kv_bytes", "kv_measured_bytes", "peak_bytes", "cell", "verb", "model", "model_sha256", "dtype", "method", "base_method", "method_kind", "reads_question", "reference", "pruner", "weights_sha256", "recipe", "scorer_seed", "code", "budget", "benchmark", "benchmark_label", "revision", "protocol", "split", "limit" AS limit_questions, "batch", "blind", "answer_tokens", "mode", "tuned_kind", "target_speedup", "run", "attempt", "commit", "dirty", "versions", "hardware", "job_seed", "started" FROM read_parquet('parts/costs/*.parquet', filename = true) WHERE (parse_filename(filename), cell) IN (SELECT (part, cell) FROM published WHERE of_table = 'costs') OR parse_filename(filename) IN (SELECT part FROM published WHERE of_table = 'costs' AND cell = '');
CREATE OR REPLACE TEMP VIEW costs AS SELECT cell, "arm", "visual_kept", "text_tokens", "prefill_flops", "encoder_flops", "counted_flops", "kv_bytes", "kv_measured_bytes", "peak_bytes" FROM all_costs;

CREATE OR REPLACE TEMP TABLE all_steps AS SELECT "step", "loss", "penalty", "temperature", "drawn_budget", "kept", "grad_norm", "clipped", "score_sd", "overlap", "grad_cosine", "step_ms", "workers", "validation_soft", "validation_hard", "cell", "verb", "model", "model_sha256", "dtype", "method", "base_method", "method_kind", "reads_question", "reference", "pruner", "weights_sha256", "recipe", "scorer_seed", "code", "budget", "benchmark", "benchmark_label", "revision", "protocol", "split", "limit" AS limit_questions, "batch", "blind", "answer_tokens", "mode", "tuned_kind", "target_speedup", "run", "attempt", "commit", "dirty", "versions", "hardware", "job_seed", "started" FROM read_parquet('parts/steps/*.parquet', filename = true) WHERE (parse_filename(filename), cell) IN (SELECT (part, cell) FROM published WHERE of_table = 'steps') OR parse_filename(filename) IN (SELECT part FROM published WHERE of_table = 'steps' AND cell = '');
CREATE OR REPLACE TEMP VIEW steps AS SELECT cell, "step", "loss", "penalty", "temperature", "drawn_budget", "kept", "grad_norm", "clipped", "score_sd", "overlap", "grad_cosine", "step_ms", "workers", "validation_soft", "validation_hard" FROM all_steps;

CREATE OR REPLACE TEMP TABLE all_curve AS SELECT NULL::BIGINT AS "num_rows", NULL::BIGINT AS "sequence", NULL::BIGINT AS "visual_kept", NULL::DOUBLE AS "prefill_ms", NULL::DOUBLE AS "p10_ms", NULL::DOUBLE AS "p90_ms", NULL::BIGINT AS "repeats", NULL::DOUBLE AS "fitted_ms", NULL::VARCHAR AS "cell", NULL::VARCHAR AS "verb", NULL::VARCHAR AS "model", NULL::VARCHAR AS "model_sha256", NULL::VARCHAR AS "dtype", NULL::VARCHAR AS "method", NULL::VARCHAR AS "base_method", NULL::VARCHAR AS "method_kind", NULL::BOOLEAN AS "reads_question", NULL::VARCHAR AS "reference", NULL::VARCHAR AS "pruner", NULL::VARCHAR AS "weights_sha256", NULL::VARCHAR AS "recipe", NULL::BIGINT AS "scorer_seed", NULL::VARCHAR AS "code", NULL::VARCHAR AS "budget", NULL::VARCHAR AS "benchmark", NULL::VARCHAR AS "benchmark_label", NULL::VARCHAR AS "revision", NULL::VARCHAR AS "protocol", NULL::VARCHAR AS "split", NULL::BIGINT AS "limit_questions", NULL::BIGINT AS "batch", NULL::BOOLEAN AS "blind", NULL::BIGINT AS "answer_tokens", NULL::VARCHAR AS "mode", NULL::VARCHAR AS "tuned_kind", NULL::DOUBLE AS "target_speedup", NULL::VARCHAR AS "run", NULL::BIGINT AS "attempt", NULL::VARCHAR AS "commit", NULL::BOOLEAN AS "dirty", NULL::VARCHAR AS "versions", NULL::VARCHAR AS "hardware", NULL::BIGINT AS "job_seed", NULL::VARCHAR AS "started" WHERE false;
CREATE OR REPLACE TEMP VIEW curve AS SELECT cell, "num_rows", "sequence", "visual_kept", "prefill_ms", "p10_ms", "p90_ms", "repeats", "fitted_ms" FROM all_curve;

CREATE OR REPLACE TEMP TABLE all_calibration AS SELECT NULL::BIGINT AS "picture", NULL::BIGINT AS "batch_index", NULL::BIGINT AS "visual_total", NULL::BIGINT AS "text_tokens", NULL::VARCHAR AS "cell", NULL::VARCHAR AS "verb", NULL::VARCHAR AS "model", NULL::VARCHAR AS "model_sha256", NULL::VARCHAR AS "dtype", NULL::VARCHAR AS "method", NULL::VARCHAR AS "base_method", NULL::VARCHAR AS "method_kind", NULL::BOOLEAN AS "reads_question", NULL::VARCHAR AS "reference", NULL::VARCHAR AS "pruner", NULL::VARCHAR AS "weights_sha256", NULL::VARCHAR AS "recipe", NULL::BIGINT AS "scorer_seed", NULL::VARCHAR AS "code", NULL::VARCHAR AS "budget", NULL::VARCHAR AS "benchmark", NULL::VARCHAR AS "benchmark_label", NULL::VARCHAR AS "revision", NULL::VARCHAR AS "protocol", NULL::VARCHAR AS "split", NULL::BIGINT AS "limit_questions", NULL::BIGINT AS "batch", NULL::BOOLEAN AS "blind", NULL::BIGINT AS "answer_tokens", NULL::VARCHAR AS "mode", NULL::VARCHAR AS "tuned_kind", NULL::DOUBLE AS "target_speedup", NULL::VARCHAR AS "run", NULL::BIGINT AS "attempt", NULL::VARCHAR AS "commit", NULL::BOOLEAN AS "dirty", NULL::VARCHAR AS "versions", NULL::VARCHAR AS "hardware", NULL::BIGINT AS "job_seed", NULL::VARCHAR AS "started" WHERE false;
CREATE OR REPLACE TEMP VIEW calibration AS SELECT cell, "picture", "batch_index", "visual_total", "text_tokens" FROM all_calibration;

CREATE OR REPLACE TEMP TABLE all_scores AS SELECT NULL::BIGINT AS "picture", NULL::BIGINT AS "rank", NULL::DOUBLE AS "score", NULL::VARCHAR AS "cell", NULL::VARCHAR AS "verb", NULL::VARCHAR AS "model", NULL::VARCHAR AS "model_sha256", NULL::VARCHAR AS "dtype", NULL::VARCHAR AS "method", NULL::VARCHAR AS "base_method", NULL::VARCHAR AS "method_kind", NULL::BOOLEAN AS "reads_question", NULL::VARCHAR AS "reference", NULL::VARCHAR AS "pruner", NULL::VARCHAR AS "weights_sha256", NULL::VARCHAR AS "recipe", NULL::BIGINT AS "scorer_seed", NULL::VARCHAR AS "code", NULL::VARCHAR AS "budget", NULL::VARCHAR AS "benchmark", NULL::VARCHAR AS "benchmark_label", NULL::VARCHAR AS "revision", NULL::VARCHAR AS "protocol", NULL::VARCHAR AS "split", NULL::BIGINT AS "limit_questions", NULL::BIGINT AS "batch", NULL::BOOLEAN AS "blind", NULL::BIGINT AS "answer_tokens", NULL::VARCHAR AS "mode", NULL::VARCHAR AS "tuned_kind", NULL::DOUBLE AS "target_speedup", NULL::VARCHAR AS "run", NULL::BIGINT AS "attempt", NULL::VARCHAR AS "commit", NULL::BOOLEAN AS "dirty", NULL::VARCHAR AS "versions", NULL::VARCHAR AS "hardware", NULL::BIGINT AS "job_seed", NULL::VARCHAR AS "started" WHERE false;
CREATE OR REPLACE TEMP VIEW scores AS SELECT cell, "picture", "rank", "score" FROM all_scores;

CREATE OR REPLACE TEMP TABLE all_held_out AS SELECT NULL::VARCHAR AS "tried_budget", NULL::BIGINT AS "batch_index", NULL::BIGINT AS "repetition", NULL::VARCHAR AS "arm", NULL::DOUBLE AS "spent_ms", NULL::BIGINT AS "num_rows", NULL::VARCHAR AS "cell", NULL::VARCHAR AS "verb", NULL::VARCHAR AS "model", NULL::VARCHAR AS "model_sha256", NULL::VARCHAR AS "dtype", NULL::VARCHAR AS "method", NULL::VARCHAR AS "base_method", NULL::VARCHAR AS "method_kind", NULL::BOOLEAN AS "reads_question", NULL::VARCHAR AS "reference", NULL::VARCHAR AS "pruner", NULL::VARCHAR AS "weights_sha256", NULL::VARCHAR AS "recipe", NULL::BIGINT AS "scorer_seed", NULL::VARCHAR AS "code", NULL::VARCHAR AS "budget", NULL::VARCHAR AS "benchmark", NULL::VARCHAR AS "benchmark_label", NULL::VARCHAR AS "revision", NULL::VARCHAR AS "protocol", NULL::VARCHAR AS "split", NULL::BIGINT AS "limit_questions", NULL::BIGINT AS "batch", NULL::BOOLEAN AS "blind", NULL::BIGINT AS "answer_tokens", NULL::VARCHAR AS "mode", NULL::VARCHAR AS "tuned_kind", NULL::DOUBLE AS "target_speedup", NULL::VARCHAR AS "run", NULL::BIGINT AS "attempt", NULL::VARCHAR AS "commit", NULL::BOOLEAN AS "dirty", NULL::VARCHAR AS "versions", NULL::VARCHAR AS "hardware", NULL::BIGINT AS "job_seed", NULL::VARCHAR AS "started" WHERE false;
CREATE OR REPLACE TEMP VIEW held_out AS SELECT cell, "tried_budget", "batch_index", "repetition", "arm", "spent_ms", "num_rows" FROM all_held_out;

CREATE OR REPLACE TEMP TABLE all_kept_tokens AS SELECT "picture", "token", "token_kept", "cell", "verb", "model", "model_sha256", "dtype", "method", "base_method", "method_kind", "reads_question", "reference", "pruner", "weights_sha256", "recipe", "scorer_seed", "code", "budget", "benchmark", "benchmark_label", "revision", "protocol", "split", "limit" AS limit_questions, "batch", "blind", "answer_tokens", "mode", "tuned_kind", "target_speedup", "run", "attempt", "commit", "dirty", "versions", "hardware", "job_seed", "started" FROM read_parquet('parts/kept_tokens/*.parquet', filename = true) WHERE (parse_filename(filename), cell) IN (SELECT (part, cell) FROM published WHERE of_table = 'kept_tokens') OR parse_filename(filename) IN (SELECT part FROM published WHERE of_table = 'kept_tokens' AND cell = '');
CREATE OR REPLACE TEMP VIEW kept_tokens AS SELECT cell, "picture", "token", "token_kept" FROM all_kept_tokens;

CREATE OR REPLACE TEMP TABLE all_trials AS SELECT NULL::DOUBLE AS "value", NULL::DOUBLE AS "kept", NULL::DOUBLE AS "predicted_speedup", NULL::BOOLEAN AS "feasible", NULL::DOUBLE AS "accuracy", NULL::DOUBLE AS "accuracy_low", NULL::DOUBLE AS "accuracy_high", NULL::VARCHAR AS "cell", NULL::VARCHAR AS "verb", NULL::VARCHAR AS "model", NULL::VARCHAR AS "model_sha256", NULL::VARCHAR AS "dtype", NULL::VARCHAR AS "method", NULL::VARCHAR AS "base_method", NULL::VARCHAR AS "method_kind", NULL::BOOLEAN AS "reads_question", NULL::VARCHAR AS "reference", NULL::VARCHAR AS "pruner", NULL::VARCHAR AS "weights_sha256", NULL::VARCHAR AS "recipe", NULL::BIGINT AS "scorer_seed", NULL::VARCHAR AS "code", NULL::VARCHAR AS "budget", NULL::VARCHAR AS "benchmark", NULL::VARCHAR AS "benchmark_label", NULL::VARCHAR AS "revision", NULL::VARCHAR AS "protocol", NULL::VARCHAR AS "split", NULL::BIGINT AS "limit_questions", NULL::BIGINT AS "batch", NULL::BOOLEAN AS "blind", NULL::BIGINT AS "answer_tokens", NULL::VARCHAR AS "mode", NULL::VARCHAR AS "tuned_kind", NULL::DOUBLE AS "target_speedup", NULL::VARCHAR AS "run", NULL::BIGINT AS "attempt", NULL::VARCHAR AS "commit", NULL::BOOLEAN AS "dirty", NULL::VARCHAR AS "versions", NULL::VARCHAR AS "hardware", NULL::BIGINT AS "job_seed", NULL::VARCHAR AS "started" WHERE false;
CREATE OR REPLACE TEMP VIEW trials AS SELECT cell, "value", "kept", "predicted_speedup", "feasible", "accuracy", "accuracy_low", "accuracy_high" FROM all_trials;

CREATE OR REPLACE TEMP TABLE all_choices AS SELECT NULL::VARCHAR AS "verdict", NULL::VARCHAR AS "chosen_budget", NULL::DOUBLE AS "value", NULL::DOUBLE AS "kept", NULL::DOUBLE AS "predicted_speedup", NULL::DOUBLE AS "measured_speedup", NULL::DOUBLE AS "measured_low", NULL::DOUBLE AS "measured_high", NULL::BIGINT AS "num_held_out", NULL::DOUBLE AS "accuracy", NULL::DOUBLE AS "best_speedup", NULL::VARCHAR AS "note", NULL::DOUBLE AS "accuracy_low", NULL::DOUBLE AS "accuracy_high", NULL::VARCHAR AS "cell", NULL::VARCHAR AS "verb", NULL::VARCHAR AS "model", NULL::VARCHAR AS "model_sha256", NULL::VARCHAR AS "dtype", NULL::VARCHAR AS "method", NULL::VARCHAR AS "base_method", NULL::VARCHAR AS "method_kind", NULL::BOOLEAN AS "reads_question", NULL::VARCHAR AS "reference", NULL::VARCHAR AS "pruner", NULL::VARCHAR AS "weights_sha256", NULL::VARCHAR AS "recipe", NULL::BIGINT AS "scorer_seed", NULL::VARCHAR AS "code", NULL::VARCHAR AS "budget", NULL::VARCHAR AS "benchmark", NULL::VARCHAR AS "benchmark_label", NULL::VARCHAR AS "revision", NULL::VARCHAR AS "protocol", NULL::VARCHAR AS "split", NULL::BIGINT AS "limit_questions", NULL::BIGINT AS "batch", NULL::BOOLEAN AS "blind", NULL::BIGINT AS "answer_tokens", NULL::VARCHAR AS "mode", NULL::VARCHAR AS "tuned_kind", NULL::DOUBLE AS "target_speedup", NULL::VARCHAR AS "run", NULL::BIGINT AS "attempt", NULL::VARCHAR AS "commit", NULL::BOOLEAN AS "dirty", NULL::VARCHAR AS "versions", NULL::VARCHAR AS "hardware", NULL::BIGINT AS "job_seed", NULL::VARCHAR AS "started" WHERE false;
CREATE OR REPLACE TEMP VIEW choices AS SELECT cell, "verdict", "chosen_budget", "value", "kept", "predicted_speedup", "measured_speedup", "measured_low", "measured_high", "num_held_out", "accuracy", "best_speedup", "note", "accuracy_low", "accuracy_high" FROM all_choices;

CREATE OR REPLACE TEMP TABLE all_search AS SELECT NULL::BIGINT AS "configuration", NULL::VARCHAR AS "searched_settings", NULL::BIGINT AS "training_seed", NULL::BIGINT AS "training_step", NULL::BIGINT AS "training_images", NULL::DOUBLE AS "validation_hard", NULL::VARCHAR AS "trial_state", NULL::DOUBLE AS "spent_s", NULL::VARCHAR AS "cell", NULL::VARCHAR AS "verb", NULL::VARCHAR AS "model", NULL::VARCHAR AS "model_sha256", NULL::VARCHAR AS "dtype", NULL::VARCHAR AS "method", NULL::VARCHAR AS "base_method", NULL::VARCHAR AS "method_kind", NULL::BOOLEAN AS "reads_question", NULL::VARCHAR AS "reference", NULL::VARCHAR AS "pruner", NULL::VARCHAR AS "weights_sha256", NULL::VARCHAR AS "recipe", NULL::BIGINT AS "scorer_seed", NULL::VARCHAR AS "code", NULL::VARCHAR AS "budget", NULL::VARCHAR AS "benchmark", NULL::VARCHAR AS "benchmark_label", NULL::VARCHAR AS "revision", NULL::VARCHAR AS "protocol", NULL::VARCHAR AS "split", NULL::BIGINT AS "limit_questions", NULL::BIGINT AS "batch", NULL::BOOLEAN AS "blind", NULL::BIGINT AS "answer_tokens", NULL::VARCHAR AS "mode", NULL::VARCHAR AS "tuned_kind", NULL::DOUBLE AS "target_speedup", NULL::VARCHAR AS "run", NULL::BIGINT AS "attempt", NULL::VARCHAR AS "commit", NULL::BOOLEAN AS "dirty", NULL::VARCHAR AS "versions", NULL::VARCHAR AS "hardware", NULL::BIGINT AS "job_seed", NULL::VARCHAR AS "started" WHERE false;
CREATE OR REPLACE TEMP VIEW search AS SELECT cell, "configuration", "searched_settings", "training_seed", "training_step", "training_images", "validation_hard", "trial_state", "spent_s" FROM all_search;

CREATE OR REPLACE TEMP TABLE all_outcomes AS SELECT "status", "reason", "rows", "seconds", "cell", "verb", "model", "model_sha256", "dtype", "method", "base_method", "method_kind", "reads_question", "reference", "pruner", "weights_sha256", "recipe", "scorer_seed", "code", "budget", "benchmark", "benchmark_label", "revision", "protocol", "split", "limit" AS limit_questions, "batch", "blind", "answer_tokens", "mode", "tuned_kind", "target_speedup", "run", "attempt", "commit", "dirty", "versions", "hardware", "job_seed", "started" FROM read_parquet('parts/outcomes/*.parquet', filename = true) WHERE (parse_filename(filename), cell) IN (SELECT (part, cell) FROM published WHERE of_table = 'outcomes') OR parse_filename(filename) IN (SELECT part FROM published WHERE of_table = 'outcomes' AND cell = '');
CREATE OR REPLACE TEMP VIEW outcomes AS SELECT cell, "status", "reason", "rows", "seconds" FROM all_outcomes;


CREATE OR REPLACE TEMP VIEW predictions AS
SELECT a.* EXCLUDE (error), g.parsed, g.target, g.credit, if(a.error = '', g.grade_error, a.error) AS error
FROM answers_given a JOIN grades g USING (cell, sample);


CREATE OR REPLACE TEMP TABLE every_cell AS
WITH told AS (SELECT DISTINCT cell, verb, model, model_sha256, dtype, method, base_method, method_kind, reads_question, reference, pruner, weights_sha256, recipe, scorer_seed, code, budget, benchmark, benchmark_label, revision, protocol, split, limit_questions, batch, blind, answer_tokens, mode, tuned_kind, target_speedup, started, hardware, 0 AS place FROM all_answers UNION ALL SELECT DISTINCT cell, verb, model, model_sha256, dtype, method, base_method, method_kind, reads_question, reference, pruner, weights_sha256, recipe, scorer_seed, code, budget, benchmark, benchmark_label, revision, protocol, split, limit_questions, batch, blind, answer_tokens, mode, tuned_kind, target_speedup, started, hardware, 1 AS place FROM all_grades UNION ALL SELECT DISTINCT cell, verb, model, model_sha256, dtype, method, base_method, method_kind, reads_question, reference, pruner, weights_sha256, recipe, scorer_seed, code, budget, benchmark, benchmark_label, revision, protocol, split, limit_questions, batch, blind, answer_tokens, mode, tuned_kind, target_speedup, started, hardware, 2 AS place FROM all_figures UNION ALL SELECT DISTINCT cell, verb, model, model_sha256, dtype, method, base_method, method_kind, reads_question, reference, pruner, weights_sha256, recipe, scorer_seed, code, budget, benchmark, benchmark_label, revision, protocol, split, limit_questions, batch, blind, answer_tokens, mode, tuned_kind, target_speedup, started, hardware, 3 AS place FROM all_timings UNION ALL SELECT DISTINCT cell, verb, model, model_sha256, dtype, method, base_method, method_kind, reads_question, reference, pruner, weights_sha256, recipe, scorer_seed, code, budget, benchmark, benchmark_label, revision, protocol, split, limit_questions, batch, blind, answer_tokens, mode, tuned_kind, target_speedup, started, hardware, 4 AS place FROM all_costs UNION ALL SELECT DISTINCT cell, verb, model, model_sha256, dtype, method, base_method, method_kind, reads_question, reference, pruner, weights_sha256, recipe, scorer_seed, code, budget, benchmark, benchmark_label, revision, protocol, split, limit_questions, batch, blind, answer_tokens, mode, tuned_kind, target_speedup, started, hardware, 5 AS place FROM all_steps UNION ALL SELECT DISTINCT cell, verb, model, model_sha256, dtype, method, base_method, method_kind, reads_question, reference, pruner, weights_sha256, recipe, scorer_seed, code, budget, benchmark, benchmark_label, revision, protocol, split, limit_questions, batch, blind, answer_tokens, mode, tuned_kind, target_speedup, started, hardware, 6 AS place FROM all_curve UNION ALL SELECT DISTINCT cell, verb, model, model_sha256, dtype, method, base_method, method_kind, reads_question, reference, pruner, weights_sha256, recipe, scorer_seed, code, budget, benchmark, benchmark_label, revision, protocol, split, limit_questions, batch, blind, answer_tokens, mode, tuned_kind, target_speedup, started, hardware, 7 AS place FROM all_calibration UNION ALL SELECT DISTINCT cell, verb, model, model_sha256, dtype, method, base_method, method_kind, reads_question, reference, pruner, weights_sha256, recipe, scorer_seed, code, budget, benchmark, benchmark_label, revision, protocol, split, limit_questions, batch, blind, answer_tokens, mode, tuned_kind, target_speedup, started, hardware, 8 AS place FROM all_scores UNION ALL SELECT DISTINCT cell, verb, model, model_sha256, dtype, method, base_method, method_kind, reads_question, reference, pruner, weights_sha256, recipe, scorer_seed, code, budget, benchmark, benchmark_label, revision, protocol, split, limit_questions, batch, blind, answer_tokens, mode, tuned_kind, target_speedup, started, hardware, 9 AS place FROM all_held_out UNION ALL SELECT DISTINCT cell, verb, model, model_sha256, dtype, method, base_method, method_kind, reads_question, reference, pruner, weights_sha256, recipe, scorer_seed, code, budget, benchmark, benchmark_label, revision, protocol, split, limit_questions, batch, blind, answer_tokens, mode, tuned_kind, target_speedup, started, hardware, 10 AS place FROM all_kept_tokens UNION ALL SELECT DISTINCT cell, verb, model, model_sha256, dtype, method, base_method, method_kind, reads_question, reference, pruner, weights_sha256, recipe, scorer_seed, code, budget, benchmark, benchmark_label, revision, protocol, split, limit_questions, batch, blind, answer_tokens, mode, tuned_kind, target_speedup, started, hardware, 11 AS place FROM all_trials UNION ALL SELECT DISTINCT cell, verb, model, model_sha256, dtype, method, base_method, method_kind, reads_question, reference, pruner, weights_sha256, recipe, scorer_seed, code, budget, benchmark, benchmark_label, revision, protocol, split, limit_questions, batch, blind, answer_tokens, mode, tuned_kind, target_speedup, started, hardware, 12 AS place FROM all_choices UNION ALL SELECT DISTINCT cell, verb, model, model_sha256, dtype, method, base_method, method_kind, reads_question, reference, pruner, weights_sha256, recipe, scorer_seed, code, budget, benchmark, benchmark_label, revision, protocol, split, limit_questions, batch, blind, answer_tokens, mode, tuned_kind, target_speedup, started, hardware, 13 AS place FROM all_search UNION ALL SELECT DISTINCT cell, verb, model, model_sha256, dtype, method, base_method, method_kind, reads_question, reference, pruner, weights_sha256, recipe, scorer_seed, code, budget, benchmark, benchmark_label, revision, protocol, split, limit_questions, batch, blind, answer_tokens, mode, tuned_kind, target_speedup, started, hardware, 14 AS place FROM all_outcomes), one AS (
    SELECT * FROM told QUALIFY row_number() OVER (PARTITION BY cell ORDER BY place, started DESC) = 1
), named AS (
    SELECT *, coalesce(nullif(recipe, ''), weights_sha256) AS trained_as,
        CASE method_kind WHEN 'bound' THEN '' WHEN 'diagnostic' THEN regexp_extract(pruner, '\w+=([a-z]\w*)', 1)
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
