"""The contract of a method: what it says of itself, its plan of cuts, and a selection for each."""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffprune.core.budget import Budget
from diffprune.core.evidence import Evidence
from diffprune.core.site import ENCODED, Cut, Plan
from diffprune.core.spec import Spec
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.core.vlm import Shape

FULL, BLIND = "Unpruned", "No image"  # labels of bounds: the model as it is, and its questions without their pictures


class Kind(enum.StrEnum):
    """What a method is, so that tables and figures can group methods they have never heard of."""

    BOUND = "bound"  # keeps everything: what the others are measured against
    CONTROL = "control"  # looks at nothing a method should beat
    RULE = "rule"  # training-free
    CALIBRATED = "calibrated"  # fitted without gradients
    TRAINED = "trained"
    DIAGNOSTIC = "diagnostic"  # answers a question about a method and saves nothing


@dataclass(frozen=True)
class Reference:
    """The paper a method comes from; tables print it. Empty for controls."""

    title: str = ""
    arxiv: str = ""


@dataclass(frozen=True)
class TrainedOn:
    """The model a scorer was trained on: its name, the hash of its weights, and their type, as in its card."""

    model: str
    weights_sha256: str
    dtype: str


class Pruner(ABC):
    """A method that chooses which visual tokens survive. Stateless between calls: the same tokens, the same answer.

    Defining a class below this one raises ValueError where it says of itself what is of another type than stands here.

    label:     name in tables and figures; the file's name unless a class says another.
    kind, reference: what it is and the paper it comes from.
    option_labels: words for options in a label, where their own names would read wrong.
    shared_options: options, and their defaults, that all classes below this one take beside their constructor's, as attributes.
    replicate_options: options that give another replicate of the same method, such as a seed, not another method.
    needs:     evidence that it looks at beside the features.
    inner:     the method that a wrapper holds; tables tell wrappers by it.
    slack:     an image keeps at least the count of a budget divided by this and at most that many times it; 1 is exactly.
    """

    label: ClassVar[str]
    kind: ClassVar[Kind] = Kind.RULE
    reference: ClassVar[Reference] = Reference()
    option_labels: ClassVar[Mapping[str, str]] = {}
    shared_options: ClassVar[Mapping[str, Any]] = {}
    replicate_options: ClassVar[frozenset[str]] = frozenset()
    needs: frozenset[Evidence] = frozenset()
    inner: Pruner | None = None
    slack: float = 1.0
    spec: Spec = Spec("")  # what the registry was asked for, with the hash of what was learnt
    weights_sha256: str = ""  # 20 digits, of what was learnt; empty for rules
    recipe: str = ""  # of a trained scorer: the hash of its recipe, seeds aside
    trained_seed: int | None = None
    trained_on: TrainedOn | None = None  # of a trained scorer
    other_model: bool = False  # it may serve another model than that, because its user says so

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "label" not in vars(cls):
            cls.label = cls.__module__.rpartition(".")[2].removeprefix("diffprune_pruners_")  # of a user's folder
        _check_description(cls)

    @property
    def reads_question(self) -> bool:
        """Whether the choice may depend on the question; tables keep such methods apart from image-only ones."""
        return any(evidence.of_question for evidence in self.needs)

    def cuts(self, budget: Budget, shape: Shape) -> Plan:
        """The cuts this method makes to meet `budget`: one before the projector, unless a method says others.

        A budget means the average over decoder layers: `core.site.staged` gives the cuts of a method that removes in stages.

        Raises:
            ValueError: the method cannot meet this budget in a model of this shape.
        """
        return (Cut(ENCODED, budget),)

    @abstractmethod
    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        """Choose the survivors of one cut. Never looks at padding, never at another image of the batch.

        Raises:
            ValueError: the method cannot meet this kind of budget.
        """


def _check_description(cls: type[Pruner]) -> None:
    """Raises ValueError: an attribute of the class that is of another type than tables, figures and keys read."""
    own, examples = vars(cls), {"kind": "Kind.RULE", "reference": "Reference('title', '2405.01234')"}
    if not isinstance(own["label"], str) or not own["label"].strip() or "\n" in own["label"]:
        raise ValueError(f"{cls.__name__}: label is {own['label']!r:.80}, but must be text of one line")
    if own["label"] in (FULL, BLIND) and getattr(cls, "kind", None) is not Kind.BOUND:
        raise ValueError(f"{cls.__name__}: label is {own['label']!r}, as tables call a bound: give the method another one")
    for name, wanted in (("kind", Kind), ("reference", Reference)):
        if name in own and not isinstance(own[name], (wanted, property)):
            raise ValueError(
                f"{cls.__name__}: {name} is {own[name]!r:.80}, but must be a {wanted.__name__}, as in {examples[name]}"
            )
    needs = own.get("needs", frozenset())
    if isinstance(needs, frozenset | set | list | tuple) and not (
        isinstance(needs, frozenset) and all(isinstance(evidence, Evidence) for evidence in needs)
    ):
        raise ValueError(
            f"{cls.__name__}: needs is {needs!r:.80}, but must be a frozenset of evidence, as in frozenset({{QUESTION}})"
        )


class ScorePruner(Pruner):
    """A method that only ranks tokens by a score; the budget picks the best."""

    @property
    def by_score_alone(self) -> bool:
        """Whether the budget and the scores decide everything, so that choosing can be part of a CUDA graph."""
        return type(self).select is ScorePruner.select

    @abstractmethod
    def score(self, tokens: VisualTokens) -> Tensor:
        """Scores [B N] float: higher is kept first. Values at padding are ignored."""

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        """The best by score.

        Raises:
            ValueError: scores that have no order (`ordered`); or a kind of budget this method cannot meet.
        """
        return Selection(cut.budget.pick(self.ordered(tokens), tokens.valid))

    def ordered(self, tokens: VisualTokens) -> Tensor:
        """Scores [B N] that have an order.

        Raises:
            ValueError: not one score for each token, or a score that is NaN, which no order has a place for.
        """
        scores = self.score(tokens)
        if not isinstance(scores, Tensor) or scores.shape != tokens.valid.shape:
            found = list(scores.shape) if isinstance(scores, Tensor) else f"as {type(scores).__name__}"
            raise ValueError(
                f"{self.label} gives scores {found}, but must give one for every token, a tensor [B, N] = "
                f"{list(tokens.valid.shape)}"
            )
        asked = scores.is_cpu or not torch.cuda.is_current_stream_capturing()  # a graph under capture cannot be asked for values
        if asked and math.isnan(scores.sum().item()) and bool((scores.isnan() & tokens.valid).any()):  # no sum hides a NaN
            raise ValueError(
                f"{self.label} gives scores that are NaN, so nothing can be chosen by them: its weights or its evidence are damaged"
            )
        return scores
