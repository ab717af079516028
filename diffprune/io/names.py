"""Names of runs, commits, parts and blobs: safe as file names on every system."""

from __future__ import annotations

import re

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
WINDOWS = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?\Z|.*\.\Z", re.IGNORECASE)


def checked_name(name: str, what: str) -> str:
    """`name`, if it is a safe file name on every system.

    Raises:
        ValueError: anything outside the allow-list, so no separators, no leading dot, no device names of Windows.
    """
    if not isinstance(name, str) or not NAME.match(name) or WINDOWS.match(name):
        raise ValueError(f"{what} {name!r:.100} is refused: 1 to 64 of A-Z a-z 0-9 . _ - and a letter or digit first")
    return name


def without_secrets(address: str) -> str:
    """An address as a message may repeat it: not what stands before an '@' or behind a '?', where people put secrets."""
    return re.sub(r"\?.*", "?...", re.sub(r"//[^/]*@", "//...@", address), flags=re.DOTALL)


def is_key(text: str) -> bool:
    """Whether a text may name a blob: relative, no `..`, nothing hidden, nothing that does not print."""
    names = text.split("/")
    return all(name and name[0] != "." and "\\" not in name and name.isprintable() for name in names)


def checked_key(key: str) -> str:
    """`key`, if it is one.

    Raises:
        ValueError: it is not.
    """
    if not is_key(key):
        raise ValueError(f"{key!r:.100} names no blob: a relative path is needed, without '..' and names that begin with a dot")
    return key
