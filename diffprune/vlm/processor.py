"""Processors: what the path needs of one, and how it is read from a checkpoint with or without torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, ProcessorMixin

from diffprune.core.errors import first_line


class Parts:
    """What the path needs of a processor: image processor, tokenizer, image token and chat template."""

    def __init__(self, image_processor: Any, text: Any, image_token: str = "<image>") -> None:
        self.image_processor, self.tokenizer, self.image_token = image_processor, text, image_token

    def apply_chat_template(self, conversation: Any, add_generation_prompt: bool = True) -> str:
        """The framed prompt as text."""
        return self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt)


class Absent:
    """Stands where a model was wrapped without a processor: false, and a sentence for who needs one."""

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling look for hooks here
            raise AttributeError(name)
        raise ValueError("this model was wrapped without its processor, which images and questions need: wrap(model, processor)")


def read(source: str | Path, image_token_id: int, **options: Any) -> Any:
    """The processor of a checkpoint; of a family that also takes videos its parts for images where torchvision is missing.

    options: `revision` and the like, for `from_pretrained`.

    Raises:
        ValueError: no image processor or no tokenizer can be read.
    """
    try:
        found = AutoProcessor.from_pretrained(source, **options)
        if all(hasattr(found, part) for part in ("image_processor", "tokenizer")):
            return found
    except (ImportError, OSError, ValueError, TypeError, AttributeError) as error:
        # its video processor exists for torchvision only; images need none
        if not isinstance(error, ImportError) and "torchvision" not in str(error):
            raise ValueError(f"{source}: no processor can be read ({first_line(error)})") from None
    try:
        pictures = AutoImageProcessor.from_pretrained(source, **options)
        text = AutoTokenizer.from_pretrained(source, **options)
        template = ProcessorMixin.get_processor_dict(source, **options)[0].get("chat_template")
    except (ImportError, OSError, ValueError, TypeError) as error:
        raise ValueError(f"{source}: no image processor and tokenizer can be read ({first_line(error)})") from None
    if template is not None:  # the tokenizer's own may know text only
        text.chat_template = template
    return Parts(pictures, text, text.convert_ids_to_tokens(image_token_id))
