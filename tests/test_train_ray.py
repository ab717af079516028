"""Training on Ray against the same loop without it: equal losses, through a killed driver and a killed worker."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch import distributed as group

from diffprune import data as training
from diffprune.core.records import Step
from diffprune.core.vlm import VLM
from diffprune.distributed import train as on_ray
from diffprune.distributed.cluster import connect
from diffprune.distributed.fsdp import spread
from diffprune.distributed.parcel import opened, packed
from diffprune.distributed.train_worker import work
from diffprune.embedded import vlm as embedded
from diffprune.io import shared_storage
from diffprune.io.attempts import Attempt
from diffprune.pruners.gumbel_keepdrop import GumbelKeepDrop
from diffprune.store import Store
from diffprune.train.ahead import BadData, drawn
from diffprune.train.checkpoints import Files, claim, read_steps
from diffprune.train.context import Context, LocalContext
from diffprune.train.loop import Unfitted, scorers, train
from diffprune.train.objective import BadObjective
from diffprune.train.recipe import Recipe
from diffprune.vlm.activation_checkpointing import decoder_layers
from diffprune.vlm.load import load
from tests.records import provenance

pytestmark = pytest.mark.slow

OPTIONS: dict[str, Any] = {
    "pruners": ("diffprune",), "steps": 10, "images": 4, "questions": 2, "workers": 2, "budgets": ("Share(2/3)", "Share(1/3)"),
    "calibration_images": 4, "validation_images": 4, "checkpoint_every": 2, "validate_every": 0, "grad_cosine_every": 0,
}  # fmt: skip


THREE: dict[str, Any] = {  # scorers for two workers, with a ratio loss over uneven shares of the images
    "seeds": (0, 1, 2), "steps": 3, "images": 3, "pruners": ("gumbel_keepdrop",),
}  # fmt: skip
BAD = "gumbel_keepdrop"
KEPT = {"attempts", "scorers", "steps.jsonl"}
SPREAD = OPTIONS | {"model": "tiny(llava)", "steps": 3, "micro_images": 1, "checkpointing": True, "validate_every": 3}


def recipe(model: str, **options: Any) -> Recipe:
    """Noise, budgets and batches of one seed, which any number of workers shares."""
    return Recipe(**{**OPTIONS, "model": model, **options})


class PlainContext(Context):
    """Two processes and torch.distributed, no Ray: what the cluster must reproduce."""

    def __init__(self, folder: Path, rank: int, meeting: str) -> None:
        self.rank, self.world, self.device = rank, 2, torch.device("cpu")
        group.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
        self.files = Files(folder, 1)

    def begin_sum(self, values: Tensor) -> Callable[[], Tensor]:
        total = values.clone()
        group.all_reduce(total)
        return lambda: total

    def progress(self, text: str) -> None:
        pass


def plain(folder: str, rank: str, model: str) -> None:
    """One of the two plain processes. It goes on with what else needs two, as starting them takes longer."""
    torch.set_num_threads(1)
    context = PlainContext(Path(folder), int(rank), f"{folder}/meeting")
    train(recipe(model), context, load)
    for name in ("whole", "spread"):
        vlm = load("tiny(llava)", device="cpu")
        context.files = Files(Path(folder) / name, 1)
        if name == "spread":
            layers, before = decoder_layers(vlm.model), vlm.weights_hash
            assert spread(vlm, context.device).weights_hash == before
            held = [p.to_local().numel() / p.numel() for layer in layers for p in layer.parameters()]  # type: ignore[attr-defined]
            assert set(held) == {0.5}, "each has half of every layer"
        train(Recipe(**SPREAD), context, lambda _, vlm=vlm: vlm)
    context.files = Files(Path(folder) / "apart", 1)
    train(recipe(model, **THREE), context, load)
    refused(context, vlm)
    failing(context, Path(folder), model)
    group.destroy_process_group()


def refused(context: Context, vlm: VLM) -> None:
    """Data that only worker 0 finds broken stop both, each with a sentence."""

    def draw() -> training.TrainBatch:
        if context.rank == 0:
            raise training.TooManyBroken("7 of 9 rows are broken")
        return training.calibration(vlm, "world", 1)

    wanted = ("7 of 9 rows are broken", "the training data cannot be read on another worker")[context.rank]
    with pytest.raises(BadData, match=wanted):
        drawn(context, draw)


def failing(context: Context, folder: Path, model: str) -> None:
    """A method whose own code fails, in whole scorers of one worker and in one that both train, keeps the others from nothing."""
    options: dict[str, Any] = {"steps": 1, "pruners": (BAD, "visionselector", "learnpruner")}
    GumbelKeepDrop.objective = lambda *_: None  # type: ignore[assignment,method-assign]
    context.files = Files(folder / "failing", 1)
    with pytest.raises(Unfitted, match=f"^1 of 3 scorers cannot be trained: {BAD}, seed 0, step 0: its objective gives NoneType"):
        train(recipe(model, **options), context, load)
    context.files = Files(folder / "together", 1)
    together = recipe(model, **{**options, "pruners": ("visionselector", "learnpruner", BAD)})
    with pytest.raises(BadObjective):  # the other may wait for this one, so the group starts again
        train(together, context, load)
    with pytest.raises(Unfitted, match=f"^1 of 3 scorers cannot be trained: {BAD}, seed 0, step 0: its objective gives NoneType"):
        train(together, context, lambda *_, **__: pytest.fail("nothing is left to train"))


def driver(folder: str, address: str, model: str) -> None:
    """A driver of its own on a running cluster, to be killed."""
    with connect(address):
        on_ray.train(recipe(model), folder)


def spawn(call: str, *args: str) -> subprocess.Popen[bytes]:
    tests = Path(__file__).parent
    code = f"import sys, test_train_ray; test_train_ray.{call}(*sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *args], env=environment)


def await_(what: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def newest(folder: Path) -> str:
    """The state a run would go on from, "" before the first."""
    return max((path.name for path in folder.glob("states/*/*.pt")), default="")


def losses(folder: Path) -> list[float]:
    return [row.loss for row in steps(folder)]


def steps(folder: Path, scorer: str = "") -> list[Step]:
    """Records of a scorer in a folder, of the only one if no name is given."""
    found = read_steps(folder)[scorer] if scorer else next(iter(read_steps(folder).values()))
    return sorted(found, key=lambda row: row.step)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    embedded.build(0).save_pretrained(folder)
    embedded.processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def two(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two plain processes leave."""
    folder = tmp_path_factory.mktemp("plain")
    for place in (folder, folder / "whole", folder / "spread", folder / "apart", folder / "failing", folder / "together"):
        claim(place)
    both = [spawn("plain", str(folder), str(rank), model) for rank in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    return folder


@pytest.fixture(scope="module")
def undisturbed(two: Path) -> list[float]:
    """Losses of two plain processes."""
    return losses(two)


@pytest.fixture(scope="module")
def alone(model: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of one process with the whole batch."""
    folder = tmp_path_factory.mktemp("alone")
    train(recipe(model, workers=1), LocalContext(folder), load)
    return losses(folder)


def test_two_workers_equal_one(undisturbed: list[float], alone: list[float]) -> None:
    assert len(undisturbed) == len(alone) == 10
    assert undisturbed == pytest.approx(alone, rel=1e-4), "noise of each image is its own, so the mean is over the same answers"
    assert sum(alone[-3:]) < sum(alone[:3]) - 0.03, "something was learnt, so gradients were averaged right"


def test_two_workers_share_out_whole_scorers_and_train_the_odd_one_together(two: Path, model: str, tmp_path: Path) -> None:
    train(recipe(model, workers=1, **THREE), LocalContext(tmp_path), load)
    places = scorers(recipe(model, **THREE), two / "apart")
    workers = {seed: {row.workers for row in steps(two / "apart", place.name)} for (_, seed), place in places.items()}
    assert workers == {0: {1}, 1: {1}, 2: {2}}
    for (_, seed), place in places.items():
        mine, alone = (load_file(found / "model.safetensors") for found in (place, tmp_path / "scorers" / place.name))
        for key, value in mine.items():
            torch.testing.assert_close(value, alone[key], **({"rtol": 0, "atol": 0} if seed < 2 else {"rtol": 1e-3, "atol": 1e-4}))


def test_a_method_that_fails_keeps_no_other_from_being_trained(two: Path) -> None:
    for place in (two / "failing", two / "together"):
        assert {path.name for path in place.glob("scorers/*")} == {"visionselector-0", "learnpruner-0"}


def test_a_spread_decoder_trains_as_a_whole_one(two: Path) -> None:
    """A replicated scorer (DDP) beside a spread decoder (FSDP), with micro-batches and recomputed layers."""
    whole, spread_out = (steps(two / name) for name in ("whole", "spread"))
    assert len(whole) == len(spread_out) == SPREAD["steps"]
    for name, near in (("loss", 1e-5), ("validation_hard", 1e-5), ("grad_norm", 1e-4)):
        wanted = [getattr(row, name) for row in whole]
        assert [getattr(row, name) for row in spread_out] == pytest.approx(wanted, rel=near, nan_ok=True), name
    assert whole[-1].validation_hard > 0 and whole[-1].workers == 2


def test_one_ray_worker_equals_no_ray(model: str, alone: list[float], tmp_path: Path) -> None:
    made = recipe(model, workers=1)
    config = {"recipe": made, "folder": str(tmp_path), "attempt": claim(tmp_path)}
    assert on_ray._fit(config, workers=0) == ""  # Ray's local mode: in this process, no cluster
    assert losses(tmp_path) == alone
    assert list((tmp_path / "workers").iterdir())
    assert on_ray.train(made, tmp_path) == [tmp_path / "scorers" / "diffprune-0"]
    assert not (tmp_path / "workers").exists(), "what the workers of a driver said that was killed when they were done"


def test_who_passes_the_work_on_imports_nothing_of_it() -> None:
    """A worker of Ray's unpickles what it is handed before it answers; torch, transformers and the rest would take it seconds."""
    parcel = pickle.dumps((opened, packed(work, {"recipe": recipe("embedded")})))
    code = (
        "import pickle, sys; f, p = pickle.load(sys.stdin.buffer); print(len(p), 'torch' in sys.modules, 'pydantic' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], input=parcel, capture_output=True, check=True)
    assert found.stdout.split() == [b"1", b"False", b"False"]
    assert opened(packed(divmod, 7, 2)) == (3, 1)


@pytest.mark.trial(1)
def test_a_killed_driver_and_a_killed_worker_leave_the_loss_curve(model: str, undisturbed: list[float], tmp_path: Path) -> None:
    import ray

    made, folder = recipe(model), tmp_path / "run"
    store, made_by = Store(tmp_path / "store"), provenance()
    with connect(workers=2):
        first = spawn("driver", str(folder), ray.get_runtime_context().gcs_address, model)
        await_(lambda: bool(newest(folder)) or first.poll() is not None)
        valid = first.poll() is None
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert valid and not (folder / "scorers").exists(), "killed before it was done"
        killer = threading.Thread(target=kill_a_worker, args=(folder,))
        killer.start()
        (place,) = on_ray.train(made, folder, store, made_by)
        killer.join()
        assert on_ray.train(made, folder, store, made_by) == [place]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "Ctrl-C stays ours"
    assert losses(folder) == pytest.approx(undisturbed, rel=1e-5)
    begins = [json.loads(text)["begin"][1] for text in (folder / "steps.jsonl").read_text().split("\n") if '"begin"' in text]
    assert begins[0] == 0 and begins[1] >= 2 and begins[2] >= 4 and len(begins) == 3
    assert store.read("steps")["step"].tolist() == list(range(10)), "published once, redone steps left out"
    assert {path.name for path in folder.iterdir()} <= KEPT, "nothing of Ray's"


def test_a_group_that_fails_is_started_again_while_it_comes_further(
    monkeypatch: pytest.MonkeyPatch, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three hosts are lost, each after another state was saved; the fourth loss follows no progress and ends the run."""
    tries: list[int] = []

    def lost(config: dict[str, Any], workers: Any) -> str:
        tries.append(len(tries))
        if len(tries) < 4:
            Files(tmp_path, config["attempt"]).save("diffprune-0", {"step": len(tries)})
        raise RuntimeError(f"host {len(tries)} was lost")

    monkeypatch.setattr(on_ray, "_fit", lost)
    with pytest.raises(RuntimeError, match=r"^host 4 was lost$"):
        on_ray.train(recipe(model), tmp_path)
    assert "train: host 3 was lost: it had come further, so it goes on by itself" in capsys.readouterr().out


def test_a_host_that_cannot_see_the_folder_is_named(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver has noted is elsewhere: the attempt's number is there, by chance, and its note is another's."""
    monkeypatch.setattr(shared_storage, "SEEN_S", 0.6)
    claim(tmp_path)
    config = {"recipe": recipe(model, workers=1), "folder": str(tmp_path), "attempt": Attempt.noted(1, b"the driver's")}
    reason = on_ray._fit(config, workers=0)
    assert reason.startswith(f"{socket.gethostname()} cannot see {tmp_path}, where the driver has written")
    assert not (tmp_path / "steps.jsonl").exists() and not (tmp_path / "workers").exists(), "nothing is written beside"


def kill_a_worker(folder: Path) -> None:
    """SIGKILL one of this test's own training workers once a state of the resumed run is there (it is announced before)."""
    before = newest(folder)
    await_(lambda: newest(folder) > before)
    processes("RayTrainWorker")[-1].kill()


def processes(name: str) -> list[psutil.Process]:
    """This test's own processes whose command line contains `name`."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if name in " ".join(process.cmdline() or [process.name()]):
                found.append(process)
    return found


def test_a_loss_that_stays_bad_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch, model: str, tmp_path: Path) -> None:
    monkeypatch.setattr(on_ray, "_fit", lambda *_: "diffprune, seed 0: loss or gradient was NaN")
    with pytest.raises(RuntimeError, match=r"^diffprune, seed 0: loss or gradient was NaN$"):
        on_ray.train(recipe(model), tmp_path / "run")
