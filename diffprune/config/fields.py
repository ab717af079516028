"""Pydantic field types: plug-ins, models and budgets by their spelling, which hold the value; counts and seeds in their ranges."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

from diffprune.core import budget, registry
from diffprune.core.budget import Budget
from diffprune.core.spec import Spec
from diffprune.vlm.load import model_spec


def _spec(kind: str, value: Any) -> Spec:
    if isinstance(value, (str, Spec)):
        return registry.spec(kind, value)
    raise ValueError(f"{value!r:.100} is no {kind.rstrip('s')}: write its name, as text")


def _model(value: Any) -> Spec:
    if isinstance(value, (str, Spec)):
        return model_spec(value)
    raise ValueError(f"{value!r:.100} is no model: write its name, as text")


def _budget(value: Any) -> Any:
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return budget.parse(str(value))
    if isinstance(value, Budget):
        return value
    raise ValueError(f"{value!r:.100} is no budget: write Keep(64), Share(1/9), Above(0.5), 64 or 22%")


TEXT = PlainSerializer(str, return_type=str, when_used="json")
PrunerSpec = Annotated[Spec, BeforeValidator(partial(_spec, "pruners")), TEXT]
BenchmarkSpec = Annotated[Spec, BeforeValidator(partial(_spec, "benchmarks")), TEXT]
ModelSpec = Annotated[Spec, BeforeValidator(_model), TEXT]
BudgetValue = Annotated[Budget, BeforeValidator(_budget), TEXT]


def _no_truth(number: str, value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be {number}, not {str(value).lower()}")
    return value


MOST, MOST_WORKERS = 10**9, 4096
# Numbers of settings, none of them a truth value, of which Python makes 1 and 0. Bounds stand behind that: pydantic leaves out
# those that a section adds to a bound in front of it, such as the 2 of `rounds: Count = Field(10, ge=2)`.
Whole = Annotated[int, BeforeValidator(partial(_no_truth, "a whole number"))]
Real = Annotated[float, BeforeValidator(partial(_no_truth, "a number"))]
Count = Annotated[Whole, Field(ge=1, le=MOST)]
Seed = Annotated[Whole, Field(ge=0, lt=2**31)]
Workers = Annotated[Whole, Field(ge=1, le=MOST_WORKERS)]


def each_once(found: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values of a setting as they are.

    Raises:
        ValueError: one of them is named twice, however it was spelled; plug-ins whose data or weights lie elsewhere are two.
    """
    told = [(one, getattr(one, "all_places", ())) for one in found]
    for number, one in enumerate(told):
        if one in told[:number]:
            raise ValueError(f"{str(one[0])!r} is named twice, perhaps in two spellings: name it once")
    return found
