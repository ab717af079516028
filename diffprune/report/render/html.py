"""The page: the template beside this file, filled with tables, figures and pictures; everything else is escaped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jinja2
from markupsafe import Markup

from diffprune.report.render import escape
from diffprune.report.render.svg import inline
from diffprune.report.render.table import Number

TEMPLATES = Path(__file__).parent / "templates"


def render(**values: object) -> str:
    """The whole page. Only strings made by `figures` and `pictures` may come as `Markup`."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        autoescape=True,
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = escape.plain
    environment.tests["numeric"] = lambda value: isinstance(value, Number)
    style = Markup((TEMPLATES / "style.css").read_text("utf-8"))
    return environment.get_template("page.html.j2").render(style=style, **values)


def drawn(figures: Mapping[str, str | None]) -> dict[str, Markup | None]:
    """SVG text from matplotlib as markup. matplotlib escapes the text in it."""
    return {name: Markup(inline(svg)) if svg else None for name, svg in figures.items()}
