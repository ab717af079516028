"""The recipes for 7B models: their very code on tiny instances, what saves memory changes no number, and the estimate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import diffprune
from diffprune import data as training
from diffprune.cli import commands
from diffprune.core import budget as budgets
from diffprune.core import registry
from diffprune.core.fitted import Progress
from diffprune.core.spec import Spec
from diffprune.core.vlm import VLM
from diffprune.distributed import train as on_ray
from diffprune.distributed import train_worker
from diffprune.job import pipeline
from diffprune.job.files import load_job
from diffprune.train import estimate, loop
from diffprune.train.checkpoints import Files
from diffprune.train.context import LocalContext
from diffprune.train.recipe import Recipe
from diffprune.train.scorer_trainer import ScorerTrainer
from diffprune.vlm.activation_checkpointing import decoder_layers, recomputed
from diffprune.vlm.load import load
from diffprune.vlm.meta_model import outline, projector_input_width

JOBS = {"train_llava15_7b": "llava", "train_llava_next_7b": "llava_next", "train_qwen25_vl_7b": "qwen2_5_vl"}
SMALL: dict[str, Any] = {
    "pruners": ("diffprune",), "steps": 2, "images": 4, "questions": 2, "questions_alone": 1, "workers": 1, "calibration_images": 4,
    "validation_images": 4, "checkpoint_every": 0, "validate_every": 2, "grad_cosine_every": 2, "budgets": ("Share(1/3)",),
}  # fmt: skip


def arm(vlm: VLM, folder: str, spelling: str = "diffprune", **options: Any) -> ScorerTrainer:
    recipe = Recipe(**{**SMALL, "pruners": (spelling,), **options})
    return ScorerTrainer(LocalContext(folder), vlm, recipe, registry.load("pruners", spelling), 0)


def batch(vlm: VLM, packed: bool = True, images: int = 4, questions: int = 2) -> training.TrainBatch:
    return next(training.batches(vlm, "world", seed=0, images=images, questions=questions, packed=packed))


# --- the jobs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", JOBS)
def test_a_recipe_runs_on_its_tiny_family(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command itself, with Ray Train's local mode in place of a cluster, which `test_train_ray` covers."""
    fit = on_ray._fit
    monkeypatch.setattr(on_ray, "_fit", lambda config, workers: fit(config, 0))
    monkeypatch.setattr(pipeline.PipelineRun, "ray", lambda self: None)
    line = ["run", name, "--tiny", "--scorer", "diffprune"]
    assert commands.call(line) == (0, ""), "the same recipe, in bfloat16 and with recomputed layers"
    folder = Path("runs") / f"{name}-tiny"
    places = sorted((folder / "scorers").iterdir())
    assert [p.name for p in places] == ["diffprune-0"]
    vlm, facts = load(f"tiny({JOBS[name]})"), json.loads((places[0] / "config.json").read_text())["facts"]
    assert facts["model"] == vlm.name and facts["steps"] == 3 and facts["broken_rows"] == 0
    assert facts["recipe"]["checkpointing"] and facts["recipe"]["dtype"] == "bfloat16" and facts["recipe"]["micro_images"] == 1
    pruner = diffprune.from_pretrained(places[0])
    picture = (
        training.source("world").draw(training.sources.DrawIndex(training.sources.TRAIN, 0, 1), 1, training.BrokenRows()).images[0]
    )
    assert len(diffprune.generate(vlm, [picture], ["what?"], pruner=pruner, budget=diffprune.Share(0.3), max_new_tokens=2)) == 1
    assert facts["features"] == vlm.encode(vlm.pixels([picture])).features.shape[-1]
    assert commands.call(line) == (0, "") and "all 1 scorers are there already" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "inside"), [("train_llava15_7b", ("atp", "dynamic_llava")), ("train_llava_next_7b", ("dynamic_llava",))]
)
def test_methods_that_train_through_cuts_inside_the_decoder_run_in_the_same_job(
    name: str, inside: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = on_ray._fit
    monkeypatch.setattr(on_ray, "_fit", lambda config, workers: fit(config, 0))
    monkeypatch.setattr(pipeline.PipelineRun, "ray", lambda self: None)
    asked = [part for method in inside for part in ("--scorer", method)]
    assert commands.call(["run", name, "--tiny", *asked]) == (0, "")
    facts = {p.name: json.loads((p / "config.json").read_text())["facts"]["recipe"] for p in Path("runs").glob("*/scorers/*")}
    assert {key.rpartition("-")[0] for key in facts} == {*inside}
    assert not any(recipe["checkpointing"] for recipe in facts.values())


@pytest.mark.parametrize(
    ("name", "parameters"),
    # the parameters of the published checkpoints
    [("train_llava15_7b", 7_063_427_072), ("train_llava_next_7b", 7_063_431_168), ("train_qwen25_vl_7b", 8_292_166_656)],
)
def test_a_dry_run_tells_memory_and_time_without_a_model(name: str, parameters: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.call(["run", name, "--scorer", "diffprune", "--dry-run"]) == (0, "")
    out = capsys.readouterr().out
    assert "train: 3 scorers of 4000 steps, 3 to do" in out and f"frozen   {parameters:,} parameters" in out
    assert "1 x H200" in out and not list(Path.cwd().iterdir())
    assert load_job(name).train.images == 32  # type: ignore[union-attr]


def test_the_estimate_is_what_the_paper_needed() -> None:
    """About 10 hours of one RTX A6000 (48 GB) for 4,000 steps of 32 images; nothing there says that layers were recomputed."""
    job = load_job("train_llava15_7b")
    assert job.train
    recipe = job.train.model_copy(update={"checkpointing": False, "pruners": (Spec("diffprune"),)})
    (found,) = estimate.estimate(recipe, job.config, job.assumed)
    hours = found.step_flops * recipe.steps / (estimate.SHARE * estimate.GPUS["RTX A6000"]) / 3600
    assert 8 < hours < 12 and 30 < found.peak / estimate.GIB < 0.9 * 48 * 1e9 / estimate.GIB
    (spread_out,) = estimate.estimate(recipe.model_copy(update={"shard": True, "workers": 4}), job.config, job.assumed)
    assert found.weights / 4 < spread_out.weights < found.weights / 2


def test_tiny_needs_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    for line, says in ((("run", "demo", "--tiny"), "demo states none"), (("evaluate", "--tiny"), "this command states none")):
        code, sentence = commands.call(line)
        assert code == 2 and says in sentence
    code, sentence = commands.call(["run", "demo", "--set", "family=lava"])
    assert code == 2 and "did you mean 'llava'" in sentence
    code, sentence = commands.call(["train", "--scorer", "diffprune", "--model", "nowhere"])
    assert code == 2 and "no model 'nowhere'" in sentence, "before anything is started"


def test_tiny_models_have_names() -> None:
    vlm: Any = load("tiny(llava, image_mode='pad')", dtype="bfloat16", device="cpu")
    assert vlm.name == "tiny(family='llava', image_mode='pad')" and vlm.image_mode == "pad" and vlm.model.dtype == torch.bfloat16
    assert load("tiny(llava)").weights_hash == load("tiny(llava)").weights_hash
    for name, says in (
        ("tiny(lava)", "did you mean 'llava'"),
        ("tiny()", "tiny\\(family\\)"),
        ("tiny(llava, x=1)", "no option 'x'"),
    ):
        with pytest.raises(ValueError, match=says):
            load(name)


# --- what saves memory changes no number ------------------------------------------------------------------------------


def gradients(made: ScorerTrainer, given: training.TrainBatch) -> tuple[Any, list[torch.Tensor]]:
    """A step's record and gradients, before they are used."""
    found: list[torch.Tensor] = []
    made.optimizer.step = lambda: found.extend(p.grad.clone() for p in made.parameters if p.grad is not None)  # type: ignore
    return made.step(given), found


@pytest.mark.parametrize("spelling", ["diffprune", "gumbel_keepdrop", "diffprune(question_aware=True)"])
def test_micro_batches_and_recomputed_layers_give_the_same_step(spelling: str) -> None:
    vlm = load("tiny(llava)")
    given = batch(vlm, packed="aware" not in spelling)
    whole = arm(vlm, "whole", spelling)
    validated, cosine = whole.validate(), whole.grad_cosine(given, 0)
    row, wanted = gradients(whole, given)
    for number, options in enumerate(({"micro_images": 3}, {"micro_images": 1, "checkpointing": True})):
        made = arm(vlm, f"other{number}", spelling, **options)
        assert made.validate() == pytest.approx(validated, rel=1e-4)
        assert made.grad_cosine(given, 0) == pytest.approx(cosine, abs=1e-4)
        again, found = gradients(made, given)
        assert again.loss == pytest.approx(row.loss, rel=1e-5) and again.penalty == pytest.approx(row.penalty, rel=1e-4)
        assert (again.kept, again.grad_norm) == pytest.approx((row.kept, row.grad_norm), rel=1e-4)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_recomputed_layers_run_twice_and_only_inside() -> None:
    vlm = load("tiny(qwen2_5_vl)")
    made, calls = arm(vlm, "run", checkpointing=True), []
    layers = decoder_layers(vlm.model)
    before = [dict(vars(layer)) for layer in layers]
    handle = layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[operator, union-attr]
    made.step(batch(vlm))
    handle.remove()
    assert len(calls) == 2 and not any(module.training for module in vlm.model.modules())
    with pytest.raises(KeyError), recomputed(vlm.model):
        assert layers[0].training and not layers[0].self_attn.training  # type: ignore[union-attr]
        raise KeyError
    assert [vars(layer).keys() for layer in layers] == [b.keys() for b in before] and not layers[0].training


def kept_bytes(made: ScorerTrainer, given: training.TrainBatch) -> int:
    """Oracle: bytes of all tensors autograd saves in a forward pass, weights left out."""
    weights = [*made.vlm.model.parameters(), *made.vlm.model.buffers(), *made.networks.parameters()]
    known, valid = {w.untyped_storage().data_ptr() for w in weights}, []
    sizes: dict[int, int] = {}

    def saved(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            valid.append(tensor)  # else its place is given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor), made._differentiated():
        made.pruner.objective(
            made.run(given, given.num_labels), given, budgets.parse("Share(1/3)"), Progress(0, 1), made.noise(given, 0)
        )
    return sum(sizes.values())


@pytest.mark.parametrize("family", JOBS.values())
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_activations_are_what_autograd_keeps(family: str, dtype: str) -> None:
    vlm = load(f"tiny({family})", dtype=dtype)
    given = batch(vlm, images=2, questions=1)
    length, visual = given.prompts.input_ids.shape[1], int(given.prompts.slots[0].sum())
    assumed = estimate.Assumed(text=length - visual, answer=given.num_labels // 2, visual=visual)
    for checkpointing, least, most in ((False, 0.93, 1.03), (True, 0.95, 1.45)):
        made = arm(vlm, f"run{checkpointing}", questions=1, checkpointing=checkpointing, dtype=dtype)
        (found,) = estimate.estimate(made.recipe, vlm.model.config.to_dict(), assumed)
        said = 2 * (found.recomputed if checkpointing else found.stored)
        assert least < said / kept_bytes(made, given) < most
        assert found.trained == sum(p.numel() for p in made.networks.parameters())


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("spelling", ["diffprune", "diffprune(question_aware=True)"])
def test_the_estimate_has_the_lengths_of_the_first_example(family: str, spelling: str) -> None:
    vlm = load(f"tiny({family})")
    recipe = Recipe(**SMALL | {"model": f"tiny({family})", "pruners": (spelling,), "questions": 3, "questions_alone": 2})
    (found,) = estimate.estimate(recipe, vlm.model.config.to_dict())
    aware = "aware" in spelling
    prompts = training.first_batch(vlm, "world", 2 if aware else 3, packed=vlm.packs and not aware).prompts
    assert (found.image.rows, found.image.length) == tuple(prompts.input_ids.shape) and found.image.seen
    assert found.image.visual == int(prompts.slots[0].sum())
    assert "as the first example" in "\n".join(estimate.lines(recipe, found))
    (assumed,) = estimate.estimate(recipe, vlm.model.config.to_dict(), estimate.Assumed(text=50))
    assert not assumed.image.seen and assumed.image.length == assumed.image.visual + 50 * (
        1 if not (vlm.packs and not aware) else 3
    )
    (missing,) = estimate.estimate(
        recipe.model_copy(update={"data": Spec("jsonl").at(file=Path("no.jsonl"))}), vlm.model.config.to_dict()
    )
    assert not missing.image.seen and missing.image.answers == missing.image.rows * 32 * (3 if vlm.packs and not aware else 1)


@pytest.mark.parametrize("family", registry.names("models"))
def test_a_model_without_weights_has_the_parameters_of_one_with(family: str) -> None:
    vlm = load(f"tiny({family})")
    bare = outline(vlm.model.config.to_dict())
    assert [(n, p.shape) for n, p in bare.model.named_parameters()] == [(n, p.shape) for n, p in vlm.model.named_parameters()]
    assert all(p.is_meta for p in bare.model.parameters())
    assert bare.shape.layers == vlm.shape.layers and bare.shape.width == vlm.shape.width
    given = batch(vlm, images=1, questions=1)
    assert projector_input_width(bare) == vlm.encode(given.pixels).features.shape[-1]


# --- several workers --------------------------------------------------------------------------------------------------


def test_one_worker_cannot_spread_a_model() -> None:
    with pytest.raises(ValueError, match="give workers=2 or more"):
        Recipe(**SMALL, shard=True)
    with pytest.raises(ValueError, match="dtype='bfloat16'"):
        Recipe(**{**SMALL, "workers": 2, "shard": True})
    key = Recipe(**SMALL).key(Spec("diffprune"))
    assert Recipe(**SMALL, micro_images=2, checkpointing=True).key(Spec("diffprune")) == key
    assert Recipe(**SMALL, dtype="bfloat16").key(Spec("diffprune")) != key


def test_data_that_cannot_be_read_stop_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one sentence, before a worker starts; a fault in a worker is raised, so that Ray tries again."""
    fit = on_ray._fit
    monkeypatch.setattr(on_ray, "_fit", lambda config, workers: fit(config, 0))
    with pytest.raises(ValueError, match=r"^\S+nowhere.jsonl cannot be read as training data \(No such file or directory\)$"):
        on_ray.train(Recipe(**{**SMALL, "model": "tiny(llava)", "data": "jsonl('nowhere.jsonl')"}), "run")
    monkeypatch.setattr(train_worker, "train", lambda *_: pytest.fail("this is a fault, which Ray may try again"))
    with pytest.raises(pytest.fail.Exception):
        on_ray.train(Recipe(**{**SMALL, "model": "tiny(llava)"}), "other")


def test_what_any_worker_notes_is_told_though_the_first_has_nothing_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives what the first worker returns."""
    made = Recipe(**{**SMALL, "model": "tiny(llava)"})

    def fit(note: Any) -> Any:
        return lambda config, workers: note(Files(Path("run"), config["attempt"])) or ""

    for note, said in (
        (lambda files: files.fail("diffprune-0", "its loss was NaN"), r"^its loss was NaN$"),
        (lambda files: files.stop(1, "9 of 9 rows are broken"), r"^9 of 9 rows are broken$"),
        (lambda files: None, r"^training ended without diffprune, seed 0: run the same command again to go on$"),
    ):
        monkeypatch.setattr(on_ray, "_fit", fit(note))
        with pytest.raises(RuntimeError, match=said):
            on_ray.train(made, "run")


def test_a_folder_that_went_away_while_it_was_trained_into_is_named_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(config: dict[str, Any], workers: int) -> str:
        Path("run").rename("elsewhere")
        return "a-host cannot see run, where the driver has written"

    monkeypatch.setattr(on_ray, "_fit", fit)
    with pytest.raises(RuntimeError, match="run was moved or removed while it was trained into: move it back"):
        on_ray.train(Recipe(**{**SMALL, "model": "tiny(llava)"}), "run")
    assert not Path("run").exists(), "nor is it made anew"


# --- trained scorers by name ------------------------------------------------------------------------------------------


def test_a_scorer_from_a_folder_or_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = load("tiny(llava)")
    (place,) = loop.train(
        Recipe(**{**SMALL, "pruners": ("gumbel_topk(attention=False, depth=1)",), "steps": 1, "validate_every": 0}),
        LocalContext("run"),
        lambda _: vlm,
    )
    tokens = vlm.encode(batch(vlm, images=1).pixels)
    found: Any = diffprune.from_pretrained(str(place))
    assert str(found.spec) == "gumbel_topk(attention=False, depth=1)" and found.spec.weights_sha256 == found.weights_sha256 != ""
    asked = []

    def files(*given: Any, **more: Any) -> list[Path]:
        asked.append((given, more))
        return sorted(place.iterdir())

    monkeypatch.setattr("diffprune.io.hub.files", files)
    other: Any = diffprune.from_pretrained("user/scorer-llava15", revision="v1")
    assert other.score(tokens).equal(found.score(tokens))
    assert asked == [(("user/scorer-llava15", "v1", ("config.json", "model.safetensors")), {"kind": "model"})]
    spelled: Any = registry.load("pruners", "gumbel_topk(attention=False, weights='user/scorer-llava15')")
    assert spelled.score(tokens).equal(found.score(tokens)) and spelled.weights_sha256 == found.weights_sha256
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "method": "fastest"}))
    with pytest.raises(ValueError, match="no method of ours but 'fastest'"):
        diffprune.from_pretrained(place)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere", "no scorer 'nowhere'"),
        ("./nowhere", "no scorer"),
        (
            "user/scorer-llava15",
            "there is no folder user/scorer-llava15 here, and user/scorer-llava15 at main is not on this machine",
        ),
        (".", "config.json is missing"),
    ],
)
def test_a_scorer_that_is_not_there(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        diffprune.from_pretrained(name)
    assert "\n" not in str(refused.value)
