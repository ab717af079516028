"""One small JSON object from bytes that anybody may have damaged."""

from __future__ import annotations

import json
from typing import Any


def parsed(raw: bytes | str) -> dict[str, Any]:
    """The object a text holds.

    Raises:
        ValueError: it is no JSON, or no object; says which, in words that follow the file's name.
    """
    try:
        found = json.loads(raw)
    except RecursionError:
        raise ValueError("not valid JSON (nested without end)") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})" if raw.strip() else "empty") from None
    if not isinstance(found, dict):
        raise ValueError(f"no JSON object but {type(found).__name__}")
    return found
