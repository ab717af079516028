"""The catalogue of methods: one row for every pruner there is, from what its file says of itself and what a run found of it."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

from diffprune.core import registry
from diffprune.core.budget import Share
from diffprune.core.pruner import Kind, Pruner
from diffprune.core.site import ENCODED, PROJECTED, for_images
from diffprune.core.vlm import Shape
from diffprune.report.analysis import labels, records, speed
from diffprune.report.analysis.comparison import FULL, Budget, Comparison, chapters
from diffprune.report.analysis.labels import Method
from diffprune.report.render.table import Entry, Number, Table, markdown
from diffprune.report.tables.accuracy import other_count

LLAVA = Shape(  # LLaVA-1.5-7B, in which a method says where it cuts
    layers=32, width=4096, heads=32, kv_heads=32, head_dim=128, ffn=11008, vocabulary=32064, vision_layers=24, vision_width=1024,
    vision_ffn=4096, patches=577, patch_inputs=588, visual_tokens=576,
)  # fmt: skip
START, END = "<!-- methods: made by `diffprune list pruners --readme README.md` -->", "<!-- end of methods -->"
RECORD = Path("reports", "zoo", "store")  # of the run whose figures stand in the README
PLACES = {ENCODED: "before the projector", PROJECTED: "after the projector"}


@dataclass(frozen=True)
class Measured:
    """What a run found of methods with their default options, by plug-in.

    labels: how its tables call them; of a wrapper the first around some method. budgets: most tokens first. relative: percent of
    the unpruned accuracy by plug-in and budget. overhead: percent of the unpruned prefill at the budget `at`. kept: of those that
    keep other counts than a budget asks, how many.
    """

    labels: dict[str, str]
    budgets: tuple[Budget, ...]
    relative: dict[tuple[str, str], float]
    overhead: dict[str, float]
    at: str
    kept: dict[tuple[str, str], float]

    @staticmethod
    def of(chapter: Comparison) -> Measured | None:
        """None where there is no unpruned model to divide by, or nothing beside it at a count or a share."""
        plain = [method for method in chapter.methods.values() if method.label == method.base and method.kind != "diagnostic"]
        labels = {method.plugin: method.label for method in reversed(plain)}
        if (FULL, "") not in chapter.arms or not labels or not chapter.budgets:
            return None
        relative = {
            (name, budget.spelling): chapter.relative(label, budget.spelling)
            for name, label in labels.items() for budget in chapter.budgets if (label, budget.spelling) in chapter.arms
        }  # fmt: skip
        timed = speed.of(chapter)[1]
        where = Counter(budget for label, budget in timed if label in labels.values())
        at = max((b.spelling for b in reversed(chapter.budgets)), key=lambda b: where[b])  # of equals the one with fewest tokens
        overhead = {name: _overhead(timed[label, at]) for name, label in labels.items() if (label, at) in timed}
        kept = {(name, at): chapter.kept_by(labels[name], at) for name, at in relative if chapter.off(labels[name], at)}
        return Measured(labels, chapter.budgets, relative, overhead, at if overhead else "", kept)

    @property
    def columns(self) -> tuple[str, ...]:
        """Headings."""
        return (*(["overhead, % of prefill"] if self.at else []), *(f"{_kept(budget.spelling)}, %" for budget in self.budgets))

    @property
    def keys(self) -> tuple[str, ...]:
        """What the columns are about, in words of the store."""
        return (*([f"overhead | {self.at}"] if self.at else []), *(budget.spelling for budget in self.budgets))

    def row(self, name: str) -> tuple[Entry, ...]:
        """The figures of a plug-in, dashes where there are none."""
        overhead = [Number(self.overhead.get(name, math.nan), digits=1)] if self.at else []
        return (*overhead, *(self._share(name, budget.spelling) for budget in self.budgets))

    def _share(self, name: str, budget: str) -> Number:
        """Percent of the unpruned accuracy; of a method that keeps another count, beside that count."""
        kept = self.kept.get((name, budget))
        note = other_count(kept) if kept is not None else ""
        return Number(self.relative.get((name, budget), math.nan), note=note)

    @property
    def note(self) -> str:
        """What the figures are."""
        wrapped = [f"{name}(…) is {label}" for name, label in self.labels.items() if " of " in label]
        costs = f"; overhead beside its prefill, at {self.at}" if self.at else ""
        said = "Percent of the unpruned accuracy, mean over benchmarks" + "; ".join([costs, *wrapped]) + "."
        if not self.kept:
            return said
        met = ", ".join(f"{_kept(budget.spelling)}: {budget.kept:.0f} of {budget.total:.0f}" for budget in self.budgets)
        return f"{said} In brackets: counts of methods that keep others than these ({met} tokens)."


def _kept(spelling: str) -> str:
    """A budget as a heading: `64 kept`, `1/3 kept`; adaptive methods keep about as many."""
    kind, number = labels.budget(spelling)
    part = Fraction(number).limit_denominator(100) if kind == "Share" else Fraction(round(number))
    return f"{part if abs(part - number) < 1e-5 else f'{number:.3g}'} kept"


def _overhead(one: speed.Speed) -> float:
    spans = one.spans
    if ("pruned", "overhead") not in spans or ("full", "prefill") not in spans:
        return math.nan
    return 100 * spans["pruned", "overhead"].median / spans["full", "prefill"].median


def catalogue(beside: Collection[str] = (), found: Measured | None = None) -> Table:
    """Method, idea, where it cuts at half of the tokens, what it reads beside the features, kind, paper. Wrappers come last.

    beside: methods of the working directory and of other distributions that are shown, too, where they can be had. found: of a run,
    in further columns.
    """
    rows = {}
    for name, source in registry.sources("pruners").items():
        if source.origin == "diffprune":
            rows[name] = _row(name, registry.find("pruners", name))
        elif name in beside:
            with suppress(ValueError):  # its file has gone or changed since
                rows[name] = _row(name, registry.find("pruners", name))
    rows = {name: row + (found.row(name) if found else ()) for name, row in rows.items()}
    ordered = sorted(rows, key=lambda name: "(" in str(rows[name][0]))
    columns = ("method", "idea", "cuts", "reads beside the features", "kind", "arXiv")
    notes = (
        "Where a method cuts, and what is left there, is that of LLaVA-1.5-7B at half of its 576 tokens, the average over layers.",
    )
    return Table(
        "methods", "Methods", columns + (found.columns if found else ()), tuple(rows[name] for name in ordered),
        notes=(*notes, *([found.note] if found else ())),
        keys=tuple(found.labels.get(name, name) for name in ordered) if found else (),
        column_keys=columns + found.keys if found else (), longest=400,
    )  # fmt: skip


def apart(methods: Iterable[Method]) -> Table | None:
    """How the training of each of these methods differs from the others', from what its file says; None where none is trained."""
    names = dict.fromkeys(method.plugin for method in methods if method.kind == Kind.TRAINED)
    found: list[Any] = [registry.find("pruners", name) for name in names if name in registry.names("pruners")]
    rows = [(plugin.label, " ".join(getattr(plugin, "apart", ())) or "As its recipe says.") for plugin in found]
    return Table(
        "apart", "How trainings differ", ("method", "its training"), tuple(rows),
        notes=("All see the same images, steps, seeds and drawn budgets of a recipe, or as many training images, but for this.",),
        longest=600,
    ) if rows else None  # fmt: skip


def _row(name: str, plugin: Any) -> tuple[Entry, ...]:
    inner = [key for key, value in inspect.signature(plugin).parameters.items() if re.search(r"\bPruner\b", str(value.annotation))]
    if inner:
        return f"{name}(…)", idea(plugin), "where the method inside does", "what the method inside reads", *_end(plugin)
    if any(value.default is value.empty for value in registry.signature(plugin).parameters.values()):
        return f"{name}(…)", idea(plugin), "as its options say", "as its options say", *_end(plugin)
    made: Pruner = registry.load("pruners", name)
    return name, idea(plugin), _where(made), "; ".join(sorted(map(str, made.needs))) or "nothing", *_end(plugin)


def _end(plugin: Any) -> tuple[Entry, ...]:
    return str(plugin.kind), plugin.reference.arxiv


def _where(pruner: Pruner) -> str:
    """Where a method cuts, and of cuts inside the decoder, what is there before, between and behind them."""
    cuts = for_images(pruner.cuts(Share(0.5), LLAVA), [LLAVA.visual_tokens])
    places, inside = [PLACES[cut.site] for cut in cuts if cut.site in PLACES], [cut for cut in cuts if cut.site not in PLACES]
    if inside:
        left = list(accumulate((cut.budget for cut in cuts), lambda seen, budget: budget.count(seen), initial=LLAVA.visual_tokens))
        layers = ", ".join(str(cut.site.layer) for cut in inside)
        places += [f"after decoder layer{'s' * (len(inside) > 1)} {layers}: {' → '.join(map(str, left[len(places) :]))} tokens"]
    return "; ".join(places) or "nowhere"


def idea(plugin: Any) -> str:
    """The first sentence of a plug-in's file, without the paper it names, or of its class."""
    text = inspect.getdoc(sys.modules[plugin.__module__]) or inspect.getdoc(plugin) or ""
    told = re.sub(r"\s*\([^()]*arXiv[^()]*\)", "", " ".join(text.partition("\n\n")[0].split()))
    return re.split(r"\.(?:\s|$)", told)[0]


def recorded(store: Path) -> Measured | None:
    """What the first chapter of a store says; None where there is no store."""
    first = next(chapters(records.read(store)), None) if store.is_dir() else None
    return Measured.of(first) if first else None


def written(page: str, found: Measured | None = None) -> str:
    """A page with the package's catalogue between its two marks. found: as in `catalogue`.

    Raises:
        ValueError: the page has not both marks, once and in order.
    """
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"the page has no place for the methods: write {START} and {END} where they belong")
    table = markdown(catalogue(found=found)).partition("\n\n")[2]
    return f"{before}{START}\n{table}\n{END}{after}"


def write(path: Path) -> None:
    """Write the package's catalogue into the file at `path`, between its marks; see `written`. Figures are those of the zoo's
    store beside it (`RECORD`), if there is one."""
    path.write_text(written(path.read_text(encoding="utf-8"), recorded(path.parent / RECORD)), encoding="utf-8")
