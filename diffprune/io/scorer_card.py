"""The card of a scorer, README.md beside its weights: whose it is, how it is used, and how it was made, as the Hub shows it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)  # owner/name
CARD = """---
library_name: diffprune
tags: [visual-token-pruning]
{base}---
# {spec}

{about} for `{model}`. Use it with

    pruner = diffprune.from_pretrained("{place}")

{facts}
"""


def card(about: str, spec: str, place: str, facts: Mapping[str, Any]) -> str:
    """about: what it is, "A visual-token scorer"; place: the folder or the name of the Hub it is had from; facts: of its making."""
    model = str(facts.get("model", "a VLM"))
    base = f"base_model: {model}\n" if HUB_NAME.fullmatch(model) else ""
    lines = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    return CARD.format(about=about, spec=spec, model=model, place=place, base=base, facts=lines)
