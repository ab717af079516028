"""The page: the template beside this file, filled with tables, figures and pictures; everything else is escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup

from diffprune.report.render import escape
from diffprune.report.render.svg import Plot, inline
from diffprune.report.render.table import Number, Table, to_csv

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = {"live.html.j2": "live.js"}  # of other pages it sorts and filters tables


def render(template: str, **values: object) -> str:
    """The whole page. Only strings made by `figures` and `pictures` may come as `Markup`.

    The policy of the page names the digest of its one script, so no other runs.
    """
    style, script = (Markup((TEMPLATES / name).read_text("utf-8")) for name in ("style.css", SCRIPTS.get(template, "script.js")))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _environment().get_template(template).render(style=style, script=script, script_hash=digest, **values)


@cache
def _environment() -> jinja2.Environment:
    """Templates are compiled once: a live page is written every few seconds."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    made = jinja2.Environment(
        autoescape=True,
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["plain"] = escape.plain
    made.tests["numeric"] = lambda value: isinstance(value, Number)
    made.filters["attachment"] = _attachment
    return made


@dataclass(frozen=True)
class Drawn:
    """A plot as markup, for wide and for narrow pages."""

    wide: Markup
    narrow: Markup


def drawn(plots: Mapping[str, Plot | None], chapter: int = 0) -> dict[str, Drawn | None]:
    """SVG text from matplotlib, which escapes the words in it, as markup.

    chapter: a number of its own for each call on a page.
    """
    found: dict[str, Drawn | None] = {}
    for place, (name, plot) in enumerate(plots.items()):
        key = f"f{chapter}-{place}"
        found[name] = None
        if plot:
            wide, narrow = inline(plot.wide, f"{key}w", plot.alt), inline(plot.narrow, f"{key}n", plot.alt)
            found[name] = Drawn(Markup(wide), Markup(narrow))
    return found


def _attachment(table: Table) -> str:
    """A table's CSV within the page, so that the page alone can be sent."""
    return "data:text/csv;base64," + base64.b64encode(to_csv(table).encode()).decode()
