"""Drawing whole groups: the only way in which a benchmark gives fewer questions than it has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from hashlib import sha256


def drawn(groups: Sequence[str], limit: int) -> set[str]:
    """As many groups as hold `limit` rows (`groups`: the group of every row), in the order of the hash of their names.

    The order of the rows does not matter, and a smaller limit draws a part of what a larger one draws.
    """
    sizes, chosen, held = Counter(groups), set[str](), 0
    for name in sorted(sizes, key=lambda group: sha256(group.encode()).digest()):
        if held >= limit:
            break
        chosen.add(name)
        held += sizes[name]
    return chosen
