"""Escaping of foreign text (answers, notes, names) for each kind of output."""

from __future__ import annotations

import re

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])|\x9b[0-?]*[ -/]*[@-~]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "×": r"$\times$", "−": r"$-$", "±": r"$\pm$", "≤": r"$\le$", "≥": r"$\ge$", "τ": r"$\tau$", "–": "--", "·": r"$\cdot$",
}  # fmt: skip


def plain(value: object, limit: int = 160) -> str:
    """One line without escape sequences, control or direction characters, cut to `limit` characters."""
    text = str(value)[: limit * 8 + 64]  # bounded before the regular expressions see it
    text = " ".join(_CONTROL.sub("", _ANSI.sub("", text)).split())
    return text if len(text) <= limit and len(str(value)) <= limit * 8 + 64 else text[: limit - 1].rstrip() + "…"


def markdown(value: object, limit: int = 160) -> str:
    """Text for a Markdown table cell: markup, tables and HTML stay letters."""
    text = plain(value, limit).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|!~#])", r"\\\1", text).replace("://", ":&#47;&#47;")


def latex(value: object, limit: int = 160) -> str:
    """Text for LaTeX: every active character is printed, none is executed."""
    return "".join(_LATEX.get(c, c) for c in plain(value, limit))


def csv(value: object) -> str:
    """Text for a CSV cell: a spreadsheet shall not read it as a formula."""
    text = plain(value, 1000)
    return f"'{text}" if text[:1] in {"=", "+", "-", "@", "|", "%"} else text
