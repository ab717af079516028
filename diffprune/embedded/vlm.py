"""The embedded VLM: a real `LlavaForConditionalGeneration` of about 1.5 million parameters, and how prompts reach it.

A row is [BOS] + system prompt + 144 visual tokens + question + answer + [EOS], the same in training and in use. The system
prompt stands before the image, as in LLaVA, so that attention has somewhere to rest when visual tokens are removed; its words say
what LLaVA-1.5's system prompt and format instruction say, and are about as many. Width and prompt are such that a learned scorer
costs below a tenth of the shortest prefill (beside a decoder of 7B, by the paper: 2 %).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from . import questions, world

SYSTEM = (
    "this is a chat between a person who asks about one small picture and a helper who looks at it with care and gives short "
    "and true answers to each one of the questions answer the question using a single word or a short phrase"
)
PAD, BOS, EOS, IMAGE, UNKNOWN = "<pad>", "<bos>", "<eos>", "<image>", "<unk>"
VOCABULARY: tuple[str, ...] = tuple(dict.fromkeys((PAD, BOS, EOS, IMAGE, UNKNOWN, *SYSTEM.split(), *questions.WORDS)))
WORD_ID = {word: i for i, word in enumerate(VOCABULARY)}
PAD_ID, BOS_ID, EOS_ID, IMAGE_ID = (WORD_ID[w] for w in (PAD, BOS, EOS, IMAGE))
IMAGE_START = 1 + len(SYSTEM.split())  # position of the first visual token
IMAGE_END = IMAGE_START + world.NUM_TOKENS  # position of the first question word
PIXEL_MEAN, PIXEL_STD = 0.5, 0.25
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + SYSTEM + " <image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def checkpoint() -> Path:
    """The folder of the weights that ship with the package; `from_pretrained` reads it offline."""
    return Path(__file__).parent / "checkpoint"


def prompt(question: str) -> str:
    """The text a processor takes for one question: system prompt, image marker, question (BOS comes with the tokenizer)."""
    return f"{SYSTEM} {IMAGE} {question}"


def ids(text: str) -> list[int]:
    """Word ids of a text; raises KeyError on a word outside the world."""
    return [WORD_ID[word] for word in text.split()]


def build(seed: int) -> LlavaForConditionalGeneration:
    """A fresh random model: CLIP tower 96 x 4 layers, LLaVA projector, Llama 160 x 4 layers."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=96, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, projection_dim=96,
        image_size=world.IMAGE_SIZE, patch_size=world.PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=160, intermediate_size=384, num_hidden_layers=4, num_attention_heads=5,
        num_key_value_heads=5, max_position_embeddings=1024, pad_token_id=PAD_ID, bos_token_id=BOS_ID, eos_token_id=EOS_ID,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_ID, image_token_index=IMAGE_ID,
        vision_feature_layer=-1, vision_feature_select_strategy="default", image_seq_length=world.NUM_TOKENS,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def processor() -> LlavaProcessor:
    """Word-level tokenizer (left padding, BOS first) and image processor, as they are saved beside the weights.

    Pictures of other sizes than 96 x 96 are resized (bicubic); those of the world stay as they are, bit for bit.
    """
    words = Tokenizer(models.WordLevel(WORD_ID, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN, padding_side="left",
        extra_special_tokens={"image_token": IMAGE}, model_max_length=1024, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    size = {"height": world.IMAGE_SIZE, "width": world.IMAGE_SIZE}
    pictures = CLIPImageProcessorPil(
        do_resize=True, resample=Image.Resampling.BICUBIC, do_center_crop=False, size=size, crop_size=size,
        image_mean=[PIXEL_MEAN] * 3, image_std=[PIXEL_STD] * 3, do_convert_rgb=True,
    )  # fmt: skip
    return LlavaProcessor(
        pictures, tokenizer, patch_size=world.PATCH, vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE, num_additional_image_tokens=1,
    )  # fmt: skip


def pixels(images: Iterable[np.ndarray]) -> Tensor:
    """Pictures uint8 [96, 96, 3] -> what the image processor gives, float [B, 3, 96, 96]."""
    x = torch.from_numpy(np.ascontiguousarray(np.stack(list(images)).transpose(0, 3, 1, 2)))
    return (x.float() / 255 - PIXEL_MEAN) / PIXEL_STD


# --- many questions about one picture in one row ---------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """Rows of [BOS] + system + image + question segments, padded on the right; int64 [B, L].

    labels: the answer words and EOS at their own places, -100 elsewhere (Hugging Face's convention: place i is predicted at
    i - 1). positions: every segment restarts at IMAGE_END. segments: 0 the shared prefix, 1.. the questions, -1 padding, -2..
    questions without a picture, which see only BOS, the system prompt and themselves.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    segments: Tensor

    def mask(self, keep: Tensor | None = None) -> Tensor:
        """Who sees whom, bool [B, 1, L, L]: causal, and only the prefix and one's own segment.

        keep: bool [B, 144], visual tokens that may be seen; the others are seen by themselves alone, which for all the rest is
        exactly as if they had been removed.
        """
        length, seg = self.ids.shape[1], self.segments
        causal = torch.ones(length, length, dtype=torch.bool, device=seg.device).tril()
        visual = torch.zeros(length, dtype=torch.bool, device=seg.device)
        visual[IMAGE_START:IMAGE_END] = True
        prefix = (seg == 0)[:, None, :] & ~((seg < -1)[:, :, None] & visual)
        seen = (prefix | (seg[:, None, :] == seg[:, :, None])) & causal
        if keep is not None:
            column = torch.ones_like(seg, dtype=torch.bool)
            column[:, IMAGE_START:IMAGE_END] = keep
            seen = seen & (column[:, None, :] | torch.eye(length, dtype=torch.bool, device=seg.device))
        return seen[:, None]


Pairs = Sequence[tuple[str, str]]


def pack(rows: Sequence[Pairs], text_only: Sequence[Pairs] = ()) -> Packed:
    """Pack the (question, answer) pairs of each picture into one row; scoring it equals asking each question alone.

    text_only: further pairs for each row that do not see the picture.
    """
    prefix = [BOS_ID, *ids(SYSTEM), *[IMAGE_ID] * world.NUM_TOKENS]
    packed = []
    for b, row in enumerate(rows):
        columns = [prefix, [-100] * IMAGE_END, list(range(IMAGE_END)), [0] * IMAGE_END]
        numbered = [(k + 1, pair) for k, pair in enumerate(row)]
        numbered += [(-2 - k, pair) for k, pair in enumerate(text_only[b] if text_only else ())]
        for number, (question, answer) in numbered:
            asked, said = ids(question), [*ids(answer), EOS_ID]
            length = len(asked) + len(said)
            more = (asked + said, [-100] * len(asked) + said, list(range(IMAGE_END, IMAGE_END + length)), [number] * length)
            columns = [old + new for old, new in zip(columns, more, strict=True)]
        packed.append(columns)
    longest = max(len(columns[0]) for columns in packed)
    fills = (PAD_ID, -100, 0, -1)
    return Packed(*(
        torch.tensor([columns[k] + [fill] * (longest - len(columns[k])) for columns in packed])
        for k, fill in enumerate(fills)
    ))  # fmt: skip


def embed(model: LlavaForConditionalGeneration, packed: Packed, image: Tensor) -> Tensor:
    """Word embeddings with projected visual tokens [B, 144, D] in their places, [B, L, D]."""
    words = model.get_input_embeddings()(packed.ids)
    return torch.cat([words[:, :IMAGE_START], image.to(words.dtype), words[:, IMAGE_END:]], 1)
