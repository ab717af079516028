"""Metrics and the dashboard that draws them: it asks for what is exported and for all of it, in fields that Grafana knows."""

from __future__ import annotations

import json
import re
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import jsonschema
import pytest
import ray

from diffprune.distributed import metrics
from diffprune.distributed.follower import Follower
from diffprune.distributed.metrics import METRICS
from diffprune.io.job_files import REPOSITORY
from diffprune.train.context import LocalContext
from diffprune.train.recipe import Recipe
from tests.records import prediction, provenance, step

DASHBOARD = json.loads((REPOSITORY / "cluster" / "grafana.json").read_text())
EXPORTED = {one.exported: set(one.tags) for one in METRICS}


def closed(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": required | optional, "required": list(required)}


TEXT, NUMBER, FLAG = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
SOURCE = closed({"type": {"const": "prometheus"}, "uid": {"const": "${datasource}"}})
TARGET = closed({"refId": TEXT, "datasource": SOURCE, "expr": TEXT, "legendFormat": TEXT, "instant": FLAG, "range": FLAG})
DEFAULTS = closed({"unit": {"enum": ["short", "percentunit"]}, "min": {"type": "number"}}, max={"type": "number"})
PANEL = closed({
    "id": NUMBER, "type": {"enum": ["timeseries", "stat"]}, "title": TEXT, "description": {"type": "string"}, "datasource": SOURCE,
    "gridPos": closed({"h": NUMBER, "w": NUMBER, "x": NUMBER, "y": NUMBER}), "options": {"type": "object"},
    "fieldConfig": closed({"defaults": DEFAULTS, "overrides": {"type": "array"}}),
    "targets": {"type": "array", "items": TARGET, "minItems": 1},
})  # fmt: skip
VARIABLE = closed(
    {
        "name": TEXT, "type": {"enum": ["datasource", "query"]}, "label": TEXT, "refresh": {"enum": [1, 2]}, "hide": NUMBER,
        "query": {}, "current": {"type": "object"}, "options": {"type": "array"}, "regex": {"type": "string"}, "includeAll": FLAG,
        "multi": FLAG,
    },
    datasource=SOURCE, definition=TEXT, sort=NUMBER, allValue=TEXT,
)  # fmt: skip
GRAFANA = closed({  # the fields we use, as the reference of Grafana's dashboard JSON (schema version 39) documents them
    "uid": {"type": "string", "pattern": "^[a-z-]{1,40}$"}, "title": TEXT, "tags": {"type": "array", "items": TEXT},
    "schemaVersion": {"const": 39}, "version": NUMBER, "editable": FLAG, "timezone": {"enum": ["browser", "utc"]},
    "refresh": {"type": "string", "pattern": "^[0-9]+[smh]$"}, "time": closed({"from": TEXT, "to": TEXT}),
    "templating": closed({"list": {"type": "array", "items": VARIABLE}}), "annotations": closed({"list": {"type": "array"}}),
    "links": {"type": "array"}, "panels": {"type": "array", "items": PANEL, "minItems": 1},
})  # fmt: skip


def asked(dashboard: dict[str, Any]) -> list[str]:
    """Every query of a dashboard."""
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_grafana_takes_the_dashboard() -> None:
    jsonschema.validate(DASHBOARD, GRAFANA)
    for name in ("panelz", "uidd"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(DASHBOARD | {name: []}, GRAFANA)
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken = [
        {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        for at in (panel["gridPos"] for panel in DASHBOARD["panels"])
    ]
    assert len(set().union(*taken)) == sum(map(len, taken)) and max(x for part in taken for x, _ in part) < 24, "none on another"
    names = {one["name"] for one in DASHBOARD["templating"]["list"]}
    assert names == {"datasource", "run"}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))
    assert used - names == {"__rate_interval", "__range"}, "variables of ours and of Grafana's"


def test_the_dashboard_asks_for_what_is_exported_and_for_all_of_it() -> None:
    found = set(re.findall(r"\bray_\w+", " ".join(asked(DASHBOARD))))
    assert found == set(EXPORTED)
    for query in asked(DASHBOARD):
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}")
        (name, *_) = re.findall(r"\bray_\w+", query)
        labels = {one.strip() for by in re.findall(r"by \(([^)]*)\)", query) for one in by.split(",")}
        labels |= set(re.findall(r"(\w+)=~", query))
        assert labels and labels <= EXPORTED[name], query
    for one in DASHBOARD["templating"]["list"]:
        if one["type"] == "query":
            name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", one["query"]["query"]).groups()  # type: ignore[union-attr]
            assert label in EXPORTED[name] and one["definition"] == one["query"]["query"]
    legends = {
        name for panel in DASHBOARD["panels"] for t in panel["targets"] for name in re.findall(r"{{(\w+)}}", t["legendFormat"])
    }
    assert legends <= {"run", "stage", "status", "cache"}


class Heard:
    """Instead of Ray's counters and gauges."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, ...], float] = {}
        self.last: dict[tuple[str, ...], float] = {}

    def add(self, metric: metrics.Counted, number: float, *labels: str) -> None:
        assert len(labels) == len(metric.tags)
        self.sums[metric.name, *labels] = self.sums.get((metric.name, *labels), 0) + number

    def set(self, metric: metrics.Shown, value: float, *labels: str) -> None:
        assert len(labels) == len(metric.tags)
        self.last[metric.name, *labels] = value


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    found = Heard()
    monkeypatch.setattr(metrics.Counted, "add", lambda metric, *given: found.add(metric, *given))
    monkeypatch.setattr(metrics.Shown, "set", lambda metric, *given: found.set(metric, *given))
    return found


def test_the_driver_counts_what_training_logs(heard: Heard) -> None:
    recipe = Recipe(pruners=("diffprune",), seeds=(0,), steps=3, images=5)
    context = LocalContext("run")
    with Follower(recipe, Path("run"), None, provenance(run="mine")):
        for number in range(3):
            context.report("diffprune-0", step(number, kept=60.0 - number))
    assert heard.sums["diffprune_examples", "mine", "train"] == 3 * 5
    assert heard.last["diffprune_kept_tokens", "mine", "train"] == 58


def test_answers_without_a_picture_keep_no_tokens(heard: Heard) -> None:
    rows = [prediction(0, visual_kept=10), prediction(1, visual_kept=20), prediction(2, visual_kept=0)]
    metrics.answered("mine", rows)
    metrics.answered("mine", rows[2:])
    assert heard.sums == {("diffprune_examples", "mine", "evaluate"): 4}
    assert heard.last == {("diffprune_kept_tokens", "mine", "evaluate"): 15}


def test_without_ray_nothing_is_counted_and_nothing_is_raised() -> None:
    metrics.CELLS.add(1, "mine", "evaluate", "ok")
    metrics.IDLE_SHARE.set(0.5, "mine", "evaluate")
    metrics.worker_lost("mine", "evaluate", "killed")
    assert not ray.is_initialized(), "and none is started"


def test_reporting_a_step_does_not_hold_training_up() -> None:
    """What a worker does for the metrics of a step is one line of its log: below 20 ms, be the machine ever so busy."""
    context, taken = LocalContext("run"), [time.perf_counter()]
    for number in range(60):
        context.report("diffprune-0", step(number))
        taken.append(time.perf_counter())
    assert median(after - before for before, after in pairwise(taken)) < 0.020
