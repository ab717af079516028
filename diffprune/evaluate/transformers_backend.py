"""The backend on transformers: pictures encoded once, prompts tokenised once, tokens pruned, the model's own `generate`.

Questions about one image go on from one prefill of what they share (`pruning/shared_prefix.py`), where method and family allow.
An image is encoded once per process, whatever the number of budgets, methods and benchmarks that ask about it; questions are
tokenised batch by batch, because those of a large benchmark take gigabytes at once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch

from diffprune import pruning
from diffprune.core.budget import Budget
from diffprune.core.pruner import Pruner
from diffprune.core.spec import Spec
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import VLM, Prompts
from diffprune.evaluate.backend import Answer, Question, Refused, Shown
from diffprune.evaluate.cache import TOKENISED_MIB, Encodings, Prefixes, Tokenised
from diffprune.pruning import shared_prefix


class TransformersBackend:
    """A loaded VLM that answers. cache_mib: host memory for encoder output; prefix_mib: of the model's device, for prefixes, an
    eighth of what is free there unless given.

    shares: questions about one image go on from one prefill of it, where method and family allow it.
    """

    def __init__(self, vlm: VLM, cache_mib: float = 2048, prefix_mib: float | None = None, shares: bool = True) -> None:
        self.vlm, self.encodings, self.tokenised = vlm, Encodings(vlm, cache_mib), Tokenised(TOKENISED_MIB)
        self.prefixes, self.shares = Prefixes(vlm.device, _eighth(vlm.device) if prefix_mib is None else prefix_mib), shares

    @property
    def model(self) -> Spec:
        """The VLM with the hash of its weights."""
        return self.vlm.spec

    @property
    def dtype(self) -> str:
        """Of its weights."""
        return self.vlm.dtype

    def looked_up(self) -> dict[str, tuple[int, int]]:
        """{cache: (found, made)}, of images and prefixes so far."""
        images, prefixes = self.encodings, self.prefixes
        return {
            "images": (images.asked - images.encoded, images.encoded),
            "prefixes": (prefixes.asked - prefixes.prefilled, prefixes.prefilled),
        }

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], pruner: Pruner, budget: Budget, max_new_tokens: int) -> list[Answer]:
        """See `Backend.answer`. Images that all are asked about once have nothing to share."""
        pictures: dict[Hashable, Shown] = {}
        for picture in (picture for q in questions for picture in q.pictures):
            pictures.setdefault(picture.name, picture)
        tokens = self.encodings.get(list(pictures), [picture.image for picture in pictures.values()], pruner.needs)
        number = {name: i for i, name in enumerate(pictures)}
        sets = {q.name: [number[picture.name] for picture in q.pictures] for q in questions}  # rows of `tokens` by what is shown
        names = list(sets)
        owner = [names.index(q.name) for q in questions]
        shown = [sets[q.name] for q in questions]
        prompts = self._prompts(questions, tokens, shown)
        with _refusing():
            alone = not self.shares or len(names) == len(questions) or shared_prefix.refusal(self.vlm, pruner, budget)
        where = None if alone else shared_prefix.shared(prompts, owner)
        if where is None:
            with _refusing():
                packed = pruning.shrink(self.vlm, prompts, tokens[_index(shown)], pruner, budget)
            made = pruning.answer(self.vlm, packed, max_new_tokens)
            return _answers(prompts, made, _summed(self._kept(packed), shown), _summed(packed.total.tolist(), shown))

        def prefill(groups: list[int]) -> list[shared_prefix.Prefix]:
            rows = where.prefixes(prompts, groups)
            seen = [sets[names[group]] for group in groups]
            with _refusing():
                packed = pruning.shrink(self.vlm, rows, tokens[_index(seen)], pruner, budget)
            return shared_prefix.prefill(self.vlm, rows, packed, list(map(len, seen)))

        told = [(name, ids, pruner, budget) for name, ids in zip(names, where.ids(prompts), strict=True)]
        prefixes = self.prefixes.get(told, prefill)
        made = shared_prefix.answer(self.vlm, prompts, where, prefixes, max_new_tokens)
        return _answers(prompts, made, [prefixes[i].kept for i in owner], [prefixes[i].total for i in owner])

    @torch.inference_mode()
    def answer_blind(self, questions: Sequence[Question], max_new_tokens: int) -> list[Answer]:
        """See `Backend.answer_blind`; prompts have places for an image of the default size, which are removed."""
        prompts = self._prompts(questions, None, [range(len(q.pictures)) for q in questions])
        packed = pruning.blind(prompts)
        return _answers(
            prompts, pruning.answer(self.vlm, packed, max_new_tokens), packed.kept.tolist(), packed.total.tolist()
        )  # fmt: skip

    def _kept(self, packed: pruning.Packed) -> list[int]:
        """Visual tokens of each image, mean over decoder layers."""
        return [round(num) for num in packed.averages(self.vlm.shape.layers)]

    def _prompts(self, questions: Sequence[Question], tokens: VisualTokens | None, shown: Sequence[Sequence[int]]) -> Prompts:
        """shown: of each question, the rows of `tokens` it is about."""
        texts, images = [q.text for q in questions], list(map(len, shown))
        name = (tokens is None, *((q.name, q.text) for q in questions))
        if tokens is None:
            default = [self.vlm.num_visual_tokens] * sum(images)
            return self.tokenised.get(name, lambda: self.vlm.prompts(texts, default, images=images))
        rows = _index(shown).to(tokens.valid.device)
        places, layout = tokens.present.sum(1)[rows].tolist(), None if tokens.layout is None else tokens.layout[rows]
        return self.tokenised.get(name, lambda: self.vlm.prompts(texts, places, layout, images))


def _index(shown: Sequence[Sequence[int]]) -> torch.Tensor:
    """[I] int: the images of all questions, one question after the other."""
    return torch.tensor([image for images in shown for image in images])


def _summed(counts: Sequence[int], shown: Sequence[Sequence[int]]) -> list[int]:
    """[I] counts of the images -> one of each question."""
    each = iter(counts)
    return [sum(next(each) for _ in images) for images in shown]


def _eighth(device: torch.device) -> float:
    """Of the memory that is free, MiB: several workers may share a host."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return free / 8 / 2**20


@contextmanager
def _refusing() -> Iterator[None]:
    """A ValueError inside is the method's refusal."""
    try:
        yield
    except ValueError as error:
        raise Refused(str(error)) from error


def _answers(prompts: Prompts, made: tuple[list[str], list[int]], kept: list[int], total: list[int]) -> list[Answer]:
    """made: texts and the tokens of each."""
    words = (prompts.attention_mask.sum(1) - prompts.slots.sum(1)).tolist()
    return [Answer(*row) for row in zip(made[0], total, kept, words, made[1], strict=True)]
