"""Parts of tiny random instances: a byte-level tokenizer, a processor, narrow decoder settings. They work offline.

Tests and dry runs of real recipes use them: the same classes and code as a 7B checkpoint, only narrow and untrained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diffprune.vlm.processor import Parts as Parts  # a tiny instance's processor

PAD, BOS, EOS, IMAGE = 0, 1, 2, 3  # ids of the first four special tokens
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}:"
)


def tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """One token per byte; `<pad> <bos> <eos> <image>` have ids 0 to 3, then `special` from 4 on."""
    named = ["<pad>", "<bos>", "<eos>", "<image>", *special]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate([*named, *letters])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left",
        extra_special_tokens=["<image>", *special], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    made.chat_template = TEMPLATE
    return made


@dataclass(frozen=True)
class Size:
    """Of a tiny instance's decoder; heads are 16 wide."""

    width: int = 64
    layers: int = 2


USUAL = Size()
_size: ContextVar[Size] = ContextVar("size", default=USUAL)


@contextmanager
def sized(width: int, layers: int) -> Iterator[None]:
    """Instances made inside have a larger decoder, for measuring.

    Raises:
        ValueError: a width that is no multiple of 32 (two heads at least), or no layer.
    """
    if width < 32 or width % 32 or layers < 1:
        raise ValueError(f"width={width}, layers={layers}: the width of a tiny instance is a multiple of 32, its layers at least 1")
    before = _size.set(Size(width, layers))
    try:
        yield
    finally:
        _size.reset(before)


def width() -> int:
    """Of the decoder of the instance in the making."""
    return _size.get().width


def decoder(text: PreTrainedTokenizerFast, **changes: Any) -> dict[str, Any]:
    """Settings of a decoder of two layers, 64 wide, four heads over two of keys, unless `sized` says otherwise."""
    size = _size.get()
    return {
        "vocab_size": len(text), "hidden_size": size.width, "intermediate_size": 2 * size.width,
        "num_hidden_layers": size.layers, "num_attention_heads": size.width // 16, "num_key_value_heads": size.width // 32,
        "max_position_embeddings": 4096, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
    } | changes  # fmt: skip


def build(make: Any, config: Any, seed: int, sharpness: float = 0.05) -> Any:
    """A random model whose every parameter matters: the usual initialisation plus noise, so that no token is without effect."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make(config)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * sharpness)
    model.generation_config.pad_token_id = PAD
    return model.eval().requires_grad_(False)
