"""What a row says: its image and the questions and answers about it, in the spellings data sets use."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from diffprune.core.registry import nearest
from diffprune.data.sources import Asked

PROMPT = "Describe the image."
ANSWERS = ("conversations", "answer", "caption", "caption_enriched", "text")  # looked for in this order
MARKER = "<image>"
SPEAKERS = {"human": "question", "user": "question", "gpt": "answer", "assistant": "answer", "system": ""}
ANSWERING = [speaker for speaker, turn in SPEAKERS.items() if turn == "answer"]


@dataclass(frozen=True)
class Fields:
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

    def pairs(self, row: Mapping[str, Any]) -> Asked:
        """The (question, answer) pairs of a row, image markers taken out; turns of a conversation become pairs of their own.

        Raises:
            ValueError: no answer, or one that is no text.
        """
        names = [self.answer] if self.answer else ANSWERS
        said = next((row[name] for name in names if row.get(name) is not None), None)
        if isinstance(said, list | tuple):
            return _turns(said, self.prompt)
        asked = row.get(self.question or "question")
        return [(_plain(asked, self.prompt), _text(said, "answer"))]


def _turns(turns: Collection[Any], prompt: str) -> Asked:
    found: Asked = []
    asked: str | None = None
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise ValueError(f"a turn of a conversation is {type(turn).__name__}, not a pair of 'from' and 'value'")
        speaker, said = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise ValueError(f"a turn of a conversation is from {str(speaker)!r:.100}: {nearest(str(speaker), SPEAKERS)}")
        if SPEAKERS[speaker] == "question":
            asked = _plain(said, prompt)
        elif SPEAKERS[speaker] == "answer":
            if asked is None:
                raise ValueError("a conversation has an answer without a question before it")
            found.append((asked, _text(said, "answer")))
            asked = None
    if not found:
        raise ValueError(f"a conversation has no answer: a turn from {' or '.join(ANSWERING)} is needed")
    return found


def _plain(asked: Any, prompt: str) -> str:
    """A question without the marker that says where the image stands: the model's own frame places it."""
    if asked is None:
        return prompt
    text = _text(asked, "question")
    if text.count(MARKER) > 1:
        raise ValueError(f"a question has {text.count(MARKER)} image markers; a training row is about one image")
    return text.replace(MARKER, "").strip() or prompt


def _text(said: Any, what: str) -> str:
    if not isinstance(said, str) or not said.strip():
        raise ValueError(
            f"the {what} is {'empty' if isinstance(said, str) else 'missing' if said is None else type(said).__name__}"
        )
    return said.strip()
