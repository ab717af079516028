"""`lmms-eval --model diffprune`: lmms-eval's own loop over its own tasks, with a model whose visual tokens are pruned.

    lmms-eval --model diffprune --model_args pretrained=llava-hf/llava-1.5-7b-hf,pruner=attention,budget=64 --tasks pope

lmms-eval finds it by the entry point `lmms_eval.models`. A spelling with several options is quoted, as in
`pruner="btp(a=1, b=2)"`, because lmms-eval splits its arguments at commas.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from diffprune import pruning
from diffprune.core import budget as budgets
from diffprune.core import registry
from diffprune.io import lmms_eval
from diffprune.vlm import load


def manifest() -> Any:
    """What the entry point answers: lmms-eval's description of this model.

    Raises:
        ValueError: lmms-eval cannot be used.
    """
    lmms_eval.need("the entry point for lmms-eval")
    from lmms_eval.models.registry_v2 import ModelManifest  # late: importing it makes lmms-eval ask this very entry point

    return ModelManifest(model_id=lmms_eval.MODEL, simple_class_path=f"{__name__}.DiffPrune")


class DiffPrune(lmms_eval.lmms):  # type: ignore[misc, valid-type]
    """A model of ours behind lmms-eval's interface: answers are greedy, one question about one picture.

    pretrained, device, dtype, revision, attention: as `diffprune.load` takes them.
    pruner, budget: spellings, e.g. `attention` and `Keep(64)`, `64`, `22%`; budget is every token where none is given.

    Stop strings are not applied (as in lmms-eval's own LLaVA model); what fails raises instead of being an empty answer.

    Raises:
        ValueError: no such model, method or budget, an option that does not exist, or several processes.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "embedded",
        pruner: str = "unpruned",
        budget: str | float = "Share(1)",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        revision: str | None = None,
        attention: str = "auto",
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            known = ("pretrained", "pruner", "budget", "batch_size", "device", "dtype", "revision", "attention")
            wrong = next(iter(unknown))
            raise ValueError(f"--model diffprune has no argument {wrong!r}: {registry.nearest(wrong, known)}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("--model diffprune runs in one process; `diffprune evaluate --workers` uses several GPUs")
        self.pruner = registry.load("pruners", _unquoted(pruner))
        self.budget = budgets.parse(_unquoted(str(budget)))
        self.batch_size = 1 if str(batch_size) == "auto" else int(batch_size)
        self.vlm = load.load(
            pretrained,
            device=device or "auto",
            dtype=dtype,
            revision=None if revision is None else str(revision),
            attention=attention,
        )
        self.device = self.vlm.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One answer per request, in their order; questions of similar length share a batch.

        Raises:
            ValueError: a request with other than one picture, or one that wants sampling.
        """
        limits = [lmms_eval.new_tokens(request.args[1], _where(request)) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (limits[i], len(requests[i].args[0]), i))
        answers: dict[int, str] = {}
        while order:
            index = [i for i in order[: self.batch_size] if limits[i] == limits[order[0]]]
            order = order[len(index) :]
            images = [self._image(requests[i]) for i in index]
            questions = [requests[i].args[0] for i in index]
            made = pruning.generate(
                self.vlm, images, questions, pruner=self.pruner, budget=self.budget, max_new_tokens=limits[index[0]]
            )
            for i, answer in zip(index, made, strict=True):
                self.cache_hook.add_partial("generate_until", requests[i].args[:2], answer)
                answers[i] = answer
        return [answers[i] for i in range(len(requests))]

    def _image(self, request: Any) -> Any:
        _, _, doc_to_visual, doc_id, task, split = request.args
        return lmms_eval.one_image(doc_to_visual(self.task_dict[task][split][doc_id]), _where(request))

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refused: nothing but answers is asked of a pruned model."""
        raise ValueError(f"{_where(requests[0])} compares likelihoods: --model diffprune only generates answers")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused: one question, one answer."""
        raise ValueError(f"{_where(requests[0])} has several rounds: --model diffprune answers one question about one picture")


def _where(request: Any) -> str:
    return f"row {request.doc_id} of task {request.task_name!r}"


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text
