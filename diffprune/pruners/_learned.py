"""Base of learned scorers: standardised features, one set of networks, saved and loaded in the layout of the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffprune.core.budget import Budget
from diffprune.core.evidence import QUESTION, Question
from diffprune.core.fitted import TrainablePruner
from diffprune.core.tokens import VisualTokens
from diffprune.io import checkpoint as files
from diffprune.io.hub import scorer_folder
from diffprune.io.scorer_card import card
from diffprune.pruners._scorer import Denoiser, Scorer
from diffprune.pruners._scorer_config import DIMS, checked, trained_on


class Learned(TrainablePruner):
    """A scorer trained through a relaxation of its selection; `weights` is a folder it was saved to, or a repository of the Hub.

    question_aware: the scorer reads the question. denoiser: there is one.
    attention:      the scorer's blocks look at other tokens; None: as the paper's do, unless it is scaled down (`scaled`).
    depth, width:   blocks of the scorer and their width; 0 scales the paper's shape to the encoder (`scaled`).
    other_model:    it may serve another model than the one it was trained on.

    Raises:
        ValueError: the folder holds another method, other options, or damaged weights.
    """

    option_labels = {"attention": "self-attention", "other_model": "trained on another model"}
    outputs: ClassVar[int] = 1  # logits per token

    def __init__(
        self,
        weights: Path | None = None,
        *,
        question_aware: bool = False,
        attention: bool | None = None,
        denoiser: bool = True,
        depth: int = 0,
        width: int = 0,
        other_model: bool = False,
    ) -> None:
        self.other_model = other_model
        self.options: dict[str, Any] = {
            "question_aware": question_aware, "attention": attention, "denoiser": denoiser, "depth": depth, "width": width,
        }  # fmt: skip
        self.needs = frozenset({QUESTION}) if question_aware else frozenset()
        self.networks: nn.ModuleDict | None = None
        self.dims: dict[str, int | None] = {}
        self.facts: dict[str, Any] = {}
        self.standardise_by(torch.zeros(0), torch.ones(0))
        if weights is not None:
            self._load(scorer_folder(str(weights)))

    # -- networks ----------------------------------------------------------------------------------------------------

    def build(self, tokens: VisualTokens) -> nn.ModuleDict:
        """Networks for the widths of `tokens`; mean and standard deviation per channel from its valid tokens.

        CLIP features are far from unit variance, which variance-preserving noise presumes (arXiv 2605.28051, Eq. 5).
        """
        valid = tokens.features[tokens.valid].float()
        self.standardise_by(valid.mean(0), valid.std(0).clamp_min(1e-6))
        question = self._question(tokens)
        text = None if question is None else question.embedding.shape[-1]
        self.dims = self._sizes(tokens.features.shape[-1], text)
        return self._make().to(tokens.features.device)

    def outline(self, features: int, text: int | None = None) -> nn.ModuleDict:
        """The networks for tokens (and words) of these widths, without values: torch's `meta` device."""
        self.dims = self._sizes(features, text if self.options["question_aware"] else None)
        with torch.device("meta"):
            return self._make()

    def _sizes(self, features: int, text: int | None) -> dict[str, int | None]:
        width, depth, attention = scaled(features)
        if self.options["attention"] is None:
            self.options["attention"] = attention
        return {
            "features": features,
            "text": text,
            "width": self.options["width"] or width,
            "depth": self.options["depth"] or depth,
        }

    def _make(self) -> nn.ModuleDict:
        features, text, width, depth = (self.dims[name] for name in DIMS)
        assert features and width and depth, "a scorer has widths and blocks"
        scorer = Scorer(
            features, width, depth, max(1, width // min(64, max(16, width // 16))),
            attention=self.options["attention"], text=text, outputs=self.outputs,
        )  # fmt: skip
        self.networks = nn.ModuleDict({"scorer": scorer})
        if self.options["denoiser"]:
            self.networks["denoiser"] = Denoiser(features)
        return self.networks

    def to(self, device: torch.device | str) -> None:
        """Everything this method has learnt, on `device`."""
        if self.networks is not None:
            self.networks.to(device)
        self.standardise_by(self.mean.to(device), self.spread.to(device))

    def standardise_by(self, mean: Tensor, spread: Tensor) -> None:
        """mean, spread: [D] of the channels, on the device the networks will work on."""
        self.mean, self.spread = mean, spread
        self._scale = 1 / spread
        self._shift = -mean * self._scale

    def standardised(self, features: Tensor) -> Tensor:
        """z = (x - mean) / standard deviation, per channel, float32, in one pass over the tokens."""
        if self.mean.device != features.device:  # a loaded scorer follows the model
            self.to(features.device)
        return torch.addcmul(self._shift, features.float(), self._scale)

    def restored(self, z: Tensor, like: Tensor) -> Tensor:
        """Back to the space the projector expects, in the dtype of `like`."""
        return (self.mean + self.spread * z).to(like.dtype)

    def logits(self, tokens: VisualTokens) -> Tensor:
        """Output of the scorer for each token: [B N] or [B N outputs].

        Raises:
            ValueError: the method has not been trained, or was trained for features of another width.
        """
        if self.networks is None:
            name = self.spec.name or type(self).__name__.lower()
            raise ValueError(f"{name} has no weights yet: train it (diffprune train), then write {name}(weights='folder')")
        if tokens.features.shape[-1] != self.dims["features"]:
            raise ValueError(
                f"this scorer was trained on features of width {self.dims['features']}, the model gives {tokens.features.shape[-1]}"
            )
        return self.networks["scorer"](self.standardised(tokens.features), tokens.valid, *(self._question(tokens) or ()))

    def _question(self, tokens: VisualTokens) -> Question | None:
        """The question beside the tokens, where this scorer reads it."""
        if QUESTION not in self.needs:
            return None
        found = tokens.evidence.get(QUESTION)
        if not isinstance(found, Question):
            raise ValueError("a question-aware scorer needs the embedded question beside the tokens")
        return found

    def score(self, tokens: VisualTokens) -> Tensor:
        return self.logits(tokens)

    def denoised(self, z: Tensor) -> Tensor:
        """Through the denoiser, if the method has one."""
        assert self.networks is not None, "build comes before relax"
        return self.networks["denoiser"](z) if "denoiser" in self.networks else z

    def counts(self, tokens: VisualTokens, budget: Budget) -> Tensor:
        """[B] float: tokens to let through per image."""
        return torch.tensor([float(budget.count(n)) for n in tokens.counts.tolist()], device=tokens.features.device)

    # -- files -------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: Path | str, **facts: Any) -> None:
        """config.json + model.safetensors + README.md in `folder`; `facts` (recipe, figures) go into both texts, beside those it
        was loaded with."""
        assert self.networks is not None, "build comes before save"
        facts = self.facts | facts
        tensors = {**self.networks.state_dict(), "mean": self.mean, "spread": self.spread}
        text = card("A visual-token scorer", str(self.spec), Path(folder).name, facts)
        config = {"method": self.spec.name, "spec": str(self.spec), "options": self.options, "dims": self.dims, "facts": facts}
        self.weights_sha256 = files.write(folder, tensors, config, text)[:20]

    def _load(self, folder: Path) -> None:
        tensors, config = files.read(folder)
        name, path = str(config.get("method", "no method"))[:60], folder / files.FILE
        if name.replace("_", "") != type(self).__name__.lower():
            raise ValueError(f"{folder}: these weights belong to {name!r}, not to {type(self).__name__}")
        options, dims = checked(config, folder / files.CONFIG)
        for key in ("question_aware", "attention", "denoiser"):
            if self.options[key] not in (options[key], None):
                raise ValueError(
                    f"{folder}: trained with {key}={options[key]}; write {name}({key}={options[key]}, weights='{folder}')"
                )
        for field in ("mean", "spread"):
            if field not in tensors or tensors[field].shape != (dims["features"],) or not tensors[field].is_floating_point():
                raise ValueError(f"{path}: tensor {field!r} is missing or no {dims['features']} floating-point numbers")
        if not bool((tensors["spread"] > 0).all()):
            raise ValueError(f"{path}: tensor 'spread' holds values that are not above 0, by which features are divided")
        self.options, self.dims = options, dims
        with torch.device("meta"):  # shapes alone: what does not fit the file is refused before it is allocated
            networks = self._make()
        files.load_into(networks, {key: value for key, value in tensors.items() if key not in ("mean", "spread")}, path)
        self.standardise_by(tensors["mean"].float(), tensors["spread"].float())
        networks.eval().requires_grad_(False)
        self.weights_sha256 = files.sha256(path)[:20]
        self.trained_on, self.recipe, self.trained_seed = trained_on(config, folder / files.CONFIG)
        self.facts = config.get("facts", {})


def scaled(features: int) -> tuple[int, int, bool]:
    """(width, blocks, self-attention) of the scorer for encoder features of this width.

    The paper's is 1,024 wide on CLIP-L's 1,024, two blocks. A small encoder feeds a small decoder, beside which that shape
    would cost a good part of what it saves: below 512 half the width, one block, every token by itself. On the embedded model that
    costs what a sixth of the width with self-attention does, and trains far more steadily: at such a width some seeds never
    learn to keep what is small, such as signs.
    """
    return (min(1024, features), 2, True) if features >= 512 else (max(16, features // 2 // 16 * 16), 1, False)
