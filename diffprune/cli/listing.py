"""What there is to ask for: plug-ins and jobs in one line each, and the options of one of them with their meaning."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from diffprune.core import registry
from diffprune.core.spec import parse
from diffprune.job.files import find_job, folders, load_job
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


def _jobs() -> Iterator[Line]:
    found: dict[str, str] = {}
    for folder in folders():
        for file in sorted(folder.glob("*.py")) if folder.is_dir() else []:
            found.setdefault(file.stem, str(file))
    for name, place in sorted(found.items()):
        try:
            job = load_job(place)
        except ValueError as error:
            yield Line(name, f"cannot be used: {error}", "", place)
            continue
        verbs = [verb for verb in (*SECTIONS, "report") if getattr(job, verb)]
        yield Line(name, f"{job.title or job.name} ({', '.join(verbs)})", "", place)


def shown(text: str) -> list[tuple[str, str, list[Option]]]:
    """(heading, description, options) of everything called `text`: plug-ins, a section of a job's settings, or a job.

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
    if not found:
        known = [n for kind in registry.KINDS for n in registry.names(kind)]
        jobs = [file.stem for folder in folders() if folder.is_dir() for file in folder.glob("*.py")]
        if name not in jobs:
            raise ValueError(f"nothing is called {name!r}: {registry.nearest(name, [*known, *SECTIONS, 'job', *jobs])}")
        found = [(f"job {name}, {find_job(name)}", load_job(name).title, [])]
    return found


def _options(plugin: type) -> Iterator[Option]:
    """The constructor's parameters, explained by the docstrings of the class and of what it inherits from."""
    meanings: dict[str, str] = {}
    for parent in reversed(plugin.__mro__):
        meanings |= _meanings(parent.__doc__ or "")
    for name, parameter in inspect.signature(plugin).parameters.items():
        if name not in LOADER and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            default = "" if parameter.default in (parameter.empty, None) else repr(parameter.default)
            yield Option(name, default, meanings.get(name, ""))


def _fields(section: Any) -> list[Option]:
    meanings = _meanings(section.__doc__ or "")
    found = []
    for name, field in section.model_fields.items():
        default = field.get_default(call_default_factory=True) if not field.is_required() else ""
        written = ", ".join(map(str, default)) if isinstance(default, tuple) else "" if field.is_required() else str(default)
        found.append(Option(name, written, meanings.get(name, "")))
    return found


def _meanings(text: str) -> dict[str, str]:
    """`name: meaning` and `one, two: meaning` of a docstring; several may stand in one line, a meaning may go on in the next."""
    flat = " ".join(line.strip() for line in inspect.cleandoc(text).partition("Raises:")[0].splitlines())
    found: dict[str, str] = {}
    pieces = re.split(r"(?:(?<=^)|(?<=\. )|(?<=; )|(?<=\s))((?:[a-z_]+, )*[a-z_]+):\s+", flat)
    for names, meaning in zip(pieces[1::2], pieces[2::2], strict=True):
        for name in names.split(", "):
            found.setdefault(name, meaning.strip().rstrip(";"))
    return found


def _first(plugin: type) -> str:
    """The first sentence of a docstring."""
    return inspect.cleandoc(plugin.__doc__ or "").split("\n\n")[0].replace("\n", " ")
