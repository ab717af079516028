"""The contract of an inference backend: questions about pictures, answered with pruned visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from diffprune.core.budget import Budget
from diffprune.core.pruner import Pruner
from diffprune.core.spec import Spec


@dataclass(frozen=True)
class Shown:
    """A picture. name: equal for equal pictures, so that each is encoded once; image: opens it."""

    name: Hashable
    image: Callable[[], Any]


@dataclass(frozen=True)
class Question:
    """One question about one or more pictures, shown before it in order."""

    pictures: tuple[Shown, ...]
    text: str

    @property
    def name(self) -> Hashable:
        """Equal for questions about the same pictures in the same order."""
        return tuple(picture.name for picture in self.pictures)


@dataclass(frozen=True)
class Answer:
    """What a backend says to one question, and the tokens that went in and came out (the end token included).

    visual_total, visual_kept: of all its pictures together.
    """

    text: str
    visual_total: int
    visual_kept: int
    text_tokens: int
    generated_tokens: int


class Refused(ValueError):
    """The method cannot run like this at all: no question is to blame."""


class Backend(Protocol):
    """A resident model that answers. model: with the hash of its weights; dtype: of the weights, as torch names it."""

    @property
    def model(self) -> Spec:
        """The model that answers, with the hash of its weights."""

    @property
    def dtype(self) -> str:
        """Of the weights, as torch names it."""

    def answer(self, questions: Sequence[Question], pruner: Pruner, budget: Budget, max_new_tokens: int) -> list[Answer]:
        """Greedy answers, one per question, as one batch.

        Raises:
            Refused: the method refuses the budget or the model. Whatever a picture raises: the caller finds out which.
        """

    def answer_blind(self, questions: Sequence[Question], max_new_tokens: int) -> list[Answer]:
        """The same without any visual token."""
