"""The ten small benchmarks: whole groups, the published aggregates by hand, and every rule reachable from the world."""

from itertools import combinations

import numpy as np
import pytest

from diffprune.benchmarks import _aggregate
from diffprune.benchmarks.mmbench import Mmbench
from diffprune.benchmarks.world import EXAMPLES, LIKES, World
from diffprune.core import registry
from diffprune.core.benchmark import Graded, Sample
from diffprune.embedded import benchmarks, world

SMALL = 8


def _answer(sample: Sample) -> str:
    return str(sample.row["answer"])


def _graded(bench: World, samples: list[Sample], answers: list[str], protocol: str = "llava") -> list[Graded]:
    grades = [bench.grade(s, a, protocol) for s, a in zip(samples, answers, strict=True)]
    return [Graded(s.group, s.category, g.credit, g.parsed, g.target) for s, g in zip(samples, grades, strict=True)]


def test_the_likes_are_those_of_the_world_and_near_misses_are_named() -> None:
    assert set(LIKES) == set(benchmarks.NAMES)
    with pytest.raises(ValueError, match="did you mean 'pope'"):
        World("popo")
    assert str(registry.load("benchmarks", "world('pope')").spec) == "world(like='pope')"


@pytest.mark.parametrize(("like", "row", "answer", "protocol", "credit"), EXAMPLES)
def test_examples(like: str, row: dict, answer: str, protocol: str, credit: float) -> None:
    sample = Sample("0", "0", "0", "", row)
    assert World(like).grade(sample, answer, protocol).credit == pytest.approx(credit)


def test_every_like_has_an_example() -> None:
    assert {like for like, *_ in EXAMPLES} == set(LIKES)


@pytest.mark.parametrize("like", LIKES)
def test_gold_answers_earn_full_credit_under_both_protocols(like: str) -> None:
    bench = World(like)
    samples = bench.samples("test", 24)
    for protocol in bench.protocols:
        figures = bench.aggregate(_graded(bench, samples, [_answer(s) for s in samples], protocol))
        assert figures["accuracy"] == pytest.approx(100)
        best = 200 * len({s.category for s in samples}) if like == "mme" else 100
        assert next(iter(figures.values())) == pytest.approx(best)
    aloud = bench.aggregate(_graded(bench, samples, [f"<think>No, B, 7?</think> {_answer(s)}" for s in samples], "lmms_eval"))
    assert aloud["accuracy"] == pytest.approx(100)
    wrong = bench.aggregate(_graded(bench, samples, ["?!" for _ in samples], "lmms_eval"))
    assert wrong["accuracy"] == 0


@pytest.mark.parametrize("like", LIKES)
def test_limit_draws_whole_groups_and_small_ones_are_part_of_large_ones(like: str) -> None:
    bench = World(like)
    full = bench.samples("test")
    assert len(full) >= World.QUESTIONS and len({s.id for s in full}) == len(full)
    some, more = bench.samples("test", SMALL), bench.samples("test", 40)
    assert SMALL <= len(some) < len(more) < len(full)
    assert {s.id for s in some} < {s.id for s in more} < {s.id for s in full}
    sizes = {group: sum(s.group == group for s in full) for group in {s.group for s in full}}
    for group in {s.group for s in some}:
        assert sum(s.group == group for s in some) == sizes[group]
    assert [s for s in full if s in some] == some
    assert bench.samples("test", SMALL) == some


def test_a_limit_above_the_full_run_asks_for_more() -> None:
    assert len(World("textvqa").samples("calibration", World.QUESTIONS + 30)) >= World.QUESTIONS + 30


def test_a_full_run_asks_more_than_a_thousand_questions_on_disjoint_splits() -> None:
    seeds = {split: {s.image_id for like in ("pope", "gqa") for s in World(like).samples(split)} for split in world.SPLITS}
    assert list(seeds) == ["train", "calibration", "test", "confirmation"] and all(seeds.values())
    assert not any(one & other for one, other in combinations(seeds.values(), 2))
    assert not any(set(one) & set(other) for one, other in combinations(world._TEXTURES.values(), 2))
    assert len(LIKES) * World.QUESTIONS >= 1000


def test_wrong_split_limit_and_protocol_are_refused() -> None:
    bench = World("pope")
    with pytest.raises(ValueError, match="did you mean 'test'"):
        bench.samples("tests")
    with pytest.raises(ValueError, match="limit is 0"):
        bench.samples("test", 0)
    with pytest.raises(ValueError, match="did you mean 'llava'"):
        bench.grade(bench.samples("test", 1)[0], "yes", "lava")


def test_pictures_are_rgb_and_equal_for_equal_ids() -> None:
    first, second = (World(like).samples("test", 200)[0] for like in ("gqa", "pope"))
    assert first.image_id == second.image_id
    picture = World("gqa").image(first)
    assert picture.mode == "RGB" and picture.size == (world.IMAGE_SIZE, world.IMAGE_SIZE)
    assert np.array_equal(np.asarray(picture), world.scene(int(first.image_id)).image)
    assert World("pope").image(second) is picture


# --- aggregates, by hand ---------------------------------------------------------------------------------------------


def _row(group: str, category: str, credit: float, parsed: str = "", target: str = "") -> Graded:
    return Graded(group, category, credit, parsed, target)


def test_mme_arithmetic() -> None:
    rows = [_row("0", "count", 1), _row("0", "count", 1), _row("1", "count", 1), _row("1", "count", 0)]
    figures = _aggregate.mme(rows)
    assert (figures["acc/count"], figures["acc_plus/count"], figures["mme/count"]) == (75, 50, 125)
    assert list(figures)[:2] == ["mme_perception", "accuracy"] and figures["mme_perception"] == 125


def test_mme_all_right_is_2000_and_800() -> None:
    categories = _aggregate.MME_PERCEPTION + _aggregate.MME_COGNITION
    figures = _aggregate.mme([_row("same", c, 1) for c in categories for _ in range(2)])
    assert (figures["mme_perception"], figures["mme_cognition"], figures["mme_total"]) == (2000, 800, 2800)


def test_mme_refuses_an_incomplete_pair_by_name() -> None:
    rows = [_row("7", "count", 1), _row("7", "color", 1), _row("7", "color", 1)]
    with pytest.raises(ValueError, match="'7' of 'count' has 1 graded rows"):
        _aggregate.mme(rows)
    with pytest.raises(ValueError, match="no category 'colour'"):
        _aggregate.mme([_row("7", "colour", 1)] * 2)


def test_pope_answers_that_vlmevalkit_cannot_read_are_no_yes() -> None:
    """Its POPE_rating: TP 1, FN 2, FP 0 make a recall of 1/3 and an F1 of 1/2; lmms-eval's rule leaves `neither` out of both."""
    rows = [_row(str(i), "random", float(parsed == "yes"), parsed, "yes") for i, parsed in enumerate(("yes", "unknown", "no"))]
    figures = _aggregate.pope(rows)
    assert (figures["recall"], figures["f1_mean"]) == pytest.approx((100 / 3, 50)) and figures["unparsed"] == pytest.approx(100 / 3)


def test_pope_mean_of_f1_by_hand() -> None:
    def rows(category: str, *pairs: tuple[str, str]) -> list[Graded]:
        return [_row(str(i), category, float(p == t), p, t) for i, (p, t) in enumerate(pairs)]

    easy = rows("random", ("yes", "yes"), ("no", "no"))  # F1 1
    hard = rows("adversarial", ("yes", "yes"), ("yes", "no"), ("no", "yes"), ("neither", "yes"))  # TP 1 FP 1 FN 1: F1 1/2
    never = rows("popular", ("no", "yes"))  # F1 0
    figures = _aggregate.pope(easy + hard + never)
    assert figures["f1_mean"] == pytest.approx(50) and next(iter(figures)) == "f1_mean"
    assert figures["accuracy"] == pytest.approx(100 * 3 / 7)
    assert figures["precision"] == pytest.approx(100 * 2 / 3)
    assert figures["recall"] == pytest.approx(100 * 2 / 4)  # the `neither` is no false negative
    assert figures["yes_ratio"] == pytest.approx(100 * 3 / 7)
    assert figures["unparsed"] == pytest.approx(100 / 7)


def test_circular_group_counts_only_if_all_rotations_are_right() -> None:
    rows = [_row("a", "x", 1), _row("a", "x", 1), _row("b", "y", 1), _row("b", "y", 0)]
    figures = _aggregate.circular(rows)
    assert figures == {
        "circular_accuracy": 50, "accuracy": 75, "circular_accuracy/x": 100, "circular_accuracy/y": 0,
    }  # fmt: skip
    assert _aggregate.circular(rows[:3])["circular_accuracy"] == 100  # unknown sizes: a lost rotation cannot be seen
    with pytest.raises(ValueError, match="'b' has 1 graded rotations where 2 belong"):
        _aggregate.circular(rows[:3], 2)
    with pytest.raises(ValueError, match="'c' has 0 graded rotations where 4 belong"):
        _aggregate.circular(rows, {"a": 2, "b": 2, "c": 4})


def test_mmbench_sums_up_categories_and_what_they_belong_to() -> None:
    """Oracle: the questions of a category, or of all whose category lies in one, counted by hand."""
    rng, kinds = np.random.default_rng(0), ("logic/shape", "logic/number", "scene/place", "alone")
    asked = [(i, kinds[i % 4], rng.random(2 + i % 3) < 0.8) for i in range(40)]
    rows = [_row(f"{i}x{len(right)}", kind, float(one)) for i, kind, right in asked for one in right]
    figures = Mmbench().aggregate(rows)
    for name in ("", *kinds, "logic", "scene"):
        mine = [right.all() for _, kind, right in asked if not name or kind == name or kind.startswith(f"{name}/")]
        assert figures["circular_accuracy" + f"/{name}" * bool(name)] == pytest.approx(100 * np.mean(mine)), name
    assert len(figures) == 2 + 4 + 2


def test_means_per_category() -> None:
    figures = _aggregate.soft_mean([_row("a", "number", 0.3), _row("b", "number", 0.9), _row("c", "other", 0)])
    assert list(figures)[:2] == ["soft_accuracy", "accuracy"]
    assert figures["accuracy"] == pytest.approx(40) and figures["accuracy/number"] == pytest.approx(60)


@pytest.mark.parametrize("like", LIKES)
def test_aggregates_do_not_depend_on_order_and_refuse_nothing(like: str) -> None:
    bench = World(like)
    samples = bench.samples("test", 24)
    said = [_answer(s) if i % 3 else "yes" for i, s in enumerate(samples)]
    rows = _graded(bench, samples, said)
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    assert bench.aggregate(shuffled) == pytest.approx(bench.aggregate(rows))
    with pytest.raises(ValueError, match="no graded rows"):
        bench.aggregate([])


def test_the_world_knows_its_rotations_and_pairs() -> None:
    for like, message in (("mmbench", "rotations where 4 belong"), ("mme", "where a pair belongs")):
        bench = World(like)
        samples = bench.samples("test", 24)
        rows = _graded(bench, samples, [_answer(s) for s in samples])
        with pytest.raises(ValueError, match=message):
            bench.aggregate(rows[1:])
