"""The catalogue of methods: one row for every pruner there is, from what its file says of itself."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffprune.core import registry
from diffprune.core.budget import Share
from diffprune.core.pruner import Kind, Pruner
from diffprune.core.site import ENCODED, PROJECTED
from diffprune.core.vlm import Shape
from diffprune.report.analysis.labels import Method
from diffprune.report.render.table import Entry, Table, markdown

LLAVA = Shape(  # LLaVA-1.5-7B, in which a method says where it cuts
    layers=32, width=4096, heads=32, kv_heads=32, head_dim=128, ffn=11008, vocabulary=32064, vision_layers=24, vision_width=1024,
    vision_ffn=4096, patches=577, patch_inputs=588, visual_tokens=576,
)  # fmt: skip
START, END = "<!-- methods: made by `diffprune list pruners --readme README.md` -->", "<!-- end of methods -->"
PLACES = {ENCODED: "before the projector", PROJECTED: "after the projector"}


def catalogue(package_only: bool = False) -> Table:
    """Method, idea, where it cuts at half of the tokens, what it reads beside the features, kind, paper. Wrappers come last.

    package_only: without those of the working directory and of other distributions.
    """
    rows = [
        _row(name, registry.find("pruners", name))
        for name, source in registry.sources("pruners").items()
        if source.origin == "diffprune" or not package_only
    ]
    return Table(
        "methods", "Methods", ("method", "idea", "cuts", "reads beside the features", "kind", "arXiv"),
        tuple(sorted(rows, key=lambda row: "(" in str(row[0]))),
        notes=("Where a method cuts is that of LLaVA-1.5-7B at half of the tokens, averaged over decoder layers.",),
    )  # fmt: skip


def apart(methods: Iterable[Method]) -> Table | None:
    """How the training of each of these methods differs from the others', from what its file says; None where none is trained."""
    names = dict.fromkeys(method.plugin for method in methods if method.kind == Kind.TRAINED)
    found: list[Any] = [registry.find("pruners", name) for name in names if name in registry.names("pruners")]
    rows = [(plugin.label, " ".join(getattr(plugin, "apart", ())) or "As its recipe says.") for plugin in found]
    return Table(
        "apart", "How trainings differ", ("method", "its training"), tuple(rows),
        notes=("All see the same images, steps, seeds and drawn budgets of a recipe, or as many training images, but for this.",),
    ) if rows else None  # fmt: skip


def _row(name: str, plugin: Any) -> tuple[Entry, ...]:
    inner = [key for key, value in inspect.signature(plugin).parameters.items() if re.search(r"\bPruner\b", str(value.annotation))]
    if inner:
        return f"{name}(…)", idea(plugin), "where the method inside does", "what the method inside reads", *_end(plugin)
    made: Pruner = registry.load("pruners", name)
    return name, idea(plugin), _where(made), "; ".join(sorted(map(str, made.needs))) or "nothing", *_end(plugin)


def _end(plugin: Any) -> tuple[Entry, ...]:
    return str(plugin.kind), plugin.reference.arxiv


def _where(pruner: Pruner) -> str:
    sites = [cut.site for cut in pruner.cuts(Share(0.5), LLAVA)]
    places = [PLACES[site] for site in sites if site in PLACES]
    layers = ", ".join(str(site.layer) for site in sites if site not in PLACES)
    return "; ".join([*places, *([f"after decoder layer{'s' * (len(sites) > 1)} {layers}"] if layers else [])]) or "nowhere"


def idea(plugin: Any) -> str:
    """The first sentence of a plug-in's file, without the paper it names, or of its class."""
    text = inspect.getdoc(sys.modules[plugin.__module__]) or inspect.getdoc(plugin) or ""
    told = re.sub(r"\s*\([^()]*arXiv[^()]*\)", "", " ".join(text.partition("\n\n")[0].split()))
    return re.split(r"\.(?:\s|$)", told)[0]


def written(page: str) -> str:
    """A page with the package's catalogue between its two marks.

    Raises:
        ValueError: the page has not both marks, once and in order.
    """
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"the page has no place for the methods: write {START} and {END} where they belong")
    table = markdown(catalogue(package_only=True)).partition("\n\n")[2]
    return f"{before}{START}\n{table}\n{END}{after}"


def write(path: Path) -> None:
    """Write the package's catalogue into the file at `path`, between its marks; see `written`."""
    path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
