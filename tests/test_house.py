"""The house rules of CONTRIBUTING.md, read from the syntax trees: arrows point down, one foreign library has one home."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import START_RAY

HOUSE = Path(__file__).parent.parent
FILES = sorted((HOUSE / "diffprune").rglob("*.py"))

# Lowest first. Imports point down; neighbours on one level never import each other; every module is in a group named here.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("core",),
    ("embedded",),
    ("io", "statistics"),
    ("store", "vlm", "track"),
    ("models", "pruners", "benchmarks", "config"),
    ("pruning", "data"),
    ("timing",),
    ("train", "tune", "evaluate", "measure", "report", "verify", "integrations"),
    ("distributed", "watch"),
    ("job",),
    ("cli",),
    ("__main__",),
)
LAYER = {name: depth for depth, names in enumerate(LAYERS) for name in names}
NOUNS = ("models", "pruners", "benchmarks")

HOMES = {
    "ray": ("distributed",),
    "grpc": ("distributed",),
    "transformers": ("vlm", "models", "embedded"),
    "tokenizers": ("vlm", "models", "embedded"),
    "pyarrow": ("store", "io"),
    "duckdb": ("store",),
    "fsspec": ("store", "io"),
    "boto3": ("io",),
    "obstore": ("io",),
    "botocore": ("io",),
    "matplotlib": ("report/render",),
    "jinja2": ("report/render",),
    "datasets": ("io",),
    "huggingface_hub": ("io",),
    "pydantic": ("config", "train", "tune", "evaluate", "timing", "job", "watch"),
    "click": ("cli",),
    "rich": ("cli", "evaluate", "report/render", "watch"),
    "tensorboardX": ("track",),
    "wandb": ("track",),
    "mlflow": ("track",),
    "lmms_eval": ("io", "benchmarks", "integrations"),
}
CORE_MAY_USE = {"torch", "safetensors"}  # beside the standard library
BAD_NAMES = re.compile(r"(^|_)(utils?|helpers?|common|misc)$")


def group(path: Path, house: Path = HOUSE) -> str:
    """`core`, `pruners`, `train` ...: the first part of a module's path below the package."""
    return path.relative_to(house / "diffprune").with_suffix("").parts[0]


def imports(path: Path, house: Path = HOUSE) -> list[tuple[ast.stmt, str]]:
    """(statement, absolute module) of every import in a file, `from package import module` included as both."""
    package = path.relative_to(house).parent.parts
    found: list[tuple[ast.stmt, str]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found += [(node, module), *((node, f"{module}.{alias.name}") for alias in node.names)]
    return found


def at_home(path: Path, library: str) -> bool:
    """Whether a foreign library may be imported in this file."""
    place = path.relative_to(HOUSE / "diffprune").as_posix()
    return any(place.startswith(f"{home}/") for home in HOMES[library])


def bad_arrows(path: Path, house: Path = HOUSE) -> list[str]:
    """Imports that point up or sideways, and imports by or of a module in no named group; the public names are all lazy."""
    here, found = group(path, house), []
    if here == "__init__":
        return []
    if here not in LAYER:
        return [f"{path.relative_to(house)}: no layer is named for it"]
    for node, module in imports(path, house):
        parts = module.split(".")
        place = house / "diffprune" / parts[1] if len(parts) > 1 else house
        ours = parts[0] == "diffprune" and len(parts) > 1 and (place.is_dir() or place.with_suffix(".py").is_file())
        if ours and parts[1] != here and not LAYER.get(parts[1], len(LAYERS)) < LAYER[here]:
            found.append(f"{path.name}:{node.lineno} imports {module}: an arrow that points up or sideways")
    return found


def private_imports(path: Path, house: Path = HOUSE) -> list[str]:
    """Imports of another folder's `_file`."""
    home, found = path.relative_to(house).with_suffix("").parts[:-1], []
    for node, module in imports(path, house):
        parts = module.split(".")
        private = [i for i, part in enumerate(parts) if part.startswith("_") and not part.startswith("__")]
        if parts[0] == "diffprune" and private and tuple(parts[: private[0]]) != home:
            found.append(f"{path.name}:{node.lineno} imports {module}, private to another folder")
    return found


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda p: str(p.relative_to(HOUSE)))


@each(FILES)
def test_every_module_is_in_a_named_group_and_arrows_point_down(path: Path) -> None:
    assert not bad_arrows(path)


@each(FILES)
def test_private_files_stay_at_home(path: Path) -> None:
    assert not private_imports(path)


@pytest.mark.parametrize(
    ("place", "line", "fault"),
    [
        ("core/tokens.py", "", ""),
        ("evaluate/cells.py", "from diffprune.core import tokens", ""),
        ("evaluate/cells.py", "from diffprune.evaluate import _parts", ""),
        ("leftover.py", "", "no layer is named for it"),
        ("attic/old.py", "", "no layer is named for it"),
        ("evaluate/cells.py", "from diffprune.leftover import anything", "points up or sideways"),
        ("evaluate/cells.py", "import diffprune.tune.search", "points up or sideways"),
        ("evaluate/cells.py", "from diffprune import tune", "points up or sideways"),
        ("core/tokens.py", "from ..evaluate import cells", "points up or sideways"),
        ("evaluate/cells.py", "def late():\n    from diffprune.distributed import sweep", "points up or sideways"),
        ("evaluate/cells.py", "from diffprune.core._parts import x", "private to another folder"),
        ("evaluate/cells.py", "from diffprune.core import _parts", "private to another folder"),
    ],
)
def test_a_planted_fault_is_found(place: str, line: str, fault: str, tmp_path: Path) -> None:
    for name in ("core/_parts.py", "tune/search.py", "distributed/sweep.py", "evaluate/_parts.py", "leftover.py", place):
        path = tmp_path / "diffprune" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line if name == place else "")
    planted = tmp_path / "diffprune" / place
    found = "; ".join([*bad_arrows(planted, tmp_path), *private_imports(planted, tmp_path)])
    assert fault in found and bool(fault) == bool(found)


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
            assert at_home(path, library), f"{path.name}:{node.lineno}: {library} belongs to {HOMES[library]}"


@each([p for p in FILES if group(p) == "core"])
def test_core_is_torch_and_the_standard_library(path: Path) -> None:
    for node, module in imports(path):
        library = module.split(".")[0]
        allowed = library in sys.stdlib_module_names or library in CORE_MAY_USE or library == "diffprune"
        assert allowed, f"{path.name}:{node.lineno}: core/ must not use {library}"


@each([p for p in FILES if group(p) not in ("cli", "__init__")])
def test_no_lazy_import_hides_an_arrow(path: Path) -> None:
    """A foreign library may be imported late in its own home (Ray reads the environment on import); ours never."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    late = {n.lineno for function in functions for n in ast.walk(function) if isinstance(n, ast.stmt)}
    for node, module in imports(path):
        allowed = module.split(".")[0] in HOMES and at_home(path, module.split(".")[0])
        assert node.lineno not in late or allowed, f"{path.name}:{node.lineno}: late import of {module}; only cli/ may"


@each(FILES)
def test_names_say_something(path: Path) -> None:
    assert not BAD_NAMES.search(path.stem) and not BAD_NAMES.search(path.parent.name), f"{path}: a name that says nothing"


@each([p for p in FILES if group(p) in NOUNS and not p.name.startswith("_")])
def test_a_plugin_file_defines_its_class(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = {n.name.rstrip("_").lower() for n in tree.body if isinstance(n, ast.ClassDef)}
    assert path.stem.replace("_", "") in classes, f"{path.name} defines no class of its name"


@each([p for p in FILES if p.read_text(encoding="utf-8").strip()])
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


def test_files_that_start_ray_are_called_what_the_list_says() -> None:
    missing = [name for name in START_RAY if not (Path(__file__).parent / f"test_{name}.py").is_file()]
    assert not missing, f"no such files: {missing}; a renamed one would start its Ray beside another's"
