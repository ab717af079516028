"""Escaping of foreign text (answers, notes, names) for each kind of output."""

from __future__ import annotations

import re
import unicodedata

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])|\x9b[0-?]*[ -/]*[@-~]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "×": r"$\times$", "−": r"$-$", "±": r"$\pm$", "≤": r"$\le$", "≥": r"$\ge$", "τ": r"$\tau$", "–": "--", "·": r"$\cdot$",
    "≈": r"$\approx$", "→": r"$\to$",
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
    """Text for pdflatex: every active character is printed, none is executed."""
    return "".join(_LATEX.get(c, c) for c in latin(plain(value, limit)))


def latin(text: str) -> str:
    """Text that pdflatex can set: letters of Western Europe as they are, others by their plain form, and where they have none how
    many characters stood there."""
    kept = "".join(c if c.isascii() or c in _LATEX or c in _LETTERS else _plainest(c) for c in text)
    return re.sub("\0+", lambda run: f"[{len(run[0])} character{'s' * (len(run[0]) > 1)}]", kept)


_LETTERS = frozenset([*map(chr, (*range(0xC0, 0xD7), *range(0xD8, 0xF7), *range(0xF8, 0x100))), *"ŁłŒœĐđ"])
_MARKS = {"‘": "'", "’": "'", "“": '"', "”": '"', "—": "--", "…": "...", "•": "-"}


def _plainest(mark: str) -> str:
    """Of one character; NUL where there is none."""
    if unicodedata.combining(mark):
        return ""
    found = _MARKS.get(mark) or "".join(c for c in unicodedata.normalize("NFKD", mark) if not unicodedata.combining(c))
    return found if found.isascii() and found else "\0"


def csv(value: object) -> str:
    """Text for a CSV cell: a spreadsheet shall not read it as a formula."""
    text = plain(value, 1000)
    return f"'{text}" if text[:1] in {"=", "+", "-", "@", "|", "%"} else text
