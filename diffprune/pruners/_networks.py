"""Networks a trained method saves: standardised features, one set of modules, files in the layout of the Hub."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffprune.core.budget import Budget
from diffprune.core.evidence import QUESTION, Question
from diffprune.core.fitted import TrainablePruner
from diffprune.core.tokens import VisualTokens
from diffprune.io import checkpoint as files
from diffprune.io.hub import scorer_folder
from diffprune.io.scorer_card import card
from diffprune.pruners._scorer_config import CHOICES, SIZES, checked, trained_on


class Networks(TrainablePruner):
    """A trained method's networks and files.

    weights: the folder it was saved to, or a repository of the Hub; none: not trained yet.
    options: of the networks, as `_scorer_config` knows them; they are saved with the weights.
    other_model: it may serve another model than the one it was trained on.

    Raises:
        ValueError: the folder holds another method, other options, or damaged weights.
    """

    option_labels = {"other_model": "trained on another model"}

    def __init__(self, weights: Path | None, options: dict[str, Any], *, other_model: bool = False) -> None:
        self.options, self.other_model = options, other_model
        self.networks: nn.ModuleDict | None = None
        self.dims: dict[str, int | None] = {}
        self.facts: dict[str, Any] = {}
        self.standardise_by(torch.zeros(0), torch.ones(0))
        if weights is not None:
            self._load(scorer_folder(str(weights)))

    # -- networks ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def _sizes(self, features: int, text: int | None) -> dict[str, int | None]:
        """`_scorer_config.DIMS` for tokens (and words) of these widths."""

    @abstractmethod
    def _make(self) -> nn.ModuleDict:
        """`networks` of the sizes in `dims`."""

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
        self.dims = self._sizes(features, text if QUESTION in self.needs else None)
        with torch.device("meta"):
            return self._make()

    def trained(self, name: str) -> nn.Module:
        """One of the networks.

        Raises:
            ValueError: the method has not been trained.
        """
        if self.networks is None:
            own = self.spec.name or type(self).__name__.lower()
            raise ValueError(f"{own} has no weights yet: train it (diffprune train), then write {own}(weights='folder')")
        return self.networks[name]

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

    def seen(self, tokens: VisualTokens) -> Tensor:
        """Standardised features [B N D].

        Raises:
            ValueError: the networks were trained for features of another width.
        """
        if tokens.features.shape[-1] != self.dims["features"]:
            raise ValueError(
                f"this scorer was trained on features of width {self.dims['features']}, the model gives {tokens.features.shape[-1]}"
            )
        return self.standardised(tokens.features)

    def _question(self, tokens: VisualTokens) -> Question | None:
        """The question beside the tokens, where this method reads it."""
        if QUESTION not in self.needs:
            return None
        found = tokens.evidence.get(QUESTION)
        if not isinstance(found, Question):
            raise ValueError("a question-aware scorer needs the embedded question beside the tokens")
        return found

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
        for key in CHOICES:
            if self.options[key] not in (options[key], None):
                raise ValueError(
                    f"{folder}: trained with {key}={options[key]!r}; write {name}({key}={options[key]!r}, weights='{folder}')"
                )
        for key, unsaid in SIZES.items():
            if self.options[key] not in (unsaid, dims[key]):
                raise ValueError(
                    f"{folder}: trained with {key}={dims[key]}, not {self.options[key]}; write {name}({key}={dims[key]}, "
                    f"weights='{folder}')"
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
        self.weights_sha256 = config[files.CHECKSUM][:20]
        self.trained_on, self.recipe, self.trained_seed = trained_on(config, folder / files.CONFIG)
        self.facts = config.get("facts", {})
