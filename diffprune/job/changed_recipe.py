"""In which settings a scorer that is there was trained otherwise than a job asks: what a refusal to go on in its folder names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from diffprune.io.checkpoint import read_config
from diffprune.job.settings import changes
from diffprune.train.loop import scorers
from diffprune.train.recipe import SHAPE_NOTHING, Recipe

MOST = 6


def told(recipe: Recipe, folder: Path) -> str:
    """A sentence on the first scorer in `folder` that the recipe would not train so; "" where there is none."""
    return next(_differing(recipe, folder), "")


def _differing(recipe: Recipe, folder: Path) -> Iterator[str]:
    for (spec, _), place in scorers(recipe, folder).items():
        try:
            facts = read_config(place).get("facts")
        except ValueError:
            continue
        if not isinstance(facts, dict) or facts.get("recipe_key") == recipe.key(spec):
            continue
        old, new = facts.get("recipe"), recipe.of(spec).model_dump(mode="json", exclude=set(SHAPE_NOTHING))
        found = list(changes({key: old[key] for key in new if key in old}, new, "")) if isinstance(old, dict) else []
        what = (
            f"with other settings ({', '.join(found[:MOST])})"
            if found
            else "by other code, or on data or a model that have changed"
        )
        yield f"{place} was trained {what}: give this one a name of its own, as in --name {folder.name}-2, or remove what is there"
