"""Training-free methods against their definitions, written out token by token in double precision, one image at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Above, Budget, Keep, Share
from diffprune.core.evidence import IDENTITY, QUESTION, Evidence, Question, encoder_attention, encoder_keys
from diffprune.core.pruner import Pruner
from diffprune.core.site import PROJECTED, Cut
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.pruners import _greedy, _quotas, vispruner
from diffprune.pruners.cdpruner import relevance
from diffprune.pruners.holov import stretch_scores, stretches
from diffprune.pruners.prunesid import draw
from tests.contracts import SHAPE
from tests.test_families import FAMILIES, pictures, tiny

Array = NDArray[np.float64]
JOINT, LAST_KEYS = encoder_attention(-1, joint=True), encoder_keys(-1)
BUDGETS: list[Budget] = [Keep(1), Keep(2), Keep(9), Keep(20), Keep(31), Share(0.3), Share(0.8)]
GRID = (6, 7)
VALID = (42, 35, 17, 6)


def tokens(seed: int = 0, width: int = 48) -> VisualTokens:
    """Images of 42, 35, 17 and 6 tokens, smooth and with near-duplicates as real ones are; padding is full of NaN."""
    chance = torch.Generator().manual_seed(seed)
    num = math.prod(GRID)
    valid = torch.arange(num) < torch.tensor(VALID)[:, None]
    base = torch.randn(4, 12, width, generator=chance)[:, torch.randint(12, (num,), generator=chance)]
    features = base + 0.4 * torch.randn(4, num, width, generator=chance) + 0.5
    keys = base[..., :8].unflatten(-1, (2, 4)) + 0.5 * torch.randn(4, num, 2, 4, generator=chance)
    evidence: dict[Evidence, Tensor | Question] = {
        encoder_attention(): torch.randn(4, num, generator=chance).mul(1.5).softmax(1),
        JOINT: torch.randn(4, num, generator=chance).mul(2).softmax(1),
        encoder_keys(): keys,
        LAST_KEYS: keys.flip(0) + torch.randn(4, num, 2, 4, generator=chance),
        QUESTION: Question(torch.randn(4, 5, width, generator=chance), torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None]),
        IDENTITY: torch.arange(4) * 7919 + seed,
    }
    return VisualTokens(features.where(valid[..., None], torch.nan), valid, grid=GRID, evidence=evidence, projected=True)


class Image:
    """One image's valid tokens as double arrays."""

    def __init__(self, seen: VisualTokens, row: int) -> None:
        self.num = VALID[row]
        self.x = seen.features[row, : self.num].double().numpy()
        for name, evidence in (("a", encoder_attention()), ("joint", JOINT), ("keys", encoder_keys()), ("last_keys", LAST_KEYS)):
            setattr(self, name, seen.given(evidence)[row, : self.num].double().numpy())
        question = seen.evidence[QUESTION]
        assert isinstance(question, Question)
        self.words = question.embedding[row][question.valid[row]].double().numpy()

    a: Array
    joint: Array
    keys: Array
    last_keys: Array


def unit(x: Array) -> Array:
    return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))


def best(score: Array, among: list[int], count: int) -> list[int]:
    return sorted(among, key=lambda i: (-score[i], i))[:count]


# --- the definitions --------------------------------------------------------------------------------------------------

Answer = tuple[set[int], Array | None]  # kept tokens; [K N] weights of their sums, in raster order


def divprune(image: Image, count: int) -> Answer:
    x = unit(image.x)
    distance = 1 - x @ x.T
    kept: list[int] = []
    while len(kept) < count:
        left = [i for i in range(image.num) if i not in kept]
        others = kept or range(image.num)
        value = {i: min((distance[i, j] for j in others if j != i), default=0.0) for i in left}
        kept.append(max(left, key=lambda i: value[i]))
    return set(kept), None


def volumes(kernel: Array, count: int) -> set[int]:
    """Greedy by determinant: each step takes the token with which the chosen submatrix has the largest determinant."""
    kept: list[int] = []
    while len(kept) < count:
        left = [i for i in range(len(kernel)) if i not in kept]
        kept.append(max(left, key=lambda i: np.linalg.det(kernel[np.ix_([*kept, i], [*kept, i])])))
    return set(kept)


def cdpruner(image: Image, count: int) -> Answer:
    x = unit(image.x)
    likeness = (x @ unit(image.words).T).mean(1)
    r = (likeness - likeness.min() + 1e-6) / (likeness.max() - likeness.min())
    return volumes(r[:, None] * (x @ x.T) * r[None], count), None


def dpp(image: Image, count: int) -> Answer:
    x = unit(image.x)
    kernel = x @ x.T
    np.fill_diagonal(kernel, 1)  # all alike at first, so that the first token is first
    return volumes(kernel, count), None


def vispruner_(image: Image, count: int, important: float = 0.5) -> Answer:
    kept = best(image.a, list(range(image.num)), int(count * important))
    rest = best(image.a, [i for i in range(image.num) if i not in kept], image.num)
    x, wanted = unit(image.x), count - len(kept)
    while len(rest) > wanted:
        one, two = rest[0::2], rest[1::2]
        step = min(8, len(rest) - wanted, len(one))
        nearest = {i: max((x[i] @ x[j] for j in two), default=-2.0) for i in one}
        rest = sorted(one, key=lambda i: -nearest[i])[step:] + two
    return {*kept, *rest}, None


def stretched(image: Image, count: int) -> tuple[list[list[int]], list[float]]:
    """HoloV's stretches and the mean score of each."""
    num = image.num
    parts = max(1, min(num, int(1024 * num / (576 * count))))
    chunks = [list(map(int, part)) for part in np.array_split(np.arange(num), parts)]
    score = []
    for chunk in chunks:
        x, n = unit(image.x[chunk]), len(chunk)
        similar = x @ x.T * (1 - np.eye(n))
        mean = similar.sum(1) / max(n - 1, 1)
        variance = ((similar - mean[:, None]) ** 2).sum(1) / max(n - 1, 1)
        attention = 1000 * image.a[chunk]
        variance *= np.abs(attention).mean() / (np.abs(variance).mean() + 1e-6)
        score.append(float((attention + 0.09 * variance).mean()))
    return chunks, score


def holov(image: Image, count: int) -> Answer:
    chunks, score = stretched(image, count)
    share = np.array(score) / (sum(score) + 1e-6)
    quota = [min(int(count * s), len(c)) for s, c in zip(share, chunks, strict=True)]
    while sum(quota) < count:
        for q in np.argsort(-share, kind="stable"):
            if sum(quota) < count and quota[q] < len(chunks[q]):
                quota[q] += 1
    return {i for q, chunk in zip(quota, chunks, strict=True) for i in best(image.a, chunk, q)}, None


def prunesid(image: Image, count: int) -> Answer:
    groups = max(1, count // 4)
    data = 1 / (1 + np.exp(-image.x.T))  # [D N], tokens as variables
    data = data - data.mean(0)
    streams = [torch.Generator().manual_seed(group) for group in range(groups)]
    start = torch.stack([torch.randn(48, generator=stream)[: image.num] for stream in streams], 1)
    q = np.linalg.qr(data @ start.double().numpy())[0]
    for _ in range(2):
        q = np.linalg.qr(data.T @ q)[0]
        q = np.linalg.qr(data @ q)[0]
    loadings = np.abs(np.linalg.svd(q.T @ data, full_matrices=False)[2]).T  # [N groups]
    group = loadings.argmax(1)
    x = unit(image.x)
    similar = x @ x.T
    threshold = 18 * count / image.num * float(np.mean([similar[i, j] for i in range(image.num) for j in range(i)] or [0.0]))
    members = [[i for i in range(image.num) if group[i] == g] for g in range(groups)]
    distinct: list[list[int]] = []
    for inside in members:
        left, kept = best(image.a, inside, len(inside)), []
        while left:
            kept.append(left.pop(0))
            left = [i for i in left if similar[i, kept[-1]] <= threshold]
        distinct.append(kept)
    survivors, sizes = [len(d) for d in distinct], [len(m) for m in members]
    upper = [min(5 * math.ceil(count / 64), n, s) for n, s in zip(sizes, survivors, strict=True)]
    while sum(upper) < count:
        upper = [min(u + 1, n) for u, n in zip(upper, sizes, strict=True)]
    lower = [min(1, n) for n in sizes]
    rest = count - sum(lower)
    upto = [round(rest * c / sum(survivors)) for c in np.cumsum(survivors)]
    quota = [min(low + now - before, up) for low, now, before, up in zip(lower, upto, [0, *upto], upper, strict=False)]
    for g in sorted(range(groups), key=lambda g: (-survivors[g], g)):
        quota[g] += min(upper[g] - quota[g], count - sum(quota))
    ranked = [d + best(image.a, [i for i in m if i not in d], len(m)) for d, m in zip(distinct, members, strict=True)]
    return {i for r, n in zip(ranked, quota, strict=True) for i in r[:n]}, None


def visionzip(image: Image, count: int, share: float = 5 / 32) -> Answer:
    contextual = math.floor(count * share + 0.5)
    dominant = best(image.a, list(range(image.num)), count - contextual)
    rest = [i for i in range(image.num) if i not in dominant]
    stride = max(1, len(rest) // contextual) if contextual else 1
    targets = [rest[stride * c] for c in range(contextual)]
    key = unit(image.keys.mean(1))
    got: dict[int, list[int]] = {t: [] for t in targets}
    for i in rest:
        if i not in targets and targets:
            got[max(targets, key=lambda t: key[i] @ key[t])].append(i)
    kept = sorted([*dominant, *targets])
    mix = np.zeros((count, image.num))
    for k, i in enumerate(kept):
        mix[k, i] = 1
        for j in got.get(i, []):
            mix[k, j] = 1 / len(got[i])
    return set(kept), mix


def prumerge(image: Image, count: int, centres: list[int] | None = None) -> Answer:
    a, num = image.joint, image.num
    more = 1 < count < num  # one token is made of what is not kept
    centres = best(a, list(range(num)), count - more) if centres is None else centres
    rest = [i for i in range(num) if i not in centres]
    extra = best(a, rest, int(more))
    key, kept = unit(image.last_keys.reshape(num, -1)), sorted([*centres, *extra])
    mix = np.zeros((len(kept), num))
    for k, i in enumerate(kept):
        if i in extra:
            mix[k, rest] = a[rest]
            continue
        mix[k, i] = 1
        if rest:
            near = sorted((j for j in range(num) if j != i), key=lambda j: -key[i] @ key[j])[:32]
            mix[k, near] = a[near]
    return set(kept), mix


def prumerge_plus(image: Image, count: int) -> Answer:
    num = image.num
    if count == num:
        return prumerge(image, count)
    total = count - (count > 1)
    centres = best(image.joint, list(range(num)), math.ceil(total / 4))
    rest = [i for i in range(num) if i not in centres]
    wanted = total - len(centres)
    centres += [i for place, i in enumerate(rest) if (place + 1) * wanted // len(rest) > place * wanted // len(rest)]
    assert len(centres) == total
    return prumerge(image, count, centres)


def outstanding(image: Image) -> int:
    low, high = np.percentile(image.joint.astype(np.float32), [25, 75])
    return int((image.joint > high + 1.5 * (high - low)).sum())


def prumerge_adaptive(image: Image, count: int) -> Answer:
    return prumerge(image, min(count, outstanding(image) + 1))


def prumerge_both(image: Image, count: int) -> Answer:
    return prumerge_plus(image, min(count, 4 * outstanding(image) + 1))


def tome(image: Image, count: int, rounds: int = 23, size: Array | None = None) -> Answer:
    groups, excess, number = [[i] for i in range(image.num)], image.num - count, 0  # the token in whose place a mean stands first
    size = np.ones(image.num) if size is None else size
    keys = image.keys.mean(1) * size[:, None]
    while number < rounds or len(groups) > count:
        number += 1
        goes = min(excess * min(number, rounds) // rounds - (image.num - len(groups)), len(groups) // 2)
        even, odd = groups[::2], groups[1::2]
        like = unit(np.stack([keys[g].sum(0) for g in even])) @ unit(np.stack([keys[g].sum(0) for g in odd] or [keys[0]])).T
        for a in best(like.max(1), list(range(len(even))), goes):
            odd[like[a].argmax()].extend(even[a])
            even[a] = []
        groups = sorted((g for g in (*even, *odd) if g), key=lambda g: g[0])
    mix = np.zeros((count, image.num))
    for k, group in enumerate(groups):
        mix[k, group] = size[group] / size[group].sum()
    return {group[0] for group in groups}, mix


DEFINITIONS: dict[str, Callable[[Image, int], Answer]] = {
    "divprune": divprune, "cdpruner": cdpruner, "cdpruner(question=False)": dpp, "vispruner": vispruner_, "holov": holov,
    "prunesid": prunesid, "visionzip": visionzip, "prumerge": prumerge, "prumerge(plus=True)": prumerge_plus,
    "prumerge(adaptive=True)": prumerge_adaptive, "prumerge(plus=True, adaptive=True)": prumerge_both, "tome": tome,
}  # fmt: skip
OPTIONS: dict[str, Callable[[Image, int], Answer]] = {
    "tome(rounds=1)": partial(tome, rounds=1),
    **{f"vispruner(important={share})": partial(vispruner_, important=share) for share in (0.0, 0.3, 1.0)},
    **{f"visionzip(contextual={share})": partial(visionzip, share=share) for share in (0.0, 0.5, 1.0)},
}


def chosen(method: Pruner, seen: VisualTokens, budget: Budget) -> Selection:
    return method.select(seen, Cut(method.cuts(Keep(1), SHAPE)[0].site, budget))


@pytest.mark.parametrize(("text", "seed"), [*product(DEFINITIONS, (0, 1, 2)), *product(OPTIONS, (0,))])
def test_a_method_is_its_definition(text: str, seed: int) -> None:
    seen, method = tokens(seed), registry.load("pruners", text)
    for budget in BUDGETS:
        found = chosen(method, seen, budget)
        for row, num in enumerate(VALID):
            kept, mix = (DEFINITIONS | OPTIONS)[text](Image(seen, row), budget.count(num))
            assert set(found.keep[row].nonzero()[:, 0].tolist()) == kept, f"{budget}, image {row}"
            assert (found.mix is None) == (mix is None)
            if found.mix is not None and mix is not None:
                weights = found.mix[row, : len(kept), :num]
                torch.testing.assert_close(weights.double(), torch.from_numpy(mix), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("seed", "budget"), [(6, Keep(9)), (8, Keep(9)), (6, Share(0.3))], ids=str)
def test_prunesid_suppresses_above_eighteen_times_share_and_mean(seed: int, budget: Budget) -> None:
    """Images in which 17 or 19 times would leave other tokens."""
    seen = tokens(seed)
    found = chosen(registry.load("pruners", "prunesid"), seen, budget).keep
    for row, num in enumerate(VALID):
        assert set(found[row].nonzero()[:, 0].tolist()) == prunesid(Image(seen, row), budget.count(num))[0]


def test_prunesid_draws_other_numbers_for_every_seed_and_component() -> None:
    drawn = torch.cat([draw(16, 200, seed) for seed in range(4)], 1)
    assert len({tuple(column) for column in drawn.T.tolist()}) == 800


def test_visionzip_has_as_many_contextual_tokens_as_the_release() -> None:
    share = registry.load("pruners", "visionzip").contextual
    assert [math.floor(count * share + 0.5) for count in (64, 128, 192)] == [10, 20, 30]


@pytest.mark.parametrize("rounds", [1, 23])
def test_a_token_that_stands_for_several_weighs_as_many_when_it_is_merged_again(rounds: int) -> None:
    size = torch.randint(1, 9, (4, 42), generator=torch.Generator().manual_seed(5)).float()
    seen, method = replace(tokens(), size=size), registry.load("pruners", f"tome(rounds={rounds})")
    for count in (2, 9, 20):
        found = chosen(method, seen, Keep(count))
        assert found.mix is not None
        for row, num in enumerate(VALID):
            kept, mix = tome(Image(seen, row), min(count, num), rounds, size[row, :num].double().numpy())
            assert mix is not None and set(found.keep[row].nonzero()[:, 0].tolist()) == kept
            weights = found.mix[row, : len(kept), :num]
            torch.testing.assert_close(weights.double(), torch.from_numpy(mix), rtol=0, atol=1e-6)


def spread_out(rows: int, columns: int, count: int) -> set[int]:
    """Cells of a regular grid in whole numbers: lines as far apart as points in them, each in the middle of its part."""
    lines = min(rows, count, max(math.ceil(count / columns), round(math.sqrt(count * rows / columns))))
    found = set()
    for line in range(lines):
        points = count * (line + 1) // lines - count * line // lines
        row = (2 * line + 1) * rows // (2 * lines)
        found |= {row * columns + (2 * point + 1) * columns // (2 * points) for point in range(points)}
    return found


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (6, 10), (9, 4), (1, 7), (5, 1), (2, 30)])
def test_grid_is_spread_evenly(rows: int, columns: int) -> None:
    num = rows * columns
    seen = VisualTokens(torch.zeros(1, num, 1), torch.ones(1, num, dtype=torch.bool), grid=(rows, columns))
    for count in {*range(1, num + 1, 1 + num // 40), num}:
        kept = set(chosen(registry.load("pruners", "grid"), seen, Keep(count)).keep[0].nonzero()[:, 0].tolist())
        assert kept == spread_out(rows, columns, count) and len(kept) == count


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_grid_goes_along_the_sequence_of_what_is_no_full_raster(budget: Budget) -> None:
    seen = tokens()
    seen = replace(seen, valid=seen.valid.roll(3, 1), features=seen.features.roll(3, 1))  # padding stands on both sides
    keep = chosen(registry.load("pruners", "grid"), seen, budget).keep
    for row, num in enumerate(VALID):
        wanted = spread_out(*(GRID if num == 42 else (1, num)), budget.count(num))
        assert torch.equal(keep[row], seen.valid[row] & (sum((seen.valid[row].cumsum(0) - 1 == i) for i in wanted) > 0))


@pytest.mark.parametrize(
    ("rows", "columns", "count"),
    [(24, 24, n) for n in (64, 128, 192, 144, 576, 1)] + [(6, 10, 15), (5, 7, 35), (2, 24, 12), (3, 12, 21), (12, 3, 21)],
)
def test_pooling_is_adaptive_average_pooling(rows: int, columns: int, count: int) -> None:
    features = torch.randn(2, rows * columns, 5)
    seen = VisualTokens(features, torch.ones(2, rows * columns, dtype=torch.bool), grid=(rows, columns))
    found = chosen(registry.load("pruners", "pool"), seen, Keep(count))
    sides = {(24, 64): (8, 8), (24, 128): (16, 8), (24, 192): (16, 12), (24, 144): (12, 12), (24, 576): (24, 24), (24, 1): (1, 1),
             (6, 15): (3, 5), (5, 35): (5, 7), (2, 12): (1, 12), (3, 21): (3, 7), (12, 21): (7, 3)}[rows, count]  # fmt: skip
    rasters = features.view(2, rows, columns, 5).movedim(-1, 1)
    wanted = functional.adaptive_avg_pool2d(rasters, sides).flatten(2).transpose(1, 2)
    assert found.mix is not None
    after = pruning.merged(seen, found.keep, found.mix).features[found.keep].view(2, count, 5)
    torch.testing.assert_close(after, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [7, 61, 97, 575])
def test_pooling_meets_budgets_without_good_factors(count: int) -> None:
    """Every token is in some window, windows are rectangles around their own token, and their weights add up to 1."""
    seen = VisualTokens(torch.randn(1, 576, 3), torch.ones(1, 576, dtype=torch.bool), grid=(24, 24))
    found = chosen(registry.load("pruners", "pool"), seen, Keep(count))
    assert found.mix is not None and int(found.keep.sum()) == count
    rows = found.mix[0].view(count, 24, 24)
    assert (rows.sum(0) > 0).all()
    torch.testing.assert_close(rows.sum((1, 2)), torch.ones(count))
    for window, own in zip(rows, found.keep[0].nonzero()[:, 0].tolist(), strict=True):
        inside = window > 0
        box = inside.any(1)[:, None] & inside.any(0)
        assert torch.equal(inside, box) and inside.flatten()[own]


@pytest.mark.parametrize(("count", "lines"), [(8, 4), (10, 3), (128, 16)])
def test_pooled_lines_are_even_unless_windows_were_more_than_twice_as_long_as_wide(count: int, lines: int) -> None:
    """8 make four lines of two, 10 neither two of five nor five of two."""
    seen = VisualTokens(torch.randn(1, 576, 3), torch.ones(1, 576, dtype=torch.bool), grid=(24, 24))
    found = chosen(registry.load("pruners", "pool"), seen, Keep(count))
    assert found.mix is not None
    tops = [int((window > 0).any(1).nonzero()[0]) for window in found.mix[0].view(count, 24, 24)]
    assert len(set(tops)) == lines and max(map(tops.count, tops)) - min(map(tops.count, tops)) == (count == 10)


def test_pooling_along_a_sequence_where_there_is_no_grid() -> None:
    seen = tokens()
    found = chosen(registry.load("pruners", "pool"), seen, Keep(4))
    after = pruning.merged(seen, found.keep, found.mix).features  # type: ignore[arg-type]
    full = functional.adaptive_avg_pool2d(seen.features[0].T.view(1, -1, *GRID), (2, 2))[0].flatten(1).T
    torch.testing.assert_close(after[0][found.keep[0]], full, rtol=0, atol=1e-5)
    for row, num in enumerate(VALID[1:], 1):
        wanted = functional.adaptive_avg_pool1d(seen.features[row, :num].T, 4).T
        torch.testing.assert_close(after[row][found.keep[row]], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 7, -3])
def test_random_scores_are_splitmix64(seed: int) -> None:
    """Oracle: the generator in whole numbers; and every token has the same chance."""
    mask = 2**64 - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    seen = tokens()
    identities = seen.given(IDENTITY).tolist()
    found = registry.load("pruners", f"random(seed={seed})").score(seen)
    for row, identity in enumerate(identities):
        stream = mix((identity + mix(seed & mask)) & mask)
        assert found[row].tolist() == [mix((stream + (i + 1) * 0x9E3779B97F4A7C15) & mask) >> 40 for i in range(42)]
    many = VisualTokens(torch.zeros(4000, 10, 1), torch.ones(4000, 10, dtype=torch.bool), evidence={IDENTITY: torch.arange(4000)})
    share = chosen(registry.load("pruners", f"random(seed={seed})"), many, Keep(3)).keep.double()
    assert float((share.mean(0) - 0.3).abs().max()) < 4 * (0.21 / 4000) ** 0.5
    pairs = share.T @ share / 4000 - torch.eye(10) * share.mean(0)  # of two different tokens: 3/10 of 2/9
    assert float((pairs - (1 / 15) * (1 - torch.eye(10))).abs().max()) < 5 * (0.0622 / 4000) ** 0.5


# --- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_that_replaces_tokens_is_that_of_all_of_them_in_half_precision(dtype: torch.dtype) -> None:
    """As many as a picture in tiles has, whose sum float16 cannot hold; padding is full of NaN."""
    features, valid = (30 + torch.randn(2, 2880, 4)).to(dtype), torch.ones(2, 2880, dtype=torch.bool)
    features[1, 100:], valid[1, 100:] = torch.nan, False
    seen = VisualTokens(features, valid)
    found, keep = (chosen(registry.load("pruners", name), seen, Keep(64)) for name in ("replaced(grid)", "grid"))
    assert found.features is not None and found.features.dtype == dtype
    for row in range(2):
        kept, gone = keep.keep[row], valid[row] & ~keep.keep[row]
        assert torch.equal(found.features[row, kept], features[row, kept])
        wanted = features[row, valid[row]].double().mean(0).to(dtype)
        assert torch.equal(found.features[row, gone], wanted.expand(int(gone.sum()), -1))


def test_exact_copies_are_chosen_once_each() -> None:
    features = torch.eye(4)[torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])][None]
    valid = torch.ones(1, 8, dtype=torch.bool)
    cosine = _greedy.cosines(features, valid)
    for order in (_greedy.max_min(cosine.clone(), valid, 8), _greedy.most_volume(cosine, valid, 8)[0]):
        assert sorted(order[0].tolist()) == list(range(8))
        assert sorted(features[0, order[0, :4]].argmax(1).tolist()) == [0, 1, 2, 3], "one of each before any copy"


def test_padding_is_nobodys_neighbour_where_all_tokens_are_unlike() -> None:
    """At 154, 0 and 250 degrees the second has the farthest neighbours, from which the first is farthest."""
    turn = torch.tensor([154.0, 0.0, 250.0, 0.0, 0.0]).deg2rad()
    seen = VisualTokens(torch.stack([turn.cos(), turn.sin()], 1)[None], torch.tensor([[True] * 3 + [False] * 2]))
    for count, kept in ((1, [1]), (2, [0, 1])):
        assert chosen(registry.load("pruners", "divprune"), seen, Keep(count)).keep[0].nonzero()[:, 0].tolist() == kept


def test_a_process_that_has_spanned_the_space_goes_on_from_the_front() -> None:
    """Rounding must not choose: the same tokens in other company give the same order."""
    features = torch.randn(1, 30, 4, generator=torch.Generator().manual_seed(3))
    valid = torch.ones(1, 30, dtype=torch.bool)
    order = _greedy.most_volume(_greedy.cosines(features, valid), valid, 12)[0][0].tolist()
    left = [i for i in range(30) if i not in order[:4]]
    assert order[4:] == left[:8]


@pytest.mark.parametrize("seed", range(5))
def test_suppression_is_the_sequential_one(seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    conflict = torch.rand(3, 40, 40, generator=chance) > 0.9
    conflict |= conflict.transpose(1, 2).clone()
    scores, valid = torch.randint(9, (3, 40), generator=chance).float(), torch.rand(3, 40, generator=chance) > 0.2
    found = _greedy.unsuppressed(conflict, scores, valid)
    for row in range(3):
        kept: list[int] = []
        for i in best(scores[row].double().numpy(), valid[row].nonzero()[:, 0].tolist(), 40):
            if not any(conflict[row, i, j] for j in kept):
                kept.append(i)
        assert set(found[row].nonzero()[:, 0].tolist()) == set(kept)


@pytest.mark.parametrize("count", [1, 2, 5, 9, 20, 42])
def test_scores_of_stretches_are_their_definition(count: int) -> None:
    """And 1.09 times the mean attention of several tokens, as the class says."""
    seen = tokens()
    counts = Keep(count).counts(seen.counts)
    found = stretch_scores(seen, seen.given(encoder_attention()), *stretches(seen.valid, counts))
    for row, num in enumerate(counts.tolist()):
        chunks, wanted = stretched(image := Image(seen, row), num)
        for chunk, score in zip(chunks, wanted, strict=True):
            assert score == pytest.approx((1.09 if len(chunk) > 1 else 1.0) * 1000 * image.a[chunk].mean(), rel=0.02)
        assert found[row].tolist() == pytest.approx([*wanted, *[0.0] * (found.shape[1] - len(wanted))], rel=1e-4)


def test_relevance_is_the_mean_cosine_to_the_words_from_0_to_1() -> None:
    seen = tokens()
    found = relevance(seen)
    for row, num in enumerate(VALID):
        image = Image(seen, row)
        mean = np.array([np.mean([unit(x) @ unit(word) for word in image.words]) for x in image.x])
        wanted = (mean - mean.min()) / (mean.max() - mean.min())
        assert found[row, :num].tolist() == pytest.approx(wanted.tolist(), abs=1e-4) and not found[row, num:].any()


def test_ranks_in_groups_and_lowest_keys() -> None:
    scores = torch.tensor([[5.0, 1.0, 5.0, 9.0, 2.0, 7.0]])
    group, valid = torch.tensor([[0, 1, 0, 1, 0, 1]]), torch.tensor([[True] * 5 + [False]])
    assert _quotas.ranks(scores, group, valid, 2)[0, :5].tolist() == [0, 1, 1, 0, 2]
    keys = [torch.tensor([[1, 0, 0, 1, 0, 0]]), torch.tensor([[0, 2, 1, 0, 1, 0]])]
    assert _quotas.lowest(keys, valid, torch.tensor([3]))[0].tolist() == [False, True, True, False, True, False]
    assert _quotas.lowest(keys, valid, torch.tensor([2]))[0].tolist() == [False, False, True, False, True, False]


def test_rounds_of_duplicate_removal_suffice_for_images_of_every_size() -> None:
    """The rounds follow from the largest image alone: simulated for all sizes, shares and counts."""

    def needed(length: int, wanted: int) -> int:
        found = 0
        while length > wanted:
            length -= min(8, length - wanted, (length + 1) // 2)
            found += 1
        return found

    budgets: list[Budget] = [Keep(n) for n in (1, 2, 5, 16, 20, 64)] + [Share(s / 40) for s in range(1, 41)]
    for budget, share in product(budgets, (0.0, 0.3, 0.5, 1.0)):
        most = 0
        for num in range(1, 300):
            count = budget.count(num)
            wanted = count - math.floor(count * share)
            if wanted:
                length = num - (count - wanted)
                most = max(most, needed(length, wanted))
                assert most <= vispruner.rounds(length, wanted), f"{budget} {share} at {num} tokens"


# --- families and refusals --------------------------------------------------------------------------------------------

METHODS = [*DEFINITIONS, "pool"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_runs_on_every_family(family: str) -> None:
    vlm = tiny(family)
    with torch.inference_mode():
        for text in METHODS:
            method = registry.load("pruners", text)
            seen = vlm.encode(vlm.pixels(pictures()[:2]), method.needs)
            prompts = vlm.prompts(["what?", "how many?"], seen.present.sum(1).tolist(), seen.layout)
            packed = pruning.shrink(vlm, prompts, seen, method, Keep(6))
            assert torch.isfinite(pruning.forward(vlm, packed, logits_to_keep=1).logits).all(), text
            if "adaptive" not in text:
                assert packed.kept.tolist() == [6, 6], text


@pytest.mark.parametrize("text", METHODS)
def test_a_threshold_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"Above\(0.5\) keeps a different number of tokens per image; this method needs a count"):
        chosen(registry.load("pruners", text), tokens(), Above(0.5))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("vispruner(important=1.5)", "lies between 0 and 1"),
        ("visionzip(contextual=True)", "lies between 0 and 1"),
        ("tome(rounds=0)", "at least 1"),
    ],
)
def test_options_out_of_range_are_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        registry.load("pruners", text)


@pytest.mark.parametrize("text", [*METHODS, "grid", "random", "attention"])
def test_an_image_without_tokens_keeps_none_and_changes_no_other(text: str) -> None:
    seen, method = tokens(), registry.load("pruners", text)
    some = torch.tensor([0, 2, 3])
    valid = seen.valid.clone()
    valid[1] = False
    for budget in (Keep(5), Share(0.5)):
        found = chosen(method, replace(seen, valid=valid), budget)
        assert not found.keep[1].any() and torch.equal(found.keep[some], chosen(method, seen, budget).keep[some])


@pytest.mark.parametrize("text", [*METHODS, "grid"])
def test_the_only_token_of_an_image_stays_as_it_is(text: str) -> None:
    seen = tokens()
    seen = replace(seen, valid=seen.valid & (torch.arange(42) == 3))
    for budget in (Keep(1), Keep(5), Share(0.3)):
        found = chosen(registry.load("pruners", text), seen, budget)
        assert torch.equal(found.keep, seen.valid)
        after = seen if found.mix is None else pruning.merged(seen, found.keep, found.mix)
        assert torch.equal(after.features[:, 3], seen.features[:, 3])


def test_those_that_need_the_projector_cut_behind_it() -> None:
    behind = {text for text in METHODS if registry.load("pruners", text).cuts(Keep(3), SHAPE)[0].site == PROJECTED}
    assert behind == {"divprune", "cdpruner", "cdpruner(question=False)", "holov"}


@pytest.mark.parametrize("name", ["divprune", "cdpruner", "vispruner", "prunesid", "visionzip", "prumerge", "tome", "holov"])
def test_tokens_that_cannot_be_compared_are_refused(name: str) -> None:
    """A token that overflowed, as it does in half precision, leaves nothing to choose by."""
    seen, method = tokens(), registry.load("pruners", name)
    features, evidence = seen.features.clone(), dict(seen.evidence)
    features[0, 0] = torch.inf
    for key in (encoder_keys(), LAST_KEYS):
        damaged = seen.given(key).clone()
        damaged[0, 0] = torch.inf
        evidence[key] = damaged
    with pytest.raises(ValueError, match="tokens are infinite or NaN"):
        chosen(method, replace(seen, features=features, evidence=evidence), Keep(4))
