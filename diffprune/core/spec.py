"""Specs: a plug-in asked for as a frozen value of name, options and weights hash, and the parser of its spelling.

The constructor call is the spelling: `fastv(after=2)` means the same on the command line, in a job and in a table. Nothing is
evaluated: values are literals, quotients (`1/9`), bare names, or calls, which are plug-ins inside a wrapper.
"""

from __future__ import annotations

import ast
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

LONGEST = 10_000  # characters of a spelling


@dataclass(frozen=True)
class Spec:
    """One plug-in with its options, equal wherever it is asked for.

    options: (name, value) pairs in the order of their names, defaults left out; a value is plain, a tuple, or a Spec.
    weights_sha256: of what was learnt, 20 digits; "" for rules and for what is not loaded yet.
    source:  digest of the code behind the name (`core.source`), 12 digits; "" for what is not made yet.
    places:  (option, path) pairs that say where files lie on this machine. They travel along, but are no part of what is asked:
             neither compared, nor hashed, nor spelled.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    weights_sha256: str = ""
    source: str = ""
    places: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)

    def __str__(self) -> str:
        written = ", ".join(f"{key}={value if isinstance(value, Spec) else repr(value)}" for key, value in self.options)
        return f"{self.name}({written})" if written else self.name

    @property
    def identity(self) -> dict[str, Any]:
        """What keys are made of: JSON values."""
        options = {key: value.identity if isinstance(value, Spec) else value for key, value in self.options}
        return {"name": self.name, "options": options, "weights_sha256": self.weights_sha256, "source": self.source}

    def get(self, option: str, default: Any = None) -> Any:
        """The value of an option, or `default` where it was not given."""
        return dict(self.options).get(option, default)

    def place(self, option: str) -> Path | None:
        """Where the files of an option lie."""
        found = dict(self.places).get(option)
        return None if found is None else Path(found)

    @property
    def all_places(self) -> tuple[tuple[str, str], ...]:
        """Its places, then those of what it wraps."""
        inner = (place for _, value in self.options if isinstance(value, Spec) for place in value.all_places)
        return (*self.places, *inner)

    def with_options(self, **options: Any) -> Spec:
        """The same plug-in with more options."""
        return replace(self, options=tuple(sorted((dict(self.options) | options).items())))

    def at(self, **places: Path | str) -> Spec:
        """The same plug-in with its files elsewhere."""
        return replace(self, places=tuple(sorted((dict(self.places) | {k: str(v) for k, v in places.items()}).items())))

    def wraps(self, inner: Spec) -> bool:
        """Whether `inner` is what it wraps, or lies in that."""
        return any(value == inner or value.wraps(inner) for _, value in self.options if isinstance(value, Spec))

    def around(self, inner: Spec, other: Spec) -> Spec:
        """The same plug-in wrapped around `other` where it wraps `inner`, as deep as that lies."""
        held = {key: value for key, value in self.options if isinstance(value, Spec)}
        return self.with_options(**{k: other if v == inner else v.around(inner, other) for k, v in held.items()})

    def without_places(self) -> Spec:
        """The same plug-in, not saying where anything lies, nor of what it wraps."""
        inner = {key: value.without_places() for key, value in self.options if isinstance(value, Spec)}
        return replace(self.with_options(**inner), places=())


class Name(str):
    """A bare name, as in `replaced(attention)`: text that was written without quotes."""

    __slots__ = ()


@dataclass(frozen=True)
class Call:
    """A call as it was written: `name(1, key='x')`. Not bound to any plug-in yet."""

    name: str
    args: tuple[Any, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()


def parse(text: str) -> Call:
    """`name(1, key='x')` as a value; nested calls are `Call`s, bare names are `Name`s, which are text.

    Raises:
        ValueError: not of that form, or a value that is no literal.
    """
    if len(text) > LONGEST:
        raise ValueError(f"{text[:60]!r}... has {len(text):,} characters; nothing is asked for in more than {LONGEST:,}")
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        node = None
    try:
        if isinstance(node, ast.Call):
            return _call(node, text)
    except RecursionError:
        node = None
    if not isinstance(node, ast.Name):
        raise ValueError(f"{text!r:.200} is not of the form name or name(option=value)")
    return Call(node.id)


def _call(node: ast.Call, text: str) -> Call:
    if not isinstance(node.func, ast.Name) or any(k.arg is None for k in node.keywords):
        raise ValueError(f"{text!r:.200} is not of the form name or name(option=value)")
    named = [(k.arg, _value(k.value, text)) for k in node.keywords if k.arg]
    for key, _ in named:
        if [k for k, _ in named].count(key) > 1:
            raise ValueError(f"{text!r:.200} gives {key!r} more than once")
    return Call(node.func.id, tuple(_value(a, text) for a in node.args), tuple(named))


def _value(node: ast.expr, text: str) -> Any:
    """A literal, a quotient of numbers (`1/9`), a bare name, or a nested call."""
    if isinstance(node, ast.Call):
        return _call(node, text)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        try:
            return _value(node.left, text) / _value(node.right, text)
        except (TypeError, ZeroDivisionError):
            raise ValueError(f"{text!r:.200}: {ast.unparse(node)!r} is no quotient of two numbers, as in 1/9") from None
    if isinstance(node, ast.Name):
        return Name(node.id)
    try:
        value = ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{text!r:.200}: {ast.unparse(node)!r} is not a plain value") from None
    return tuple(value) if isinstance(value, list) else value


def located(place: str) -> str:
    """A path as it travels: absolute, `~` expanded, if it is one; a name of the Hub (`owner/name`) or of a data set as it is.

    Raises:
        ValueError: a NUL or half a character in it, which no file system takes.
    """
    if "\0" in place or any("\ud800" <= mark <= "\udfff" for mark in place):
        raise ValueError(f"{place!a:.100} is no path: it must be text of whole characters, without NUL")
    if "://" in place:  # an address of a bucket
        return place
    path = os.path.expanduser(place)
    looks = place.startswith((".", "/", "~")) or place.count("/") > 1
    return str(Path(path).absolute()) if looks or os.path.exists(path) else place
