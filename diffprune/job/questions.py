"""Whether what a job asks can be asked: pictures a user brought are opened, a user's grader is tried, before the job starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from PIL import Image

from diffprune.core import registry
from diffprune.core.benchmark import Benchmark, Sample, users_own
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
    """Open pictures of data that are given by a path, and grade the first question's own answer by a user's grader.

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
        if grader:
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
        benchmark.grade(sample, answer, protocol)
    except Exception as error:  # whatever a user's function raises is the reason
        said = " ".join((str(error) if isinstance(error, ValueError) else with_class(error)).split())
        raise ValueError(
            f"the grader of {benchmark.spec} fails on the answer {answer!r:.60} to question {sample.id}: {said}"
        ) from None
