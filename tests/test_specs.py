"""Specs: what is asked for is one value, however it is written; what is no spelling is refused in one sentence, quickly."""

from __future__ import annotations

import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffprune.core import registry
from diffprune.core.spec import Spec, parse
from diffprune.job.job import Job
from diffprune.train.recipe import Recipe
from diffprune.vlm.load import load, model_spec

METHODS = ("random", "grid", "attention", "diffprune", "gumbel_topk")


def pruner(text: str | Spec) -> Spec:
    return registry.spec("pruners", text)


def drawn(draw: random.Random, depth: int = 2) -> str:
    """A random method with random options, spaces and order, wrapped now and then."""
    if depth and draw.random() < 0.4:
        return f"replaced({draw.choice(('', 'method = '))}{drawn(draw, depth - 1)} )"
    name = draw.choice(METHODS)
    options = {"random": {"seed": draw.randrange(5)}, "diffprune": {"depth": draw.randrange(3), "denoiser": draw.random() < 0.5}}
    given = [f"{key}={value}" for key, value in options.get(name, {}).items() if draw.random() < 0.7]
    draw.shuffle(given)
    return f" {name}({', '.join(given)})" if given or draw.random() < 0.5 else name


def test_a_spelling_reads_back_as_the_value_it_is_of() -> None:
    draw = random.Random(0)
    for _ in range(300):
        spec = pruner(drawn(draw))
        assert pruner(str(spec)) == spec and str(pruner(str(spec))) == str(spec)
        assert hash(pruner(str(spec))) == hash(spec) and pruner(str(spec)).identity == spec.identity


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("random(3)", "random(seed=3)"),
        ("random(seed=0)", "random"),
        ("grid()", "grid"),
        (" random( seed = 3 ,)", "random(seed=3)"),
        ("diffprune(depth=1, denoiser=False)", "diffprune(denoiser=False, depth=1)"),
        ("replaced(method=attention)", "replaced(attention)"),
        ("replaced(random(seed=0))", "replaced(random)"),
        ("diffprune(weights='/a/b/c')", "diffprune(weights='/d/e/f')"),
    ],
)
def test_one_thing_has_one_value_however_it_is_written(one: str, other: str) -> None:
    assert pruner(one) == pruner(other) and str(pruner(one)) == str(pruner(other)) and len({pruner(one), pruner(other)}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("random(seed=1)", "random"),
        ("diffprune(denoiser=False)", "diffprune"),
        ("replaced(attention)", "attention"),
        ("replaced(random(seed=1))", "replaced(random)"),
        ("replaced(replaced(grid))", "replaced(grid)"),
    ],
)
def test_two_things_have_two_values(one: str, other: str) -> None:
    assert pruner(one) != pruner(other) and pruner(one).identity != pruner(other).identity


def test_a_wrapper_holds_a_value_not_a_text() -> None:
    spec = pruner("replaced(replaced(diffprune(depth=2)))")
    inner = spec.get("method").get("method")
    assert inner == pruner("diffprune(depth=2)") and inner.get("depth") == 2
    assert str(spec) == "replaced(method=replaced(method=diffprune(depth=2)))"
    made: Any = registry.make("pruners", spec)
    assert made.spec == registry.sourced("pruners", spec) != spec and made.inner.inner.options["depth"] == 2


@pytest.mark.parametrize(("text", "value"), [("1/9", 1 / 9), ("(1/2)/4", 0.125), ("-1/2", -0.5), ("3", 3), ("-3", -3)])
def test_numbers_and_quotients_are_values(text: str, value: float) -> None:
    assert parse(f"name(x={text})").options == (("x", value),)


@pytest.mark.parametrize(
    "text", ["1/0", "1/'a'", "1 + 1", "2 ** 9", "a.b", "[x for x in y]", "f'{a}'", "lambda: 1", "a if b else c"]
)
def test_nothing_is_evaluated(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no quotient of two numbers|is not a plain value"):
        parse(f"name(x={text})")


# Where files lie -----------------------------------------------------------------------------------------------------


def test_where_files_lie_travels_along_and_is_no_part_of_what_is_asked() -> None:
    here, there = pruner("diffprune(depth=1, weights='/a/b/c')"), pruner("diffprune(depth=1, weights='/d/e/f')")
    assert here == there and hash(here) == hash(there) and here.identity == there.identity
    assert "/a/b/c" not in str(here) + repr(here)
    again = pickle.loads(pickle.dumps(here))
    assert (again, again.place("weights")) == (here, Path("/a/b/c")), "a worker finds them"
    assert here.without_places() == here and here.without_places().place("weights") is None


def test_a_wrapped_method_keeps_its_place() -> None:
    spec = pruner("replaced(diffprune(weights='/a/b/c'))")
    assert spec.get("method").place("weights") == Path("/a/b/c") and "/a/b/c" not in str(spec)


@pytest.mark.parametrize("written", ["scorers/one", "./scorers/one", "scorers/../scorers/one"])
def test_a_relative_place_is_absolute_once_it_is_read(written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("scorers/one").mkdir(parents=True)
    place = pruner(f"diffprune(weights={written!r})").place("weights")
    monkeypatch.chdir("/")
    assert place and place.is_absolute() and place.is_dir()


def test_a_model_in_a_folder_is_called_by_its_own_name() -> None:
    Path("models/mine").mkdir(parents=True)
    Path("link").symlink_to("models/mine")
    for written in ("models/mine", "./models/mine/", str(Path("models/mine").absolute()), "link"):
        assert str(model_spec(written)) == "mine" and model_spec(written).place("folder")
    assert model_spec("models/mine(image_mode='pad')") == Spec("mine", (("image_mode", "pad"),))


@pytest.mark.parametrize("text", ["embedded", "tiny(llava)", "tiny(llava, image_mode='pad')", "owner/name(frame='vicuna_v1')"])
def test_a_model_s_spelling_reads_back(text: str) -> None:
    assert model_spec(str(model_spec(text))) == model_spec(text)


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("none", "'none' is called 'unpruned' now"),
        ("replaced('attention')", "without quotes as in replaced(attention)"),
        ("replaced(method='attention(x=1)')", "without quotes"),
        ("replaced(3)", "without quotes"),
        ("atention", "did you mean 'attention'"),
        ("replaced(atention)", "did you mean 'attention'"),
        ("random(sed=1)", "did you mean 'seed'"),
        ("grid(x=1)", "grid has no option 'x': it takes none"),
        ("random(1, 2)", "too many positional"),
        ("random(1, seed=2)", "multiple values"),
        ("random(seed=1, seed=2)", "gives 'seed' more than once"),
        ("random(seed=attention(x=1))", "takes a plain value"),
        ("random(*[1])", "not a plain value"),
        ("random(**{})", "not of the form"),
        ("replaced()", "missing"),
        ("diffprune(weights=3)", "must be a path in quotes"),
        ("diffprune.core", "not of the form"),
        ("", "not of the form"),
        ("grid)(", "not of the form"),
    ],
)
def test_mistakes_are_one_sentence_with_what_would_be_right(text: str, says: str) -> None:
    with pytest.raises(ValueError) as refused:
        pruner(text)
    assert says in str(refused.value) and "\n" not in str(refused.value)


HOSTILE = {
    "deep nesting": "replaced(" * 5_000 + "grid" + ")" * 5_000,
    "deep brackets": "random(seed=" + "(" * 5_000 + "1" + ")" * 5_000 + ")",
    "a long chain": "random(seed=" + "1/" * 50_000 + "1)",
    "a chain that Python parses": "random(seed=" + "1/" * 4_900 + "1)",
    "minus signs": "random(seed=" + "-" * 900 + "1)",
    "brackets that Python parses": "random(seed=" + "[" * 150 + "]" * 150 + ", x=1)",
    "a long name": "a" * 9_000,
    "a long option": f"random({'a' * 9_000}=1)",
    "ten megabytes of a name": "a" * 10_000_000,
    "ten megabytes of text": f"random(seed='{'a' * 10_000_000}'",
    "NUL": "random(seed='\0')\0",
    "a lone surrogate": "random(seed='\ud800'",
    "a lone surrogate as a name": "\ud800",
    "a newline": "random(\nseed=\n",
    "many digits": "random(seed=" + "9" * 100_000 + ")",
}


DOORS: dict[str, Callable[[str], Any]] = {
    "pruner": pruner,
    "benchmark": lambda text: registry.spec("benchmarks", text),
    "model": lambda text: load(f"tiny({text})"),
    "data": lambda text: Recipe(data=text),
    "job": lambda text: Job(name="x", baselines=(text,)),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_one_short_value_error_at_every_door(name: str, door: str) -> None:
    with pytest.raises(ValueError) as refused:
        DOORS[door](HOSTILE[name])
    assert len(str(refused.value)) < 2_000


@pytest.mark.parametrize("place", ["a" * 5_000, "/" + "a" * 5_000, "~nobody-of-this-name/x/y", "a/" * 3_000, "a\0b", "\ud800"])
def test_a_place_that_no_file_can_have_is_a_value_error_when_it_is_looked_for(place: str) -> None:
    with pytest.raises(ValueError):
        registry.load("pruners", pruner(f"diffprune(weights={place!r})"))
    with pytest.raises(ValueError):
        load(model_spec(place))


def test_wrappers_may_be_nested_as_deeply_as_python_parses() -> None:
    spec = pruner("replaced(" * 90 + "grid" + ")" * 90)
    assert str(spec).count("replaced") == 90 and pruner(str(spec)) == spec


@pytest.mark.parametrize("value", [3, None, ["random"], b"random", {"name": "random"}])
def test_what_is_no_text_is_refused_at_the_door(value: object) -> None:
    with pytest.raises(ValueError):
        Job(name="x", baselines=(value,))


@pytest.mark.parametrize(
    ("spelling", "says"),
    [
        ("random(seed=1.5)", "random: seed is 1.5, but must be a whole number"),  # drew what 1 draws, as another replicate
        ("random(seed=True)", "random: seed is True, but must be a whole number"),
        ("fastv(after='x')", "fastv: after is 'x', but must be a whole number"),  # a TypeError
        ("prumerge(plus='no')", "prumerge: plus is 'no', but must be True or False"),  # which is true
        ("cdpruner(question=0)", "cdpruner: question is 0, but must be True or False"),
        ("diffprune(other_model='False')", "diffprune: other_model is 'False', but must be True or False"),
        ("atp(slack=True)", "atp: slack is True, but must be a number"),
        ("replaced(random(seed='a'))", "random: seed is 'a', but must be a whole number"),
        ("diffprune(depth=True)", "DiffPrune: depth is True, but a scorer has a whole number of it"),  # the method says it itself
    ],
)
def test_an_option_of_another_type_is_refused_in_a_sentence(spelling: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        registry.load("pruners", spelling)


def test_a_whole_number_is_a_number() -> None:
    assert registry.load("pruners", "atp(slack=1)").slack == 1 and registry.load("pruners", "dpp(attention, weight=1)").weight == 1
