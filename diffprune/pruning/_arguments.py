"""Arguments of the public calls: a value, or a spelling of it that can mean one thing only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffprune.core import registry
from diffprune.core.budget import SPELLINGS, Above, Budget, Keep, Share, parse
from diffprune.core.pruner import Pruner
from diffprune.io.qa_rows import check_whole


def budget_of(value: Any) -> Budget:
    """A budget, or its spelling as text or number: `4` is `Keep(4)`, `0.11` is `Share(0.11)`, `"22%"` is `Share(0.22)`.

    Raises:
        ValueError: neither.
    """
    if isinstance(value, (Keep, Share, Above)):
        return value
    if isinstance(value, str):
        return parse(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Keep(value) if isinstance(value, int) else Share(value)
    raise ValueError(f"{value!r:.80} is not a budget: {SPELLINGS}")


def pruner_of(value: Any) -> Pruner:
    """A method, or its spelling: `"random"` is `diffprune.pruner("random")`.

    Raises:
        ValueError: neither, or no such method.
    """
    if isinstance(value, Pruner):
        return value
    if isinstance(value, str):
        made: Pruner = registry.load("pruners", value)
        return made
    raise ValueError(f"{value!r:.80} is not a pruner: write diffprune.pruner('attention'), or 'attention'")


def rows_of_questions(images: Any, questions: Any) -> tuple[list[list[Any]], list[str]]:
    """(images of each question, questions), from one or many of both.

    Raises:
        ValueError: other numbers of images than of questions, a question without an image, or one that is no text or holds half a
            character.
    """
    if isinstance(questions, str):
        questions, images = [questions], [images]
    elif _is_image(images):
        raise ValueError(f"one image and {len(questions)} questions: give one image, or one list of images, per question")
    asked, rows = list(questions), list(images)
    if len(rows) != len(asked):
        raise ValueError(f"{len(rows)} images and {len(asked)} questions: give one image, or one list of images, per question")
    if wrong := [question for question in asked if not isinstance(question, str)]:
        raise ValueError(f"a question is text, not {wrong[0]!r:.80}")
    for number, question in enumerate(asked):
        check_whole(question, f"question {number}")
    shown = [list(row) if isinstance(row, Sequence) and not _is_image(row) else [row] for row in rows]
    if not shown or not all(shown):
        raise ValueError("a question without an image: give every question at least one")
    return shown, asked


def _is_image(value: Any) -> bool:
    """Whether it is one picture, as `open_image` takes it, and not several."""
    return isinstance(value, (Image.Image, str, Path, bytes, Mapping))
