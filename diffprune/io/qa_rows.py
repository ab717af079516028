"""What a row of question-answering data says: its picture, its questions with their answers, its options, its name.

One reader for training and for a benchmark of one's own. Rows of JSON lines, JSON arrays, CSV, TSV and Parquet may have

    picture   `image`, else `file_name`: see `stored_picture`; a list is several pictures, shown before the question in its order
    question  `question`; as many `<image>` at its start as there are pictures, or one at its end, are LLaVA's marks for them and
              are taken out, any other is text
    answer    `conversations` (turns of LLaVA-665K or of chats; each answer goes with the question before it), `answer`, `answers`;
              in training also a caption: `caption`, `caption_enriched` (ImageNet-1K-VL-Enriched), `text`
    answers   one, or a list: of accepted answers, of annotators' (`{"answer": ...}`), also as text ("['red', 'crimson']")
    options   a list (letters by position), a mapping from letters, a list of pairs or of `{"key": ..., "value": ...}`, ARC's
              `{"label": [...], "text": [...]}`; any of them as text. Null and empty options do not exist
    id, group, category

A text may be a number or a truth value: 2 and 2.0 are "2", true is "yes", false is "no". Null, NaN and blank text are missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from diffprune.core.registry import nearest
from diffprune.io.listed_text import listed
from diffprune.io.stored_picture import Picture, pictures

Row = Mapping[str, Any]

IMAGE, FILE_NAME, QUESTION = "image", "file_name", "question"
ANSWERS = ("conversations", "answer", "answers")  # looked for in this order
CAPTIONS = ("caption", "caption_enriched", "text")
ASKED_OR_SAID = frozenset(  # words in names of columns that are questions or answers, where captions would leave them unread
    "label labels class target truth response reply output completion solution query instruction input prompt asked said".split()
)
PROMPT = "Describe the image."
MARKER = "<image>"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SPEAKERS = {"human": "question", "user": "question", "gpt": "answer", "assistant": "answer", "system": ""}
ANSWERING = [speaker for speaker, turn in SPEAKERS.items() if turn == "answer"]
LONGEST = 100_000  # letters of a question or an answer
MOST_PICTURES = 64  # of a question
OPTION_FIELDS = (("key", "value"), ("label", "text"))


class QA(NamedTuple):
    """A question and its accepted answers, at least one."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class QAColumns:
    """Names of a row's columns; those left empty are looked for, see the table above.

    image:    column of the pictures; where there is none called `image`, `file_name`.
    question: column of the question; `question` unless given.
    answer:   column of the answer or answers; `conversations`, `answer` or `answers` unless given.
    options:  column of the options, which become lines `A. text` of the question; none unless given.
    id:       column of the row's name; `id` unless given. In training, rows of one id are about the same picture.
    group:    column of what may not be split; `group` unless given.
    category: column of what figures are told apart by; `category` unless given.
    prompt:   the question of rows that have none: it makes their answers captions.
    captions: columns that are called captions are answers, too, to PROMPT where there is no question.
    """

    image: str = IMAGE
    question: str = ""
    answer: str = ""
    options: str = ""
    id: str = ""
    group: str = ""
    category: str = ""
    prompt: str = ""
    captions: bool = False

    def __str__(self) -> str:
        return " ".join(f"{name}={value!r}" for name, value in asdict(self).items())

    @property
    def answers(self) -> tuple[str, ...]:
        """Where an answer is looked for, in this order; never in the column of the question."""
        looked = (*ANSWERS, *(CAPTIONS if self.captions else ()))
        return (self.answer,) if self.answer else tuple(name for name in looked if name != self.question)

    def found_in(self, names: Collection[str], where: str, turns: bool = False) -> QAColumns:
        """The columns of a table that has these names. turns: the answers are conversations, which have their questions.

        Raises:
            ValueError: one is missing; names the nearest.
        """
        image = self._image(names)
        for name in (image, self.question, self.answer, self.options, self.id, self.group, self.category):
            if name and name not in names:
                raise ValueError(f"{where}: column {name!r} is missing; {_has(name, names)}")
        if not (accepted := [name for name in self.answers if name in names]):
            raise ValueError(
                f"{where}: column 'answer' (or 'answers') is missing; name yours with answer=; {_has('answer', names)}"
            )
        made = replace(self, image=image, question=self.question or (QUESTION if QUESTION in names else ""))
        if not self.prompt and not turns and (unread := made._unread(names, accepted[0])):
            raise ValueError(
                f"{where}: column {accepted[0]!r} would be read as captions or answers, and column {unread!r} not at all; name the "
                f"columns with question= and answer=, as in answer={unread!r}, or answer={accepted[0]!r} if that is meant"
            )
        if made.question or made.prompt or turns or accepted[0] == "conversations":
            return made
        if accepted[0] in CAPTIONS and self.captions and not get_close_matches(QUESTION, names, n=1, cutoff=0.75):
            return replace(made, prompt=PROMPT)
        more = "; of captions say what is asked, as prompt='Describe the image.'" if self.captions else ""
        raise ValueError(f"{where}: column {QUESTION!r} is missing; {_has(QUESTION, names)}; name yours with question={more}")

    def _unread(self, names: Collection[str], caption: str) -> str:
        """A column that may be a question or an answer beside captions that nobody named; "" where there is none."""
        if self.answer or caption not in CAPTIONS:
            return ""
        known = {self.image, self.question, self.options, self.id, self.group, self.category, caption}
        left = [name for name in names if name not in known]
        likely = [name for name in left if ASKED_OR_SAID & set(name.lower().replace("-", "_").split("_"))]
        meant = get_close_matches("answer", [name.lower() for name in left], n=1, cutoff=0.75) or ["text"]
        more = likely or [name for name in left if name.lower() == meant[0]]
        return next(iter(more), "")

    def read(self, names: Collection[str], named: Sequence[str] = ()) -> list[str]:
        """The columns to read of a table that has these names. named: which of `id`, `group` and `category` are wanted, too."""
        more = (getattr(self, what) or what for what in named)
        wanted = (self.image, self.question, self.options, *self.answers, *more)
        return [name for name in dict.fromkeys(wanted) if name in names]

    # --- what a row says

    def pictures(self, row: Row, folder: Path | None = None) -> list[Picture]:
        """The pictures, none of a row without one. folder: of relative paths.

        Raises:
            ValueError: one that cannot be understood, or more than MOST_PICTURES.
        """
        column = self._image(row)
        try:
            found = pictures(row.get(column), folder)
        except ValueError as error:
            raise ValueError(f"column {column!r}: {error}") from None
        if len(found) > MOST_PICTURES:
            raise ValueError(f"column {column!r} has {len(found)} pictures; a question is about {MOST_PICTURES} at most")
        return found

    def pairs(self, row: Row, shown: Callable[[], int] = lambda: 1) -> list[QA]:
        """The questions, options included, with their accepted answers; each answer of a conversation is a pair of its own.

        shown: counts the pictures; asked only where a question opens with several marks.

        Raises:
            ValueError: an empty question, no answer, or what is no text.
        """
        column = next((name for name in self.answers if not missing(row.get(name))), "")
        said = _listing(row.get(column))
        if column == "conversations" or _are_turns(said):
            return _conversation(said, self.prompt, shown)
        name = column or next((c for c in self.answers if c in row), self.answers[0])
        if all(map(missing, said)):
            raise ValueError(f"column {name!r} has no answer")
        asked = _question(row.get(self.question or QUESTION), self.prompt, f"column {self.question or QUESTION!r}", shown)
        lines = "".join(f"\n{letter}. {option}" for letter, option in self.choices(row).items())
        return [QA(asked + lines, tuple(text(answer, f"column {name!r}") for answer in said))]

    def has_turns(self, row: Row) -> bool:
        """Whether the answer of a row is a conversation."""
        return any(_are_turns(_listing(row.get(name))) for name in self.answers)

    def choices(self, row: Row) -> dict[str, str]:
        """Options by letter, in the order of the letters; none where no column of them is named.

        Raises:
            ValueError: fewer than two, or keys that are no letters.
        """
        if not self.options:
            return {}
        where = f"column {self.options!r}"
        found = {k: text(option, where) for k, option in _lettered(row.get(self.options), where) if not missing(option)}
        if len(found) < 2:
            raise ValueError(f"{where} has {len(found)} options; two at least are needed, as a list or by letter")
        return dict(sorted(found.items()))

    def name(self, row: Row, what: str) -> str:
        """The `id`, `group` or `category` of a row; empty where it has none. Raises ValueError: it is no text."""
        column = getattr(self, what) or what
        return "" if missing(row.get(column)) else text(row.get(column), f"column {column!r}")

    def _image(self, names: Collection[str]) -> str:
        return FILE_NAME if self.image == IMAGE and IMAGE not in names and FILE_NAME in names else self.image


def text(value: Any, where: str) -> str:
    """A text, without the white space around it.

    Raises:
        ValueError: empty, not a text or a number, far too long, or half a character.
    """
    if isinstance(value, int | float | Decimal) and not missing(value):
        return _number(value)
    if missing(value):
        raise ValueError(f"{where} is empty; it must hold text")
    if not isinstance(value, str):
        raise ValueError(f"{where} is {f'{value!r}':.80}; it must hold text")
    if len(value) > LONGEST:
        raise ValueError(f"{where} holds {len(value):,} characters; at most {LONGEST:,} can be right")
    check_whole(value, where)
    return value.strip()


def check_whole(value: str, where: str) -> None:
    """Raises ValueError: a text holds half a character, which no tokenizer and no file takes."""
    if not value.isascii() and any("\ud800" <= mark <= "\udfff" for mark in value):
        raise ValueError(f"{where} holds half a character (a lone surrogate, as of an emoji cut in two)")


def missing(value: Any) -> bool:
    """Whether a cell holds nothing: null, NaN or blank text."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and not value.strip())


def unmarked(question: str, marker: str = MARKER, most: int = 1) -> str:
    """A question without the marks for its pictures, up to `most`, that it opens with."""
    for _ in range(most):
        if question.lstrip().startswith(marker):
            question = question.lstrip().removeprefix(marker).lstrip()
    return question


def _number(value: float | Decimal) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    whole = isinstance(value, int) or (math.isfinite(value) and value == int(value))  # no float is as large as some `int`
    return f"{int(value)}" if whole else f"{value}"


def _has(name: str, names: Collection[str]) -> str:
    close = nearest(name, names)
    return f"it has {', '.join(names) or 'none'}" + (f": {close}" if close.startswith("did") else "")


def _listing(value: Any) -> Sequence[Any]:
    """The answers of a cell. A list of numbers in a text is an answer itself, such as a box."""
    found = listed(value) if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or (found is not value and not all(isinstance(one, str | Mapping) for one in found)):
        return [value]
    return [one.get("answer") if isinstance(one, Mapping) and "answer" in one else one for one in found]


def _are_turns(said: Sequence[Any]) -> bool:
    return any(isinstance(turn, Mapping) and turn.keys() & {"from", "role"} for turn in said)


def _question(value: Any, prompt: str, where: str, shown: Callable[[], int]) -> str:
    if missing(value):
        if prompt:
            return prompt
        raise ValueError(f"{where} is empty; it must hold text")
    asked = text(value, where)
    several = unmarked(asked).startswith(MARKER)
    found = unmarked(asked, most=shown() if several else 1) if asked.startswith(MARKER) else asked.removesuffix(MARKER).rstrip()
    found = found or prompt
    if not found:
        raise ValueError(f"{where} is a mark for the picture alone; it must hold text, or give prompt=")
    return found


def _conversation(turns: Sequence[Any], prompt: str, shown: Callable[[], int]) -> list[QA]:
    found: list[QA] = []
    question: str | None = None
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise ValueError(f"a turn of a conversation is {type(turn).__name__}, not a pair of 'from' and 'value'")
        speaker, said = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise ValueError(f"a turn of a conversation is from {str(speaker)!r:.100}: {nearest(str(speaker), SPEAKERS)}")
        if SPEAKERS[speaker] == "question":
            question = _question(said, prompt, "a question of the conversation", shown)
        elif SPEAKERS[speaker] == "answer":
            if question is None:
                raise ValueError("a conversation has an answer without a question before it")
            found.append(QA(question, (text(said, "an answer of the conversation"),)))
            question = None
    if not found:
        raise ValueError(f"a conversation has no answer: a turn from {' or '.join(ANSWERING)} is needed")
    return found


def _lettered(value: Any, where: str) -> list[tuple[str, Any]]:
    """(letter, option) of every option, null ones too."""
    value = listed(value) if isinstance(value, str) else value
    if isinstance(value, Mapping) and value.keys() == {"label", "text"} and _alike(*value.values()):
        value = list(zip(value["label"], value["text"], strict=True))
    if isinstance(value, Mapping):
        value = list(value.items())
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where} is {f'{value!r}':.80}; a list of options, or options by letter, is needed")
    pairs = [_pair(one) for one in value]
    if not any(pairs):
        if len(value) > len(LETTERS):
            raise ValueError(f"{where} has {len(value)} options; at most {len(LETTERS)} have a letter")
        return list(zip(LETTERS, value, strict=False))
    found: dict[str, Any] = {}
    for pair in pairs:
        letter = f"{pair[0]}".strip().upper() if pair else ""
        if len(letter) != 1 or letter not in LETTERS or letter in found:
            raise ValueError(f"{where} names an option {f'{pair and pair[0]}':.40}; its keys must be different letters, A, B ...")
        found[letter] = pair[1] if pair else None
    return list(found.items())


def _alike(one: Any, other: Any) -> bool:
    """Whether both are lists of one length."""
    return isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other)


def _pair(one: Any) -> tuple[Any, Any] | None:
    """A letter with its option, as the entries of a map are written."""
    if isinstance(one, list | tuple) and len(one) == 2:
        return one[0], one[1]
    if isinstance(one, Mapping):
        for key, value in OPTION_FIELDS:
            if one.keys() == {key, value}:
                return one[key], one[value]
    return None
