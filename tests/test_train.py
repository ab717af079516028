"""The training loop without a cluster: schedules, data, one step against plain code, resuming, bad numbers."""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from diffprune import data as training
from diffprune import pruning
from diffprune.core import budget as budgets
from diffprune.core import registry
from diffprune.core.fitted import Annealing, Progress
from diffprune.core.noise import Noise
from diffprune.core.records import Step
from diffprune.core.site import ENCODED, Cut
from diffprune.core.spec import Spec
from diffprune.core.tokens import Relaxation
from diffprune.embedded import questions, world
from diffprune.embedded import vlm as embedded
from diffprune.job.configure import configure
from diffprune.pruners.diffprune import DiffPrune
from diffprune.train import loop, recipe
from diffprune.train.checkpoints import read_steps
from diffprune.train.context import LocalContext
from diffprune.train.drawn_batches import DrawnBatches
from diffprune.train.loss import answer_nll, relaxed_nll
from diffprune.train.recipe import Recipe
from diffprune.train.scorer_trainer import ScorerTrainer
from diffprune.vlm.load import load

SMALL: dict[str, Any] = {
    "pruners": ("diffprune",), "steps": 6, "images": 2, "questions": 2, "questions_alone": 1, "workers": 1, "calibration_images": 4,
    "validation_images": 2, "checkpoint_every": 2, "validate_every": 3, "grad_cosine_every": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random LLaVA of the embedded model's shape."""
    folder = tmp_path_factory.mktemp("model")
    embedded.build(0).save_pretrained(folder)
    embedded.processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vlm(checkpoint: str) -> Any:
    return load(checkpoint, device="cpu")


def run(vlm: Any, folder: str, **options: Any) -> list[Path]:
    return loop.train(Recipe(**{**SMALL, **options}), LocalContext(folder), lambda _: vlm)


def steps(folder: str) -> list[Step]:
    """Step records of the one scorer in a folder."""
    ((_, found),) = read_steps(Path(folder)).items()
    return found


def rows(folder: str) -> list[dict[str, Any]]:
    """Step records without their time, NaN as None so that they compare."""
    told = [asdict(row) | {"step_ms": 0.0} for row in steps(folder)]
    return [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in told]


# --- the recipe ------------------------------------------------------------------------------------------------------


def test_a_range_of_workers_is_two_settings_and_no_part_of_the_key() -> None:
    made, fixed = Recipe(**SMALL | {"workers": "1-2"}), Recipe(**SMALL | {"workers": 2})
    assert (made.min_workers, made.workers, made.fewest) == (1, 2, 1) and (fixed.min_workers, fixed.fewest) == (None, 2)
    (method,) = made.pruners
    assert made.key(method) == fixed.key(method) and made.of(method).fewest == 1
    job = configure("train", None, None, {}, {"train.workers": "1-4"})
    assert job.train is not None and (job.train.fewest, job.train.workers) == (1, 4)


def test_temperature_is_the_cosine_of_the_paper_then_constant() -> None:
    annealing = Annealing(2.0, 0.1, 0.5)
    cosine, geometric = (registry.load("pruners", name).temperature for name in ("diffprune", "gumbel_keepdrop"))
    assert [cosine(Progress(t, 200), annealing) for t in (0, 50, 100, 199)] == pytest.approx([2.0, 1.05, 0.1, 0.1])
    assert [geometric(Progress(t, 200), annealing) for t in (0, 199)] == pytest.approx([1.0, 0.1])
    assert geometric(Progress(100, 200), annealing) == pytest.approx(0.1 ** (100 / 199))


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    made = Recipe(**{**SMALL, "steps": 100, "warmup_share": 0.1, "learning_rate": 1.0})
    rates = [recipe.learning_rate(made, t) for t in range(100)]
    assert rates[:10] == pytest.approx([(t + 1) / 10 for t in range(10)])
    assert rates[55] == pytest.approx(0.5) and rates[99] < 1e-3
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_every_budget_is_drawn_and_no_arm_or_worker_changes_the_draw() -> None:
    made = Recipe(**{**SMALL, "workers": 2})
    drawn = [str(recipe.drawn_budget(made, 0, t)) for t in range(60)]
    assert set(drawn) == set(map(str, made.budgets))
    other = Recipe(**{**SMALL, "pruners": ("gumbel_topk",)})
    assert drawn == [str(recipe.drawn_budget(other, 0, t)) for t in range(60)]
    assert drawn != [str(recipe.drawn_budget(made, 1, t)) for t in range(60)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pruners": ("difprune",)}, "diffprune"),
        ({"pruners": ("grid",)}, "learns nothing"),
        ({"pruners": ()}, "pruners must be given"),
        ({"pruners": ("diffprune", "diffprune()")}, "each once"),
        ({"budgets": ("Above(0.5)",)}, "keeps a different number"),
        ({"budgets": ("Share(2)",)}, "share"),
        ({"data": "wrld"}, "world"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": "many"}, "steps: .*integer"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"images": 1, "workers": 2}, "each of the 2 workers needs one"),
        ({"images": 1, "workers": "1-2"}, "each of the 2 workers needs one"),
        ({"workers": "4-1"}, "min_workers is 4, but must be at least 1 and at most workers=1"),
        ({"workers": "0-2"}, "min_workers is 0"),
        ({"workers": "two"}, "the fewest and the most, as in 1-4"),
        ({"workers": "1-2-3"}, "the fewest and the most, as in 1-4"),
        (
            {"workers": "1-4", "images": 4, "validation_images": 4, "shard": True, "dtype": "bfloat16"},
            "shard=True spreads a model over workers",
        ),
        ({"step": 3}, "did you mean 'steps'"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_sentence(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        Recipe(**{**SMALL, **options})
    assert "\n" not in str(refused.value)


def test_the_key_names_what_shapes_the_result_and_seeds_are_replicates_of_it() -> None:
    asked = Spec("diffprune")
    key = Recipe(**SMALL).key(asked)
    assert key == Recipe(**{**SMALL, "seeds": (0, 1), "workers": 2, "checkpoint_every": 1}).key(asked)
    assert key not in (Recipe(**{**SMALL, "steps": 7}).key(asked), Recipe(**SMALL).key(Spec("gumbel_topk")))


# --- batches ---------------------------------------------------------------------------------------------------------


def test_packed_rows_are_those_the_model_was_trained_on(vlm: Any) -> None:
    rng = np.random.default_rng(0)
    asked = [[a[1:] for a in questions.draw(world.scene(seed), rng, num)] for seed, num in ((1, 12), (2, 9))]
    pixels = {"pixel_values": torch.zeros(2, 3, 96, 96)}
    ours, theirs = training.packed_rows(vlm, asked, pixels), embedded.pack(asked)
    assert ours.input_ids.equal(theirs.ids) and ours.labels is not None and ours.labels.equal(theirs.labels)
    assert ours.attention_mask.equal(theirs.mask())
    assert ours.position_ids.equal(theirs.positions)


def test_packed_rows_score_answers_as_rows_of_their_own_do(vlm: Any) -> None:
    options: dict[str, Any] = {"seed": 3, "images": 2, "questions": 3}
    packed, single = (next(training.batches(vlm, "world", packed=p, **options)) for p in (True, False))
    with torch.no_grad():
        tokens = vlm.encode(packed.pixels)
        nothing = Relaxation(tokens.features, tokens.valid.float())
        one, other = (float(relaxed_nll(vlm, b.prompts, tokens, nothing, b.image)) for b in (packed, single))
    assert packed.num_labels == single.num_labels > 6
    assert one == pytest.approx(other, rel=1e-5)


def test_batches_depend_on_seed_step_and_rank_alone(vlm: Any) -> None:
    def pictures(start: int = 0, **options: Any) -> list[torch.Tensor]:
        stream = training.batches(vlm, "world", **{"seed": 0, "images": 4, "questions": 1, "start_step": start, **options})
        return [next(stream).pixels["pixel_values"] for _ in range(3 - start)]

    whole = pictures()
    assert all(a.equal(b) for a, b in zip(whole[1:], pictures(1), strict=True)), "resuming at a step repeats its batch"
    halves = [pictures(rank=r, world=2) for r in range(2)]
    assert all(torch.cat(parts).equal(step) for *parts, step in zip(*halves, whole, strict=True)), "one batch, shared out"
    assert len({p.numpy().tobytes() for step in whole for p in step}) == 12, "no image twice"
    assert not whole[0].equal(pictures(seed=1)[0])
    held_out = training.validation(vlm, "world", images=4, questions=1).pixels["pixel_values"]
    calibration = training.calibration(vlm, "world", 4).pixels["pixel_values"]
    assert len({p.numpy().tobytes() for p in torch.cat([whole[0], held_out, calibration])}) == 12


def test_part_of_a_batch_keeps_rows_with_their_images(vlm: Any) -> None:
    batch = next(training.batches(vlm, "world", seed=0, images=3, questions=2, packed=False))
    part = batch.part(vlm, 1, 3)
    assert part.image.tolist() == [0, 0, 1, 1] and len(part.pixels["pixel_values"]) == 2
    assert part.prompts.input_ids.equal(batch.prompts.input_ids[2:])


def trainer_of(vlm: Any, made: Recipe, spelling: str) -> ScorerTrainer:
    return ScorerTrainer(LocalContext("run"), vlm, made, registry.load("pruners", spelling), 0)


def test_budgets_are_eased_and_methods_have_settings_of_their_own() -> None:
    """Oracle: the tokens let through, written out; the key of a method changes with its own settings alone."""
    options = {**SMALL, "steps": 100, "pruners": ("diffprune", "gumbel_topk"), "ease_share": 0.5, "ease_start": 0.25}
    made = Recipe(**options)
    for step, g in ((0, 0.25), (20, 0.55), (49, 0.985), (50, 1.0), (99, 1.0)):
        for budget in (budgets.Keep(16), budgets.Share(1 / 9)):
            let = recipe.eased(made, budget, step)
            assert let.count(144) == round(144 ** (1 - g) * 16**g) and let.counts(torch.tensor([144])).tolist() == [let.count(144)]
    assert recipe.eased(made.model_copy(update={"ease_share": 0.0}), budgets.Keep(16), 0) == budgets.Keep(16)
    own = Recipe(**options, methods=({"pruner": "gumbel_topk", "learning_rate": 0.01, "steps": 30},))
    topk, diffprune = Spec("gumbel_topk"), Spec("diffprune")
    assert (own.of(topk).learning_rate, own.of(topk).steps, own.of(topk).pruners) == (0.01, 30, (topk,))
    assert own.of(diffprune).steps == 100 and own.key(diffprune) == made.key(diffprune) and own.key(topk) != made.key(topk)
    for wrong, reason in (({"pruner": "diffprune", "clip": -1}, "clip"),):
        with pytest.raises(ValueError, match=reason):
            Recipe(**options, methods=(wrong,))


def test_kept_batches_are_those_of_the_stream_and_count_the_same(vlm: Any) -> None:
    """Oracle: `data.batches`, from the start and from the middle; the second reader draws nothing."""
    options: dict[str, Any] = {"seed": 3, "images": 2, "questions": 2, "rank": 0, "world": 1, "packed": True}
    wanted = list(itertools.islice(training.batches(vlm, "world", **options), 4))
    known, tallies, found = DrawnBatches(64), [training.BrokenRows() for _ in range(3)], []
    for start, tally in zip((0, 2, 0), tallies, strict=True):
        found.append(list(itertools.islice(known.batches(vlm, Spec("world"), **options, start_step=start, tally=tally), 4 - start)))
    for mine, theirs in zip(found[0], wanted, strict=True):
        assert mine.prompts.labels is not None and mine.prompts.labels.equal(theirs.prompts.labels)
        assert mine.pixels["pixel_values"].equal(theirs.pixels["pixel_values"])
    assert all(a is b for a, b in zip(found[2], found[0], strict=True)) and all(
        a is b for a, b in zip(found[1], found[0][2:], strict=True)
    )
    assert [tally.drawn for tally in tallies] == [8, 4, 8]
    for seed, num in ((3, 6), (4, 2)):  # further than what is known, and another seed's
        theirs = itertools.islice(training.batches(vlm, "world", **options | {"seed": seed}), num)
        mine = known.batches(vlm, Spec("world"), **options | {"seed": seed}, start_step=0, tally=tallies[0])
        for one, other in zip(itertools.islice(mine, num), theirs, strict=True):
            assert one.pixels["pixel_values"].equal(other.pixels["pixel_values"]), seed
    few = DrawnBatches(1.5 * 3 * wanted[0].pixels["pixel_values"].nbytes / 2**20)  # of two batches the first has room
    twice = [list(itertools.islice(few.batches(vlm, Spec("world"), **options, start_step=0, tally=tallies[0]), 2)) for _ in "ab"]
    assert [one is other for one, other in zip(*twice, strict=True)] == [True, False]
    nothing = DrawnBatches(0)
    first, again = (next(nothing.batches(vlm, Spec("world"), **options, start_step=0, tally=tallies[0])) for _ in range(2))
    assert first is not again


# --- one step --------------------------------------------------------------------------------------------------------


def by_hand(vlm: Any, made: Recipe, num: int) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """The first steps in plain code: the language model on inputs_embeds, no `prune`, no `ScorerTrainer`."""
    pruner, told = registry.load("pruners", "diffprune"), []
    torch.manual_seed(0)
    with torch.no_grad():
        networks = pruner.build(vlm.encode(training.calibration(vlm, "world", 4).pixels))
    optimizer = torch.optim.AdamW(networks.parameters(), weight_decay=0.01)
    for step, batch in zip(range(num), training.batches(vlm, "world", seed=0, images=2, questions=2), strict=False):
        tokens, temperature = vlm.encode(batch.pixels), 0.1 + 1.9 / 2 * (1 + math.cos(math.pi * step / (0.9 * made.steps)))
        budget = recipe.eased(made, recipe.drawn_budget(made, 0, step), step)
        relaxed = pruner.relax(tokens, budget, temperature, Noise(recipe.NOISE, 0, step, rows=[0, 1]))
        model, prompts = vlm.model.model, batch.prompts
        words = model.get_input_embeddings()(prompts.input_ids)
        seen = words.masked_scatter(prompts.slots[..., None], model.multi_modal_projector(relaxed.features))
        placed = {"attention_mask": prompts.attention_mask, "position_ids": prompts.position_ids}
        hidden = model.language_model(inputs_embeds=seen, **placed)[0]
        loss = functional.cross_entropy(vlm.model.lm_head(hidden)[:, :-1].flatten(0, 1), prompts.labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        grads = [p.grad for p in networks.parameters() if p.grad is not None]
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        for g in grads:
            g *= min(1.0, made.clip / norm)
        let, scores = relaxed.let.tolist(), pruner.score(tokens).tolist()
        best = [sorted(range(144), key=lambda i, row=row: -row[i])[: budget.count(144)] for row in scores]
        told.append({
            "loss": float(loss.detach()), "grad_norm": norm, "clipped": norm > made.clip, "temperature": temperature,
            "penalty": 0.0, "kept": float(np.mean([sum(row) for row in let])),
            "score_sd": float(np.mean([np.std(row) for row in scores])),
            "overlap": float(np.mean([np.mean([row[i] for i in those]) for row, those in zip(let, best, strict=True)])),
        })  # fmt: skip
        optimizer.param_groups[0]["lr"] = made.learning_rate * (step + 1) / 3
        optimizer.step()
    return told, dict(networks.state_dict())


@pytest.mark.parametrize("clip", [1e3, 0.01])
def test_steps_equal_plain_code_and_leave_the_model_alone(vlm: Any, clip: float) -> None:
    """Two of them: what Adam does in the first one is the same whatever the gradient's length."""
    made, before = Recipe(**SMALL, clip=clip, warmup_share=0.5), {k: v.clone() for k, v in vlm.model.state_dict().items()}
    arm = trainer_of(vlm, made, "diffprune")
    start = {k: v.clone() for k, v in arm.networks.state_dict().items()}
    told, weights = by_hand(vlm, made, 2)
    for batch, wanted in zip(training.batches(vlm, "world", seed=0, images=2, questions=2), told, strict=False):
        row = asdict(arm.step(batch))
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=2e-3)
    assert {row["clipped"] for row in told} == {clip < 1}
    for key, value in arm.networks.state_dict().items():
        torch.testing.assert_close(value, weights[key], rtol=1e-3, atol=1e-5)
    assert not arm.networks.state_dict()["scorer.head.weight"].equal(start["scorer.head.weight"])
    assert all(v.equal(before[k]) for k, v in vlm.model.state_dict().items())
    assert all(p.grad is None for p in vlm.model.parameters())


def test_masked_attention_is_on_in_training_only(vlm: Any) -> None:
    arm = trainer_of(vlm, Recipe(**SMALL), "gumbel_keepdrop")
    batch = next(training.batches(vlm, "world", seed=0, images=2, questions=2))
    before = vlm.model.config.text_config._attn_implementation
    row = arm.step(batch)
    assert row.penalty > 0 and row.grad_norm > 0 and row.temperature == 1.0
    assert vlm.model.config.text_config._attn_implementation == before


def test_a_question_aware_method_relaxes_each_row_by_its_question(vlm: Any) -> None:
    trainer = ScorerTrainer(
        LocalContext("run"), vlm, Recipe(**SMALL), registry.load("pruners", "diffprune(question_aware=True)"), 0
    )
    batch = next(training.batches(vlm, "world", seed=0, images=2, questions=2, packed=False))
    tokens, image = trainer.run(batch, batch.num_labels).tokens(batch)
    relaxed = trainer.pruner.relax(tokens, budgets.parse("Keep(40)"), 0.5, trainer.noise(batch, 0))
    assert len(relaxed.features) == 4 and relaxed.kept.tolist() == pytest.approx([40.0] * 4, abs=1e-3)
    assert image.tolist() == [0, 1, 2, 3] and trainer.step(batch).grad_norm > 0


def test_the_gradient_cosine_is_the_mean_over_pairs_of_parts(vlm: Any) -> None:
    arm = trainer_of(vlm, Recipe(**{**SMALL, "images": 4}), "diffprune")
    batch = next(training.batches(vlm, "world", seed=0, images=4, questions=2))
    grads = []
    for m in range(4):
        piece, noise = batch.part(vlm, m, m + 1), Noise(recipe.PROBE, 0, 0, rows=[m])
        loss = arm.pruner.objective(
            arm.run(piece, 1), piece, recipe.eased(arm.recipe, recipe.drawn_budget(arm.recipe, 0, 0), 0), Progress(0, 6), noise
        )
        arm.networks.zero_grad()
        loss.total.backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in arm.networks["scorer"].parameters()]
        grads.append(torch.cat([g.flatten() for g in found]))
    pairs = [float(functional.cosine_similarity(a, b, dim=0)) for a, b in itertools.combinations(grads, 2)]
    assert arm.grad_cosine(batch, 0) == pytest.approx(sum(pairs) / 6, abs=1e-4)


def test_validation_relaxes_and_removes_tokens_at_every_budget(vlm: Any) -> None:
    """Both losses per answer token, means over the budgets; what is removed is left out row by row."""
    made = Recipe(**{**SMALL, "budgets": ("Keep(9)", "Keep(40)")})
    arm = ScorerTrainer(LocalContext("run"), vlm, made, registry.load("pruners", "diffprune"), 0)
    assert arm.batch is not None
    prompts, pictures = arm.batch.prompts, vlm.encode(arm.batch.pixels)
    tokens, soft, hard = pictures[arm.batch.image], 0.0, 0.0
    with torch.no_grad():
        for number, budget in enumerate(made.budgets):
            relaxed = arm.pruner.relax(pictures, budget, 2.0, Noise(recipe.CHECK, number, rows=arm.batch.image_names()))
            soft += float(relaxed_nll(vlm, prompts, pictures, relaxed, arm.batch.image))
            keep = arm.pruner.select(tokens, Cut(ENCODED, budget)).keep
            for row in range(len(keep)):  # one by one, a fresh row of the survivors
                live = prompts.attention_mask[row].bool()
                live[prompts.slots[row]] = keep[row]
                words = vlm.model.get_input_embeddings()(prompts.input_ids[row][live])
                words[prompts.slots[row][live]] = vlm.project(tokens.features[row][keep[row]])
                positions = prompts.position_ids[row][live][None]
                logits = vlm.model.lm_head(vlm.model.model.language_model(inputs_embeds=words[None], position_ids=positions)[0])[0]
                assert prompts.labels is not None
                hard += float(functional.cross_entropy(logits[:-1], prompts.labels[row][live][1:], reduction="sum"))
    answers = 2 * arm.batch.num_labels
    assert arm.validate() == pytest.approx((soft / answers, hard / answers), rel=1e-4)
    assert arm.validate(soft=False) == pytest.approx((math.nan, hard / answers), rel=1e-4, nan_ok=True)


# --- the loop --------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(vlm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(vlm, "whole")
    step, calls = ScorerTrainer.step, []

    def dies(arm: ScorerTrainer, *given: Any) -> Any:
        calls.append(arm.done)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(arm, *given)

    monkeypatch.setattr(ScorerTrainer, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        run(vlm, "cut")
    cut = run(vlm, "cut")
    assert calls == [0, 1, 2, 3, 2, 3, 4, 5], "goes on from the last state, redoing one step"
    assert rows("cut") == rows("whole") and len(rows("cut")) == 6
    assert (cut[0] / "model.safetensors").read_bytes() == (whole[0] / "model.safetensors").read_bytes()
    assert not [path for path in Path("cut/states").rglob("*") if path.is_file()]
    assert math.isfinite(steps("whole")[5].validation_hard) and math.isfinite(steps("whole")[3].grad_cosine)


def test_what_is_there_is_not_trained_again(vlm: Any) -> None:
    options: dict[str, Any] = {"steps": 1, "validate_every": 0, "grad_cosine_every": 0}
    (place,) = run(vlm, "run", **options)
    facts = json.loads((place / "config.json").read_text())["facts"]
    assert facts["steps"] == 1 and facts["model_hash"] == vlm.weights_hash and facts["recipe"]["steps"] == 1
    pruner = registry.load("pruners", f"diffprune(weights={str(place)!r})")
    assert pruner.score(vlm.encode(training.calibration(vlm, "world", 2).pixels)).shape == (2, 144)
    made = Recipe(**{**SMALL, **options})
    assert loop.train(made, LocalContext("run"), lambda _: pytest.fail("loaded the model")) == [place]
    assert loop.missing(Recipe(**{**SMALL, **options, "seeds": (0, 1)}), "run") == [(Spec("diffprune"), 1)]
    with pytest.raises(ValueError, match="another recipe"):
        run(vlm, "run", **options, learning_rate=1e-4)
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    assert loop.missing(made, "run") == [(Spec("diffprune"), 0)], "a damaged scorer is trained again"


def poison(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
    """The n-th relaxations of a run give NaN features."""
    relax, calls = DiffPrune.relax, itertools.count()

    def bitten(self: DiffPrune, *args: Any) -> Relaxation:
        made = relax(self, *args)
        return Relaxation(made.features * math.nan, made.let) if next(calls) in bad else made

    monkeypatch.setattr(DiffPrune, "relax", bitten)


def test_a_step_that_is_not_finite_is_skipped(vlm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {1, 3})
    (place,) = run(vlm, "run", validate_every=0, grad_cosine_every=0)
    losses = [row.loss for row in steps("run")]
    assert [math.isnan(x) for x in losses] == [False, True, False, True, False, False]
    assert "NaN" not in (Path("run") / "steps.jsonl").read_text()
    assert json.loads((place / "config.json").read_text())["facts"]["skipped_steps"] == 2


def test_a_loss_that_stays_bad_ends_it_and_keeps_the_last_good_state(vlm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, set(range(2, 99)))
    with pytest.raises(loop.Unfitted, match=r"^diffprune, seed 0: loss or gradient was NaN or infinite at 2 steps, last at step 3"):
        run(vlm, "run", max_skips=1, validate_every=0, grad_cosine_every=0)
    state = LocalContext("run").load("diffprune-0")
    assert state is not None and state["step"] == 2
    assert all(torch.isfinite(v).all() for v in state["networks"].values())
    assert not (Path("run") / "scorers").exists()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("needs 9 GiB"), r"too large for memory; less is needed with smaller parts .*: needs 9 GiB"),
        (TypeError("a number is no tensor"), r"its objective fails: TypeError: a number is no tensor \(test_train.py:\d+\)"),
    ],
    ids=["memory", "mistake"],
)
def test_a_method_that_fails_keeps_no_other_from_being_trained(
    vlm: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    options: dict[str, Any] = {"pruners": ("diffprune", "visionselector"), "seeds": (0, 1), "steps": 1, "validate_every": 0}
    with monkeypatch.context() as patched:

        def failing(*_: Any) -> Any:
            raise error

        patched.setattr(DiffPrune, "relax", failing)
        one, other = (rf"diffprune, seed {seed}(, step 0)?: {told}" for seed in (0, 1))
        with pytest.raises(loop.Unfitted, match=f"^2 of 4 scorers cannot be trained: {one}; {other}$"):
            run(vlm, "run", **options)
    left = loop.missing(Recipe(**{**SMALL, **options}), "run")
    assert left == [(Spec("diffprune"), 0), (Spec("diffprune"), 1)]
    assert len(run(vlm, "run", **options)) == 4, "a later attempt tries them again"


@pytest.mark.parametrize("name", ["build", "select"])
def test_so_does_one_that_fails_before_its_first_step_or_when_it_is_validated(
    vlm: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise TypeError("no number")

    monkeypatch.setattr(DiffPrune, name, failing)
    with pytest.raises(
        loop.Unfitted, match=r"^1 of 2 scorers cannot be trained: diffprune, seed 0: its code fails: TypeError: no "
    ):
        run(vlm, "run", pruners=("diffprune", "visionselector"), steps=2, validate_every=1, grad_cosine_every=0)
    assert [path.name for path in Path("run/scorers").iterdir()] == ["visionselector-0"]


class FirstOfTwo(LocalContext):
    """A worker whose other sees the same."""

    world = 2

    def begin_sum(self, values: torch.Tensor) -> Any:
        return lambda: 2 * values


def test_a_worker_that_has_done_its_own_waits_for_the_others(vlm: Any) -> None:
    """One that returned would say nothing any more, as one that hangs, and what it returns would be taken for all."""
    made = Recipe(**{**SMALL, "pruners": ("diffprune", "visionselector"), "steps": 1, "validate_every": 0, "workers": 2})
    context, told = FirstOfTwo("run"), []

    def work() -> None:
        with pytest.raises(loop.Unfitted) as raised:
            loop.train(made, context, lambda _: vlm)
        told.append(str(raised.value))

    worker = threading.Thread(target=work)
    worker.start()
    until = time.monotonic() + 60
    while loop.missing(made, "run") != [(Spec("visionselector"), 0)]:
        assert time.monotonic() < until
        time.sleep(0.05)
    worker.join(3 * loop.POLL_S)
    assert worker.is_alive() and not told
    context.files.fail("visionselector-0", "loss was NaN")
    worker.join(30)
    assert told == ["1 of 2 scorers cannot be trained: loss was NaN"]


def test_where_workers_come_and_go_memory_is_no_fault_of_the_method(vlm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Any:
        raise torch.OutOfMemoryError("needs 9 GiB")

    monkeypatch.setattr(DiffPrune, "relax", failing)
    with pytest.raises(torch.OutOfMemoryError):
        run(vlm, "run", steps=1, workers="1-2")


def test_options_reach_the_model(vlm: Any) -> None:
    """`logits_to_keep` leaves out the prefix, where there is nothing to predict."""
    batch = next(training.batches(vlm, "world", seed=0, images=1, questions=1))
    tokens = vlm.encode(batch.pixels)
    seen: dict[str, Any] = {}
    handle = vlm.model.lm_head.register_forward_hook(lambda *args: seen.update(shape=args[2].shape))
    with torch.no_grad():
        packed = pruning.Packed(batch.prompts, vlm.project(tokens.features[0]), tokens.counts, tokens.counts)
        answer_nll(vlm, packed)
    handle.remove()
    assert seen["shape"][1] == batch.num_labels + 1
