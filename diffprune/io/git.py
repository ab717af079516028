"""Git, asked about a folder and no other."""

from __future__ import annotations

import os


def environment() -> dict[str, str]:
    """Ours without GIT_* variables: inside a hook of git's they name the hook's repository, whatever folder is asked about."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
