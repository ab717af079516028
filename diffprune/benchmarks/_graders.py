"""Graders a user's own benchmark chooses by name, or brings as a function: answer and accepted answers -> credit in [0, 1].

`module:function` imports and runs the user's code. It must be importable where the run happens (on every worker too); a module
that lies in the folder of the data is refused, as data must never bring code along. Before a rule of ours compares them, answer,
accepted answers and options are brought into normalisation form C; a user's function gets them as they are.
"""

from __future__ import annotations

import importlib
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffprune.benchmarks import _answers
from diffprune.benchmarks._answers import LETTERS
from diffprune.core.benchmark import Grade
from diffprune.core.registry import nearest

Row = Mapping[str, Any]
Grader = Callable[[str, Row, str], Grade]  # answer, row with `answers` (and `options` by letter), protocol
ANNOTATORS = 10
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "YI ", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "HANGUL")


def exact(answer: str, row: Row, protocol: str) -> Grade:
    """GQA's rule against any of the answers: identical but for case, outer white space and final periods
    (protocol `lmms_eval`: but for punctuation)."""
    grades = [_answers.gqa(answer, a.strip().rstrip(".").lower(), protocol) for a in row["answers"]]
    return max(grades, key=lambda grade: grade.credit)


def vqa(answer: str, row: Row, protocol: str) -> Grade:
    """Ten answers are ten annotators: VQAv2's soft accuracy. Any other number are accepted answers, of which one must be met
    after VQA's normalisation."""
    answers = row["answers"]
    if len(answers) == ANNOTATORS:
        return _answers.vqav2(answer, answers, protocol)
    said, accepted = _answers.vqa(answer), [_answers.vqa(a) for a in answers]
    return Grade(float(said in accepted), said, said if said in accepted else accepted[0])


def letter(answer: str, row: Row, protocol: str) -> Grade:
    """MMBench's rules: the letter, alone or decorated, or the text of one option."""
    return _answers.mmbench(answer, row["answers"][0], row.get("options") or {}, protocol)


def yes_no(answer: str, row: Row, protocol: str) -> Grade:
    """The answer holds one of the words `yes` and `no`; with both or neither it is wrong (POPE's rule `word`)."""
    return _answers.pope(answer, row["answers"][0], protocol, rule="word")


def contains(answer: str, row: Row, protocol: str) -> Grade:
    """One of the answers occurs in what was said, whatever the case, as whole words: where it starts or ends with a letter, a
    digit or a mark, none may stand beside it. Scripts that write words without spaces, and Hangul with its particles, are free."""
    said = " ".join(answer.split()).casefold()
    for accepted in row["answers"]:
        if _occurs(" ".join(accepted.split()).casefold(), said):
            return Grade(1.0, accepted, accepted)
    return Grade(0.0, said, row["answers"][0])


def _occurs(text: str, said: str) -> bool:
    start = said.find(text)
    while start >= 0:
        stop = start + len(text)
        before, after = said[start - 1 : start], said[stop : stop + 1]
        if not (_in_words(before) and _in_words(text[0])) and not (_in_words(text[-1]) and _in_words(after)):
            return True
        start = said.find(text, start + 1)
    return False


def _in_words(mark: str) -> bool:
    """Whether a character is part of words with spaces between them."""
    return bool(mark) and unicodedata.category(mark)[0] in "LMN" and not unicodedata.name(mark, "").startswith(UNSPACED)


def composed(text: str) -> str:
    """Normalisation form C: an accent typed apart is part of its letter."""
    return unicodedata.normalize("NFC", text)


NAMES = ("exact", "vqa", "letter", "yes_no", "contains")  # apart from the rules, as to name one is not to grade by it
RULES: Mapping[str, Grader] = dict(zip(NAMES, (exact, vqa, letter, yes_no, contains), strict=True))


def check(name: str) -> None:
    """Refuse what is neither a rule nor of the form `module:function`. Nothing is imported.

    Raises:
        ValueError: names the nearest rule.
    """
    module, colon, function = name.partition(":")
    if name in NAMES or (colon and function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        return
    raise ValueError(f"no grader {name!r}: {nearest(name, NAMES)}, or write your own function as 'package.module:function'")


def find(name: str, data: Path) -> Grader:
    """The grader called `name`; a user's function is imported now. data: folder whose code is refused.

    Raises:
        ValueError: the module cannot be imported, has no such function, or lies beside the data.
    """
    if name in RULES:
        return lambda answer, row, protocol: RULES[name](composed(answer), _composed(row), protocol)
    found = function(name, data)
    return lambda answer, row, protocol: _asked(name, found, answer, row)


def function(name: str, data: Path | None = None) -> Callable[..., Any]:
    """A user's function, imported now. data: folder whose code is refused, where it is known.

    Raises:
        ValueError: the module cannot be imported, has no such function, or lies beside the data.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"grader {name!r}: {module_name} cannot be imported ({error}): put it on PYTHONPATH") from None
    home = Path(getattr(module, "__file__", None) or "/").resolve()
    if data is not None and data.resolve() in home.parents:
        raise ValueError(f"grader {name!r} lies in the folder of the data, which may not bring code: put it elsewhere")
    found: Callable[..., Any] | None = getattr(module, function_name, None)
    if found is None or not callable(found):
        raise ValueError(f"grader {name!r}: {module_name} has no function {function_name!r}")
    return found


def _composed(row: Row) -> Row:
    options = {letter: composed(option) for letter, option in (row.get("options") or {}).items()}
    return {**row, "answers": [composed(answer) for answer in row["answers"]], "options": options}


def _asked(name: str, function: Callable[..., Any], answer: str, row: Row) -> Grade:
    """What the user's function(answer, answers, row) gives: a credit in [0, 1], a bool, or a Grade."""
    found = function(answer, list(row["answers"]), dict(row))
    grade = found if isinstance(found, Grade) else None
    credit = grade.credit if grade else found
    if not isinstance(credit, int | float) or not 0 <= credit <= 1:
        raise ValueError(f"grader {name!r} answered {credit!r}: a credit from 0 to 1, a bool or a Grade is needed")
    return grade or Grade(float(credit), answer, row["answers"][0])


def checked_answers(name: str, answers: Sequence[str], options: Mapping[str, str], where: str) -> list[str]:
    """The accepted answers in the form the grader compares with.

    Raises:
        ValueError: an answer that this grader can never give credit for; `where` says which row.
    """
    if name == "letter":
        letters = list(options) or list(LETTERS)
        target = answers[0].strip().upper()
        if len(answers) != 1 or target not in letters:
            raise ValueError(f"{where}: the answer {_short(answers)} is not one of the letters {', '.join(letters)}")
        return [target]
    if name == "yes_no":
        target = answers[0].strip().lower()
        if len(answers) != 1 or target not in ("yes", "no"):
            raise ValueError(f"{where}: the answer {_short(answers)} is neither yes nor no")
        return [target]
    return list(answers)


def _short(answers: Sequence[str]) -> str:
    return f"{' | '.join(answers):.60}"
