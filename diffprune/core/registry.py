"""Nouns are plug-ins: the file is the registration, the constructor call is the spelling.

`diffprune/pruners/fastv.py` *is* `fastv`; `fastv(after=2)` means the same on the command line, in a job, in a table and
in the store. Files that start with an underscore are shared parts, not plug-ins.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from typing import Any


def nearest(wrong: str, right: Iterable[str]) -> str:
    """A clause naming the closest valid word, or all of them: `did you mean 'pope'?`"""
    options = sorted(right)
    close = difflib.get_close_matches(wrong, options, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(options)}"


def names(kind: str) -> list[str]:
    """Every plug-in of a kind (`pruners`, `models`, `benchmarks`): the file names of that folder."""
    folder = importlib.import_module(f"diffprune.{kind}")
    return sorted(m.name for m in pkgutil.iter_modules(folder.__path__) if not m.name.startswith("_"))


def find(kind: str, name: str) -> type:
    """The class a plug-in file defines: its only public class whose name, lower-cased without underscores, is the file's.

    Raises:
        ValueError: no such plug-in; names the nearest one.
    """
    if name not in names(kind):
        raise ValueError(f"no {kind.rstrip('s')} named {name!r}: {nearest(name, names(kind))}")
    module = importlib.import_module(f"diffprune.{kind}.{name}")
    wanted = name.replace("_", "")
    for label, value in vars(module).items():
        if inspect.isclass(value) and value.__module__ == module.__name__ and label.rstrip("_").lower() == wanted:
            return value
    raise ValueError(f"diffprune/{kind}/{name}.py defines no class named like the file")


def _literal(node: ast.expr, text: str) -> Any:
    """A literal, a quotient of numbers (`1/9`), or a nested call, which stays text for the plug-in that takes it."""
    if isinstance(node, ast.Call):
        return ast.unparse(node)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        try:
            return _literal(node.left, text) / _literal(node.right, text)
        except (TypeError, ZeroDivisionError):
            raise ValueError(f"{text!r}: {ast.unparse(node)!r} is no quotient of two numbers, as in 1/9") from None
    if isinstance(node, ast.Name):
        return node.id
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{text!r}: {ast.unparse(node)!r} is not a plain value") from None


def parse_call(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """`name(1, key='x')` -> ('name', [1], {'key': 'x'}). Nothing is evaluated: values are literals.

    Raises:
        ValueError: not of that form.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise ValueError(f"{text!r} is not of the form name or name(option=value)") from None
    if isinstance(node, ast.Name):
        return node.id, [], {}
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)) or any(k.arg is None for k in node.keywords):
        raise ValueError(f"{text!r} is not of the form name or name(option=value)")
    return node.func.id, [_literal(a, text) for a in node.args], {k.arg: _literal(k.value, text) for k in node.keywords if k.arg}


def load(kind: str, text: str) -> Any:
    """The plug-in spelled `text`; its `spelling` attribute is the canonical form (defaults left out, keywords sorted).

    Raises:
        ValueError: unknown plug-in or option (the nearest valid one is named), or a value the plug-in refuses.
    """
    name, args, kwargs = parse_call(text)
    plugin = find(kind, name)
    signature = inspect.signature(plugin)
    for key in kwargs:
        if key not in signature.parameters:
            options = list(signature.parameters)
            raise ValueError(f"{name} has no option {key!r}: " + (nearest(key, options) if options else "it takes none"))
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"{text!r}: {error}") from None
    made = plugin(*bound.args, **bound.kwargs)
    given = {k: v for k, v in bound.arguments.items() if v != signature.parameters[k].default}
    object.__setattr__(made, "spelling", name + (f"({', '.join(f'{k}={v!r}' for k, v in sorted(given.items()))})" if given else ""))
    return made
