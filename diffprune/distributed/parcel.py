"""A call in a parcel: whoever is handed it imports what it needs when he opens it, and not before.

So a worker of a training answers while it still imports, and the others that it needs are set up meanwhile.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any

from diffprune.core import garbage


def packed(function: Callable[..., Any], *arguments: Any) -> dict[str, bytes]:
    """A parcel; function: one that is found by its name in its module, wherever the parcel is opened."""
    return {"call": pickle.dumps((function, arguments))}


def opened(parcel: Mapping[str, bytes]) -> Any:
    """Make the call. Parcels come from this run's own driver."""
    with garbage.looked_for_seldom():
        function, arguments = pickle.loads(parcel["call"])
    return function(*arguments)
