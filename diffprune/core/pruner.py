"""The contract of a method: a plan of cuts, and a selection for each."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffprune.core.budget import Budget
from diffprune.core.spec import Spec
from diffprune.core.tokens import Relaxation, Selection, VisualTokens


class Need(enum.Enum):
    """What a pruner must be given beside the features; the path computes only what is asked for."""

    TEXT = "text"  # the embedded question
    ENCODER_ATTENTION = "encoder_attention"  # attention each token receives in the vision encoder
    IDENTITY = "identity"  # a number that tells images apart, whatever batch they come in


class Stage(enum.Enum):
    """Where a cut happens; the value orders the stages along the model."""

    ENCODED = 0  # encoder output, before the projector: where DiffPrune acts
    PROJECTED = 1  # before the decoder, in its width


@dataclass(frozen=True)
class Cut:
    """One removal of tokens. From the plan alone follow the tokens every layer sees, hence the cost."""

    stage: Stage
    budget: Budget


@dataclass(frozen=True)
class Reference:
    """The paper a method comes from; tables print it. Empty for controls."""

    title: str = ""
    arxiv: str = ""


class Pruner(ABC):
    """A method that chooses which visual tokens survive. Stateless between calls: the same tokens, the same answer."""

    reference: ClassVar[Reference] = Reference()
    needs: frozenset[Need] = frozenset()
    stage: Stage = Stage.ENCODED
    label: ClassVar[str] = ""
    kind: ClassVar[str] = "rule"
    option_labels: ClassVar[Mapping[str, str]] = {}
    replicate_options: ClassVar[frozenset[str]] = frozenset()
    spec: Spec = Spec("")  # what the registry was asked for, with the hash of what was learnt
    weights_sha256: str = ""  # 20 digits, of what was learnt; empty for rules
    recipe: str = ""  # of a trained scorer: the hash of its recipe, seeds aside
    trained_seed: int | None = None

    @property
    def reads_question(self) -> bool:
        """Whether the method looks at the question."""
        return Need.TEXT in self.needs

    def plan(self, budget: Budget) -> tuple[Cut, ...]:
        """The cuts this method makes to meet `budget`, in order along the model."""
        return (Cut(self.stage, budget),)

    @abstractmethod
    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        """Choose the survivors. Never looks at padding, never at another image of the batch.

        Raises:
            ValueError: the method cannot meet this kind of budget.
        """


class ScorePruner(Pruner):
    """A method that only scores; the budget picks the best."""

    @abstractmethod
    def score(self, tokens: VisualTokens) -> Tensor:
        """Scores [B N] float: higher is kept first. Values at padding are ignored."""

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        return Selection(budget.pick(self.score(tokens), tokens.valid), tokens.features)


class TrainablePruner(ScorePruner):
    """A learned scorer with two faces: `throttle` in training keeps every token, `select` at inference only masks.

    schedule: how its temperature falls in training: "cosine" (DiffPrune, METHODS 2.6) or "geometric" (1 to 0.1, METHODS 3.2).
    attention_implementation: decoder attention its throttle needs; None is the model's own.
    """

    schedule: ClassVar[str] = "cosine"
    attention_implementation: ClassVar[str | None] = None

    @abstractmethod
    def build(self, tokens: VisualTokens) -> torch.nn.ModuleDict:
        """Make the networks for the widths of `tokens` and standardise on these calibration images; returns what trains."""

    @abstractmethod
    def throttle(self, tokens: VisualTokens, budget: Budget, temperature: float, generator: torch.Generator) -> Relaxation:
        """Degrade each token according to its score so that the answer loss can teach the scorer.

        temperature: of the relaxation, annealed by the training loop.
        generator: the only source of randomness, so a step can be replayed.
        """

    @abstractmethod
    def save_pretrained(self, folder: Path | str, **facts: Any) -> None:
        """Write config.json, model.safetensors and a card to `folder`; `facts` (recipe, figures) go into both texts."""
