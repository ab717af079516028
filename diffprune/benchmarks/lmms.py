"""Any task of lmms-eval on our path: the prompt, the rule and the aggregation are the task's own, the answers are ours.

    diffprune evaluate --benchmark "lmms('pope')" --set evaluate.protocol=lmms_eval
    diffprune evaluate --benchmark "lmms('mine', folder='my_tasks')" --set evaluate.protocol=lmms_eval

Needs the extra `lmms-eval`. A task's YAML names functions beside it, so a `folder` of tasks runs the code it holds: give only
folders you trust.
"""

from __future__ import annotations

import inspect
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, ClassVar

from PIL import Image

from diffprune.benchmarks import _groups
from diffprune.benchmarks._answers import REASONING, without_reasoning
from diffprune.core.benchmark import Benchmark, Grade, Graded, Sample
from diffprune.core.errors import first_line, with_class
from diffprune.core.registry import nearest
from diffprune.io import lmms_eval

_CREDITS = ("score", "acc", "accuracy", "correct")  # where a metric is a mapping, the entry that is its credit


class Lmms(Benchmark):
    """One task of lmms-eval that generates an answer to one question about one picture.

    task:     its name, as for `lmms-eval --tasks`. folder: of YAML files to search instead of those that come with lmms-eval.
    group:    column whose equal values belong together, e.g. `question_id` in MME; by default every question stands alone.
    category: column to report by.

    What a model thinks aloud is stripped as lmms-eval does by default, or as the task's `reasoning_tags` say.

    What differs from a run by lmms-eval itself: `limit` draws whole groups by hash instead of the first rows; a question that
    fails is an error and no empty answer; of several filters the first is used. Equal pictures of different questions cannot
    be told here (a task may draw on them), so a picture is encoded once per question, for all methods and budgets.

    Raises:
        ValueError: lmms-eval cannot be used.
    """

    protocols: ClassVar[tuple[str, ...]] = ("lmms_eval",)

    def __init__(self, task: str, folder: Path | None = None, group: str = "", category: str = "") -> None:
        lmms_eval.need(f"lmms({task!r})")
        self.task, self.folder, self.group, self.category = task, folder, group, category
        self.title, self.label = f"lmms(task={task!r})", task

    @cached_property
    def _manager(self) -> Any:
        folder = [str(Path(self.folder).resolve())] if self.folder else None
        if folder and not Path(folder[0]).is_dir():
            raise ValueError(f"{self.title}: there is no folder {str(self.folder)!r}")
        manager = lmms_eval.TaskManager("ERROR", include_path=folder, include_defaults=not folder, model_name=lmms_eval.MODEL)
        if self.task not in manager.all_tasks:
            raise ValueError(
                f"lmms-eval has no task {self.task!r}: {nearest(self.task, manager.all_tasks or ['a task: none is there'])}"
            )
        return manager

    @cached_property
    def _config(self) -> dict[str, Any]:
        """The task's YAML with its functions, without any data."""
        path = self._manager.task_index[self.task]["yaml_path"]
        return {} if path == -1 else lmms_eval.load_yaml_config(path, mode="full")

    @cached_property
    def _task(self) -> Any:
        """lmms-eval's own task with its data, fetched by `datasets` where they are not on disk."""
        try:
            task = lmms_eval.get_task_dict([self.task], self._manager, "simple").get(self.task)
        except Exception as error:
            raise ValueError(f"{self.title} cannot be loaded ({with_class(_inner(error))})") from None
        if task is None or isinstance(task, Mapping):
            raise ValueError(f"{self.task!r} is a group of tasks in lmms-eval: ask for one of its tasks by name")
        if task.config.output_type != "generate_until":
            raise ValueError(f"{self.title} asks for {task.config.output_type}: only tasks of one answer can be asked")
        if task.config.num_fewshot:
            raise ValueError(f"{self.title} shows {task.config.num_fewshot} examples first: ours are asked without")
        return task

    @property
    def _docs(self) -> Any:
        return getattr(self._task, "eval_docs_no_media", self._task.eval_docs)

    @cached_property
    def revision(self) -> str:  # type: ignore[override]
        """Hash of lmms-eval's version, the task's files and every row; pictures count by the commit or size of their files."""
        path = Path(self._manager.task_index[self.task]["yaml_path"])
        digest = sha256(f"{lmms_eval.installed()} {self.task}".encode())
        for file in [path, *sorted(path.parent.glob("*.py"))]:
            digest.update(file.read_bytes())
        for doc in self._docs:
            digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
        info = getattr(self._task.eval_docs, "info", None)
        for url, found in sorted((getattr(info, "download_checksums", None) or {}).items()):
            source = url if "://" in url else Path(url).name  # the same file elsewhere is the same data
            digest.update(f"{source} {found.get('num_bytes')}".encode())
        return digest.hexdigest()[:20]

    def samples(self, split: str, limit: int | None = None, protocol: str = "lmms_eval") -> list[Sample]:
        """The questions of the split the task evaluates on, as the task words them, in its order."""
        self.check_asked(protocol, limit)
        self.named_split(split)
        found = [self._sample(i, doc) for i, doc in enumerate(self._docs)]
        if limit is not None and limit < len(found):
            chosen = _groups.drawn([sample.group for sample in found], limit)
            found = [sample for sample in found if sample.group in chosen]
        return found

    def _sample(self, i: int, doc: Mapping[str, Any]) -> Sample:
        for column in filter(None, (self.group, self.category)):
            if column not in doc:
                raise ValueError(f"{self.title} has no column {column!r}: {nearest(column, doc)}")
        question = self._task.fewshot_context(doc, 0)
        if not isinstance(question, str):
            raise ValueError(f"{self.title} asks {type(question).__name__} instead of one text in row {i}")
        group = str(doc[self.group]) if self.group else str(i)
        category = str(doc[self.category]) if self.category else ""
        return Sample(id=str(i), group=group, image_id=f"{self.task}/{i}", question=question, row={"doc": i}, category=category)

    def image(self, sample: Sample) -> Image.Image:
        """The picture the task shows.

        Raises:
            ValueError: it shows none, several, or a broken one.
        """
        visuals = self._task.doc_to_visual(self._task.eval_docs[sample.row["doc"]])
        return lmms_eval.one_image(visuals, f"{self.title} row {sample.id}")

    def new_tokens(self, protocol: str = "lmms_eval") -> int:
        """The task's own limit, 1024 where it sets none."""
        return lmms_eval.new_tokens(self._task.config.generation_kwargs or {}, self.title)

    def grade(self, sample: Sample, answer: str, protocol: str = "lmms_eval") -> Grade:
        """The task's metrics of one answer as JSON (`parsed`), from which it aggregates; the first of them is the credit.

        Raises:
            ValueError: no metric is a credit in [0, 1], or one cannot be kept as JSON.
        """
        doc = self._docs[sample.row["doc"]]
        said = SimpleNamespace(resps=[answer], filtered_resps={}, doc=doc)
        first = self._task._filters[0]
        first.apply([said], [doc])
        metrics = self._task.process_results(doc, [self._without_reasoning(said.filtered_resps[first.name])])
        try:
            parsed = json.dumps(metrics, sort_keys=True, default=_plain, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.title}: its metrics cannot be kept in a record ({first_line(_inner(error))})") from None
        return Grade(self._credit(metrics), parsed, f"{self._task.doc_to_target(doc)}"[:300])

    def _without_reasoning(self, found: Any) -> Any:
        """A filter's answer, or answers, as lmms-eval hands them to the task."""
        tags = getattr(self._task.config, "reasoning_tags", None)
        tags = json.loads(tags) if isinstance(tags, str) and tags != "none" else tags
        if tags in (False, "none") or not isinstance(found, str | list):
            return found
        if isinstance(found, list):
            return [self._without_reasoning(part) for part in found]
        return without_reasoning(found, REASONING if tags is None else tags)

    def _credit(self, metrics: Mapping[str, Any]) -> float:
        names = [*(n for n in self._aggregations if n in metrics), *metrics]
        for value in (metrics[name] for name in names):
            entries = [value[k] for k in _CREDITS if k in value] if isinstance(value, Mapping) else [value]
            for entry in entries:
                number = _plain(entry) if hasattr(entry, "item") else entry
                if isinstance(number, int | float) and 0 <= number <= 1:
                    return float(number)
        raise ValueError(f"{self.title} gives no credit from 0 to 1 per question, only {', '.join(metrics) or 'nothing'}")

    @cached_property
    def _aggregations(self) -> dict[str, Any]:
        """Metric -> the task's function from all values to one figure; where it names none, lmms-eval's own for the metric.

        Raises:
            ValueError: there is none.
        """
        found = {}
        for metric in self._config.get("metric_list") or ():
            name, chosen = str(metric["metric"]), metric.get("aggregation")
            if chosen is None:
                chosen = lmms_eval.get_metric_aggregation(name)
            found[name] = lmms_eval.get_aggregation(chosen) if isinstance(chosen, str) else chosen
            if found[name] is None:
                wanted = metric.get("aggregation") or "of its own"
                raise ValueError(f"{self.title}: lmms-eval has no aggregation {wanted} for {name}")
        return found

    def aggregate(self, rows: Sequence[Graded]) -> dict[str, float]:
        """The task's figures as `lmms_<metric>`, in its own units and order, then `accuracy` (mean credit x 100)."""
        if not rows:
            raise ValueError("no graded rows to aggregate: the evaluation stored none for this cell")
        metrics = [json.loads(row.parsed) for row in rows]
        figures: dict[str, float] = {}
        for name, function in self._aggregations.items():
            values = [found[name] for found in metrics if name in found]
            if values:
                figures |= _numbers(f"lmms_{name}", _aggregated(function, values))
        return figures | {"accuracy": 100 * sum(row.credit for row in rows) / len(rows)}


def _aggregated(function: Any, values: list[Any]) -> Any:
    """Some aggregations also write a file for a server: it goes to a folder that is thrown away."""
    if "args" not in inspect.signature(function).parameters:
        return function(values)
    with TemporaryDirectory() as folder:
        return function(values, args=Namespace(output_path=folder, log_samples_suffix=""))


def _numbers(name: str, figure: Any) -> dict[str, float]:
    """A figure that is a number under its name, of a mapping its numbers; anything else is no figure."""
    if isinstance(figure, Mapping):
        return {k: v for part, value in figure.items() for k, v in _numbers(f"{name}/{part}", value).items()}
    number = _plain(figure) if hasattr(figure, "item") else figure
    return {name: float(number)} if isinstance(number, int | float) else {}


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy or torch as Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} is neither text nor number")


def _inner(error: BaseException) -> BaseException:
    """The error itself, not that of the library which tried it several times."""
    return getattr(getattr(error, "last_attempt", None), "exception", lambda: None)() or error
