"""Field names of training rows: where data sets keep the image, the question, and the answer or conversation."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from diffprune.core.registry import nearest
from diffprune.data.sources import QAPairs

PROMPT = "Describe the image."
ANSWERS = ("conversations", "answer", "caption", "caption_enriched", "text")  # looked for in this order
IMAGE_PLACEHOLDER = "<image>"
SPEAKERS = {"human": "question", "user": "question", "gpt": "answer", "assistant": "answer", "system": ""}
ANSWERING = [speaker for speaker, turn in SPEAKERS.items() if turn == "answer"]


@dataclass(frozen=True)
class QAFields:
    """Names of a row's fields. Empty: `question` where there is one, and the first of ANSWERS.

    prompt: the question of a row that has none, as captions do.
    """

    image: str = "image"
    question: str = ""
    answer: str = ""
    prompt: str = PROMPT

    def check(self, columns: Collection[str], where: str) -> list[str]:
        """The columns to read of a table that has these.

        Raises:
            ValueError: it lacks one; names the nearest.
        """
        for name in filter(None, (self.image, self.question, self.answer)):
            if name not in columns:
                raise ValueError(f"{where} has no column {name!r}: {nearest(name, columns)}")
        answers = [self.answer] if self.answer else [name for name in ANSWERS if name in columns]
        if not answers:
            raise ValueError(
                f"{where} has no column of answers or captions; say which with answer=, of {', '.join(sorted(columns))}"
            )
        question = self.question or "question"
        return list(dict.fromkeys([self.image, *([question] if question in columns else []), *answers]))

    def picture(self, row: Mapping[str, Any]) -> Any:
        """What `open_image` takes, None for a row without an image.

        Raises:
            ValueError: several images.
        """
        found = row.get(self.image)
        if isinstance(found, list):
            if len(found) > 1:
                raise ValueError(f"field {self.image!r} names {len(found)} images; a training row is about one")
            found = found[0] if found else None
        return found or None

    def pairs(self, row: Mapping[str, Any]) -> QAPairs:
        """The (question, answer) pairs of a row, image placeholders taken out; turns of a conversation become pairs of their own.

        Raises:
            ValueError: no answer, or one that is no text.
        """
        names = [self.answer] if self.answer else ANSWERS
        answer = next((row[name] for name in names if row.get(name) is not None), None)
        if isinstance(answer, list | tuple):
            return _conversation(answer, self.prompt)
        question = row.get(self.question or "question")
        return [(_plain(question, self.prompt), _text(answer, "answer"))]

    def __str__(self) -> str:
        return " ".join(f"{name}={value!r}" for name, value in asdict(self).items())


def _conversation(turns: Collection[Any], prompt: str) -> QAPairs:
    found: QAPairs = []
    question: str | None = None
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise ValueError(f"a turn of a conversation is {type(turn).__name__}, not a pair of 'from' and 'value'")
        speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise ValueError(f"a turn of a conversation is from {str(speaker)!r:.100}: {nearest(str(speaker), SPEAKERS)}")
        if SPEAKERS[speaker] == "question":
            question = _plain(text, prompt)
        elif SPEAKERS[speaker] == "answer":
            if question is None:
                raise ValueError("a conversation has an answer without a question before it")
            found.append((question, _text(text, "answer")))
            question = None
    if not found:
        raise ValueError(f"a conversation has no answer: a turn from {' or '.join(ANSWERING)} is needed")
    return found


def _plain(question: Any, prompt: str) -> str:
    """A question without the image placeholder: the model's own chat template has one."""
    if question is None:
        return prompt
    text = _text(question, "question")
    if text.count(IMAGE_PLACEHOLDER) > 1:
        raise ValueError(f"a question has {text.count(IMAGE_PLACEHOLDER)} image placeholders; a training row is about one image")
    return text.replace(IMAGE_PLACEHOLDER, "").strip() or prompt


def _text(value: Any, what: str) -> str:
    if isinstance(value, str) and value.strip():
        return value.strip()
    found = "empty" if isinstance(value, str) else "missing" if value is None else type(value).__name__
    raise ValueError(f"the {what} is {found}")
