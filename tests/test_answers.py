"""The published rules, on vectors made by running the reference code, and on slow restatements of the rules."""

import math

import pytest

from diffprune.benchmarks import _answers as answers

NORMALISED = [  # input, vqa, evalai
    ("The Dog.", "dog", "dog"),
    ("a cat and a dog", "cat and dog", "cat and dog"),
    ("None", "0", "0"),
    ("1,000", "1000", "1000"),
    ("10,,000", "10 000", "10000"),
    ("t-shirt", "t shirt", "t shirt"),
    ("t-shirt - red", "tshirt red", "tshirt red"),
    ("3.", "3", "3"),
    ("3.5", "3.5", "3.5"),
    (".5", ".5", ".5"),
    ("1.2.3", "1.2.3", "1.2.3"),
    ("U.S.A.", "usa", "usa"),
    ("blue, red", "blue red", "blue red"),
    ("blue,red", "blue red", "bluered"),
    ("dont", "don't", "don't"),
    ("Im", "im", "im"),
    ("I'm", "i'm", "i'm"),
    ("that's", "that's", "that 's"),
    ("John's hat", "john's hat", "john 's hat"),
    ("it's 5 o'clock", "it's 5 o'clock", "it 's 5 o'clock"),
    ("a/c", "c", "c"),
    ("12:30", "12:30", "12:30"),
    ("100%", "100%", "100%"),
    ("$5.00", "$5.00", "$5.00"),
    ("thirty-two", "thirty 2", "thirty 2"),
    ("an", "", ""),
    ("somebody'd", "somebodyd", "somebodyd"),
    ("two\tor\nthree", "2 or 3", "2 or 3"),
]


@pytest.mark.parametrize(("text", "vqa", "evalai"), NORMALISED)
def test_normalisers(text: str, vqa: str, evalai: str) -> None:
    assert answers.vqa(text) == vqa
    assert answers.evalai(text) == evalai


def test_harness_copy_takes_several_commas_for_thousands() -> None:
    assert answers.vqa("10,,000", harness=True) == "10000"


def test_at_most_32_periods_are_deleted() -> None:
    assert answers.vqa("." * 40) == "." * 8


def test_contractions_are_the_120_official_pairs() -> None:
    assert len(answers.CONTRACTIONS) == 120
    unreachable = {word for word in answers.CONTRACTIONS if word != word.lower()}
    assert unreachable == {"Id've", "I'dve", "Im", "Ive"}
    assert all(long.replace("'", "") == short.replace("'", "") for short, long in answers.CONTRACTIONS.items())
    assert len(set(answers.PUNCTUATION)) == 21


def _soft_slowly(answer: str, given: list[str]) -> float:
    credits = []
    for left_out in range(len(given)):
        others = given[:left_out] + given[left_out + 1 :]
        credits.append(min(others.count(answer) / 3, 1))
    return sum(credits) / len(credits)


@pytest.mark.parametrize(("agree", "credit"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_soft_accuracy(agree: int, credit: float) -> None:
    given = ["red"] * agree + ["blue"] * (10 - agree)
    assert answers.soft_accuracy("red", given) == pytest.approx(credit)
    assert answers.soft_accuracy("red", given) == pytest.approx(_soft_slowly("red", given))


def test_soft_accuracy_needs_ten_annotators() -> None:
    with pytest.raises(ValueError, match="ten annotators, this question has 9"):
        answers.soft_accuracy("red", ["red"] * 9)


@pytest.mark.parametrize(
    ("answer", "given", "raw", "prenormalised", "always"),
    [
        ("Yes", ["yes"] * 10, 0, 1, 1),  # unanimous: raw strings are compared
        ("Yes", ["yes"] * 9 + ["no"], 1, 1, 1),
        ("two", ["two"] * 10, 1, 0, 1),
        ("t-shirt", ["t-shirt"] * 10, 1, 0, 1),
        ("John's", ["john's"] * 9 + ["x"], 1, 0, 1),  # evalai tears the 's off, the annotators keep theirs
        (" red\n", ["red"] * 10, 1, 1, 1),
        ("T-shirt", ["t-shirt"] * 9 + ["t-shirt\n"], 0, 0, 1),  # white space alone does not make annotators differ
    ],
)
def test_vqav2_modes(answer: str, given: list[str], raw: int, prenormalised: int, always: int) -> None:
    modes = {"official_raw": raw, "official_prenormalised": prenormalised, "always": always}
    for mode, credit in modes.items():
        assert answers.vqav2(answer, given, mode=mode).credit == credit, mode
    assert answers.vqav2(answer, given, "llava").credit == prenormalised
    assert answers.vqav2(answer, given, "lmms_eval").credit == always


def test_evalai_vqa_normalises_unanimous_answers_too() -> None:
    grade = answers.evalai_vqa("Two.", ["two"] * 10)
    assert (grade.credit, grade.parsed, grade.target) == (1, "2", "2")
    assert answers.evalai_vqa("red", ["red", "Red."] + ["blue"] * 8).credit == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("answer", "target", "llava", "lmms_eval"),
    [
        ("Yes..", "yes", 1, 1),
        ("tshirt", "t-shirt", 0, 1),
        ("T-Shirt", "t-shirt", 1, 1),
        ("Yes, it is", "yes", 0, 0),
        ("red!", "red", 0, 1),
        ("the dog", "dog", 0, 0),
        (" 2 ", "2", 1, 1),
        ("two", "2", 0, 0),
    ],
)
def test_gqa(answer: str, target: str, llava: int, lmms_eval: int) -> None:
    assert answers.gqa(answer, target, "llava").credit == llava
    assert answers.gqa(answer, target, "lmms_eval").credit == lmms_eval


MME = [  # answer, lmms_eval, llava
    *((a, "yes", "yes") for a in ("Yes", "yes.", "Eyes")),
    *((a, "no", "no") for a in ("No, it is not", "Nothing", "Known", "Not sure", "nope")),
    *((a, "other", "other") for a in ("There is no", "The answer is yes", "cannot", "Yeah", "")),
    ("Y", "yes", "other"),
    ("n", "no", "other"),
    ("n.", "no", "other"),
    ("no\tno", "no", "no"),
]


@pytest.mark.parametrize(("answer", "lmms_eval", "llava"), MME)
def test_mme(answer: str, lmms_eval: str, llava: str) -> None:
    assert answers.mme_parse(answer, "lmms_eval") == lmms_eval
    assert answers.mme_parse(answer, "llava") == llava
    assert answers.mme(answer, "Yes", "llava").credit == (llava == "yes")


POPE = [  # answer, official, strict, word
    ("Yes", "yes", "yes", "yes"),
    ("No", "no", "no", "no"),
    ("NO", "yes", "no", "no"),
    ("No.", "no", "neither", "no"),
    ("Yes, there is.", "yes", "neither", "yes"),
    ("There is not a dog", "no", "neither", "unknown"),
    ("There isn't a dog", "yes", "neither", "unknown"),
    ("There is a dog.", "yes", "neither", "unknown"),
    ("I do not know", "no", "neither", "unknown"),
    ("None", "yes", "neither", "unknown"),
    ("Yes. No doubt.", "yes", "neither", "unknown"),
    ("No\nbecause", "yes", "neither", "no"),
    ("", "yes", "neither", "unknown"),
]


@pytest.mark.parametrize(("answer", "official", "strict", "word"), POPE)
def test_pope(answer: str, official: str, strict: str, word: str) -> None:
    assert [answers.pope_parse(answer, rule) for rule in answers.POPE_RULES] == [official, strict, word]
    assert answers.pope(answer, "no", "llava").parsed == official
    assert answers.pope(answer, "no", "lmms_eval").credit == (strict == "no")
    assert answers.pope(answer, "no", rule="word").credit == (word == "no")


@pytest.mark.parametrize(
    ("answer", "llava", "lmms_eval"),
    [
        ("A", "A", "A"), ("a", "", "A"), ("B.", "", "B"), ("B. no", "B", "B"), ("B.no", "", "B"),
        ("The answer is C.", "C", ""), ("The answer is C", "", ""), ("The answer is C. The answer is D.", "", ""),
        ("(A)", "", ""), ("", "", ""), ("E", "", "E"),
    ],
)  # fmt: skip
def test_scienceqa_with_four_choices(answer: str, llava: str, lmms_eval: str) -> None:
    assert answers.scienceqa_parse(answer, 4, "llava") == llava
    assert answers.scienceqa_parse(answer, 4, "lmms_eval") == lmms_eval


def test_scienceqa_reaches_e_only_with_five_choices() -> None:
    assert answers.scienceqa("E", "E", 5).credit == 1
    assert answers.scienceqa("E", "E", 4).credit == 0


@pytest.mark.parametrize(("answer", "llava", "lmms_eval"), [("B", 1, 1), ("b", 0, 1), ("B.", 0, 1), ("(B)", 0, 0), ("", 0, 0)])
def test_seed(answer: str, llava: int, lmms_eval: int) -> None:
    assert answers.seed(answer, "B", "llava").credit == llava
    assert answers.seed(answer, "B", "lmms_eval").credit == lmms_eval


ANIMALS = {"A": "teddy bear", "B": "rabbit", "C": "cat", "D": "dog"}
MMBENCH = [  # answer, rules 1-3, with the robust rule
    *((a, letter, letter) for a, letter in (
        ("A", "A"), ("B.", "B"), ("(C)", "C"), ("C) cat", "C"), ("The answer is D", "D"), ("A cat", "A"),
        ("A rabbit is in it", "B"), ("rabbit", "B"), ("A, B", "B"), ("I think (B).", "B"), ("E", "E"),
    )),
    ("A cat and a dog", "", "A"),
    ("B or C", "", "B"),
    ("The correct answer is **B**", "", "B"),
    ("选B", "", "B"),
    ("答案是C", "", "C"),
    ("It is A because", "", "A"),
    ("none of them", "", ""),
    ("a", "", ""),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "static", "robust"), MMBENCH)
def test_mmbench(answer: str, static: str, robust: str) -> None:
    assert answers.mmbench_parse(answer, ANIMALS, robust=False) == static
    assert answers.mmbench_parse(answer, ANIMALS) == robust
    assert answers.mmbench(answer, "B", ANIMALS).credit == (robust == "B")


def test_mmbench_option_named_nan_matches_banana_so_missing_options_must_be_left_out() -> None:
    assert answers.mmbench_parse("a banana", {"A": "banana", "D": "nan"}) == ""
    assert answers.mmbench_parse("a banana", {"A": "banana"}) == "A"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: answers.gqa("a", "a", "lava"),
        lambda: answers.vqav2("a", ["a"] * 10, "lava"),
        lambda: answers.evalai_vqa("a", ["a"] * 10, "lava"),
        lambda: answers.mme("a", "a", "lava"),
        lambda: answers.pope("a", "a", "lava"),
        lambda: answers.scienceqa("a", "a", 4, "lava"),
        lambda: answers.seed("a", "a", "lava"),
        lambda: answers.mmbench("a", "a", ANIMALS, "lava"),
    ],
)
def test_unknown_protocol_names_the_nearest(wrong) -> None:
    with pytest.raises(ValueError, match="did you mean 'llava'"):
        wrong()


def test_unknown_mode_and_rule_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'official_raw'"):
        answers.vqav2("a", ["a"] * 10, mode="offical_raw")
    with pytest.raises(ValueError, match="did you mean 'strict'"):
        answers.pope_parse("a", "strikt")


def test_grades_are_credits() -> None:
    assert math.isclose(answers.evalai_vqa("7 4", ["4 7"] * 9 + ["7 4"]).credit, 0.3)
