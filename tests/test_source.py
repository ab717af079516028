"""Keys hold the digest of the code behind every name: what changes code makes stale what used it, and nothing else does."""

from __future__ import annotations

import ast
import py_compile
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

import diffprune
from diffprune.core import registry, source
from diffprune.core.budget import Keep
from diffprune.core.cell import Cell
from diffprune.core.spec import Spec
from diffprune.core.vlm import VLM
from diffprune.evaluate.cells import Evaluation, cells
from diffprune.evaluate.evaluator import Evaluator
from diffprune.evaluate.transformers_backend import TransformersBackend
from diffprune.measure import measure
from diffprune.timing.options import Measurement
from diffprune.train.recipe import Recipe
from diffprune.tune.cells import settings
from diffprune.tune.options import Tuning
from diffprune.vlm.load import load

Edit = Callable[[str, str, str], None]
LEARNED = {"diffprune", "dynamic_llava", "gumbel_keepdrop", "gumbel_topk", "learnpruner", "visionselector"}
TABLES = set(registry.names("benchmarks")) - {"world", "lmms", "custom"}


@pytest.fixture
def edit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Edit]:
    """Replace a text of a module of the package, as if its file had been edited before the process began."""
    edited: dict[str, str] = {}
    real = source.text_of
    monkeypatch.setattr(source, "text_of", lambda module: edited.get(module) or real(module))

    def edit(module: str, old: str, new: str) -> None:
        name = f"diffprune.{module}"
        edited[name] = source.text_of(name).replace(old, new)
        assert edited[name] != real(name), f"{module} holds {old!r} no more: name another text"
        forget()

    forget()
    yield edit
    forget()


def forget() -> None:
    source.digest.cache_clear()
    source.of_function.cache_clear()


def codes(kind: str) -> dict[str, str]:
    return {name: registry.code(kind, name) for name in registry.names(kind)}


def graders() -> dict[str, str]:
    return {name: registry.grader(Spec(name)) for name in registry.names("benchmarks")}


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> set[str]:
    return {name for name, code in before.items() if after[name] != code}


# --- pruners ---------------------------------------------------------------------------------------------------------

SIGN = ("pruners.attention", "return tokens.given", "return -tokens.given")


@pytest.mark.parametrize(
    ("edited", "stale"),
    [
        (SIGN, {"attention"}),
        (("pruners.grid", "(r + 0.5)", "(r + 0.4)"), {"grid"}),
        (("pruners._learned", "return self.logits(tokens)", "return -self.logits(tokens)"), LEARNED),
        (("pruners._scorer", "class Block(nn.Module):", "class Block(nn.Module):\n    more = 1\n"), LEARNED),
        (("pruners._soft_topk", "def laplace_cdf(u", "def laplace_cdf(x: int, u"), {"diffprune", "gumbel_topk"}),
        (("pruners._soft_topk", "def signal_and_noise(u", "def signal_and_noise(x: int, u"), {"diffprune"}),
    ],
)
def test_a_change_makes_stale_exactly_the_methods_that_use_it(edit: Edit, edited: tuple[str, str, str], stale: set[str]) -> None:
    before = codes("pruners")
    edit(*edited)
    assert changed(before, codes("pruners")) == stale


SILENT = {
    "a comment": (SIGN[0], "    def score", "    # what the encoder looks at\n\n    def score"),
    "a docstring": (SIGN[0], '"""Keeps the tokens', '"""Retains the tokens'),
    "a docstring more": (SIGN[0], "return tokens.given", '"""Its score."""\n        return tokens.given'),
    "layout": (SIGN[0], "tokens.given(encoder_attention())", "(\n            tokens.given(\n encoder_attention(),\n))"),
    "quotes": (SIGN[0], 'label = "Attention"', "label = 'Attention'"),
    "what tables say": (SIGN[0], 'label = "Attention"', 'label = "Encoder attention"'),
    "an import nobody uses": (SIGN[0], "from torch import Tensor", "import json\nfrom torch import Tensor"),
    "a definition nobody uses": (SIGN[0], "class Attention", "def unused() -> int:\n    return 3\n\n\nclass Attention"),
}


@pytest.mark.parametrize("name", SILENT)
def test_what_no_answer_hangs_on_changes_nothing(edit: Edit, name: str) -> None:
    before = codes("pruners")
    edit(*SILENT[name])
    ast.parse(source.text_of(f"diffprune.{SIGN[0]}"))
    assert codes("pruners") == before


def test_the_order_of_definitions_does_not_count(edit: Edit) -> None:
    before, path = codes("pruners"), "pruners._soft_topk"
    tree = ast.parse(source.text_of(f"diffprune.{path}"))
    last = tree.body[-1]
    assert isinstance(last, ast.FunctionDef) and last.name == "signal_and_noise"
    first = next(i for i, node in enumerate(tree.body) if isinstance(node, ast.FunctionDef))
    tree.body = [*tree.body[:first], last, *tree.body[first:-1]]
    edit(path, source.text_of(f"diffprune.{path}"), ast.unparse(tree))
    assert codes("pruners") == before


def asked(vlm: VLM, *methods: str) -> dict[str, Cell]:
    specs = [registry.spec("pruners", text) for text in methods]
    found = cells(vlm, specs, [Keep(4)], Evaluation(benchmarks=("world('gqa')",), limit=4))
    return dict(zip(methods, found, strict=True))


def test_a_flipped_sign_makes_a_methods_cells_new_and_no_others(edit: Edit) -> None:
    vlm, methods = load("tiny(llava)"), ("unpruned", "grid", "attention", "replaced(attention)", "replaced(grid)")
    timed = Measurement(batches=(2,), benchmark="world('gqa')", limit=8)

    def keys() -> dict[str, str]:
        specs = [registry.spec("pruners", text) for text in methods[1:]]
        also = measure.cells(vlm, specs, [Keep(4)], timed)
        told = {f"measure {cell.pruner}": cell.key for cell in also}
        return {name: cell.key for name, cell in asked(vlm, *methods).items()} | told

    before = keys()
    old = asked(vlm, "attention")["attention"]
    edit(*SIGN)
    assert changed(before, keys()) == {
        "attention", "replaced(attention)", "measure attention", "measure replaced(method=attention)",
    }  # fmt: skip
    new = asked(vlm, "attention")["attention"]
    assert old.columns().code != new.columns().code and old.columns().pruner == new.columns().pruner == "attention"
    with pytest.raises(ValueError, match=r"the code of attention has changed: \w{12} was asked for, found \w{12}"):
        Evaluator(TransformersBackend(vlm)).run(old)  # a worker that has other code than the driver


def test_a_recipe_knows_the_code_of_its_method(edit: Edit) -> None:
    def keys() -> dict[str, str]:
        return {name: Recipe(pruners=(name,)).key(registry.spec("pruners", name)) for name in sorted(LEARNED)}

    before = keys()
    edit("pruners.gumbel_topk", "temperature", "warmth")
    assert changed(before, keys()) == {"gumbel_topk"}


# --- benchmarks ------------------------------------------------------------------------------------------------------

SHORT = {"gqa", "mme", "pope", "textvqa", "vizwiz", "vqav2", "custom"}
PROMPTS = [
    (("benchmarks.mme", ".strip() + SHORT", ".strip()"), {"mme"}),
    (("benchmarks._mmbench", '"\\n".join(parts) + self', '" ".join(parts) + self'), {"mmbench", "mmbench_cn"}),
    (("benchmarks._table", "single word or phrase", "single word or short phrase"), SHORT),
    (("benchmarks.custom", "tokens: int = 128", "tokens: int = 64"), {"custom"}),
    (("io.qa_rows", "{letter}. {option}", "({letter}) {option}"), {"custom"}),
    (("embedded.questions", "def pick(", "def pick_(x): return x\n\n\ndef pick(more=1, *, "), {"world"}),
    (("benchmarks._groups", "sha256", "md5"), TABLES | {"world", "custom", "lmms"}),
]


@pytest.mark.parametrize(("edited", "stale"), PROMPTS)
def test_a_changed_prompt_makes_answers_stale(edit: Edit, edited: tuple[str, str, str], stale: set[str]) -> None:
    before = codes("benchmarks")
    edit(*edited)
    assert changed(before, codes("benchmarks")) == stale


GRADERS = [
    (("benchmarks._answers", "def mme(", "def mme(more: int, "), {"mme", "world"}),
    (("benchmarks._answers", "def without_reasoning(", "def without_reasoning(more: int, "), TABLES | {"lmms", "world"}),
    (("benchmarks.pope", "_answers.pope(", "_answers.pope(0, "), {"pope"}),
    (("benchmarks.world", "_answers.gqa(answer", "_answers.gqa(answer.lower()"), {"world"}),
    (("benchmarks._graders", "def contains(", "def contains(more: int, "), {"custom"}),
    (("benchmarks._answers", '"zero one two', '"nought one two'), {"vqav2", "textvqa", "vizwiz", "world", "custom"}),
]


@pytest.mark.parametrize(("edited", "stale"), GRADERS)
def test_a_changed_grader_leaves_the_answers(edit: Edit, edited: tuple[str, str, str], stale: set[str]) -> None:
    answers, grades = codes("benchmarks"), graders()
    edit(*edited)
    assert codes("benchmarks") == answers and changed(grades, graders()) == stale


def test_figures_and_examples_are_in_no_key(edit: Edit) -> None:
    before = codes("benchmarks"), graders()
    edit("benchmarks._aggregate", "return 100 * sum(values)", "return 1000 * sum(values)")
    edit("benchmarks.mme", "EXAMPLES = (", "EXAMPLES = (None,")
    edit("benchmarks._fixtures", "def made(", "def made(more: int, ")
    assert (codes("benchmarks"), graders()) == before


def test_a_tuning_knows_its_graders(edit: Edit) -> None:
    options = Tuning(benchmarks=("world('mme')",))
    before = settings(options)
    edit(*GRADERS[0][0])
    assert settings(options).graders != before.graders and settings(options).questions == before.questions


def test_a_users_own_function_is_part_of_the_grader(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def grader(*texts: str) -> str:
        folder = own_folder / str(len(list(own_folder.iterdir())))
        folder.mkdir()
        for name, text in zip(("my_words", "my_grades"), texts, strict=True):
            (folder / f"{name}.py").write_text(text)
            sys.modules.pop(name, None)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(folder))
            found = registry.grader(registry.spec("benchmarks", "custom('/data/rows.jsonl', grader='my_grades:same')"))
        sys.modules.pop("my_words"), sys.modules.pop("my_grades")
        return found

    words = "def words(x):\n    return x.split()\n"
    mine = (
        "from my_words import words\n\n\ndef same(answer, answers, row):\n    return words(answer) in [words(a) for a in answers]\n"
    )
    first = grader(words, mine)
    assert first == grader(words, mine) == grader(f"# theirs\n{words}", f"# mine\n{mine}")
    assert (
        len({first, grader(words, mine.replace(") in ", ") not in ")), grader(words.replace("split", "lower().split"), mine)}) == 3
    )
    with pytest.raises(ValueError, match="my_grades cannot be imported"):
        registry.grader(registry.spec("benchmarks", "custom('/data/rows.jsonl', grader='my_grades:same')"))


# --- families --------------------------------------------------------------------------------------------------------


def test_a_changed_family_makes_its_models_answers_stale(edit: Edit) -> None:
    before = codes("models")
    llava, qwen = load("tiny(llava)"), load("tiny(qwen2_vl)")
    told = llava.spec, qwen.spec
    edit("models._qwen", "class ", "class More:\n    pass\n\n\nclass ")
    assert not changed(before, codes("models")), "what nobody uses"
    edit("models.llava", "class Llava(", "class Llava(*(), ")
    assert changed(before, codes("models")) == {"llava"}
    assert llava.spec.source != told[0].source and qwen.spec == told[1] and str(llava.spec) == str(told[0])


# --- wherever it lies ------------------------------------------------------------------------------------------------

OWN = """
from pruners._parts import largest

from diffprune.core.pruner import ScorePruner

class Mine(ScorePruner):
    '''The largest.'''
    def score(self, tokens):
        return largest(tokens.features)
"""
PARTS = """
SIGN = 1
UNUSED = 2

def largest(features):
    return SIGN * features.float().norm(dim=-1)
"""


@pytest.fixture
def placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """The digest of a plug-in of a user's, written into a new folder each time."""

    def placed(own: str = OWN, parts: str = PARTS) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir()))) / "pruners"
        folder.mkdir(parents=True)
        (folder / "mine.py").write_text(own)
        (folder / "_parts.py").write_text(parts)
        for name in ("pruners", "pruners._parts"):
            sys.modules.pop(name, None)
        monkeypatch.setenv(registry.FOLDER, str(folder.parent))
        monkeypatch.syspath_prepend(str(folder.parent))
        return registry.code("pruners", "mine")

    yield placed
    for name in ("pruners", "pruners._parts"):
        sys.modules.pop(name, None)


def test_a_users_plug_in_and_its_parts_count_wherever_they_lie(placed: Callable[..., str]) -> None:
    first = placed()
    assert first == placed() == placed(parts=PARTS.replace("UNUSED = 2", "# nothing")) == placed(f'"""Mine."""\n{OWN}')
    assert len({first, placed(OWN.replace("return largest", "return -largest")), placed(parts=PARTS.replace("= 1", "= -1"))}) == 3


def test_code_that_cannot_be_read_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "written.py").write_text(OWN.replace("pruners._parts", "math").replace("largest", "hypot"))
    py_compile.compile(str(tmp_path / "written.py"), cfile=str(tmp_path / "theirs_compiled.pyc"))
    point = SimpleNamespace(name="mine", value="theirs_compiled:Mine", group="diffprune.pruners", dist=None)
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: [point] if group == point.group else [])
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._installed.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"theirs_compiled.pyc: the source of this code cannot be read, .* as a .py file"):
            registry.load("pruners", "mine")
    finally:
        registry._installed.cache_clear()
        sys.modules.pop("theirs_compiled", None)


SAY = """
from diffprune.core import registry
from diffprune.core.spec import Spec
print({name: registry.code("pruners", name) for name in registry.names("pruners")})
print({name: registry.code("benchmarks", name) for name in registry.names("benchmarks")})
print({name: registry.grader(Spec(name)) for name in registry.names("benchmarks")})
"""


@pytest.mark.slow
def test_a_copy_elsewhere_in_another_process_has_the_same_digests(tmp_path: Path) -> None:
    package = Path(diffprune.__file__).parent
    shutil.copytree(package, tmp_path / "site" / "diffprune", ignore=shutil.ignore_patterns("__pycache__", "checkpoint"))
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin", "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SAY], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == [str(codes("pruners")), str(codes("benchmarks")), str(graders())]


def test_the_text_of_a_tree_is_the_same_in_every_version_of_python() -> None:
    """Golden: what another interpreter would have to write down, too."""
    tree = ast.parse("def f(x: int = 1) -> str:\n    '''Says.'''\n    return f'{x!r:>{3}} {u\"a\"}' if x else None")
    assert repr(source._plain(tree.body[0])) == (
        "['FunctionDef', ['name', \"str 'f'\"], ['args', ['arguments', ['args', [['arg', ['arg', \"str 'x'\"], ['annotation', "
        "['Name', ['id', \"str 'int'\"]]]]]], ['defaults', [['Constant', ['value', 'int 1']]]]]], ['body', [['Return', ['value', "
        "['IfExp', ['test', ['Name', ['id', \"str 'x'\"]]], ['body', ['JoinedStr', ['values', [['FormattedValue', ['value', "
        "['Name', ['id', \"str 'x'\"]]], ['conversion', 'int 114'], ['format_spec', ['JoinedStr', ['values', [['Constant', "
        "['value', \"str '>'\"]], ['FormattedValue', ['value', ['Constant', ['value', 'int 3']]], ['conversion', 'int -1']]]]]]], "
        "['Constant', ['value', \"str ' '\"]], ['FormattedValue', ['value', ['Constant', ['value', \"str 'a'\"]]], ['conversion', "
        "'int -1']]]]]], ['orelse', ['Constant']]]]]]], ['returns', ['Name', ['id', \"str 'str'\"]]]]"
    )
