"""Mistakes in plug-ins of a user's own: each is a sentence that names the class and what would be right."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import diffprune
from diffprune import pruning
from diffprune.cli import commands
from diffprune.core import exits, registry
from diffprune.core.budget import Keep
from diffprune.core.evidence import QUESTION
from diffprune.core.pruner import Kind, Pruner, Reference, ScorePruner
from diffprune.core.site import ENCODED, Cut
from diffprune.core.tokens import Selection, VisualTokens
from tests.contracts import tokens
from tests.test_families import batch

HEAD = """
from diffprune.core.benchmark import Benchmark
from diffprune.core.pruner import Pruner, ScorePruner
from diffprune.vlm.family import Family
"""
NORM = "\n    def score(self, tokens): return tokens.features.norm(dim=-1)\n"
CLASSES = [
    ("pruners", "class Bad(ScorePruner): pass", "the class Bad lacks score, which every pruner"),
    ("pruners", "class Bad(Pruner): pass", "the class Bad lacks select"),
    ("pruners", f"class Bad:{NORM}", "the class Bad is no pruner: let it inherit from diffprune.core.pruner.Pruner"),
    ("pruners", f"class Bad(ScorePruner):\n    label = 3{NORM}", "Bad: label is 3, but must be text"),
    ("pruners", f"class Bad(ScorePruner):\n    label = 'Unpruned'{NORM}", "Bad: label is 'Unpruned', as tables call a bound"),
    ("pruners", f"class Bad(ScorePruner):\n    label = 'No image'{NORM}", "Bad: label is 'No image', as tables call a bound"),
    ("pruners", f"class Bad(ScorePruner):\n    kind = 'rule'{NORM}", "kind is 'rule', but must be a Kind, as in Kind.RULE"),
    ("pruners", f"class Bad(ScorePruner):\n    reference = '2401.1'{NORM}", "but must be a Reference, as in Reference('title'"),
    ("pruners", f"class Bad(ScorePruner):\n    needs = {{'attention'}}{NORM}", "but must be a frozenset of evidence"),
    ("pruners", "raise SystemExit(3)", "bad.py cannot be imported (SystemExit: 3)"),
    ("benchmarks", "class Bad(Benchmark): pass", "lacks aggregate, grade, image, samples, which every benchmark"),
    ("benchmarks", "class Bad: pass", "is no benchmark: let it inherit from diffprune.core.benchmark.Benchmark"),
    ("models", "class Bad: pass", "is no model: let it inherit from diffprune.core.vlm.VLM"),
    ("models", "class Bad(Family): pass", "the class Bad lacks _shape, num_visual_tokens, tiny"),
]


def written(kind: str, text: str, name: str = "bad") -> None:
    Path(kind).mkdir(exist_ok=True)
    Path(kind, f"{name}.py").write_text(HEAD + text)


@pytest.mark.parametrize(("kind", "text", "says"), CLASSES, ids=[says[:50] for *_, says in CLASSES])
def test_a_class_that_is_no_plug_in_is_refused_and_listed_with_the_reason(
    kind: str, text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    written(kind, text)
    code, sentence = commands.call(["show", "bad"])
    assert (code, says in sentence, "\n" in sentence) == (2, True, False), sentence
    assert commands.call(["list", kind]) == (0, "") and "cannot be used" in capsys.readouterr().out


@pytest.mark.parametrize("error", ["RuntimeError('boom')", "ValueError('boom')", "KeyError()"])
def test_a_constructor_that_fails_is_a_sentence(error: str) -> None:
    written("pruners", f"class Bad(ScorePruner):\n    def __init__(self, k: int = 1): raise {error}{NORM}")
    code, sentence = commands.call(["show", "bad(k=2)"])
    said = "boom" if error.startswith("Value") else error.replace("('", ": ").replace("')", "").replace("()", "")
    assert (code, sentence) == (2, f"bad(k=2) cannot be made ({said})")


def test_what_a_plug_in_refuses_is_no_fault_of_ours() -> None:
    """A ValueError that a user's benchmark raises about its data is a mistake, one of a foreign library is not."""
    written("benchmarks", "def refuse():\n    raise ValueError('no rows')\n\nclass Bad(Benchmark): pass")
    with pytest.raises(ValueError, match="lacks"):
        registry.find("benchmarks", "bad")
    found: dict[str, object] = {}
    exec(compile("def refuse():\n    raise ValueError('no rows')", str(Path("benchmarks/bad.py").absolute()), "exec"), found)
    exec(compile("def foreign():\n    raise ValueError('no rows')", "/elsewhere/benchmarks/bad.py", "exec"), found)
    for name, code in (("refuse", exits.MISTAKE), ("foreign", exits.FAILED)):
        with pytest.raises(ValueError) as raised:
            found[name]()  # type: ignore[operator]
        assert exits.exit_code(raised.value) == code


# --- answers of another shape ----------------------------------------------------------------------------------------


class Scores(ScorePruner):
    """Answers with what it is told to."""

    def __init__(self, change: object) -> None:
        self.change = change

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        return self.change(tokens.features.norm(dim=-1))  # type: ignore[operator, no-any-return]


class Selects(Scores, Pruner):
    """Selects what it is told to."""

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        return self.change(tokens.valid)  # type: ignore[operator, no-any-return]


SHAPES = [
    (lambda scores: scores[0], "gives scores [20], but must give one for every token, a tensor [B, N] = [3, 20]"),
    (lambda scores: scores[..., None], "gives scores [3, 20, 1]"),
    (lambda scores: scores[:, :5], "gives scores [3, 5]"),
    (lambda scores: scores.tolist(), "gives scores as list"),
    (lambda scores: None, "gives scores as NoneType"),
]


@pytest.mark.parametrize(("change", "says"), SHAPES, ids=[says for _, says in SHAPES])
def test_scores_of_another_shape_are_refused(change: object, says: str) -> None:
    with pytest.raises(ValueError) as refused:
        Scores(change).select(tokens(), Cut(ENCODED, Keep(5)))
    assert says in str(refused.value)


SELECTIONS = [
    (lambda valid: valid, "selects a Tensor, but must return a Selection"),
    (lambda valid: None, "selects a NoneType"),
    (lambda valid: Selection(valid.float()), "keeps torch.float32"),
    (lambda valid: Selection(valid[:, :5]), "a selection's keep is a tensor of bool [B, N] = [4, 16]"),
    (lambda valid: Selection(torch.arange(4)[None].repeat(len(valid), 1)), "keeps torch.int64 [4, 4]"),
    (lambda valid: Selection(torch.zeros_like(valid)), "kept no visual token of an image"),
    (lambda valid: Selection(valid & (torch.arange(len(valid)) > 0)[:, None]), "kept no visual token of an image"),
]


@pytest.mark.parametrize(("change", "says"), SELECTIONS, ids=[says for _, says in SELECTIONS])
def test_selections_of_another_shape_are_refused(change: object, says: str) -> None:
    vlm, prompts, _, seen = batch("llava")
    with torch.inference_mode(), pytest.raises(ValueError) as refused:
        pruning.forward(vlm, pruning.shrink(vlm, prompts, seen, Selects(change), Keep(4)))
    assert says in str(refused.value)


def test_what_says_of_itself_what_it_should_is_left_alone() -> None:
    class Fine(ScorePruner):
        kind, reference, needs, label = Kind.CONTROL, Reference("A title", "2405.01234"), frozenset({QUESTION}), "Fine"

        def score(self, tokens: VisualTokens) -> torch.Tensor:
            return tokens.features.norm(dim=-1)

    assert Fine().reads_question and Fine().select(tokens(), Cut(ENCODED, Keep(5))).keep.sum(1).tolist() == [5, 5, 5]


def test_a_copy_made_inside_the_block_says_so() -> None:
    vlm, prompts, pixels, _ = batch("llava")
    given = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask, **pixels}
    with torch.inference_mode():
        before = vlm.model(**given).logits
        with diffprune.pruned(vlm.model, "grid", 4):
            copied = copy.deepcopy(vlm.model)
        with pytest.raises(ValueError, match="a copy that was made inside a pruned"):
            copied(**given)
        assert torch.equal(vlm.model(**given).logits, before)


# --- what a benchmark asks --------------------------------------------------------------------------------------------

BENCHMARK = """
from PIL import Image
from diffprune.core.benchmark import Benchmark, Grade, Sample

def one(id="0"):
    return Sample(str(id) if id != 7 else 7, "g", "picture", "what colour?", {})

class Bad(Benchmark):
    revision = "1"
    def samples(self, split, limit=None, protocol="llava"):
        SAMPLES
    def image(self, sample):
        IMAGE
    def grade(self, sample, answer, protocol="llava"):
        return Grade(0.0, answer, "red")
    def aggregate(self, rows):
        return {"accuracy": 0.0}
"""
GOOD = {"SAMPLES": "return [one(0), one(1)]", "IMAGE": "return Image.new('RGB', (96, 96))"}
ASKED = [
    ("SAMPLES", "return None", "samples() gives None for split 'test', but must give a list of Sample"),
    ("SAMPLES", "return [{'id': '0'}]", "samples() gives a list of other things for split 'test'"),
    ("SAMPLES", "return []", "samples() gives an empty list"),
    ("SAMPLES", "return [one(0), one(0), one(1)]", "2 samples of split 'test' have the id '0', but each has its own"),
    ("SAMPLES", "return [one(7)]", "a sample's id is 7, but must be text"),
    ("SAMPLES", "open('nowhere.json')", "samples() fails for split 'test' (FileNotFoundError"),
    ("IMAGE", "return 'nowhere.png'", "the picture of sample '0' is a str, but must be a PIL image"),
    ("IMAGE", "return Image.open('nowhere.png')", "the picture of sample '0' cannot be opened (FileNotFoundError"),
]


@pytest.mark.parametrize(("part", "body", "says"), ASKED, ids=[says[:50] for *_, says in ASKED])
def test_what_a_benchmark_asks_is_looked_at_before_the_start(part: str, body: str, says: str) -> None:
    text = BENCHMARK
    for name, right in GOOD.items():
        text = text.replace(name, body if name == part else right)
    written("benchmarks", text)
    code, sentence = commands.call(["evaluate", "--pruner", "grid", "--budget", "3", "--benchmark", "bad", "--dry-run"])
    assert (code, says in sentence, "\n" in sentence) == (2, True, False), sentence


def test_a_job_file_that_exits_is_told_like_one_that_fails(tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(4)\n")
    code, sentence = commands.call(["run", str(tmp_path / "leaves.py"), "--dry-run"])
    assert code == 2 and "leaves.py: SystemExit: 4" in sentence
