"""From graded rows to a benchmark's figures: means, mean of F1, MME points, circular groups.

Every function returns the benchmark's main figure first and always `accuracy`, the mean credit of the rows x 100, so that means
over benchmarks have one unit. A figure of one category is named `figure/category`. Figures are percent, MME ones are points.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from diffprune.core.benchmark import Formula, Graded

MME_PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

# Figures that are no mean credit, as sums: beside `pope`, `mme` and `circular` below.
POPE: Mapping[str, Formula] = {"f1_mean": Formula("f1_mean")}
MME: Mapping[str, Formula] = {
    "mme_perception": Formula("paired_sum", MME_PERCEPTION),
    "mme_cognition": Formula("paired_sum", MME_COGNITION),
    "mme_total": Formula("paired_sum"),
}
CIRCULAR: Mapping[str, Formula] = {"circular_accuracy": Formula("circular")}


def _some(rows: Sequence[Graded]) -> Sequence[Graded]:
    if not rows:
        raise ValueError("no graded rows to aggregate: the evaluation stored none for this cell")
    return rows


def _percent(credits: Iterable[float]) -> float:
    values = list(credits)
    return 100 * sum(values) / len(values)


def _accuracy(rows: Iterable[Graded]) -> float:
    return _percent(row.credit for row in rows)


def by_category(rows: Iterable[Graded]) -> dict[str, list[Graded]]:
    """Rows per category, names sorted."""
    return {name: part for (name,), part in sorted(_groups(rows, lambda row: (row.category,)).items())}


def mean(rows: Sequence[Graded]) -> dict[str, float]:
    """Mean credit: `accuracy`, and per category where there is more than one (GQA, ScienceQA, SEED)."""
    parts = by_category(_some(rows))
    each = {f"accuracy/{name}": _accuracy(part) for name, part in parts.items()} if len(parts) > 1 else {}
    return {"accuracy": _accuracy(rows)} | each


def soft_mean(rows: Sequence[Graded]) -> dict[str, float]:
    """Mean soft accuracy of ten annotators: `soft_accuracy`, and per category (VQAv2, TextVQA, VizWiz)."""
    figures = mean(rows)
    return {"soft_accuracy": figures["accuracy"]} | figures


def _confusion(rows: Iterable[Graded]) -> dict[str, float]:
    """Positive = yes. lmms-eval's `neither` yes nor no is no false negative, only wrong in accuracy; VLMEvalKit's `unknown` is one.
    0 where undefined."""
    true = sum(r.target == r.parsed == "yes" for r in rows)
    false = sum(r.target == "no" and r.parsed == "yes" for r in rows)
    missed = sum(r.target == "yes" and r.parsed in ("no", "unknown") for r in rows)
    precision = 100 * true / (true + false) if true + false else 0.0
    recall = 100 * true / (true + missed) if true + missed else 0.0
    f1 = 200 * true / (2 * true + false + missed) if true else 0.0
    return {"f1": f1, "precision": precision, "recall": recall}


def pope(rows: Sequence[Graded]) -> dict[str, float]:
    """`f1_mean`, the mean of the categories' F1; pooled accuracy, F1, precision, recall, yes-ratio (of the predictions) and
    the share that was read as neither yes nor no; F1 and accuracy per category."""
    parts = by_category(_some(rows))
    each = {name: _confusion(part) for name, part in parts.items()}
    return (
        {"f1_mean": sum(c["f1"] for c in each.values()) / len(each), "accuracy": _accuracy(rows)}
        | _confusion(rows)
        | {"yes_ratio": _percent(r.parsed == "yes" for r in rows)}
        | {"unparsed": _percent(r.parsed not in ("yes", "no") for r in rows)}
        | {f"f1/{name}": c["f1"] for name, c in each.items()}
        | {f"accuracy/{name}": _accuracy(part) for name, part in parts.items()}
    )


def _groups(rows: Iterable[Graded], key: Callable[[Graded], tuple[str, ...]]) -> dict[tuple[str, ...], list[Graded]]:
    found: dict[tuple[str, ...], list[Graded]] = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    return dict(found)


def mme(rows: Sequence[Graded]) -> dict[str, float]:
    """`mme_perception` (sum over its categories, at most 2000 points), accuracy, `mme_cognition`, `mme_total`, and per category
    its score (acc + acc+, at most 200), acc (rows) and acc+ (pictures with both rows right).

    Only the categories that occur are summed, so a sum over fewer than all of them is no published figure.

    Raises:
        ValueError: a picture without exactly two rows, or a category MME does not have; both are named.
    """
    pairs = _groups(_some(rows), lambda r: (r.category, r.group))
    for (category, group), pair in pairs.items():
        if category not in MME_PERCEPTION + MME_COGNITION:
            raise ValueError(f"MME has no category {category!r}; it has {', '.join(MME_PERCEPTION + MME_COGNITION)}")
        if len(pair) != 2:
            raise ValueError(f"MME picture {group!r} of {category!r} has {len(pair)} graded rows where a pair belongs")
    acc = {name: _accuracy(part) for name, part in by_category(rows).items()}
    plus = {
        name: _percent(all(r.credit == 1 for r in pair) for (category, _), pair in pairs.items() if category == name)
        for name in acc
    }
    perception = sum(acc[name] + plus[name] for name in MME_PERCEPTION if name in acc)
    cognition = sum(acc[name] + plus[name] for name in MME_COGNITION if name in acc)
    figures = {"mme_perception": perception, "accuracy": _accuracy(rows), "mme_cognition": cognition}
    figures["mme_total"] = perception + cognition
    for name in acc:
        figures |= {f"mme/{name}": acc[name] + plus[name], f"acc/{name}": acc[name], f"acc_plus/{name}": plus[name]}
    return figures


def circular(rows: Sequence[Graded], sizes: Mapping[str, int] | int | None = None) -> dict[str, float]:
    """`circular_accuracy`: share of groups whose rotations are all right, overall and per category; and accuracy per row.

    sizes: rows each group should have (one number for all, or per group), where that is known; the number of options does not
    tell it (53 four-option questions of MMBench have three rows). A lost rotation would make the score higher without a trace.

    Raises:
        ValueError: a group with more or fewer rows than `sizes` says, or a group of `sizes` with none; it is named.
    """
    groups = {key[0]: part for key, part in _groups(_some(rows), lambda r: (r.group,)).items()}
    if sizes is not None:
        wanted = dict.fromkeys(groups, sizes) if isinstance(sizes, int) else dict(sizes)
        for name in sorted(wanted.keys() | groups.keys()):
            have, want = len(groups.get(name, ())), wanted.get(name, 0)
            if have != want:
                raise ValueError(f"group {name!r} has {have} graded rotations where {want} belong")
    right = {name: all(r.credit == 1 for r in part) for name, part in groups.items()}
    categories = {name: part[0].category for name, part in groups.items()}
    figures = {"circular_accuracy": _percent(right.values()), "accuracy": _accuracy(rows)}
    for category in sorted(set(categories.values())):
        figures[f"circular_accuracy/{category}"] = _percent(right[name] for name in groups if categories[name] == category)
    return figures
