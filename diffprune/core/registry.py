"""Plug-ins by name: the file is the registration. In the package, in the working directory, or in an installed distribution.

`diffprune/pruners/fastv.py` *is* `fastv`; so is `pruners/fastv.py` in the folder a run is started in, and the entry point
`fastv` of the group `diffprune.pruners`. Files that start with an underscore are shared parts, not plug-ins.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from diffprune.core import source
from diffprune.core.errors import with_class
from diffprune.core.spec import Call, Name, Spec, located, parse

KINDS = ("pruners", "models", "benchmarks")
CONTRACTS = {"pruners": "Pruner"}  # a parameter of this type takes another plug-in: a wrapper
BASES = {  # what a plug-in of a kind inherits from
    "pruners": "diffprune.core.pruner.Pruner",
    "models": "diffprune.core.vlm.VLM",
    "benchmarks": "diffprune.core.benchmark.Benchmark",
}
FOLDER = "DIFFPRUNE_PLUGINS"  # environment variable: the folder below which `pruners/`, `models/` and `benchmarks/` are looked for
RENAMED = {("pruners", "none"): "unpruned"}


class Source(NamedTuple):
    """Where a plug-in is from. file: of one in the working directory; module: of the others; origin: as users read it."""

    origin: str
    module: str
    file: Path | None = None


def nearest(wrong: str, right: Iterable[str]) -> str:
    """A clause naming the closest valid word, or all of them: `did you mean 'pope'?`"""
    options = sorted(set(right))
    close = difflib.get_close_matches(wrong, options, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(options)}"


def sources(kind: str) -> dict[str, Source]:
    """Every plug-in of a kind (`pruners`, `models`, `benchmarks`) and where it is from, by name.

    Raises:
        ValueError: two plug-ins have one name.
    """
    found = dict(_installed(kind))
    folder = own_folder(kind)
    if folder.is_dir() and folder.resolve() != _package(kind).resolve():
        for file in sorted(folder.glob("*.py")):
            if file.stem.startswith("_") or not file.stem.isidentifier():
                continue
            if file.stem in found:
                raise ValueError(f"{file}: {found[file.stem].origin} has {file.stem!r} already; give the file another name")
            found[file.stem] = Source(str(file), f"diffprune_{kind}_{file.stem}", file)
    return dict(sorted(found.items()))


def unusable(kind: str) -> dict[str, str]:
    """Files of a user's folder whose names no plug-in can have: {name: a sentence}."""
    files = [file for file in sorted(own_folder(kind).glob("*.py")) if not file.stem.startswith("_")]
    hint = "a plug-in's file is named by letters, digits and underscores, and begins with no digit"
    return {file.stem: f"{file} cannot be used: {hint}" for file in files if not file.stem.isidentifier()}


def own_folder(kind: str) -> Path:
    """Where a user's own plug-ins of a kind are looked for."""
    return Path(os.environ.get(FOLDER) or Path.cwd()) / kind


def _package(kind: str) -> Path:
    return Path(next(iter(importlib.import_module(f"diffprune.{kind}").__path__)))


@cache
def _installed(kind: str) -> tuple[tuple[str, Source], ...]:
    """Plug-ins of the package and of installed distributions."""
    names = [m.name for m in pkgutil.iter_modules([str(_package(kind))]) if not m.name.startswith("_")]
    found = {name: Source("diffprune", f"diffprune.{kind}.{name}") for name in names}
    for point in metadata.entry_points(group=f"diffprune.{kind}"):
        origin = point.dist.name if point.dist else point.value
        if point.name in found:
            raise ValueError(f"{origin} installs a plug-in {point.name!r}, which {found[point.name].origin} has already")
        found[point.name] = Source(origin, point.value.partition(":")[0])
    return tuple(found.items())


def names(kind: str) -> list[str]:
    """Names of every plug-in of a kind."""
    return list(sources(kind))


def find(kind: str, name: str) -> type:
    """The class a plug-in file defines: of the file's name, lower-cased without underscores.

    Raises:
        ValueError: no such plug-in (the nearest is named), a file that cannot be imported or lacks the class, or a class that does
            not inherit from its kind's base or lacks a method of it.
    """
    known = sources(kind)
    if name not in known:
        if (kind, name) in RENAMED:
            raise ValueError(f"{name!r} is called {RENAMED[kind, name]!r} now")
        if name in (odd := unusable(kind)):
            raise ValueError(odd[name])
        raise ValueError(f"no {kind.rstrip('s')} named {name!r:.200}: {nearest(name, known)}")
    module = _imported(known[name])
    wanted = name.replace("_", "")
    for label, value in vars(module).items():
        if inspect.isclass(value) and value.__module__ == module.__name__ and label.lower() == wanted:
            _check_class(kind, value, known[name])
            return value
    raise ValueError(f"{known[name].file or module.__name__}: defines no class named like the plug-in {name!r}")


def _check_class(kind: str, plugin: type, source: Source) -> None:
    """Raises ValueError: it does not inherit from what its kind does, leaves a method of that unwritten, or has options without
    names."""
    where, base = f"{source.file or source.module}: the class {plugin.__name__}", BASES[kind]
    if base not in {f"{parent.__module__}.{parent.__qualname__}" for parent in plugin.__mro__}:
        raise ValueError(f"{where} is no {kind.rstrip('s')}: let it inherit from {base}")
    if any(one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in inspect.signature(plugin).parameters.values()):
        raise ValueError(f"{where} takes *args or **kwargs, but its options must have names: tables and results are told by them")
    if lacking := sorted(getattr(plugin, "__abstractmethods__", ())):
        raise ValueError(f"{where} lacks {', '.join(lacking)}, which every {kind.rstrip('s')} of its kind defines")


def _imported(source: Source) -> ModuleType:
    if source.file is None:
        return importlib.import_module(source.module)
    known = sys.modules.get(source.module)
    if known is not None and known.__file__ == str(source.file):
        return known
    found = importlib.util.spec_from_file_location(source.module, source.file)
    assert found and found.loader
    module = sys.modules[source.module] = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[source.module]
        raise ValueError(f"{source.file} cannot be imported ({type(error).__name__}: {error})") from error
    return module


# --- from text to value, from value to plug-in ------------------------------------------------------------------------


def spec(kind: str, text: str | Call | Spec) -> Spec:
    """The plug-in spelled `text` as a value: options bound to their names, defaults left out, paths made absolute and set apart.

    Raises:
        ValueError: unknown plug-in or option (the nearest valid one is named), or a value where a plug-in belongs.
    """
    if isinstance(text, Spec):
        return text
    if not isinstance(text, str | Call):
        raise ValueError(f"a {kind.rstrip('s')} is named by a text (diffprune list {kind} has them), not by {f'{text!r}':.80}")
    call = parse(text) if isinstance(text, str) else text
    return bound(call, signature(find(kind, call.name)), lambda inner: spec(kind, inner), CONTRACTS.get(kind, ""))


def signature(plugin: Any) -> inspect.Signature:
    """What a plug-in can be given: parameters of its constructor, and the options that all of its kind take (`shared_options`)."""
    own = inspect.signature(plugin)
    shared = {
        name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=type(value).__name__)
        for name, value in getattr(plugin, "shared_options", {}).items()
    }
    return own.replace(parameters=list((dict(own.parameters) | shared).values()))


def bound(call: Call, signature: inspect.Signature, inner: Any = None, contract: str = "") -> Spec:
    """A call of a constructor as a value. inner: makes the Spec of a plug-in given to a parameter of the type `contract`.

    Parameters of type `Path` say where files lie (`Spec.places`).

    Raises:
        ValueError: arguments the constructor does not take; the nearest valid option is named.
    """
    options: dict[str, Any] = {}
    places: dict[str, str] = {}
    for key, _ in call.options:
        if key not in signature.parameters:
            known = list(signature.parameters)
            raise ValueError(f"{call.name} has no option {key!r:.200}: " + (nearest(key, known) if known else "it takes none"))
    try:
        given = signature.bind(*call.args, **dict(call.options)).arguments
    except TypeError as error:
        raise ValueError(f"{call.name}: {error}") from None
    for key, value in given.items():
        parameter = signature.parameters[key]
        kind = str(parameter.annotation)
        if contract and re.search(rf"\b{contract}\b", kind):
            options[key] = inner(value if isinstance(value, Call) else Call(_name(call, key, value)))
        elif isinstance(value, Call):
            raise ValueError(f"{call.name}: {key} takes a plain value, not {value.name}(...)")
        elif value == parameter.default and type(value) is type(parameter.default):
            continue
        elif re.search(r"\bPath\b", kind):
            places[key] = located(_text(call, key, value))
        else:
            options[key] = str(value) if isinstance(value, Name) else value
    return Spec(call.name, tuple(sorted(options.items())), places=tuple(sorted(places.items())))


def _name(call: Call, key: str, value: Any) -> str:
    """The bare name of a plug-in inside a wrapper."""
    if not isinstance(value, Name):
        raise ValueError(f"{call.name}: {key} is a plug-in, written without quotes as in {call.name}(attention), not {value!r}")
    return value


def _text(call: Call, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{call.name}: {key} is {value!r}, but must be a path in quotes")
    return value


def make(kind: str, asked: Spec) -> Any:
    """The plug-in a value asks for; its `spec` attribute is the value with the hash of the weights that were loaded and the digest
    of its code.

    Raises:
        ValueError: unknown plug-in, a value it refuses, one from outside the package whose constructor fails, or other weights or
            other code than the value names.
    """
    plugin, options = find(kind, asked.name), dict(asked.options)
    inner = {key: make(kind, value) for key, value in options.items() if isinstance(value, Spec)}
    shared = {key: options.pop(key) for key in getattr(plugin, "shared_options", {}) if key in options}
    try:
        made = plugin(**options | inner | {key: Path(place) for key, place in asked.places})
    except Exception as error:
        if not isinstance(error, ValueError):
            _check_types(plugin, asked)
        if plugin.__module__.startswith("diffprune."):  # a fault of ours keeps its traceback
            raise
        said = str(error) if isinstance(error, ValueError) else with_class(error)
        raise ValueError(f"{asked} cannot be made ({said})") from error
    for key, value in shared.items():
        setattr(made, key, value)
    _check_types(plugin, asked)
    weights: str = getattr(made, "weights_sha256", "")
    if asked.weights_sha256 and weights != asked.weights_sha256:
        raise ValueError(f"the weights of {asked} have changed: {asked.weights_sha256} were asked for, found {weights or 'none'}")
    here = code(kind, asked.name)
    if asked.source and here != asked.source:
        raise ValueError(f"the code of {asked} has changed: {asked.source} was asked for, found {here}")
    known: Mapping[str, Any] = {key: value.spec for key, value in inner.items()}
    object.__setattr__(made, "spec", replace(asked.with_options(**known), weights_sha256=weights, source=here))
    return made


PLAIN = {"int": (int, "a whole number"), "float": ((int, float), "a number"), "bool": (bool, "True or False"), "str": (str, "text")}


def _check_types(plugin: Any, asked: Spec) -> None:
    """Raises ValueError: an option is of another type than the constructor says. Most would be taken in silence: 'no' is true, and
    a seed of 1.5 draws what 1 does. Asked after the plug-in itself, which may say it better."""
    parameters = signature(plugin).parameters
    for key, value in asked.options:
        kind = parameters[key].annotation if key in parameters else None
        wanted, told = PLAIN.get(kind if isinstance(kind, str) else getattr(kind, "__name__", ""), (object, ""))
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted not in (bool, object)):  # type: ignore[arg-type]
            raise ValueError(f"{asked.name}: {key} is {value!r:.80}, but must be {told}")


def code(kind: str, name: str) -> str:
    """Digest of the code of a plug-in that shapes what a model is asked and answers: of a benchmark, not of its grading.

    Raises:
        ValueError: unknown plug-in, or its code cannot be read.
    """
    plugin = find(kind, name)
    return source.digest(plugin, getattr(plugin, "ASKING", None))


def sourced(kind: str, asked: Spec) -> Spec:
    """A value with the digests of the code behind it and behind what it wraps. Nothing is made.

    Raises:
        ValueError: as in `code`.
    """
    inner = {key: sourced(kind, value) for key, value in asked.options if isinstance(value, Spec)}
    return replace(asked.with_options(**inner), source=code(kind, asked.name))


def grader(benchmark: Spec) -> str:
    """Digest of the code by which a benchmark grades, a user's function included. Needs no data.

    Raises:
        ValueError: as in `code`, or the user's function cannot be imported.
    """
    plugin: Any = find("benchmarks", benchmark.name)
    own, foreign = source.digest(plugin, plugin.GRADING), plugin.foreign_grader(benchmark)
    return source.joined(own, source.of_function(foreign)) if foreign else own


def load(kind: str, text: str | Spec) -> Any:
    """The plug-in spelled `text`; see `spec` and `make`."""
    return make(kind, spec(kind, text))
