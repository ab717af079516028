"""A call in a parcel: whoever passes it on imports nothing of what it needs, which saves training's controller seconds."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any


def packed(function: Callable[..., Any], *arguments: Any) -> dict[str, bytes]:
    """A parcel; function: one that is found by its name in its module, wherever the parcel is opened."""
    return {"call": pickle.dumps((function, arguments))}


def opened(parcel: Mapping[str, bytes]) -> Any:
    """Make the call. Parcels come from this run's own driver."""
    function, arguments = pickle.loads(parcel["call"])
    return function(*arguments)
