"""The page as a reader sees it, in a headless Chromium: narrow, dark and in print, with whatever text others wrote."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from diffprune.report import report
from diffprune.report.render.svg import axes, inline, styled, svg
from diffprune.store import Store
from tests.browser import CHROMIUM, Browser
from tests.records import evaluate_cell, prediction, provenance

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
SCRIPT, ARABIC, CHINESE = "<script>alert(1)</script>", "سؤال عن الصورة", "图中有什么颜色的形状" * 4
OVER = "document.documentElement.scrollWidth - innerWidth"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers alone, of two methods, one of them named as a script, about questions in Arabic and Chinese."""
    root = tmp_path_factory.mktemp("run")
    for number, (asked, label) in enumerate((("unpruned", ""), ("grid", SCRIPT), ("random", CHINESE))):
        cell = evaluate_cell(asked)
        cell = replace(cell, method=replace(cell.method, label=label)) if label else cell
        rows = [prediction(i, float(i % (number + 1) == 0), question=(ARABIC, CHINESE)[i % 2], answer=ARABIC) for i in range(8)]
        Store(root / "store").publish({"predictions": rows}, cell=cell, provenance=provenance())
    return report(root / "store", root / "out", title=ARABIC)["html"]


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_sticks_out_runs_or_is_refused(width: int, page: Path, browser: Browser) -> None:
    browser.open(page, width)
    assert browser.messages == [], "the policy refuses nothing of the page's own"
    assert browser.look(OVER) == 0
    assert browser.look("document.querySelectorAll('script').length") == 1
    assert browser.look(f"[...document.querySelectorAll('tbody th')].filter(x => x.textContent === {SCRIPT!r}).length") > 0
    shown = "[...document.querySelectorAll('figure.plot svg')].filter(x => x.getBoundingClientRect().width > 0)"
    assert browser.look(f"{shown}.every(x => x.getAttribute('aria-label'))") is True


def test_the_table_sorts_filters_and_keeps_its_first_column(page: Path, browser: Browser) -> None:
    browser.open(page, 400)
    rows = "[...document.querySelectorAll('table.sortable tbody tr')]"
    names = f"{rows}.filter(x => !x.hidden).map(x => x.cells[0].textContent.trim())"
    browser.look("document.querySelectorAll('table.sortable th button')[2].click()")
    accuracy = f"{rows}.map(x => Number(x.cells[2].dataset.v))"
    found = browser.look(accuracy)
    assert found == sorted(found, reverse=True) and len(set(found)) > 1
    browser.look("(f => { f.value = 'script'; f.dispatchEvent(new Event('input')) })(document.querySelector('.filter input'))")
    assert browser.look(names) == [SCRIPT]
    first = "getComputedStyle(document.querySelector('table.sortable tbody th')).position"
    assert browser.look(first) == "sticky"


def test_dark_has_light_ink_and_print_shows_what_is_folded(page: Path, browser: Browser) -> None:
    ink = "getComputedStyle(document.body).color"
    browser.open(page, dark=True)
    dark = browser.look(ink)
    browser.open(page)
    assert dark != browser.look(ink)
    height = browser.look("document.documentElement.scrollHeight")
    browser.open(page, medium="print")
    assert browser.look("document.documentElement.scrollHeight") > 1.5 * height


def test_a_figure_on_the_page_is_the_figure_as_drawn(tmp_path: Path, browser: Browser) -> None:
    """Pixel by pixel, though shared styles are classes, names are short and paths are without white space."""
    with styled():
        figure, panels = axes(4, 3, 1, 2)
        for ax, marks in zip(panels, ("osv", "DP^"), strict=True):
            for number, mark in enumerate(marks):
                ax.errorbar([0.1, 2, 3.5], [number, -number, 1e-3], 0.4, color=f"C{number}", marker=mark, mfc="white", label=mark)
            ax.fill_between([0, 3], 0.2, 0.7, alpha=0.2)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center")
        drawn = svg(figure)
    found = []
    for text in (drawn, inline(drawn, "f0-0w", "Marks & lines")):
        (tmp_path / "page.html").write_text(f"<style>svg{{display:block;width:500px;height:auto}}</style>{text}", "utf-8")
        browser.open(tmp_path / "page.html")
        browser.picture(tmp_path / "page.png", 400)
        found.append((tmp_path / "page.png").read_bytes())
    assert found[0] == found[1]
    assert len(inline(drawn, "f0-0w", "")) < 0.8 * len(drawn)


def test_without_timings_accuracy_by_kept_tokens_stands_in_the_place_of_the_speeds(page: Path, browser: Browser) -> None:
    browser.open(page)
    assert browser.look("document.querySelectorAll('.first .pair figure').length") == 1
    assert "by tokens kept" in browser.look("document.querySelector('.first .pair svg').getAttribute('aria-label')")
    assert browser.look("document.querySelector('.first').textContent").count("`diffprune measure`") == 1
