"""The zoo: every method there is, at four budgets, on the embedded model's ten benchmarks; trained ones with three scorer seeds.

    diffprune run zoo

Which methods there are is read from `pruners/`, so a new file is part of the zoo by itself: run again, and only its cells are
missing. Wrappers are asked for by name. Methods that cut inside the decoder meet a budget as the average over layers; what the
layers before their first cut see alone is a quarter of the tokens in a decoder this shallow, so smaller budgets are left out for
them. The trained ones take 1,200 images each, at the budgets and with the settings and options of one equal search
(jobs/tune_longer.py). Times are of one session, which orders methods; intervals that hold from one process to the next take
several, as `jobs/demo.py` has them. About half an hour on two cores; interrupted, the same command resumes. The catalogue
of README has its figures from here: `diffprune list pruners --readme README.md`.
"""

import inspect

from _winners import spelled, winners

from diffprune.core import registry
from diffprune.core.fitted import FittedPruner
from diffprune.job import Evaluation, Job, Measurement, Recipe

BUDGETS = ("Share(1/2)", "Share(1/3)", "Share(2/9)", "Share(1/9)")
TRAINED_AT = ("Share(1/3)", "Share(2/9)", "Share(1/9)", "Share(1/20)")
WRAPPED = ("pore(attention)", "pore(fastv)")  # position reweighting, of a rule before the decoder and of one inside it


def methods(fitted: bool) -> tuple[str, ...]:
    """Names of all methods that need fitting, or of all that do not; without wrappers."""
    plugins = {name: registry.find("pruners", name) for name in registry.names("pruners")}
    single = {n: p for n, p in plugins.items() if "Pruner" not in str(inspect.signature(p).parameters.get("method", ""))}
    return tuple(name for name, plugin in single.items() if issubclass(plugin, FittedPruner) == fitted)


READY = methods(fitted=False)  # `unpruned`, the bound, among them

job = Job(
    name="zoo",
    title="All methods on the embedded model",
    train=Recipe(
        pruners=(*spelled(*methods(fitted=True), images=1200), *WRAPPED),
        seeds=(0, 1, 2),
        steps=300,
        images=4,
        budgets=TRAINED_AT,
        workers=2,
        validate_every=0,
        grad_cosine_every=0,
        methods=winners(*methods(fitted=True), images=1200),
    ),
    evaluate=Evaluation(split="confirmation", limit=120, blind=True),
    measure=Measurement(rounds=20, warmup=3, inputs=1, slow_rounds=2, decode_tokens=4, spans=("prefill",), sessions=1),
    wrapped=("dpp(diffprune)",),
    baselines=(*READY, "dpp(attention)"),
    budgets=BUDGETS,
    leave_out=True,
    workers=2,
)
