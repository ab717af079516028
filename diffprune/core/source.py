"""The digest of a plug-in's code: its class and whatever that uses of the parts it shares; keys of cells hold it.

What counts is read from syntax trees: the members of the class and of the classes it inherits from, and from there every definition
that is reached by name, in the plug-in's own file, in files beside it, and in `HOMES`. So a changed shared part makes stale exactly
the plug-ins that use what was changed in it. Comments, docstrings, layout, the order of definitions, unused ones and `APART` do not
count, nor do folders and machines; trees are written down by ourselves, because `ast.unparse` and `ast.dump` are other texts in
other versions of Python.

Contracts and services (`core`, `vlm`, `pruning`, `io` ...), torch and transformers are left out: the path from batch to logits is
held by oracles, a change there that is meant to alter answers raises `store.columns.VERSION`, and every row names its commit; a
tidied service would otherwise cost every answer that was ever paid for. Names that are put together at run time are not seen.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

DIGITS = 12  # of a digest
PACKAGE = __name__.partition(".")[0]
# What plug-ins of the package share, and the two places beside them in which questions are worded.
HOMES = tuple(f"{PACKAGE}.{name}" for name in ("pruners", "models", "benchmarks", "embedded", "io.qa_rows"))
# Members that only say what tables print, or where data lie: their revision tells which they are.
APART = frozenset(("label", "reference", "option_labels", "revision", "place", "fetch"))
INSTALLED = ("site-packages", "dist-packages")  # folders in which strangers lie side by side
SILENT = ("ctx", "kind", "type_comment", "type_ignores")  # fields of a tree that no program sees


@cache
def digest(plugin: type, roots: tuple[str, ...] | None = None) -> str:
    """12 hexadecimal digits of the code of a class. roots: only what these members use (and construction); None: all of it.

    A class is read once, when it is first asked about: it stays the code that runs, whatever becomes of its file.

    Raises:
        ValueError: the code cannot be read.
    """
    reached = _Reached(plugin.__module__)
    reached.plugin(plugin, roots)
    return reached.digest()


@cache
def of_function(function: Callable[..., Any]) -> str:
    """The same of a function and what it uses.

    Raises:
        ValueError: the code cannot be read.
    """
    reached = _Reached(function.__module__)
    reached.name(function.__module__, function.__qualname__.partition(".")[0])
    return reached.digest()


def joined(*digests: str) -> str:
    """One digest of several; of a single one itself, of none ""."""
    told = [one for one in digests if one]
    return hashlib.sha256(" ".join(told).encode()).hexdigest()[:DIGITS] if len(told) > 1 else "".join(told)


def text_of(module: str) -> str:
    """The source text of a module.

    Raises:
        ValueError: there is none.
    """
    known = sys.modules.get(module)
    spec = known.__spec__ if known is not None else importlib.util.find_spec(module)
    found = getattr(spec.loader, "get_source", lambda name: None)(module) if spec is not None else None
    if found is None:
        place = getattr(known, "__file__", None) or module
        raise ValueError(f"{place}: the source of this code cannot be read, and answers carry its hash: give it as a .py file")
    return str(found)


# --- which code ------------------------------------------------------------------------------------------------------


@dataclass
class _Names:
    """One module: its top-level statements by the names they bind, and those that bind none."""

    bound: dict[str, list[ast.stmt]]
    loose: list[ast.stmt]


@dataclass
class _Reached:
    """Everything reached from one plug-in. home: its module; found: (module, name) -> the text of what binds the name."""

    home: str
    found: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    members: dict[str, list[tuple[str, str, ast.stmt]]] = field(default_factory=dict)  # not reached yet: (module, class, statement)
    attributes: set[str] = field(default_factory=set)
    read: dict[str, _Names] = field(default_factory=dict)

    def digest(self) -> str:
        """Of the texts, whatever order they were reached in."""
        told = repr(sorted((module.rpartition(".")[2], name, texts) for (module, name), texts in self.found.items()))
        return hashlib.sha256(told.encode()).hexdigest()[:DIGITS]

    def plugin(self, plugin: type, roots: tuple[str, ...] | None) -> None:
        """Members of a class and of those it inherits from, as far as they are followed, until nothing new is reached."""
        classes = [(one.__module__, one.__name__) for one in plugin.__mro__ if self._followed(one.__module__)]
        heads: list[tuple[str, ast.stmt]] = []
        for module, name in classes:
            self.found[module, name] = []
        for module, name in classes:
            for statement in self._names(module).bound.get(name, []):
                heads.append((module, statement))
                for member, parts in _statements(getattr(statement, "body", [])).bound.items():
                    self.members.setdefault(member, []).extend((module, name, part) for part in parts)
        for module, statement in heads:
            self._head(module, statement)
        wanted = {name for name in self.members if roots is None or name in roots or name.startswith("__")}
        while wanted:
            for name in wanted - APART:
                for module, owner, statement in self.members[name]:
                    self._take(module, f"{owner}.{name}", statement)
                    if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):  # in the body members have no `self.`
                        self.attributes |= {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
            for name in wanted:
                del self.members[name]
            wanted = self.members.keys() & self.attributes

    def _head(self, module: str, statement: ast.stmt) -> None:
        """The first line of a class, without its body."""
        if isinstance(statement, ast.ClassDef):
            bare = ast.ClassDef(statement.name, statement.bases, statement.keywords, [], statement.decorator_list)
            self._take(module, statement.name, bare)
        else:
            self._take(module, "", statement)

    def name(self, module: str, name: str) -> None:
        """What binds a name at the top of a module, once."""
        names = self._names(module)
        if (module, name) in self.found or name not in names.bound:
            return
        self.found[module, name] = []
        for statement in names.bound[name]:
            imported = _imports(statement, module).get(name) if isinstance(statement, ast.Import | ast.ImportFrom) else None
            if imported is None:
                self._take(module, name, statement)
            else:
                self.found[module, name].append(".".join(imported))
                self._into(*imported)
        if (module, "") not in self.found:
            self.found[module, ""] = []
            for statement in names.loose:
                self._take(module, "", statement)

    def _into(self, target: str, attribute: str) -> None:
        """Through an import: `attribute` of the module `target`, all of it where that is "" or "*"."""
        if attribute and self._followed(f"{target}.{attribute}"):
            target, attribute = f"{target}.{attribute}", ""
        if self._followed(target):
            for name in list(self._names(target).bound) if attribute in ("", "*") else [attribute]:
                self.name(target, name)

    def _take(self, module: str, name: str, statement: ast.stmt) -> None:
        """Note a statement, and follow the names in it."""
        self.found.setdefault((module, name), []).append(_text(statement))
        self._walk(module, statement)

    def _walk(self, module: str, node: ast.AST) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for target in _imports(node, module).values():
                self._into(*target)
        if isinstance(node, ast.Name):
            self.name(module, node.id)
        if isinstance(node, ast.Attribute):
            self.attributes.add(node.attr)
            shared = self._module_called(module, node.value.id) if isinstance(node.value, ast.Name) else ""
            if shared:  # `_answers.gqa` is one function, not the whole module
                self.name(shared, node.attr)
                return
        for child in ast.iter_child_nodes(node):
            self._walk(module, child)

    def _module_called(self, module: str, name: str) -> str:
        """The followed module that a name at the top of `module` stands for; "" where it stands for something else."""
        for statement in self._names(module).bound.get(name, []):
            if isinstance(statement, ast.ImportFrom):
                target = ".".join(_imports(statement, module)[name])
                if self._followed(target):
                    self.found.setdefault((module, name), [target])
                    return target
        return ""

    def _names(self, module: str) -> _Names:
        if module not in self.read:
            self.read[module] = _parsed(text_of(module))
        return self.read[module]

    def _followed(self, module: str) -> bool:
        """Whether a module is the plug-in's own, lies beside it, or is in `HOMES`. Never imports anything."""
        if module == self.home:
            return True
        if module.partition(".")[0] == PACKAGE:
            return module.startswith(HOMES) and _is_module(module)
        place = _file(self.home)
        if place is None or self.home.partition(".")[0] == PACKAGE or place.parent.name in INSTALLED:
            return False
        beside = place.parent / f"{module.rpartition('.')[2]}.py"
        return beside.is_file() and (module not in sys.modules or _file(module) == beside)


def _file(module: str) -> Path | None:
    place = getattr(sys.modules.get(module), "__file__", None)
    return Path(place).resolve() if place else None


@cache
def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


# --- trees -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _parsed(text: str) -> _Names:
    return _statements(ast.parse(text).body)


def _statements(body: Sequence[ast.stmt]) -> _Names:
    found = _Names({}, [])
    for statement in body:
        names = set(_binds(statement))
        for name in names:
            found.bound.setdefault(name, []).append(statement)
        if not names and not isinstance(statement, ast.Pass) and not _is_docstring(statement):
            found.loose.append(statement)
    return found


def _binds(statement: ast.AST) -> Iterator[str]:
    """The names a statement binds or changes: `A[k] = v` is part of what A is. Of an `if` or `try`, those of all that is in it."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in statement.names if alias.name != "*")
    elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        yield from (node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))
    elif not isinstance(statement, ast.Expr):
        for child in ast.iter_child_nodes(statement):
            if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
                yield from _binds(child)


def _imports(statement: ast.Import | ast.ImportFrom, module: str) -> dict[str, tuple[str, str]]:
    """(module, name in it) by the name an import binds; the name is "" where the module itself is bound."""
    if isinstance(statement, ast.Import):
        return {alias.asname or alias.name.partition(".")[0]: (alias.name, "") for alias in statement.names}
    base = statement.module or ""
    if statement.level:
        known = sys.modules.get(module)
        package = str(getattr(known, "__package__", None) or module.rpartition(".")[0])
        base = ".".join(filter(None, (package.rsplit(".", statement.level - 1)[0], base)))
    return {alias.asname or alias.name: (base, alias.name) for alias in statement.names}


def _is_docstring(statement: ast.AST) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)


@lru_cache(maxsize=4096)
def _text(statement: ast.stmt) -> str:
    return repr(_plain(statement))


def _plain(node: Any) -> Any:
    """A tree as nested lists that are the same text in every version of Python: what is empty is left out, and so is every text
    that is a statement of its own."""
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if name not in SILENT)
        return [type(node).__name__, *([name, _plain(value)] for name, value in fields if value is not None and value != [])]
    if isinstance(node, list):
        return [_plain(one) for one in node if not _is_docstring(one)]
    return f"{type(node).__name__} {node!r}"
