"""The backend on transformers: pictures encoded once, prompts tokenised once, tokens pruned, the model's own `generate`.

An image is encoded once per process, whatever the number of budgets, methods and benchmarks that ask about it; questions are
tokenised batch by batch, because those of a large benchmark take gigabytes at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffprune import pruning
from diffprune.core.budget import Budget
from diffprune.core.pruner import Pruner
from diffprune.core.spec import Spec
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import VLM, Prompts
from diffprune.evaluate.backend import Answer, Question, Refused
from diffprune.evaluate.cache import TOKENISED_MIB, Encodings, Tokenised


class TransformersBackend:
    """A loaded VLM that answers. cache_mib: host memory for encoder output, in MiB."""

    def __init__(self, vlm: VLM, cache_mib: float = 2048) -> None:
        self.vlm, self.encodings, self.tokenised = vlm, Encodings(vlm, cache_mib), Tokenised(TOKENISED_MIB)

    @property
    def model(self) -> Spec:
        """The VLM with the hash of its weights."""
        return self.vlm.spec

    @property
    def dtype(self) -> str:
        """Of its weights."""
        return self.vlm.dtype

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], pruner: Pruner, budget: Budget, max_new_tokens: int) -> list[Answer]:
        """See `Backend.answer`."""
        tokens = self.encodings.get([q.name for q in questions], [q.image for q in questions], pruner.needs)
        prompts = self._prompts(questions, tokens)
        try:
            packed = pruning.shrink(self.vlm, prompts, tokens, pruner, budget)
        except ValueError as error:
            raise Refused(str(error)) from error
        return self._answers(prompts, packed, max_new_tokens)

    @torch.inference_mode()
    def answer_blind(self, questions: Sequence[Question], max_new_tokens: int) -> list[Answer]:
        """See `Backend.answer_blind`; prompts have places for an image of the default size, which are removed."""
        prompts = self._prompts(questions, None)
        return self._answers(prompts, pruning.blind(prompts), max_new_tokens)

    def _prompts(self, questions: Sequence[Question], tokens: VisualTokens | None) -> Prompts:
        texts = [q.text for q in questions]
        name = (tokens is None, *((q.name, q.text) for q in questions))
        if tokens is None:
            default = [self.vlm.num_visual_tokens] * len(texts)
            return self.tokenised.get(name, lambda: self.vlm.prompts(texts, default))
        places, layout = tokens.present.sum(1).tolist(), tokens.layout
        return self.tokenised.get(name, lambda: self.vlm.prompts(texts, places, layout))

    def _answers(self, prompts: Prompts, packed: pruning.Packed, max_new_tokens: int) -> list[Answer]:
        texts, lengths = pruning.answer(self.vlm, packed, max_new_tokens)
        words = (prompts.attention_mask.sum(1) - prompts.slots.sum(1)).tolist()
        kept, total = packed.kept.tolist(), packed.total.tolist()
        return [Answer(*row) for row in zip(texts, total, kept, words, lengths, strict=True)]
