"""Stores that are incomplete, damaged or huge, and text in any script: the page stays right and readable in a headless Chromium."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from diffprune.core.cell import Cell
from diffprune.report import report
from diffprune.report.analysis.records import read
from diffprune.store import Store
from tests.browser import CHROMIUM, Browser
from tests.records import evaluate_cell, measure_cell, model, prediction, provenance, timing

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
KEPT = (32, 16, 7)
SCRIPT, ARABIC, CHINESE = "<script>alert(1)</script>", "سؤال عن الصورة", "图中有什么颜色的形状"
SPANS = {("full", "prefill"): 40.0, ("pruned", "prefill"): 12.0, ("pruned", "overhead"): 1.0, ("full", "encoder"): 9.0,
         ("native", "prefill"): 11.5}  # fmt: skip


def named(cell: Cell, label: str, kind: str = "") -> Cell:
    """The cell of a method of this name, and of this kind."""
    return replace(cell, method=replace(cell.method, label=label, base=label, kind=kind or cell.method.kind))


def answer(store: Store, cell: Cell, share: float = 0.8, num: int = 12, **about: object) -> None:
    rows = [prediction(i, float(i % 10 < 10 * share), visual_kept=_kept(cell), **about) for i in range(num)]
    store.publish({"predictions": rows}, cell=cell, provenance=provenance())


def _kept(cell: Cell) -> int:
    return int(str(cell.columns().budget)[5:-1]) if str(cell.columns().budget).startswith("Keep") else 144


def timed(store: Store, cell: Cell, faster: float = 1.0) -> None:
    rows = [
        timing(ms * (1 + 0.01 * turn) / (faster if arm == "pruned" else 1), span=span, arm=arm, repetition=turn,
               visual_kept=float(_kept(cell)), sequence=30 + _kept(cell))
        for turn in range(8) for (arm, span), ms in SPANS.items()
    ]  # fmt: skip
    store.publish({"timings": rows}, cell=cell, provenance=provenance())


# The stores ----------------------------------------------------------------------------------------------------------


def without_evaluation(store: Store) -> None:
    for kept in KEPT:
        timed(store, measure_cell("diffprune", f"Keep({kept})", weights="1" * 20, recipe="r", seed=0))


def without_measuring(store: Store) -> None:
    answer(store, evaluate_cell("unpruned"), 1.0)
    for kept in KEPT:
        for asked in ("grid", "random"):
            answer(store, evaluate_cell(asked, f"Keep({kept})"))


def quarantined(store: Store) -> None:
    """The answers of one cell are damaged on disk."""
    without_measuring(store)
    for kept in KEPT:
        answer(store, evaluate_cell("attention", f"Keep({kept})"))
    for path in Path("store/parts/answers").glob(f"{evaluate_cell('attention', 'Keep(16)').key}*.parquet"):
        path.chmod(0o600)
        path.write_bytes(path.read_bytes()[:-40])


def two_models(store: Store) -> None:
    for name, share in (("embedded", 0.5), ("llava-hf/llava-1.5-7b-hf", 0.9)):
        on = model(name, weights=name[:2] * 10)
        answer(store, evaluate_cell("unpruned", on=on), 1.0)
        for kept in KEPT:
            answer(store, evaluate_cell("grid", f"Keep({kept})", on=on), share)
            timed(store, measure_cell("grid", f"Keep({kept})", on=on))


def forty_methods(store: Store) -> None:
    answer(store, evaluate_cell("unpruned"), 1.0)
    for number in range(40):
        kind = ("trained", "calibrated", "rule", "control")[number % 4]
        for kept in KEPT[:2]:
            about = {"asked": "grid", "budget": f"Keep({kept})", "weights": f"{number:020x}"}
            label = f"Method {number:02}"
            answer(store, named(evaluate_cell(**about), label, kind), 0.2 + 0.01 * number + 0.1 * (kept > 10))
            timed(store, named(measure_cell(**about), label, kind), 1 + 0.01 * number)


def any_script(store: Store) -> None:
    about = {"question": f"{ARABIC}؟ {CHINESE}", "answer": ARABIC, "target": CHINESE, "question_type": CHINESE}
    answer(store, evaluate_cell("unpruned"), 1.0, **about)
    for asked, label in (("grid", SCRIPT), ("random", CHINESE * 5), ("attention", ARABIC), ("diffprune", "")):
        for kept in KEPT:
            cell = evaluate_cell(asked, f"Keep({kept})")
            answer(store, named(cell, label) if label else cell, **about)


def a_million_answers(store: Store) -> None:
    right = [prediction(n, float(n % 5 > 0), group=f"g{n // 4}") for n in range(250_000)]
    wrong = [*(replace(row, credit=0.0, parsed="no") for row in right[:50_000]), *right[50_000:]]
    for asked, rows in (("unpruned", right), ("diffprune", wrong), ("grid", wrong), ("random", right)):
        store.publish({"predictions": rows}, cell=evaluate_cell(asked), provenance=provenance())


# What is seen --------------------------------------------------------------------------------------------------------

SHOWN = "[...document.querySelectorAll('figure.plot svg')].filter(x => x.getBoundingClientRect().width > 0)"
OVER = "document.documentElement.scrollWidth - innerWidth"
OVERLAPPING = """(svg => {
  const texts = [...svg.querySelectorAll('text')].filter(t => /^Method|:$/.test(t.textContent));
  const boxes = texts.map(t => t.getBoundingClientRect());
  const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top + 1 || b.bottom <= a.top + 1;
  return boxes.flatMap((a, i) => boxes.slice(i + 1).map((b, j) => [a, b, texts[i], texts[i + 1 + j]]))
    .filter(([a, b]) => !apart(a, b)).map(([, , a, b]) => a.textContent + ' on ' + b.textContent);
})(document.querySelectorAll('.first .pair svg')[WHICH])"""


@pytest.fixture
def shown(tmp_path: Path, browser: Browser) -> Callable[..., dict[str, Path]]:
    """Fill a store, write its report and show the page, at both widths and in print: nothing sticks out, runs or is refused."""

    def fill(store: Callable[[Store], None]) -> dict[str, Path]:
        store(Store("store"))
        made = report("store", "out", title=store.__name__)
        for width, medium in ((400, "screen"), (794, "print"), (1400, "screen")):
            browser.open(made["html"], width, medium=medium)
            assert browser.messages == [] and browser.look(OVER) == 0, (width, medium)
            assert browser.look("document.querySelectorAll('script').length") == 1
            assert browser.look(f"{SHOWN}.every(x => x.getAttribute('aria-label'))") is True
        return made

    return fill


def texts(browser: Browser, selector: str) -> list[str]:
    found: list[str] = browser.look(f"[...document.querySelectorAll({selector!r})].map(x => x.textContent.trim())")
    return found


def test_a_run_without_evaluation_shows_its_timings(shown: Callable[..., dict[str, Path]], browser: Browser) -> None:
    shown(without_evaluation)
    assert "Encoder, overhead and prefill" in browser.look("document.querySelector('.first figure svg').getAttribute('aria-label')")
    assert texts(browser, "#table tbody th") == ["DiffPrune"] * 3
    assert "diffprune evaluate" in texts(browser, ".first")[0]


def test_a_run_without_measuring_shows_accuracy_by_tokens(shown: Callable[..., dict[str, Path]], browser: Browser) -> None:
    shown(without_measuring)
    assert "by tokens kept" in browser.look("document.querySelector('.first figure svg').getAttribute('aria-label')")
    assert browser.look("document.querySelectorAll('.first .pair .missing').length") == 0, "no empty box"
    assert len(texts(browser, "#table tbody th")) == 7


def test_what_was_quarantined_is_named_and_the_rest_is_right(shown: Callable[..., dict[str, Path]], browser: Browser) -> None:
    shown(quarantined)
    failures = "document.querySelector('#failures')"
    assert browser.look(f"{failures}.closest('details').open") is True
    assert "quarantine" in browser.look(f"{failures}.textContent")
    assert texts(browser, "#table tbody th").count("Attention") == 2
    rows = "[...document.querySelectorAll('#table tbody tr')].map(r => Number(r.cells[2].dataset.v).toFixed(1))"
    assert browser.look(rows) == ["100.0", *["83.3"] * 8]


@pytest.mark.slow
def test_two_models_have_a_chapter_each(shown: Callable[..., dict[str, Path]], browser: Browser) -> None:
    shown(two_models)
    assert browser.look("document.querySelectorAll('section.first').length") == 2
    names = texts(browser, "section.first h2")
    assert any(n.startswith("embedded") for n in names) and any(n.startswith("llava-hf/llava-1.5-7b-hf") for n in names)
    tables = "[...document.querySelectorAll('#table table')]"
    rows = f"{tables}.map(t => [...t.tBodies[0].rows].map(r => Math.round(r.cells[2].dataset.v)).join())"
    assert sorted(browser.look(rows)) == ["100,58,58,58", "100,92,92,92"]
    assert browser.look("(ids => ids.length - new Set(ids).size)([...document.querySelectorAll('[id]')].map(x => x.id))") == 0
    lost = "[...document.querySelectorAll('nav a')].filter(a => !document.querySelector(a.getAttribute('href'))).length"
    assert browser.look(lost) == 0


@pytest.mark.slow
def test_forty_methods_stay_apart(shown: Callable[..., dict[str, Path]], browser: Browser) -> None:
    shown(forty_methods)
    styles = read("store").styles
    assert len(set(styles.values())) == len(styles) == 41
    for which, width in ((0, 1400), (1, 400)):
        browser.open(Path("out/report.html"), width)
        assert browser.look(OVERLAPPING.replace("WHICH", str(which))) == []
        words = f"[...document.querySelectorAll('.first .pair svg')[{which}].querySelectorAll('text')].map(t => t.textContent)"
        legend = [word for word in browser.look(words) if word.startswith("Method") or word.endswith(":")]
        assert [word for word in legend if word.endswith(":")] == ["trained:", "calibrated:", "rule:", "control:"]
        kind = {f"Method {n:02}": ("trained:", "calibrated:", "rule:", "control:")[n % 4] for n in range(40)}
        heading = ""
        for word in legend:
            heading = word if word.endswith(":") else heading
            assert word.endswith(":") or kind[word] == heading
        assert len(legend) == 44


@pytest.mark.slow
def test_a_million_answers(shown: Callable[..., dict[str, Path]], browser: Browser) -> None:
    made = shown(a_million_answers)
    assert "250,000 questions about 62,500 pictures" in texts(browser, ".verdict")[0].replace("\u202f", ",")
    assert made["html"].stat().st_size < 1_000_000
    with made["csv/headline"].open(newline="") as file:
        found = {row["Method"]: float(row["accuracy %"]) for row in csv.DictReader(file)}
    assert found == pytest.approx({"Unpruned": 80.0, "DiffPrune": 64.0, "Grid": 64.0, "Random": 80.0})


def test_any_script_is_shown_as_it_was_written(shown: Callable[..., dict[str, Path]], browser: Browser) -> None:
    made = shown(any_script)
    names = texts(browser, "#table tbody th")
    assert names.count(SCRIPT) == names.count(ARABIC) == names.count(CHINESE * 5) == 3
    assert browser.look("getComputedStyle(document.querySelector('#table tbody th bdi')).unicodeBidi") == "isolate"
    words = browser.look(f"{SHOWN}.flatMap(x => [...x.querySelectorAll('text')].map(t => t.textContent))")
    assert any(SCRIPT in word for word in words) and any(ARABIC in word for word in words), "in figures, too"
    assert any(CHINESE in cell for cell in texts(browser, "td"))
    document = made["latex"].read_text("utf-8")
    assert all(ord(mark) < 0x250 for mark in document), "no script that pdflatex cannot set"
