"""The world is the same every time, splits share nothing, every row keeps its benchmark's format."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from diffprune.embedded import benchmarks, questions, vlm, world


def test_a_seed_is_one_scene():
    one, two = world.scene(7), world.scene(7)
    assert np.array_equal(one.image, two.image) and one.objects == two.objects and one.signs == two.signs
    assert one.image.shape == (96, 96, 3) and one.image.dtype == np.uint8
    assert not np.array_equal(one.image, world.scene(8).image)


def test_splits_share_neither_seeds_nor_textures():
    names = list(world.SPLITS)
    for k, a in enumerate(names):
        for b in names[k + 1 :]:
            assert not set(world._TEXTURES[a]) & set(world._TEXTURES[b])
            assert world.SPLITS[a].stop <= world.SPLITS[b].start
    assert [world.split_of(seeds.start) for seeds in world.SPLITS.values()] == names
    with pytest.raises(ValueError, match="no split"):
        world.split_of(-1)


def test_labels_agree_with_what_was_drawn():
    for seed in range(50):
        s = world.scene(seed)
        assert s.anchor.sum() == len(s.objects) + 2 * len(s.signs)
        assert Counter(s.kind[s.anchor & (s.kind < world.TENS)] - 1) == Counter(o.shape for o in s.objects)
        assert Counter(s.digit[s.anchor & (s.kind == world.TENS)]) == Counter(g.tens for g in s.signs)
        assert ((s.color >= 0) == ((s.kind > 0) & (s.kind < world.CLUTTERED))).all()


def test_oracle_covers_everything_asked_about():
    for seed in range(50):
        s = world.scene(seed)
        mask = world.oracle_mask(s, 32)
        assert mask.sum() == 32 and mask[s.anchor].all()


def test_questions_are_in_the_vocabulary_and_distinct():
    rng, kinds = np.random.default_rng(0), Counter()
    for seed in range(100):
        asked = questions.draw(world.scene(seed), rng)
        assert len(asked) == 12 and len({q for _, q, _ in asked}) == 12
        for kind, question, answer in asked:
            vlm.ids(f"{question} {answer}")
            kinds[kind] += 1
    assert set(kinds) == set(questions.KINDS)


def test_text_only_questions_need_no_picture():
    for kind, question, answer in questions.text_only(np.random.default_rng(0), 200):
        words = question.split()
        vlm.ids(f"{question} {answer}")
        if kind == "lookup":
            key = " ".join(words[words.index("is") + 1 :])
            option = f"{answer} {questions.CHINESE.get(key, key)} "
            assert f"{answer} {key} " in question or option in question
        else:
            assert answer in ("no", "0", questions.UNANSWERABLE)


@pytest.mark.parametrize("benchmark", benchmarks.NAMES)
def test_rows_are_whole_groups_and_repeat(benchmark):
    rows = benchmarks.rows(benchmark, "test", 50)
    assert len(rows) >= 50 and rows == benchmarks.rows(benchmark, "test", 50)
    assert rows == benchmarks.rows(benchmark, "test", 120)[: len(rows)]
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        vlm.ids(f"{row['question']} {row['answer']}")
        assert row["image_seed"] in world.SPLITS["test"] and row["kind"] in questions.KINDS
        assert row["answers"] is None or (len(row["answers"]) == 10 and row["answers"].count(row["answer"]) >= 7)


def grouped(benchmark, n=120):
    groups = defaultdict(list)
    for row in benchmarks.rows(benchmark, "calibration", n):
        groups[row["group"]].append(row)
    return groups.values()


def test_formats_of_the_real_ones():
    for name in ("mmbench", "mmbench_cn"):
        for group in grouped(name):
            assert sorted(row["answer"] for row in group) == list("ABCD")
            assert len({row["options"][row["answer"]] for row in group}) == 1
    for name in ("mme", "pope"):
        for group in grouped(name):
            assert [row["answer"] for row in group] == ["yes", "no"]
    assert {row["category"] for group in grouped("mme") for row in group} == {"existence", "count", "position", "color"}
    assert {row["category"] for group in grouped("pope") for row in group} == {"random", "popular", "adversarial"}
    vizwiz = [row["answer"] == questions.UNANSWERABLE for group in grouped("vizwiz", 400) for row in group]
    assert 0.28 < np.mean(vizwiz) < 0.42


def test_unknown_names_say_what_there_is():
    with pytest.raises(ValueError, match="gqa"):
        benchmarks.rows("gqq", "test", 4)
    with pytest.raises(ValueError, match="calibration"):
        benchmarks.rows("gqa", "tset", 4)
