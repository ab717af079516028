"""What a job trains on, looked at before anything starts: whether it is there, can be used, and is as much as is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from diffprune import data as training
from diffprune.train.recipe import Recipe


class Looked(NamedTuple):
    """A sentence on the data, and whether they are here to be read."""

    told: str
    here: bool


COUNTS = ("images", "calibration_images", "validation_images")


def check(recipe: Recipe, section: str, dry: bool = False, stated: bool = False) -> Looked:
    """A sentence on the first example. The first draws are made as the run will make them.

    section: of the job, "train" or "search.recipe", for messages. dry: nothing will be run, so nothing is downloaded. stated: the
    job says what its model is like, so that it can be planned where neither model nor data are: what is not here is told.

    Raises:
        ValueError: the data are not here, are empty or cannot be used, or are fewer than a setting asks for.
    """
    if dry and stated and (gone := _gone(recipe)):
        return Looked(f"the data {recipe.data} are not here ({gone}): a run here would be refused", here=False)
    source = training.source(recipe.data)
    if dry and source.fetched:
        return Looked(f"the data {recipe.data} are looked at when a run downloads them", here=False)
    held = {training.CALIBRATION: recipe.calibration_images, training.VALIDATION: recipe.validation_images}
    example = training.look(recipe.data, recipe.seeds[0], recipe.images, held, recipe.max_broken_share)
    _enough(recipe, source.size, section)
    return Looked(f"the first example is {example}", here=True)


def _gone(recipe: Recipe) -> str:
    """The first place of the data that does not exist; "" where all do."""
    return next((place for _, place in recipe.data.places if not Path(place).exists()), "")


def _enough(recipe: Recipe, rows: int | None, section: str) -> None:
    """Raises ValueError: a setting, other than by its default, asks for more images than there are rows."""
    if rows is None:
        return
    defaults: Mapping[str, int] = {name: Recipe.model_fields[name].default for name in COUNTS}
    for name in COUNTS:
        asked = getattr(recipe, name)
        if asked > rows and asked != defaults[name]:
            raise ValueError(
                f"{section}.{name} is {asked:,}, but the data {recipe.data} have {rows:,} rows with a picture: give fewer, as in "
                f"--set {section}.{name}={min(rows, defaults[name])}"
            )
