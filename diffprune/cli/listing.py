"""What there is to ask for: plug-ins and jobs in one line each, and the options of one of them with their meaning."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from diffprune.core import registry
from diffprune.core.spec import parse
from diffprune.data import catalog
from diffprune.data.catalog import SOURCES
from diffprune.io.job_files import find_job, known
from diffprune.io.qa_rows import QAColumns
from diffprune.job.files import load_job
from diffprune.job.job import SECTIONS, Job

KINDS = (*registry.KINDS, "jobs")
LOADER = {"model", "processor", "asked"}  # what a family is given by the loader, not by a user


class Line(NamedTuple):
    """One thing that can be asked for. about: what it says of itself; origin: the package, a file, or a distribution."""

    name: str
    about: str
    reference: str
    origin: str


class Option(NamedTuple):
    """One option: its default as it is written ("" where it must be given) and what it means."""

    name: str
    default: str
    meaning: str


def listed(kind: str) -> list[Line]:
    """Every plug-in of a kind, or every job.

    Raises:
        ValueError: no such kind; the nearest is named. A plug-in or a job that cannot be read is listed with the reason.
    """
    if kind not in KINDS:
        raise ValueError(f"there are no {kind!r} to list: {registry.nearest(kind, KINDS)}")
    return list(_jobs() if kind == "jobs" else _plugins(kind))


def _plugins(kind: str) -> Iterator[Line]:
    for name, source in registry.sources(kind).items():
        try:
            plugin: Any = registry.find(kind, name)
        except ValueError as error:
            yield Line(name, f"cannot be used: {error}", "", source.origin)
            continue
        label, reference = getattr(plugin, "label", ""), getattr(plugin, "reference", None)
        told = label if isinstance(label, str) and label else _first(plugin)
        about = f"{told}, {plugin.kind}" if kind == "pruners" else told
        yield Line(name, about, getattr(reference, "arxiv", ""), source.origin)
    for name, reason in registry.unusable(kind).items():
        yield Line(name, reason, "", str(registry.own_folder(kind)))


def _jobs() -> Iterator[Line]:
    for name, place in sorted((name, str(file)) for name, file in known().items()):
        try:
            job = load_job(place)
        except ValueError as error:
            yield Line(name, f"cannot be used: {error}", "", place)
            continue
        verbs = [verb for verb in (*SECTIONS, "report") if getattr(job, verb)]
        yield Line(name, f"{job.title or job.name} ({', '.join(verbs)})", "", place)


def shown(text: str) -> list[tuple[str, str, list[Option]]]:
    """(heading, description, options) of everything called `text`: plug-ins, training data, a section of settings, or a job.

    Raises:
        ValueError: there is nothing of that name; the nearest is named.
    """
    if text in (*SECTIONS, "job"):
        section, path = SECTIONS.get(text, Job), "" if text == "job" else f"{text}."
        return [(f"settings of {text}, as in --set {path}NAME=VALUE", _first(section), _fields(section))]
    name = parse(text).name if re.fullmatch(r"\w+\(.*\)", text, re.S) else text
    found = []
    for kind in registry.KINDS:
        if name in registry.sources(kind):
            plugin = registry.find(kind, name)
            if text != name and kind != "models":
                registry.make(kind, registry.spec(kind, text))
            found.append((f"{kind.rstrip('s')} {name}", _first(plugin), list(_options(plugin))))
    if name in SOURCES:
        about = f"{_first(SOURCES[name])} {_first(catalog, 1)}".strip()
        found.append((f"training data {name}", about, list(_options(SOURCES[name], QAColumns))))
    if not found:
        for kind in registry.KINDS:
            if name in (odd := registry.unusable(kind)):
                raise ValueError(odd[name])
        plugins = [n for kind in registry.KINDS for n in registry.names(kind)]
        if name not in known():
            raise ValueError(
                f"nothing is called {name!r}: {registry.nearest(name, {*plugins, *SOURCES, *SECTIONS, 'job', *known()})}"
            )
        found = [(f"job {name}, {find_job(name)}", load_job(name).title, [])]
    return found


def _options(plugin: Callable[..., Any], shared: type | None = None) -> Iterator[Option]:
    """Parameters of a constructor, explained by the docstrings of its class and of what that inherits from, or of a function.

    shared: a class whose docstring explains what the plug-in's own does not.
    """
    meanings: dict[str, str] = {}
    parameters = registry.signature(plugin).parameters
    for parent in (*filter(None, [shared]), *reversed(getattr(plugin, "__mro__", (plugin,)))):
        meanings |= _meanings(parent.__doc__ or "", parameters)
    for name, parameter in parameters.items():
        if name not in LOADER and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            default = "" if parameter.default in (parameter.empty, None) else repr(parameter.default)
            yield Option(name, default, meanings.get(name, ""))


def _fields(section: Any) -> list[Option]:
    meanings = _meanings(section.__doc__ or "", section.model_fields)
    found = []
    for name, field in section.model_fields.items():
        default = field.get_default(call_default_factory=True) if not field.is_required() else ""
        written = ", ".join(map(str, default)) if isinstance(default, tuple) else "" if field.is_required() else str(default)
        found.append(Option(name, written, meanings.get(name, "")))
        if hasattr(type(default), "model_fields"):  # settings within settings
            found += [Option(f"{name}.{own.name}", own.default, own.meaning) for own in _fields(type(default))]
    return found


def _meanings(text: str, names: Collection[str]) -> dict[str, str]:
    """`name: meaning` and `one, two: meaning` of a docstring; several may stand in one line, a meaning may go on in the next."""
    flat = " ".join(line.strip() for line in inspect.cleandoc(text).partition("Raises:")[0].splitlines())
    found: dict[str, str] = {}
    one = f"(?:{'|'.join(names)})"
    pieces = re.split(rf"(?:^|(?<=[\s;]))({one}(?:, {one})*):\s+", flat) if names else [flat]
    for told, meaning in zip(pieces[1::2], pieces[2::2], strict=True):
        for name in told.split(", "):
            found.setdefault(name, meaning.strip().rstrip(";"))
    return found


def _first(plugin: object, paragraph: int = 0) -> str:
    """The first paragraph of a docstring, or another one; "" where there is none."""
    return dict(enumerate(inspect.cleandoc(plugin.__doc__ or "").split("\n\n"))).get(paragraph, "").replace("\n", " ")
