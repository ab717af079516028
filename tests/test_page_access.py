"""What an audit of accessibility asks of a page: contrast in light and dark, names, headings, the Tab key, targets."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from diffprune.report import compare, index, report
from diffprune.store import Store
from tests.browser import CHROMIUM, Browser
from tests.test_report import evaluated, pictured, timed, trained

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")]
NAMED = {"button", "link", "searchbox", "textbox", "image", "img", "region", "DisclosureTriangle", "navigation"}
LEAST = 4.5, 3.0  # contrast of text, and of large text: WCAG 2.2, 1.4.3
TARGET = 24  # pixels of what is pressed: WCAG 2.2, 2.5.8
FAINT = """(least => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = (color, below) => {
    canvas.globalCompositeOperation = 'copy'; canvas.fillStyle = below; canvas.fillRect(0, 0, 1, 1);
    canvas.globalCompositeOperation = 'source-over'; canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = rgb => rgb.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const paper = element => {
    const stack = [];
    for (let one = element; one; one = one.parentElement) stack.push(getComputedStyle(one).backgroundColor);
    return stack.reverse().reduce((below, color) => `rgb(${rgba(color, below)})`, 'white');
  };
  const found = new Set(), walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, style = getComputedStyle(element);
    if (!walker.currentNode.textContent.trim() || !element.getClientRects().length || element.tagName === 'SCRIPT') continue;
    if (element.tagName === 'style' || element.tagName === 'title') continue;
    const behind = paper(element), ink = element.namespaceURI.endsWith('svg') ? style.fill : style.color;
    const [a, b] = [light(rgba(ink, behind)), light(rgba(behind, behind))].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const ratio = (a + .05) / (b + .05);
    const says = walker.currentNode.textContent.trim().slice(0, 40);
    if (ratio < least[large ? 1 : 0]) found.add(`${ratio.toFixed(2)} ${ink} on ${behind}: ${says}`);
  }
  return [...found];
})(LEAST)"""
STOPS = "[...document.querySelectorAll('a[href], button, input, summary, [tabindex=\"0\"]')].filter(x => x.checkVisibility())"
OPEN = "document.querySelectorAll('details').forEach(one => { one.open = true; })"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report with answers, timings, pictures and training; a comparison with its copy; an index of both."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("one", "two"):
        store = Store(root / name / "store")
        evaluated(store, 4, ("gqa",), 2)
        if name == "one":
            for fill in (lambda s: timed(s, 5), lambda s: trained(s, 5), pictured):
                fill(store)
    made = report(root / "one" / "store", root / "one" / "report")
    compared, _ = compare(root / "one", root / "two", root / "compared")
    return {"report": made["html"], "compare": compared["html"], "index": index(root)}


@pytest.mark.parametrize("name", ["report", "compare", "index"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out(name: str, dark: bool, pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages[name], dark=dark)
    browser.look(OPEN)
    assert browser.look(FAINT.replace("LEAST", str(list(LEAST)))) == []


def test_faint_text_is_found(tmp_path: Path, browser: Browser) -> None:
    (tmp_path / "page.html").write_text(
        "<p style='color:#888'>grey</p><svg><text y='20' fill='#e69f00'>orange</text></svg>", "utf-8"
    )
    browser.open(tmp_path / "page.html")
    found = browser.look(FAINT.replace("LEAST", str(list(LEAST))))
    assert [line.split(": ")[1] for line in found] == ["grey", "orange"]


@pytest.mark.parametrize("name", ["report", "compare", "index"])
def test_everything_that_is_used_or_looked_at_has_a_name(name: str, pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages[name])
    browser.look(OPEN)
    browser.ask("Accessibility.enable")
    nodes: list[dict[str, Any]] = browser.ask("Accessibility.getFullAXTree")["nodes"]
    browser.ask("Accessibility.disable")
    roles = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n.get("ignored") and "role" in n]
    assert {role for role, _ in roles} >= {"button", "link", "searchbox", "region"}
    assert [role for role, said in roles if role in NAMED and not said.strip()] == []
    assert browser.look("document.documentElement.lang") == "en" and browser.look("document.title")
    levels = browser.look("[...document.querySelectorAll('h1, h2, h3, h4')].map(x => Number(x.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    assert browser.look("(ids => ids.length - new Set(ids).size)([...document.querySelectorAll('[id]')].map(x => x.id))") == 0
    zoom = browser.look("document.querySelector('meta[name=viewport]').content")
    assert "maximum-scale" not in zoom and "user-scalable" not in zoom
    assert browser.look("[...document.querySelectorAll('th')].every(x => x.scope)") is True


@pytest.mark.parametrize("name", ["report", "compare", "index"])
def test_the_tab_key_walks_through_the_page_in_its_order(name: str, pages: dict[str, Path], browser: Browser) -> None:
    """Every stop once, in the order of the text, each with a ring around it that is seen."""
    browser.open(pages[name])
    browser.look(f"window.stops = {STOPS}; window.walk = []")
    num = browser.look("stops.length")
    for _ in range(num):
        for kind in ("rawKeyDown", "keyUp"):
            browser.ask("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        browser.look("walk.push([stops.indexOf(document.activeElement), getComputedStyle(document.activeElement).outlineStyle])")
    walk = browser.look("walk")
    assert [place for place, _ in walk] == list(range(num))
    assert {ring for _, ring in walk} == {"auto"}
    assert browser.look("document.querySelectorAll('[tabindex]:not([tabindex=\"0\"])').length") == 0


def test_on_a_telephone_targets_are_large_enough(pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages["report"], 400)
    small = f"{STOPS}.map(x => [x.textContent.trim().slice(0, 30), x.getBoundingClientRect().height]).filter(x => x[1] < {TARGET})"
    assert browser.look(small) == []


def test_on_a_telephone_heading_and_first_column_stay_in_sight(pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages["report"], 400)
    where = "(x => { const box = x.getBoundingClientRect(); return [Math.round(box.left), Math.round(box.top)] })"
    browser.look("window.area = document.querySelector('#table .scroll'); area.scrollIntoView()")
    corner, cell = "area.querySelector('thead th')", "area.querySelector('tbody tr:nth-child(2) td:nth-child(4)')"
    before = browser.look(f"[{where}({corner}), {where}({cell})]")
    browser.look("area.scrollTo(40, 200)")
    after = browser.look(f"[{where}({corner}), {where}({cell})]")
    assert after[0] == before[0], "the corner stays"
    assert after[1] == [before[1][0] - 40, before[1][1] - 200], "what is beside it moves"
    assert browser.look(f"{where}(area.querySelector('tbody tr:nth-child(2) th'))[0]") == before[0][0]
    drawn = "[...document.querySelectorAll('.first figure.plot svg')].filter(x => x.checkVisibility())"
    assert browser.look(f"{drawn}.every(x => x.viewBox.baseVal.width < 300)") is True, "figures drawn for a narrow page"
