"""How answers are read and graded: the published rules of the ten benchmarks, in the protocols `llava` and `lmms_eval`.

Every rule is a function (answer, target ..., protocol) -> Grade that a benchmark file calls with its own columns; the parsers
and normalisers under them are public too, because agreement between two models is counted on what was parsed.
Outer white space of an answer never matters (both protocols strip the decoded text first). What a model thought aloud between
`<think>` and `</think>` is no part of its answer under `lmms_eval`, by that harness's default; `llava` reads it like any words.

Sources: GT-Vision-Lab/VQA vqaEval.py (normaliser, quirks included), LLaVA llava/eval and m4c_evaluator.py (protocol `llava`),
lmms-eval task utilities (protocol `lmms_eval`), the MME tool, RUCAIBox/POPE, VLMEvalKit (POPE's rule `word`), the VizWiz
challenge's evaluation. Written from their description, not copied.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from diffprune.core.benchmark import Grade
from diffprune.core.registry import nearest

PROTOCOLS = ("llava", "lmms_eval")
VQA_MODES = ("official_raw", "official_prenormalised", "always")
VIZWIZ_MODES = ("evalai", "official_raw", "official_prenormalised")
POPE_RULES = ("official", "strict", "word")
LETTERS = "ABCDE"  # of options; as many as the published rules read
REASONING = (("<think>", "</think>"), ("<analysis>", "</analysis>"))  # the tags that lmms-eval strips by default


def without_reasoning(answer: str, tags: Sequence[Sequence[str]] = REASONING) -> str:
    """An answer without its reasoning, as lmms-eval strips it: every block from an opening tag to the next closing one; where the
    prompt had opened it, all up to the last closing tag. A block that is never closed stays. Tags are case-sensitive."""
    for opening, closing in tags:
        while (start := answer.find(opening)) >= 0 and (end := answer.find(closing, start)) >= 0:
            answer = answer[:start] + answer[end + len(closing) :]
        if opening not in answer:
            answer = answer.rpartition(closing)[2]
    return answer.strip()


# --- the VQA normalisers ---------------------------------------------------------------------------------------------

_CONTRACTIONS = """
aint→ain't arent→aren't cant→can't couldve→could've couldnt→couldn't couldn'tve→couldn't've couldnt've→couldn't've
didnt→didn't doesnt→doesn't dont→don't hadnt→hadn't hadnt've→hadn't've hadn'tve→hadn't've hasnt→hasn't havent→haven't
hed→he'd hed've→he'd've he'dve→he'd've hes→he's howd→how'd howll→how'll hows→how's Id've→I'd've I'dve→I'd've Im→I'm
Ive→I've isnt→isn't itd→it'd itd've→it'd've it'dve→it'd've itll→it'll let's→let's maam→ma'am mightnt→mightn't
mightnt've→mightn't've mightn'tve→mightn't've mightve→might've mustnt→mustn't mustve→must've neednt→needn't notve→not've
oclock→o'clock oughtnt→oughtn't ow's'at→'ow's'at 'ows'at→'ow's'at 'ow'sat→'ow's'at shant→shan't shed've→she'd've
she'dve→she'd've she's→she's shouldve→should've shouldnt→shouldn't shouldnt've→shouldn't've shouldn'tve→shouldn't've
somebody'd→somebodyd somebodyd've→somebody'd've somebody'dve→somebody'd've somebodyll→somebody'll somebodys→somebody's
someoned→someone'd someoned've→someone'd've someone'dve→someone'd've someonell→someone'll someones→someone's
somethingd→something'd somethingd've→something'd've something'dve→something'd've somethingll→something'll thats→that's
thered→there'd thered've→there'd've there'dve→there'd've therere→there're theres→there's theyd→they'd theyd've→they'd've
they'dve→they'd've theyll→they'll theyre→they're theyve→they've twas→'twas wasnt→wasn't wed've→we'd've we'dve→we'd've
weve→we've werent→weren't whatll→what'll whatre→what're whats→what's whatve→what've whens→when's whered→where'd
wheres→where's whereve→where've whod→who'd whod've→who'd've who'dve→who'd've wholl→who'll whos→who's whove→who've
whyll→why'll whyre→why're whys→why's wont→won't wouldve→would've wouldnt→wouldn't wouldnt've→wouldn't've
wouldn'tve→wouldn't've yall→y'all yall'll→y'all'll y'allll→y'all'll yall'd've→y'all'd've y'alld've→y'all'd've
y'all'dve→y'all'd've youd→you'd youd've→you'd've you'dve→you'd've youll→you'll youre→you're youve→you've
"""
CONTRACTIONS: Mapping[str, str] = dict(pair.split("→") for pair in _CONTRACTIONS.split())  # type: ignore[misc]
NUMBERS: Mapping[str, str] = {
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
ARTICLES = frozenset(("a", "an", "the"))
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PUNCTUATED = re.compile("[" + re.escape(PUNCTUATION) + ".]")
_PERIOD, _VLMEVALKIT_PERIOD = re.compile(r"\.(?!\d)"), re.compile(r"(?<!\d)\.(?!\d)")
_PERIODS = 32  # the official code passes a flag (re.UNICODE, 32) where the number of substitutions belongs
_ONE_COMMA, _COMMAS = re.compile(r"\d,\d"), re.compile(r"\d,+\d")


def _unpunctuated(text: str, thousands: re.Pattern[str], period: re.Pattern[str] = _PERIOD) -> str:
    """Punctuation deleted where it touches a blank (or the text has a thousands comma), else a blank; then periods."""
    if not _PUNCTUATED.search(text):
        return text
    delete_all = thousands.search(text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        if mark in text:
            deleted = delete_all or f"{mark} " in text or f" {mark}" in text
            cleaned = cleaned.replace(mark, "" if deleted else " ")
    return period.sub("", cleaned, count=_PERIODS)


def _cleaned(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _normalised(text: str, thousands: re.Pattern[str], contractions: Mapping[str, str] = CONTRACTIONS) -> str:
    words = (NUMBERS.get(word, word) for word in _unpunctuated(_cleaned(text), thousands).lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=1 << 16)
def vqa(text: str, harness: bool = False) -> str:
    """The official VQA normaliser; `harness` is lmms-eval's copy of it, which also takes `10,,000` for a thousands comma."""
    return _normalised(text, _COMMAS if harness else _ONE_COMMA)


@lru_cache(maxsize=1 << 16)
def evalai(text: str) -> str:
    """The EvalAI normaliser: lower case, no `,` or `?`, a blank before every `'s`, then the official one."""
    return _normalised(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"), _COMMAS)


def soft_accuracy(answer: str, answers: Sequence[str]) -> float:
    """Mean over ten annotators of min(matches among the other nine / 3, 1); strings are compared as they are.

    Annotators are left out by position, so equal answers of two people stay two answers.

    Raises:
        ValueError: not exactly ten annotators.
    """
    if len(answers) != 10:
        raise ValueError(f"soft accuracy needs the answers of ten annotators, this question has {len(answers)}")
    agree = sum(given == answer for given in answers)
    return (agree * min((agree - 1) / 3, 1) + (10 - agree) * min(agree / 3, 1)) / 10


def _soft(answer: str, answers: Sequence[str]) -> Grade:
    """`target` is the commonest answer (the first of equals); the credit counts all ten."""
    return Grade(soft_accuracy(answer, answers), answer, Counter(answers).most_common(1)[0][0])


def vqav2(answer: str, answers: Sequence[str], protocol: str = "llava", mode: str | None = None) -> Grade:
    """VQAv2. `mode` overrides the protocol's: `official_prenormalised` (llava) or `always` (lmms_eval).

    The official script normalises only if the ten raw answers are not all the same; against unanimous annotators it compares
    strings with only white space cleaned, so `Yes` earns 0 against ten `yes`, and a prediction that was normalised before upload
    0 against ten `two`.
    """
    mode = mode or ("official_prenormalised" if _known(protocol) == "llava" else "always")
    if mode not in VQA_MODES:
        raise ValueError(f"no VQA mode {mode!r}: {nearest(mode, VQA_MODES)}")
    if mode == "always":
        return _soft(vqa(answer, harness=True), [vqa(a, harness=True) for a in answers])
    said = evalai(answer) if mode == "official_prenormalised" else _cleaned(answer)
    given = [_cleaned(a) for a in answers]
    if len(set(given)) > 1:
        return _soft(vqa(said), [vqa(a) for a in given])
    return _soft(said, given)


def evalai_vqa(answer: str, answers: Sequence[str], protocol: str = "llava") -> Grade:
    """TextVQA and VizWiz, the same in both protocols: `evalai` on prediction and annotators, soft accuracy."""
    _known(protocol)
    return _soft(evalai(answer.strip()), [evalai(a) for a in answers])


# The challenge's script has typographic apostrophes in most of its pairs.
_STRAIGHT = {"aint", "arent", "cant", "couldve", "couldnt", "weve", "wheres", "whove"}  # words it maps to a straight apostrophe
_STRAIGHT_KEYS = {"couldn'tve", "hadn'tve"}
VIZWIZ_CONTRACTIONS: Mapping[str, str] = {
    short if short in _STRAIGHT_KEYS else short.replace("'", "’"): long if short in _STRAIGHT else long.replace("'", "’")
    for short, long in CONTRACTIONS.items()
}


def vizwiz(answer: str, answers: Sequence[str], protocol: str = "llava", mode: str = "evalai") -> Grade:
    """VizWiz. `evalai`: as both protocols have it, see `evalai_vqa`. `official_raw`: the challenge's own script, which normalises
    the prediction alone and compares it with what the annotators wrote, so `Coca Cola` of an annotator is never met;
    `official_prenormalised`: the same on a prediction through `evalai`, as LLaVA uploads it.

    Raises:
        ValueError: no such mode; the nearest is named.
    """
    if mode == "evalai":
        return evalai_vqa(answer, answers, protocol)
    _known(protocol)
    if mode not in VIZWIZ_MODES:
        raise ValueError(f"no VizWiz mode {mode!r}: {nearest(mode, VIZWIZ_MODES)}")
    said = evalai(answer.strip()) if mode == "official_prenormalised" else answer
    return _soft(_normalised(said, _ONE_COMMA, VIZWIZ_CONTRACTIONS), answers)


# --- open words and yes/no -------------------------------------------------------------------------------------------

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _known(protocol: str) -> str:
    if protocol not in PROTOCOLS:
        raise ValueError(f"no protocol {protocol!r}: {nearest(protocol, PROTOCOLS)}")
    return protocol


def _equal(parsed: str, target: str) -> Grade:
    return Grade(float(parsed == target), parsed, target)


def gqa(answer: str, target: str, protocol: str = "llava") -> Grade:
    """llava: trailing periods off, lower case, identical. lmms_eval: both without ASCII punctuation, lower case, identical."""
    if _known(protocol) == "llava":
        return _equal(answer.strip().rstrip(".").lower(), target)
    return _equal(answer.strip().lower().translate(_NO_PUNCTUATION), target.lower().translate(_NO_PUNCTUATION))


def mme_parse(answer: str, protocol: str = "llava") -> str:
    """`yes`, `no` or `other`: exact, else whether the first four characters hold `yes`, else `no`.

    llava reads tab-separated lines, so tabs and line feeds become blanks first; lmms_eval deletes periods and takes `y`, `n`.
    """
    said = answer.replace("\t", " ").replace("\n", " ").strip().lower()
    if _known(protocol) == "lmms_eval":
        said = answer.lower().strip().replace(".", "")
        if len(said) == 1:
            return {"y": "yes", "n": "no"}.get(said, "other")
    return next((word for word in ("yes", "no") if word in said[:4]), "other")


def mme(answer: str, target: str, protocol: str = "llava") -> Grade:
    """One row of MME: `target` is yes or no in any case."""
    return _equal(mme_parse(answer, protocol), target.strip().lower())


def pope_parse(answer: str, rule: str = "official") -> str:
    """`yes`, `no`, and where the rule has it `neither` (strict) or `unknown` (word). `official` reads `NO` as yes."""
    said = answer.strip()
    if rule == "official":
        words = said.split(".")[0].replace(",", "").split(" ")
        return "no" if {"No", "not", "no"}.intersection(words) else "yes"
    if rule == "strict":
        return said.lower() if said.lower() in ("yes", "no") else "neither"
    if rule != "word":
        raise ValueError(f"no POPE rule {rule!r}: {nearest(rule, POPE_RULES)}")
    words = _unpunctuated(said.lower(), _ONE_COMMA, _VLMEVALKIT_PERIOD).split()
    found = [word for word in ("yes", "no") if word in words]
    return found[0] if len(found) == 1 else "unknown"


def pope(answer: str, target: str, protocol: str = "llava", rule: str | None = None) -> Grade:
    """One row of POPE. `rule` overrides the protocol's: `official` (llava) or `strict` (lmms_eval)."""
    rule = rule or ("official" if _known(protocol) == "llava" else "strict")
    return _equal(pope_parse(answer, rule), target.strip().lower())


# --- letters ---------------------------------------------------------------------------------------------------------

_STATED = re.compile(r"The answer is ([A-Z]).")


def scienceqa_parse(answer: str, num_choices: int, protocol: str = "llava") -> str:
    """A letter, or empty where the rule fails (in `llava` also for a letter beyond the choices)."""
    said = answer.strip()
    if _known(protocol) == "lmms_eval":
        if len(said) == 1:
            return said.upper()
        return said[0] if said[1:2] == "." and said[0].isupper() else ""
    stated = _STATED.findall(said)
    if said in tuple(LETTERS) or (said[:1] in tuple(LETTERS) and said[1:3] == ". "):
        letter = said[0]
    else:
        letter = stated[0] if len(stated) == 1 else ""
    return letter if letter in tuple(LETTERS[:num_choices]) else ""


def scienceqa(answer: str, target: str, num_choices: int, protocol: str = "llava") -> Grade:
    """One row of ScienceQA; `target` is the letter of the right choice."""
    return _equal(scienceqa_parse(answer, num_choices, protocol), target)


def seed(answer: str, target: str, protocol: str = "llava") -> Grade:
    """SEED-Bench. llava: the answer is the letter. lmms_eval: its first character is, in any case."""
    said = answer.strip()
    return _equal(said if _known(protocol) == "llava" else said[:1].upper(), target)


_DECORATIONS = (
    ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
    (":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."),
)  # fmt: skip
_PHRASES = (
    *(f"{the}{phrase} is" for phrase in ("answer", "correct answer", "best answer", "correct option", "best option",
                                         "choice", "correct choice") for the in ("", "the ")),
    "i choose", "i select", "i pick", "my answer is", "my choice is",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip


def _letter_token(said: str) -> str:
    """Rules 1 and 2: the only one of LETTERS that stands alone, plain or with one kind of decoration; else empty."""
    tokens = said.split()
    found = [letter for letter in LETTERS if letter in tokens]
    if len(found) == 1 and not ("A" in tokens and len(tokens) > 3):  # "A" may be an article
        return found[0]
    for before, after in _DECORATIONS:
        found = [letter for letter in LETTERS if f"{before}{letter}{after}" in tokens]
        if len(found) == 1:
            return found[0]
    return ""


def _letter_text(said: str, options: Mapping[str, str]) -> str:
    """Rule 3: the only option whose text occurs in the answer; else empty."""
    found = [letter for letter in options if str(options[letter]).lower() in said.lower()]
    return found[0] if len(found) == 1 else ""


def _letter_robust(said: str, letters: Iterable[str]) -> str:
    """Rule 4: of all places where a letter could be meant, the one of highest priority, then the last; else empty."""
    text = said.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    text = f" {text} "
    found: list[tuple[int, int, str]] = []  # priority, position, letter
    for letter in letters:
        for priority, form in ((6, f"({letter})"), (5, f"{letter}."), (4, f"{letter}:"), (3, f"{letter})"), (2, f"{letter} ")):
            if form in text:
                found.append((priority, text.rfind(form), letter))
        for phrase in _PHRASES:
            start = text.lower().find(phrase)
            place = text.find(letter, start + len(phrase)) if start >= 0 else -1
            if place >= 0:
                found.append((7, place, letter))
        inner = text.strip()
        if inner.startswith(letter) and not inner[1:2].isalpha():
            found.append((10, 0, letter))
        if inner.endswith(letter) and not inner[-2:-1].isalpha():
            found.append((9, len(text), letter))
    found = found or [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(found, key=lambda place: place[:2])[2] if found else ""


def mmbench_parse(answer: str, options: Mapping[str, str], robust: bool = True) -> str:
    """The letter an answer means by the offline (`static`) rules 1-3, then 4 if `robust`; empty where none decides.

    `options`: letter -> text of those that rules 3 and 4 read (in MMBench itself A to D). A missing option must be left out, not
    be the text `nan`. Rules 1 and 2 read A to E, whatever there is.
    """
    said, options = answer.strip(), dict(sorted(options.items()))
    letter = _letter_token(said) or _letter_text(said, options)
    return letter or (_letter_robust(said, options) if robust else "")


def mmbench(answer: str, target: str, options: Mapping[str, str], protocol: str = "llava") -> Grade:
    """One rotation of an MMBench question (EN and CN, both protocols); a group counts only if all rotations are right."""
    _known(protocol)
    return _equal(mmbench_parse(answer, options), target)
