"""The house rules of CONTRIBUTING.md, read from the syntax trees: arrows point down, one foreign library has one home."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent
FILES = sorted((HOUSE / "diffprune").rglob("*.py"))

# Lowest first; imports may only point down, or stay within one level. What is not named here serves the verbs, like the store.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("core",),
    ("embedded", "hub", "images", "prune"),
    ("pruners", "models", "benchmarks"),
    ("store", "data"),
    ("train", "tune", "evaluate", "measure", "report"),
    ("distributed", "job"),
    ("cli", "__main__"),
)
SERVICES = 3
LAYER = {name: depth for depth, names in enumerate(LAYERS) for name in names}
NOUNS = LAYERS[2]
VERBS = LAYERS[4]

HOMES = {
    "ray": ("distributed",),
    "transformers": ("models", "embedded"),
    "tokenizers": ("models", "embedded"),
    "pyarrow": ("store", "hub"),
    "matplotlib": ("report",),
    "jinja2": ("report",),
    "datasets": ("hub",),
    "huggingface_hub": ("hub",),
    "click": ("cli",),
    "lmms_eval": ("benchmarks", "harness"),
}
CORE_MAY_USE = {"torch", "safetensors"}  # beside the standard library
BAD_NAMES = re.compile(r"(^|_)(utils?|helpers?|common|misc)$")


def group(path: Path) -> str:
    """`core`, `pruners`, `train` ...: the first part of a module's path below the package."""
    return path.relative_to(HOUSE / "diffprune").with_suffix("").parts[0]


def imports(path: Path) -> list[tuple[ast.stmt, str]]:
    """(statement, absolute module) of every import in a file, `from package import module` included as both."""
    package = path.relative_to(HOUSE).parent.parts
    found: list[tuple[ast.stmt, str]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found += [(node, module), *((node, f"{module}.{alias.name}") for alias in node.names)]
    return found


def own(module: str) -> str | None:
    """The group a module of ours belongs to, None for foreign modules and the package's public names."""
    parts = module.split(".")
    known = parts[0] == "diffprune" and len(parts) > 1 and parts[1] in {group(p) for p in FILES}
    return parts[1] if known else None


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda p: str(p.relative_to(HOUSE)))


@each(FILES)
def test_arrows_point_down(path: Path) -> None:
    here = group(path)
    if here == "__init__":
        return  # the public names, all lazy
    for node, module in imports(path):
        there = own(module)
        if there is None or there == here:
            continue
        where = f"{path.name}:{node.lineno} imports {module}"
        assert LAYER.get(there, SERVICES) <= LAYER.get(here, SERVICES), f"{where}: an arrow that points up"
        assert not (here in VERBS and there in VERBS), f"{where}: verbs do not import each other"
        assert not (here in NOUNS and there in NOUNS), f"{where}: nouns do not import each other"


@each([p for p in FILES if group(p) in NOUNS and not p.name.startswith("_")])
def test_plugins_do_not_import_each_other(path: Path) -> None:
    for node, module in imports(path):
        parts = module.split(".")
        if parts[:2] == ["diffprune", group(path)] and len(parts) > 2:
            assert parts[2].startswith("_"), f"{path.name}:{node.lineno} imports {module}: share through an underscore file"


@each(FILES)
def test_a_foreign_library_has_one_home(path: Path) -> None:
    for node, module in imports(path):
        library = module.split(".")[0]
        if library in HOMES:
            assert group(path) in HOMES[library], f"{path.name}:{node.lineno}: {library} belongs to {HOMES[library]}"


@each([p for p in FILES if group(p) == "core"])
def test_core_is_torch_and_the_standard_library(path: Path) -> None:
    for node, module in imports(path):
        library = module.split(".")[0]
        allowed = library in sys.stdlib_module_names or library in CORE_MAY_USE or library == "diffprune"
        assert allowed, f"{path.name}:{node.lineno}: core/ must not use {library}"


@each([p for p in FILES if p.name not in ("cli.py", "__init__.py")])
def test_no_lazy_import_hides_an_arrow(path: Path) -> None:
    """A foreign library may be imported late in its own home (Ray reads the environment on import); ours never."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    late = {n.lineno for function in functions for n in ast.walk(function) if isinstance(n, ast.stmt)}
    for node, module in imports(path):
        at_home = group(path) in HOMES.get(module.split(".")[0], ())
        assert node.lineno not in late or at_home, f"{path.name}:{node.lineno}: late import of {module}; only cli.py may"


@each(FILES)
def test_names_say_something(path: Path) -> None:
    assert not BAD_NAMES.search(path.stem) and not BAD_NAMES.search(path.parent.name), f"{path}: a name that says nothing"


@each([p for p in FILES if group(p) in NOUNS and not p.name.startswith("_")])
def test_a_plugin_file_defines_its_class(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = {n.name.rstrip("_").lower() for n in tree.body if isinstance(n, ast.ClassDef)}
    assert path.stem.replace("_", "") in classes, f"{path.name} defines no class of its name"


@each([p for p in FILES if p.name != "__init__.py"])
def test_every_file_and_public_definition_is_documented(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path}: a file starts with one sentence on its idea"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}:{node.lineno} {node.name} has no docstring"


@each(FILES)
def test_functions_stay_readable(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{path.name}:{node.lineno} {node.name} has {length} lines: what second thing does it do?"
