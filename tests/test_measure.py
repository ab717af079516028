"""The harness measures what it says: every span gets its own time and nobody else's, on a clock the test controls."""

import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffprune.core import registry
from diffprune.core.budget import Keep, parse
from diffprune.core.cell import Cell
from diffprune.core.records import Timing
from diffprune.core.spec import Spec
from diffprune.embedded import vlm as embedded
from diffprune.measure import measure as measuring
from diffprune.measure.measure import Measured, measure, measured
from diffprune.models import llava, llava_next
from diffprune.models.llava import Llava
from diffprune.pruners.attention import Attention
from diffprune.statistics import speedup
from diffprune.timing import eager, flops, machine
from diffprune.timing.clock import Clock, Marks, clocks
from diffprune.timing.options import Measurement
from diffprune.vlm import family as families
from diffprune.vlm.load import load
from tests.records import timing

QUICK = Measurement(batches=(2,), rounds=3, warmup=1, slow_rounds=2, decode_tokens=3, inputs=1, threads=1, sessions=1)
TIMED = QUICK.model_copy(update={"spans": ("encoder", "parts", "prefill")})


class Fake(Clock):
    """Time passes only where a test says so. slower: how much each ms lengthens all later ones."""

    def __init__(self, slower: float = 0.0) -> None:
        super().__init__()
        self.now, self.slower = 0.0, slower

    def mark(self) -> float:
        return self.now

    def between(self, start: float, end: float) -> float:
        return end - start

    def advance(self, ms: float) -> None:
        self.now += ms * (1 + self.slower * self.now)

    def costing(self, ms: float, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, taking `ms` on this clock."""

        def slow(*args: Any, **kwargs: Any) -> Any:
            self.advance(ms)
            return call(*args, **kwargs)

        return slow


class Slowed:
    """A model that takes 1 + 0.1 n ms for a forward over n tokens, 2 ms for every generated token, on a fake clock."""

    def __init__(self, model: Any, clock: Fake) -> None:
        self.model, self.clock = model, clock

    def __call__(self, **inputs: Any) -> Any:
        self.clock.advance(1 + 0.1 * inputs["input_ids"].shape[1])
        return self.model(**inputs)

    def generate(self, **inputs: Any) -> Any:
        self.clock.advance(7 + 2 * inputs["max_new_tokens"])
        return self.model.generate(**inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


@pytest.fixture(scope="module")
def tiny() -> Llava:
    torch.set_num_threads(1)
    return Llava(embedded.build(0), embedded.processor(), "tiny")


def slowed(vlm: Llava, clock: Fake) -> Llava:
    """The model on a fake clock: encoder 5 ms, projector 0.5 ms a call, decoder as in `Slowed`."""
    found = copy(vlm)
    found.model = Slowed(vlm.model, clock)
    found.encode = clock.costing(5.0, vlm.encode)  # type: ignore[method-assign]
    found.project = clock.costing(0.5, vlm.project)  # type: ignore[method-assign]
    return found


def run(
    vlm: Llava, clock: Fake, pruners: list[str], budgets: list[str], options: Measurement = TIMED
) -> dict[tuple[str, str], Measured]:
    found = measure(slowed(vlm, clock), cells(vlm, pruners, budgets, options), options, clock)
    return {(str(cell.pruner), str(measured(cell).budget)): m for cell, m in found.items()}


def cells(vlm: Llava, pruners: list[str], budgets: list[str], options: Measurement = TIMED) -> list[Cell]:
    return measuring.cells(vlm, [Spec(name) for name in pruners], [parse(text) for text in budgets], options)


def median(found: Measured, arm: str, span: str) -> float:
    return float(speedup.times(found.timings, arm, span).median())


# --- cells -----------------------------------------------------------------------------------------------------------


def test_unpruned_is_no_cell_of_its_own(tiny: Llava) -> None:
    found = cells(tiny, ["unpruned", "random", "grid"], ["16", "Share(1/9)"], Measurement(batches=(1, 8), sessions=1))
    assert {c.method.label for c in found} == {"Random", "Grid"} and len(found) == 2 * 2 * 2
    assert [len(group) for group in measuring.together(found)] == [4, 4]
    again = cells(tiny, ["random", "grid"], ["16", "Share(1/9)"], Measurement(batches=(1, 8), sessions=3, seed=7))
    assert [{measuring.measured(cell).seed for cell in group} for group in measuring.together(again)] == [
        {7},
        {7},
        {8},
        {8},
        {9},
        {9},
    ]
    assert not {cell.key for cell in found} & {cell.key for cell in again} and len({cell.key for cell in again}) == 24


# --- spans -----------------------------------------------------------------------------------


def test_keeping_all_is_no_speedup_and_pays_its_overhead(tiny: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Fake()
    monkeypatch.setattr(Attention, "score", clock.costing(3.0, Attention.score))
    found = run(tiny, clock, ["attention"], ["144"])["attention", "Keep(144)"]
    full = median(found, "full", "prefill")
    assert speedup.prefill_speedup(found.timings).estimate == pytest.approx(1)
    assert speedup.prefill_speedup_net(found.timings).estimate == pytest.approx(full / (full + 3))
    assert speedup.native_ratio(found.timings).estimate == pytest.approx((full + 3) / full)


def test_equal_counts_cost_equal_prefill_whatever_the_method(tiny: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Fake()
    monkeypatch.setattr(Attention, "score", clock.costing(3.0, Attention.score))
    found = run(tiny, clock, ["attention", "random", "grid"], ["16"])
    prefills = {m: median(f, "pruned", "prefill") for (m, _), f in found.items()}
    natives = {median(f, "native", "prefill") for f in found.values()}
    assert len(prefills) == 3 and max(prefills.values()) == pytest.approx(min(prefills.values()))
    assert [*natives, *prefills.values()] == pytest.approx([max(natives)] * (len(natives) + 3))
    overheads = {m: median(f, "pruned", "overhead") for (m, _), f in found.items()}
    assert overheads == pytest.approx({"attention": 3, "random": 0, "grid": 0})
    text = found["grid", "Keep(16)"].timings[0].sequence - 144
    expected = (1 + 0.1 * (text + 144)) / (1 + 0.1 * (text + 16))
    assert speedup.prefill_speedup(found["grid", "Keep(16)"].timings).estimate == pytest.approx(expected)


@pytest.mark.parametrize("where", ["score", "select", "prefill", "decode", "project", "encoder"])
def test_a_delay_shows_in_its_own_span_only(tiny: Llava, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    before = {"encoder": 5.0, "score": 0.0, "select": 0.0, "gather": 0.0, "overhead": 0.0}
    before |= {"project": 0.5, "prefill": 1 + 0.1 * (53 + 16), "decode": 2.0}  # 53 words with both questions of the batch
    clock = Fake()
    _delay(monkeypatch, clock, where)
    found = run(tiny, clock, ["attention"], ["16"], QUICK)["attention", "Keep(16)"]
    after = {name: median(found, "pruned", name) for name in before}
    moved = {name for name in before if abs(after[name] - before[name]) > 1e-6}
    assert moved == {where} | ({"overhead"} if where in ("score", "select") else set())
    assert after[where] - before[where] == pytest.approx(20, rel=0.1)


def _delay(patch: pytest.MonkeyPatch, clock: Fake, where: str) -> None:
    """20 ms more in one place."""
    if where == "score":
        patch.setattr(Attention, "score", clock.costing(20, Attention.score))
    elif where == "select":
        patch.setattr(Keep, "pick", clock.costing(20, Keep.pick))
    elif where == "prefill":
        patch.setattr(Slowed, "__call__", clock.costing(20, Slowed.__call__))
    elif where == "project":
        patch.setattr(Llava, "project", clock.costing(20, Llava.project))
    elif where == "encoder":
        patch.setattr(Llava, "encode", clock.costing(20, Llava.encode))
    else:
        real = Slowed.generate
        patch.setattr(Slowed, "generate", lambda self, **k: (clock.advance(20 * (k["max_new_tokens"] - 1)), real(self, **k))[1])


def test_parts_add_up_to_the_whole(tiny: Llava) -> None:
    """On the real clock: the parts of one marked pass, against its whole."""
    inputs = eager.prepare(tiny, *_asked(2), Attention.needs)
    for _ in range(3):
        spans = eager.shrink(tiny, inputs, Attention(), Keep(16), Clock(), parts=True)[1]
        assert spans["score"] + spans["select"] + spans["gather"] == pytest.approx(spans["overhead"])
        assert min(spans.values()) >= 0


def test_what_a_method_needs_of_the_encoder_is_its_overhead(tiny: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Fake()
    monkeypatch.setattr(llava, "summary_attention", clock.costing(4, llava.summary_attention))
    found = run(tiny, clock, ["attention", "grid"], ["16"])
    assert median(found["attention", "Keep(16)"], "pruned", "overhead") == pytest.approx(4)
    assert median(found["attention", "Keep(16)"], "pruned", "score") == pytest.approx(4)
    assert median(found["grid", "Keep(16)"], "pruned", "overhead") == 0
    assert median(found["grid", "Keep(16)"], "pruned", "encoder") == median(found["attention", "Keep(16)"], "full", "encoder")


@pytest.mark.parametrize("family", ["internvl", "qwen2_vl", "llava_next"])
def test_what_every_request_does_behind_the_tower_is_no_methods_overhead(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Projecting all tokens, 7 ms here, is in every pass; what reads attention, 4 ms, only in that of a method that asks."""
    vlm, clock = load(f"tiny({family})", device="cpu"), Fake()
    projector = vlm.model.model.get_submodule(vlm.projector_input)
    for module, name in ((families, "read"), (llava_next, "summary_attention")):
        monkeypatch.setattr(module, name, clock.costing(4.0, getattr(module, name)))
    inputs = eager.prepare(vlm, *_asked(1), Attention.needs)
    hook = projector.register_forward_pre_hook(lambda *_: clock.advance(7.0))
    try:
        assert eager.encode(vlm, inputs, Attention.needs, clock) == (pytest.approx(11.0), pytest.approx(4.0))
        assert eager.encode(vlm, inputs, frozenset(), clock) == (pytest.approx(7.0), 0.0)
    finally:
        hook.remove()


def test_the_first_ttft_and_decoding_on_every_batch_of_inputs_count_for_nothing(
    tiny: Llava, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, options = Fake(), QUICK.model_copy(update={"inputs": 2, "slow_rounds": 3})
    for name in ("first_token", "decode"):
        monkeypatch.setattr(eager, name, _slow_at_first(clock, getattr(eager, name)))
    found = run(tiny, clock, ["grid"], ["16"], options)["grid", "Keep(16)"]
    for arm, span in (("full", "ttft"), ("pruned", "ttft"), ("full", "decode"), ("pruned", "decode"), ("native", "decode")):
        assert float(speedup.times(found.timings, arm, span).max()) < 100, (arm, span)


def _slow_at_first(clock: Fake, call: Callable[..., float]) -> Callable[..., float]:
    """`call`, with 1,000 ms more the first time it meets a length of rows or a method's budget on a batch."""
    met: set[str] = set()

    def slow(vlm: Any, what: Any, *rest: Any) -> float:
        key = (id(what), *rest[:-1]) if isinstance(what, eager.Inputs) else (what.sequence, what.packed.prompts.input_ids.sum())
        more = 0.0 if str(key) in met else 1000.0
        met.add(str(key))
        return call(vlm, what, *rest) + more

    return slow


def test_ttft_has_everything_in_it(tiny: Llava) -> None:
    clock = Fake()
    found = run(tiny, clock, ["grid"], ["16"], QUICK)["grid", "Keep(16)"]
    whole = sum(median(found, "pruned", s) for s in ("encoder", "overhead", "project", "prefill"))
    assert median(found, "pruned", "ttft") == pytest.approx(whole, rel=1e-6)
    assert median(found, "pruned", "decode") == 2
    assert speedup.ttft_speedup(found.timings).estimate > 1.5


# --- noise -------------------------------------------------------------------------------------


def test_a_machine_that_slows_down_does_not_bias_a_ratio(tiny: Llava) -> None:
    options = Measurement(batches=(1,), rounds=15, warmup=1, slow_rounds=2, inputs=1, spans=("prefill",), sessions=1)
    steady, slow = (run(tiny, Fake(s), ["grid"], ["16"], options)["grid", "Keep(16)"].timings for s in (0.0, 2e-3))
    assert speedup.prefill_speedup(slow).estimate == pytest.approx(speedup.prefill_speedup(steady).estimate, rel=0.05)
    assert "clock_drift" in slow[0].flags and "clock_drift" not in steady[0].flags
    last = [r.value_ms for r in slow if r.span == "prefill" and r.arm == "full"]
    assert last[-1] > 1.5 * last[0], "the clock must really have slowed down"


def test_the_same_thing_twice_has_ratio_one() -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(25):
        a, b = (10 * rng.lognormal(0, 0.2, 30) for _ in range(2))
        found = speedup.prefill_speedup([*_rows("full", a), *_rows("pruned", b)])
        covered += found.low <= 1 <= found.high
    assert covered >= 19  # of 25 at 95 %: fewer has a probability below 0.001


def test_an_outlier_is_flagged_and_does_not_move_the_median() -> None:
    values = list(np.linspace(9.9, 10.1, 40))
    planted = values[:-5] + [100.0] * 5
    before, after = (speedup.times(_rows("full", v), "full", "prefill") for v in (values, planted))
    assert after.median() == pytest.approx(before.median(), rel=0.01) and after.quantile(0.9) > 5 * before.quantile(0.9)
    assert machine.value_flags(values) == [] and machine.value_flags(planted) == ["outlier"]
    assert machine.value_flags(values[:10]) == [], "few in one session may be many in all"


def test_a_busy_machine_is_flagged() -> None:
    busy = machine.others((0.0, 100.0, 50.0), (10.0, 115.0, 59.0))  # 15 s of work in 10 s, 9 of them ours
    assert busy == pytest.approx(0.6)
    cpu = torch.device("cpu")
    assert machine.machine_flags(cpu, busy, 2) == ["threads_2", "cpu_only", "shared_device"]
    assert machine.machine_flags(cpu, 0.05, 2) == ["threads_2", "cpu_only"]
    assert machine.machine_flags(cpu, float("nan"), 2) == ["threads_2", "cpu_only"]


def test_threads_are_pinned_and_given_back() -> None:
    before = torch.get_num_threads()
    with machine.steady(before + 1) as threads:
        assert torch.get_num_threads() == threads == before + 1
    assert torch.get_num_threads() == before


FAULTS = """
import resource, torch
from diffprune.timing import machine

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):  # as a long prefill: many blocks at once, all given back
        blocks = [torch.ones(600_000) for _ in range(8)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

young = faults()
with machine.steady(1):
    faults()
    print(young, faults())
"""


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="only glibc hands memory back this way")
def test_a_timed_process_keeps_its_memory() -> None:
    """Else the unpruned prefill alone pays for its pages, and pruning looks faster than it is."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    young, steady = map(int, done.stdout.split())
    assert young > 2000 and steady < young / 20


def test_ratios_compare_the_rounds_both_arms_have() -> None:
    rows = [*_rows("full", [10, 20, 30]), *_rows("pruned", [5, 10])]
    assert speedup.prefill_speedup(rows).estimate == 2
    with pytest.raises(ValueError, match="overhead"):
        speedup.prefill_speedup_net(rows)


def _rows(arm: str, values: Any) -> list[Timing]:
    return [timing(v, arm=arm, repetition=i) for i, v in enumerate(values)]


# --- removal and costs ---------------------------------------------------------------------------------


def test_cost_rows_say_what_the_cache_holds(tiny: Llava) -> None:
    found = run(tiny, Fake(), ["grid"], ["16"])["grid", "Keep(16)"]
    by_arm = {c.arm: c for c in found.costs}
    assert {arm: c.visual_kept for arm, c in by_arm.items()} == {"full": 144, "pruned": 16, "native": 16}
    for c in found.costs:
        assert c.kv_measured_bytes == c.kv_bytes
        visual = (int(c.visual_kept),) * tiny.shape.layers
        expected = c.prefill_flops + flops.causal_half(tiny.shape, visual, c.text_tokens)
        assert c.counted_flops == pytest.approx(expected, rel=0.02)
    assert found.outcome.status == "ok" and found.outcome.rows == len(found.timings) + 3


@torch.inference_mode()
def test_hidden_tokens_are_found_out(tiny: Llava) -> None:
    inputs = eager.prepare(tiny, *_asked(2), frozenset())
    long = eager.native(tiny, inputs, [144, 144])
    output = eager.prefill(tiny, long, Clock())[1]
    assert eager.prove_removed(long, output) > 0
    claimed = replace(long, packed=replace(long.packed, kept=long.packed.kept - 100))
    with pytest.raises(RuntimeError, match="hidden, not removed"):
        eager.prove_removed(claimed, output)


@torch.inference_mode()
def test_native_rows_are_as_long_as_pruned_ones(tiny: Llava) -> None:
    inputs = eager.prepare(tiny, *_asked(2), frozenset())
    pruned = eager.shrink(tiny, inputs, registry.load("pruners", "grid"), Keep(16), Clock())[0]
    native = eager.native(tiny, inputs, [16, 16])
    assert native.sequence == pruned.sequence
    positions = native.packed.prompts.position_ids[native.packed.prompts.attention_mask.bool()]
    assert int(positions.max()) == native.sequence - 1, "no gaps: no token was ever there"


# --- errors are outcomes ---------------------------------------------------------------------------------------------


def test_seconds_of_cells_that_share_a_session_add_up_to_it(tiny: Llava) -> None:
    began = time.monotonic()
    found = run(tiny, Fake(), ["attention", "grid"], ["16", "32"])
    seconds = [one.outcome.seconds for one in found.values()]
    assert len(seconds) == 4 and len(set(seconds)) == 1 and 0 < sum(seconds) < time.monotonic() - began


def test_a_method_that_fails_is_an_outcome_and_leaves_the_others_alone(tiny: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Attention, tokens: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Attention, "score", broken)
    found = run(tiny, Fake(), ["attention", "grid"], ["16"])
    bad, good = found["attention", "Keep(16)"], found["grid", "Keep(16)"]
    assert (bad.outcome.status, bad.timings, bad.costs) == ("failed", [], []) and "out of memory" in bad.outcome.reason
    assert good.outcome.status == "ok" and good.timings


def test_a_method_that_fails_later_gives_no_times_either(tiny: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = iter(range(1000)), Attention.score
    monkeypatch.setattr(Attention, "score", lambda self, tokens: real(self, tokens) if next(calls) < 4 else 1 / 0)
    found = run(tiny, Fake(), ["attention", "grid"], ["16"])
    assert found["attention", "Keep(16)"].timings == [] and "ZeroDivisionError" in found["attention", "Keep(16)"].outcome.reason
    assert found["grid", "Keep(16)"].outcome.status == "ok"


def test_other_weights_than_the_cell_names_are_refused(tiny: Llava) -> None:
    (cell,) = cells(tiny, ["grid"], ["16"])
    found = measure(tiny, [replace(cell, model=replace(cell.model, weights_sha256="somebody else's"))], TIMED)
    assert [m.outcome.status for m in found.values()] == ["failed"]
    assert "have changed" in next(iter(found.values())).outcome.reason


def test_too_few_samples_for_a_batch(tiny: Llava) -> None:
    options = TIMED.model_copy(update={"batches": (500,), "limit": 1})
    with pytest.raises(ValueError, match="a batch takes 500"):
        measure(tiny, cells(tiny, ["grid"], ["16"], options), options)


def test_the_hook_on_the_encoder_is_gone_afterwards(tiny: Llava) -> None:
    inputs = eager.prepare(tiny, *_asked(1), frozenset())
    whole, added = eager.encode(tiny, inputs, Attention.needs, Clock())
    assert added < whole and not tiny.model.get_encoder(modality="image")._forward_hooks
    assert eager.encode(tiny, inputs, frozenset(), Clock())[1] == 0


# --- the clock -------------------------------------------------------------------------------------------------------


def test_marks_of_one_name_add_up() -> None:
    clock = Fake()
    marks = Marks(clock)
    for ms in (1.0, 2.0):
        with marks.span("a"):
            clock.advance(ms)
        clock.advance(100)
    assert marks.totals() == {"a": 3.0}


def test_marks_and_waits_are_of_the_models_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: what torch is asked for a model on the second device while the first is current."""
    told: list[Any] = []
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: SimpleNamespace(record=lambda stream=None: told.append(stream)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: told.append(f"waits for {device}"))
    events, host = clocks(torch.device("cuda", 1))
    for do in (events.mark, events.wait, host.mark):
        do()
    assert told == ["stream of cuda:1", "waits for cuda:1", "waits for cuda:1"]


def _asked(number: int) -> tuple[list[Any], list[str]]:
    benchmark = registry.load("benchmarks", "world('gqa')")
    samples = benchmark.samples("test", 4)[:number]
    return [benchmark.image(s) for s in samples], [s.question for s in samples]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield
