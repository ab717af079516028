"""The rules of the ten benchmarks on hostile answers, against a second reading of their descriptions that goes mark by mark.

The texts: empty, very long, full-width letters, blanks of all kinds, line feeds, markdown, emoji, tags, halves of words.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable

import pytest

from diffprune.benchmarks import _answers as answers

WORDS = [
    *"ABCDEFabcd", *string.punctuation, "Yes", "No", "yes", "no", "NO", "not", "none", "zero", "ten", "the", "an",
    "1,0", "1,,0", ".5", "5.", "t-shirt", "dont", "Im", "let's", "'s", "somebody'd", "couldn’t’ve",
    "Ｙｅｓ", "Ａ", "ａ", "１", "１,１", "é", "e\u0301", "😀", "中", "选", "答案是", "ß", "İ", "ſ",
    "The answer is ", "the answer is", "I choose", "rabbit", "Rabbit", "cat", "dog", "teddy bear", "banana",
    "**B**", "# A", "`C`", "(D)", "(a)", "A.", "B)", "C:", ":D", "<think>", "</think>",
    "\u00a0", "\u3000", "\u2028", "\u200b", "\x85", "\x1c", "\r",
]  # fmt: skip
GAPS = ["", "", " ", "  ", "\n", "\t", "\r\n"]


def _texts() -> list[str]:
    draw = random.Random(0)
    made = [
        "".join(draw.choice(WORDS) + draw.choice(GAPS) for _ in range(draw.choice((1, 1, 2, 2, 3, 4, 6, 12)))) for _ in range(1500)
    ]
    return ["", " ", "\n", "A" * 5000, "yes " * 3000, ". " * 200 + "no.", *made]


TEXTS = _texts()
Reading = Callable[[str], str]


def _normalise(text: str, comma: Callable[[str], bool]) -> str:
    """Marks deleted or blanked, one after the other; 32 periods gone; number words; no articles; contractions."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    thousands = any(
        text[i].isdecimal() and text[j].isdecimal() and comma(text[i + 1 : j])
        for i in range(len(text))
        for j in range(i + 2, min(len(text), i + 8))
    )
    kept = []
    for mark in text:
        if mark in ';/[]"{}()=+\\_-><@`,?!':
            touches = any(pair in text for pair in (mark + " ", " " + mark))
            kept.append("" if touches or thousands else " ")
        else:
            kept.append(mark)
    cleaned, out, gone = "".join(kept), "", 0
    for i, mark in enumerate(cleaned):
        if mark == "." and gone < 32 and not cleaned[i + 1 : i + 2].isdecimal():
            gone += 1
        else:
            out += mark
    words = []
    for word in out.lower().split():
        number = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
        word = "0" if word == "none" else str(number.index(word)) if word in number else word
        if word not in ("a", "an", "the"):
            words.append(answers.CONTRACTIONS.get(word, word))
    return " ".join(words)


def _one(between: str) -> bool:
    return between == ","


def _several(between: str) -> bool:
    return bool(between) and set(between) == {","}


def _evalai(text: str) -> str:
    lower = text.strip().lower()
    return _normalise(lower.replace(",", "").replace("?", "").replace("'s", " 's").strip(), _several)


def _mme(text: str, harness: bool) -> str:
    said = text.strip().lower()
    said = said.replace(".", "") if harness else said.replace("\t", " ").replace("\n", " ")
    if harness and len(said) == 1:
        return "yes" if said == "y" else "no" if said == "n" else "other"
    start = said[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def _pope(text: str) -> str:
    sentence = text.strip()
    sentence = sentence[: sentence.index(".")] if "." in sentence else sentence
    return "no" if any(word in ("No", "no", "not") for word in sentence.replace(",", "").split(" ")) else "yes"


def _scienceqa(text: str) -> str:
    said, start, found = text.strip(), 0, []
    if said and said[0] in "ABCDE" and (len(said) == 1 or said[1:3] == ". "):
        return said[0] if said[0] != "E" else ""
    while (place := said.find("The answer is ", start)) >= 0:
        letter, after = said[place + 14 : place + 15], said[place + 15 : place + 16]
        if letter and letter in string.ascii_uppercase and after and after != "\n":
            found.append(letter)
            start = place + 16
        else:
            start = place + 1
    return found[0] if len(found) == 1 and found[0] in "ABCD" else ""


def _scienceqa_harness(text: str) -> str:
    said = text.strip()
    hits = [x for x in "ABCD" if said.lower() == x.lower() or (said[:1].isupper() and said[:2].lower() == x.lower() + ".")]
    return hits[0] if hits else ""


OPTIONS = {"A": "teddy bear", "B": "Rabbit", "C": "cat", "D": "banana"}


def _mmbench(text: str) -> str:
    """Rules 1 to 3."""
    said = text.strip()
    tokens = said.split()
    for before, after in [("", ""), *(tuple(pair.split("X")) for pair in "X. X, X: X) X). (X) (X). :X :X, :X. :X) :X).".split())]:
        alone = [x for x in "ABCDE" if before + x + after in tokens]
        if len(alone) == 1 and not (before == after == "" and "A" in tokens and len(tokens) >= 4):
            return alone[0]
    held = [x for x, option in OPTIONS.items() if option.lower() in said.lower()]
    return held[0] if len(held) == 1 else ""


def _gqa_harness(text: str) -> str:
    return "".join(mark for mark in text.strip().lower() if mark not in string.punctuation)


def _gqa(text: str) -> str:
    said = text.strip()
    while said.endswith("."):
        said = said[:-1]
    return said.lower()


RULES: dict[str, tuple[Reading, Reading]] = {
    "gqa llava": (lambda t: answers.gqa(t, "x", "llava").parsed, _gqa),
    "gqa lmms_eval": (lambda t: answers.gqa(t, "x", "lmms_eval").parsed, _gqa_harness),
    "mme llava": (lambda t: answers.mme(t, "yes", "llava").parsed, lambda t: _mme(t, False)),
    "mme lmms_eval": (lambda t: answers.mme(t, "yes", "lmms_eval").parsed, lambda t: _mme(t, True)),
    "pope llava": (lambda t: answers.pope(t, "yes", "llava").parsed, _pope),
    "pope lmms_eval": (
        lambda t: answers.pope(t, "yes", "lmms_eval").parsed,
        lambda t: next((word for word in ("yes", "no") if t.strip().lower() == word), "neither"),
    ),
    "scienceqa llava": (lambda t: answers.scienceqa(t, "A", 4, "llava").parsed, _scienceqa),
    "scienceqa lmms_eval": (
        lambda t: next((x for x in "ABCD" if answers.scienceqa(t, x, 4, "lmms_eval").credit), ""),
        _scienceqa_harness,
    ),
    "seed llava": (
        lambda t: next((x for x in "ABCD" if answers.seed(t, x, "llava").credit), ""),
        lambda t: t.strip() if t.strip() in list("ABCD") else "",
    ),
    "seed lmms_eval": (
        lambda t: next((x for x in "ABCD" if answers.seed(t, x, "lmms_eval").credit), ""),
        lambda t: next((x for x in "ABCD" if t.strip()[:1] in (x, x.lower())), ""),
    ),
    "mmbench and mmbench_cn": (lambda t: answers.mmbench_parse(t, OPTIONS, robust=False), _mmbench),
    "textvqa and vizwiz": (lambda t: answers.evalai_vqa(t, ["x"] * 10).parsed, _evalai),
    "vqav2 llava": (lambda t: answers.vqav2(t, ["x"] * 9 + ["y"], "llava").parsed, lambda t: _normalise(_evalai(t), _one)),
    "vqav2 lmms_eval": (lambda t: answers.vqav2(t, ["x"] * 10, "lmms_eval").parsed, lambda t: _normalise(t, _several)),
    "vqav2 official_raw": (lambda t: answers.vqav2(t, [*"xxxxxxxxxy"], mode="official_raw").parsed, lambda t: _normalise(t, _one)),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_rules_read_hostile_answers_as_their_descriptions_say(rule: str) -> None:
    ours, slow = RULES[rule]
    differ = [(text, ours(text), slow(text)) for text in TEXTS if ours(text) != slow(text)]
    assert not differ, differ[:3]
    assert len({ours(text) for text in TEXTS}) > 1
