"""What `--set key=value` says: settings by their path, values as JSON or Python writes them."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from typing import Any

MOST_NESTED = 12
NESTED = "--set: {!r:.60} is nested deeper than any setting"


def value_of(text: str) -> Any:
    """The value of `--set key=value`: JSON or a Python literal, else the text itself."""
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError):
            continue
        except (RecursionError, MemoryError):
            raise ValueError(NESTED.format(text)) from None
        if _depth(found) > MOST_NESTED:
            raise ValueError(NESTED.format(text))
        return found
    return text


def _depth(value: Any) -> int:
    """How deep lists and mappings lie in each other."""
    level, depth = [value], 0
    while level:
        level = [one for item in level for one in _within(item)]
        depth += 1
    return depth - 1


def _within(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, list | tuple | set) else []


def settings_of(pairs: Sequence[str]) -> dict[str, Any]:
    """`["train.steps=50"]` -> `{"train.steps": 50}`.

    Raises:
        ValueError: a pair without an equals sign, or two of one key.
    """
    found: dict[str, Any] = {}
    written: dict[str, str] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {pair}: write key=value, as in --set train.steps=50")
        key = key.strip()
        if key in found:
            raise ValueError(f"--set {written[key]} and --set {pair} set one thing twice: leave one of them out")
        found[key], written[key] = value_of(text.strip()), pair
    return found
