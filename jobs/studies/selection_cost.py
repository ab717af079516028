"""What choosing costs: every training-free method's selection of 64 of 576 tokens for 8 images, beside a bare choice by score.

    python jobs/studies/selection_cost.py --out reports/selection_cost

Random features as wide as those of LLaVA-1.5-7B (1,024 before the projector, 4,096 after it), one thread, methods in shuffled
turns; milliseconds are the processor time of that thread, which other work on the machine moves less than the clock on the wall.
`scorer` is what the method computes before it chooses: scores, cosines, principal components. `bare` is the least a choice of its
kind takes: one top-64 of scores and its mask, for a greedy method as many argmaxes, one after the other, as it takes steps (of
DivPrune the first, and of VisPruner every one, is over pairs of tokens). `choice` is what a greedy method does behind its scorer,
timed by itself, as a difference of two selections would drown in them. `over` is in units of what may be taken: for methods that
score, the whole selection over twice scorer and bare; for greedy ones the choice over three times bare. What the vision encoder's
evidence costs and what merging costs are not in it.

What cannot be had: a step of CDPruner's determinantal point process takes the product of a row with all that was chosen before,
which is several times an argmax over 576 numbers. A round of VisPruner compares one half of a list with the other, and the next
list is in another order, so that the rows of one half have to be brought together first, with all their columns; `bare` has them
side by side.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from diffprune.core import registry
from diffprune.core.budget import Keep, top
from diffprune.core.evidence import IDENTITY, QUESTION, Evidence, Question, encoder_attention, encoder_keys
from diffprune.core.pruner import Pruner
from diffprune.core.site import PROJECTED, Cut
from diffprune.core.tokens import VisualTokens
from diffprune.pruners import _greedy, cdpruner, holov, prunesid, vispruner
from diffprune.report.tables.catalogue import LLAVA
from diffprune.store.provenance import collect

BATCH, KEPT, SIDE = 8, 64, 24
SCORING_LIMIT, GREEDY_LIMIT = 2.0, 3.0
METHODS = (
    "random", "attention", "grid", "pool", "visionzip", "prumerge", "prumerge(plus=True)", "holov", "divprune", "cdpruner",
    "vispruner", "prunesid",
)  # fmt: skip
GREEDY = ("divprune", "cdpruner", "vispruner")


def tokens(side: int, widths: tuple[int, int], projected: bool) -> VisualTokens:
    """Random tokens with everything the methods look at; widths: before and after the projector."""
    chance, num = torch.Generator().manual_seed(0), side * side

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=chance)

    keys, width = draw(BATCH, num, 16, widths[0] // 16), widths[int(projected)]
    question = Question(draw(BATCH, 16, widths[1]), torch.ones(BATCH, 16, dtype=torch.bool))
    evidence: dict[Evidence, torch.Tensor | Question] = {
        encoder_attention(): draw(BATCH, num).softmax(1), encoder_attention(-1, joint=True): draw(BATCH, num).softmax(1),
        encoder_keys(): keys, encoder_keys(-1): keys, QUESTION: question, IDENTITY: torch.arange(BATCH),
    }  # fmt: skip
    valid = torch.ones(BATCH, num, dtype=torch.bool)
    return VisualTokens(draw(BATCH, num, width), valid, (side, side), evidence, projected=projected)


def scorer(name: str, seen: VisualTokens, kept: int) -> Callable[[], Any]:
    """What a method computes before it chooses."""
    counts = torch.full((BATCH,), kept)

    def unit_keys() -> torch.Tensor:
        key = torch.nn.functional.normalize(seen.given(encoder_keys()).flatten(2), dim=-1)
        return key[:, :kept] @ key.transpose(1, 2)

    def mean_keys() -> torch.Tensor:
        key = torch.nn.functional.normalize(seen.given(encoder_keys()).mean(2), dim=-1)
        return key @ key[:, : kept * 5 // 32].transpose(1, 2)

    def stretches() -> torch.Tensor:
        return holov.stretch_scores(seen, seen.given(encoder_attention()), *holov.stretches(seen.valid, counts))

    def groups() -> Any:
        found = prunesid.components(seen, counts // 4, max(1, kept // 4), 0)
        return found, _greedy.cosines(seen.features, seen.valid)

    found: dict[str, Callable[[], Any]] = {
        "random": lambda: registry.load("pruners", "random").score(seen), "visionzip": mean_keys, "prumerge": unit_keys,
        "holov": stretches, "divprune": lambda: _greedy.cosines(seen.features, seen.valid),
        "cdpruner": lambda: cdpruner.kernel(seen), "vispruner": lambda: _greedy.cosines(seen.features, seen.valid),
        "prunesid": groups,
    }  # fmt: skip
    return found.get(name, lambda: None)


def choice(name: str, seen: VisualTokens, kept: int) -> Callable[[], Any]:
    """What a greedy method does behind its scorer; nothing of others."""
    num, counts = seen.valid.shape[1], torch.full((BATCH,), kept)
    if name not in GREEDY:
        return lambda: None
    if name == "cdpruner":
        kernel = cdpruner.kernel(seen)
        return lambda: _greedy.first(_greedy.most_volume(kernel, seen.valid, kept)[0], counts, num)
    likeness = _greedy.cosines(seen.features, seen.valid)
    if name == "divprune":
        return lambda: _greedy.first(_greedy.max_min(likeness, seen.valid, kept), counts, num)
    scores, left = seen.given(encoder_attention()), kept - kept // 2

    def prune() -> torch.Tensor:
        rest = ~top(scores, seen.valid, counts // 2)
        return vispruner.distinct(likeness, scores, rest, counts - counts // 2, num - kept // 2, left)

    return prune


def bare(name: str, num: int, kept: int) -> Callable[[], Any]:
    """The least a choice of this kind takes, on random numbers."""
    scores = torch.rand(BATCH, num, generator=torch.Generator().manual_seed(1))
    if name not in GREEDY:
        return lambda: torch.zeros(BATCH, num, dtype=torch.bool).scatter_(1, scores.topk(kept, dim=1).indices, True)
    if name == "cdpruner":
        return lambda: [scores.argmax(1) for _ in range(kept)]
    if name == "divprune":
        likeness = torch.rand(BATCH, num, num, generator=torch.Generator().manual_seed(2))
        return lambda: [likeness.amax(2).argmin(1), *(scores.argmax(1) for _ in range(kept - 1))]
    left = kept - kept // 2
    first = num - kept // 2
    pairs = torch.rand(BATCH, (first + 1) // 2, first // 2, generator=torch.Generator().manual_seed(2))
    lengths = [max(first - vispruner.STEP * r, left, 2) for r in range(vispruner.rounds(first, left))]
    return lambda: [pairs[:, : (n + 1) // 2, : n // 2].amax(2).topk(1) for n in lengths]


def spent(call: Callable[[], Any]) -> float:
    """ms of this thread."""
    start = time.thread_time()
    call()
    return 1000 * (time.thread_time() - start)


@torch.inference_mode()
def measure(rounds: int, warmup: int, side: int, widths: tuple[int, int]) -> pd.DataFrame:
    """One row per method: medians, and the selection over what it may take."""
    seen = {projected: tokens(side, widths, projected) for projected in (False, True)}
    kept, calls = min(KEPT, side * side // 4), dict[tuple[str, str], Callable[[], Any]]()
    for text in METHODS:
        method: Pruner = registry.load("pruners", text)
        cut: Cut = method.cuts(Keep(kept), LLAVA)[0]
        own, name = seen[cut.site == PROJECTED], method.spec.name
        calls[text, "select"] = partial(method.select, own, cut)
        calls[text, "scorer"], calls[text, "bare"] = scorer(name, own, kept), bare(name, side * side, kept)
        calls[text, "choice"] = choice(name, own, kept)
    found: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    order = random.Random(0)
    for turn in range(warmup + rounds):
        for key in order.sample(list(calls), len(calls)):
            took = spent(calls[key])
            if turn >= warmup:
                found[key].append(took)
    rows = []
    for text in METHODS:
        parts = ("select", "scorer", "choice", "bare")
        select, scored, chose, least = (float(pd.Series(found[text, part]).median()) for part in parts)
        greedy = text in GREEDY
        over = chose / (GREEDY_LIMIT * least) if greedy else select / (SCORING_LIMIT * (scored + least))
        told = {"method": text, "greedy": greedy, "select_ms": select, "scorer_ms": scored}
        rows.append(told | {"choice_ms": chose if greedy else float("nan"), "bare_ms": least, "over": over})
    return pd.DataFrame(rows)


def page(table: pd.DataFrame, origin: str) -> str:
    """The table as Markdown."""
    lines = [
        "# What choosing costs, method by method", "", (__doc__ or "").split("\n\n", 2)[2].strip(), "",
        f"Targets: at most {SCORING_LIMIT:g} times scorer and bare together, of a greedy choice {GREEDY_LIMIT:g} times "
        f"bare; an `over` up to 1 meets its target. {origin}", "",
        "| method | kind | selection ms | scorer ms | choice ms | bare ms | over |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for _, row in table.iterrows():
        kind, mark = "greedy" if row.greedy else "by score", "" if row.over <= 1 else " (above)"
        chose = f"{row.choice_ms:.2f}" if row.greedy else ""
        lines.append(
            f"| {row.method} | {kind} | {row.select_ms:.2f} | {row.scorer_ms:.2f} | {chose} | {row.bare_ms:.3f} | "
            f"{row.over:.2f}{mark} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every method, write table.csv and README.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--side", type=int, default=SIDE, help="tokens along one side of a picture")
    parser.add_argument("--widths", type=int, nargs=2, default=(LLAVA.vision_width, LLAVA.width))
    parser.add_argument("--note", default="", help="a sentence on the machine, for the page")
    given = parser.parse_args()
    torch.set_num_threads(1)
    table, made = measure(given.rounds, given.warmup, given.side, tuple(given.widths)), collect("selection_cost", 1, 0)
    given.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(given.out / "table.csv", index=False, float_format="%.4f")
    origin = f"Commit {made.commit[:12]}{' (changed)' if made.dirty else ''}, {made.started}. {given.note}".strip()
    (given.out / "README.md").write_text(page(table, origin), encoding="utf-8")
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
