"""Whether what a job asks can be asked: pictures a user brought are opened, a user's grader is tried, before the job starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from PIL import Image

from diffprune.core import registry
from diffprune.core.benchmark import Benchmark, Grade, Graded, Sample, named_figures, users_own
from diffprune.core.cell import Cell, Questions, TuneSpec
from diffprune.core.errors import with_class

LOOKED = 300  # pictures of a data set that are opened: a few seconds


def asked(cells: Iterable[Cell]) -> list[Questions]:
    """All questions of these cells, each once; of a tuning those of which it takes calibration and held-out pictures."""
    found: dict[Questions, None] = {}
    for cell in cells:
        for questions in cell.questions:
            settings = cell.subject.settings if isinstance(cell.subject, TuneSpec) else None
            limit = settings.calibration + settings.held_out if settings else questions.limit
            found[replace(questions, limit=limit)] = None
    return list(found)


def check(every: Sequence[Questions]) -> None:
    """Open pictures of data that are given by a path, grade the first question's own answer by a user's grader, and ask a user's
    benchmark for the figure of that grade.

    Of each data set LOOKED pictures at most, evenly spread: all of small ones. Damaged ones of large data are told as errors of
    their questions.

    Raises:
        ValueError: a picture is missing or damaged, or the grader fails; the row, or the grader, is named.
    """
    shown: dict[tuple[str, str], dict[str, tuple[Benchmark, Sample, int]]] = {}  # by (revision, split): name of a picture
    for questions in every:
        benchmark: Benchmark = registry.make("benchmarks", questions.benchmark)
        grader, own = benchmark.foreign_grader(questions.benchmark), bool(questions.benchmark.places) or users_own(benchmark)
        if not (own or grader):
            continue
        samples = benchmark.samples(questions.split, questions.limit, questions.protocol)
        if grader or users_own(benchmark):
            _grade(benchmark, samples[0], questions.protocol)
        for sample in samples if own else ():
            for number, name in enumerate(sample.image_ids):
                shown.setdefault((questions.revision, questions.split), {}).setdefault(name, (benchmark, sample, number))
    for pictures in shown.values():
        some = list(pictures.values())
        for benchmark, sample, number in some if len(some) <= LOOKED else [some[i * len(some) // LOOKED] for i in range(LOOKED)]:
            _open(benchmark, sample, number)


def _open(benchmark: Benchmark, sample: Sample, number: int) -> None:
    try:
        found = benchmark.nth_image(sample, number)
    except Exception as error:
        if isinstance(error, ValueError) or not users_own(benchmark):
            raise
        raise ValueError(f"{benchmark.spec}: the picture of sample {sample.id!r} cannot be opened ({with_class(error)})") from error
    if not isinstance(found, Image.Image):
        raise ValueError(
            f"{benchmark.spec}: the picture of sample {sample.id!r} is a {type(found).__name__}, but must be a PIL image"
        )


def _grade(benchmark: Benchmark, sample: Sample, protocol: str) -> None:
    answer = next(iter(sample.row.get("answers", ())), "")
    try:
        grade = benchmark.grade(sample, answer, protocol)
        if not isinstance(grade, Grade):
            raise ValueError(f"it gives {grade!r:.60}, but must give a Grade")
    except Exception as error:  # whatever a user's function raises is the reason
        raise ValueError(
            f"the grader of {benchmark.spec} fails on the answer {answer!r:.60} to question {sample.id}: {_reason(error)}"
        ) from None
    try:
        named_figures(benchmark.aggregate([Graded(sample.group, sample.category, grade.credit, grade.parsed, grade.target)]))
    except ValueError:  # one row may be no whole group, which has no figure
        return
    except Exception as error:
        raise ValueError(f"{benchmark.spec} has no figure of one graded question: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """What an error says; its class, too, where it is no sentence of ours or of the data."""
    return " ".join((str(error) if isinstance(error, ValueError) else with_class(error)).split())
