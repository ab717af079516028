"""Base of learned scorers: the shared scorer (and denoiser), trained through a relaxation of its selection."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from diffprune.core.evidence import QUESTION
from diffprune.core.fitted import RelaxedPruner
from diffprune.core.tokens import VisualTokens
from diffprune.pruners._networks import Networks
from diffprune.pruners._scorer import Denoiser, Scorer, num_heads
from diffprune.pruners._scorer_config import DIMS, check_asked


class Learned(Networks, RelaxedPruner):
    """A scorer trained through a relaxation of its selection.

    question_aware: the scorer reads the question: True by late interaction, "cross" by cross-attention.
    denoiser:       there is one, which sees every token by itself; "global": one that sees all of an image's, a control.
    attention:      the scorer's blocks look at other tokens; None: as the paper's do, unless it is scaled down (`scaled`).
    depth:          blocks of the scorer; 0: a linear function of each standardised token. None: the paper's two, or what they are
                    scaled to beside a small encoder (`scaled`).
    width:          of the scorer; 0: as `depth` has it.
    other_model:    it may serve another model than the one it was trained on.

    Raises:
        ValueError: the folder holds another method, other options, or damaged weights.
    """

    option_labels = Networks.option_labels | {"attention": "self-attention"}
    outputs: ClassVar[int] = 1  # logits per token

    def __init__(
        self,
        weights: Path | None = None,
        *,
        question_aware: bool | str = False,
        attention: bool | None = None,
        denoiser: bool | str = True,
        depth: int | None = None,
        width: int = 0,
        other_model: bool = False,
    ) -> None:
        self.needs = self.needs | {QUESTION} if question_aware else self.needs
        options = {
            "question_aware": question_aware, "attention": attention, "denoiser": denoiser, "depth": depth, "width": width,
        }  # fmt: skip
        check_asked(options, self.label)
        super().__init__(weights, options, other_model=other_model)

    def _sizes(self, features: int, text: int | None) -> dict[str, int | None]:
        width, depth, attention = scaled(features)
        if self.options["attention"] is None:
            self.options["attention"] = attention and self.options["depth"] != 0
        return {
            "features": features,
            "text": text,
            "width": self.options["width"] or width,
            "depth": depth if self.options["depth"] is None else self.options["depth"],
        }

    def _make(self) -> nn.ModuleDict:
        features, text, width, depth = (self.dims[name] for name in DIMS)
        assert features and width and depth is not None, "a scorer has widths and a depth"
        scorer = Scorer(
            features, width, depth, num_heads(width),
            attention=self.options["attention"], text=text, cross=self.options["question_aware"] == "cross", outputs=self.outputs,
        )  # fmt: skip
        self.networks = nn.ModuleDict({"scorer": scorer})
        if self.options["denoiser"]:
            self.networks["denoiser"] = Denoiser(features, everywhere=self.options["denoiser"] == "global")
        return self.networks

    def logits(self, tokens: VisualTokens) -> Tensor:
        """Output of the scorer for each token: [B N] or [B N outputs].

        Raises:
            ValueError: the method has not been trained, or was trained for features of another width.
        """
        scorer = self.trained("scorer")
        scores: Tensor = scorer(self.seen(tokens), tokens.valid, *(self._question(tokens) or ()))
        return scores

    def score(self, tokens: VisualTokens) -> Tensor:
        return self.logits(tokens)

    def denoised(self, z: Tensor, valid: Tensor) -> Tensor:
        """Through the denoiser, if the method has one. z [B N D], valid [B N]."""
        assert self.networks is not None, "build comes before relax"
        return self.networks["denoiser"](z, valid) if "denoiser" in self.networks else z


def scaled(features: int) -> tuple[int, int, bool]:
    """(width, blocks, self-attention) of the scorer for encoder features of this width.

    The paper's is 1,024 wide on CLIP-L's 1,024, two blocks. A small encoder feeds a small decoder, beside which that shape
    would cost a good part of what it saves: below 512 half the width, one block, every token by itself. On the embedded model that
    costs what a sixth of the width with self-attention does, and trains far more steadily: at such a width some seeds never
    learn to keep what is small, such as signs.
    """
    return (min(1024, features), 2, True) if features >= 512 else (max(16, features // 2 // 16 * 16), 1, False)
