"""Text that holds a list or a mapping, as CSV files and tables written by pandas have it: JSON, or a Python literal."""

from __future__ import annotations

import ast
import io
import json
import tokenize
from itertools import pairwise
from typing import Any

LONGEST = 1_000_000  # letters


def listed(text: str) -> Any:
    """The list or mapping that a text spells, else the text itself.

    Python joins neighbouring texts, so "['a' 'b']", as NumPy prints arrays, would be a list of one; it stays text.
    """
    inner = text.strip()
    if len(inner) > LONGEST or inner[:1] + inner[-1:] not in ("[]", "{}", "()"):
        return text
    try:
        found = json.loads(inner)
    except (ValueError, RecursionError):
        try:
            found = None if _joined(inner) else ast.literal_eval(inner)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError):
            return text
    return found if isinstance(found, list | tuple | dict) else text


def _joined(text: str) -> bool:
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type != tokenize.NL]
    return any(a == b == tokenize.STRING for a, b in pairwise(kinds))
