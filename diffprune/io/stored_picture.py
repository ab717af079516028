"""A picture as a row of a data set stores it: a path, bytes, base64, a data URI, a mapping of these, or a list of one or more.

"12.png", Path("12.png")                a file, relative to the folder of the rows
b"\x89PNG...", "iVBORw0KGgo...",        the bytes of a file, in base64 where a row holds text
"data:image/png;base64,iVBORw0KGgo..."
{"bytes": ..., "path": ...}             either of them, as the Hub has it; the bytes lead
["12.png", "13.png"], '["12.png"]'      a list, or its text: the pictures of one question
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from contextlib import suppress
from hashlib import blake2b
from os.path import normpath
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from diffprune.io.listed_text import listed

Picture = Path | bytes
BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}=*\s*")
LONGEST_PATH = 4096
MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"\0\0\0")  # of the formats that we read


def pictures(value: Any, folder: Path | None = None) -> list[Picture]:
    """The pictures of a cell, none where it is empty. folder: where relative paths start; the working directory if None.

    Raises:
        ValueError: a value that names no picture; where files lie elsewhere than on this machine.
    """
    if value is None or (isinstance(value, float) and value != value):
        return []
    if isinstance(value, Mapping):
        held = value.get("bytes")
        return pictures(value.get("path") if held is None else held, folder)
    if isinstance(value, list | tuple):
        return [picture for part in value for picture in pictures(part, folder)]
    if isinstance(value, Path):
        return [(folder or Path()) / value]
    if isinstance(value, bytes | bytearray | memoryview):
        return [bytes(value)] if len(value) else []
    if isinstance(value, str):
        return _of_text(value, folder)
    raise ValueError(f"a picture is {type(value).__name__}; a path, the bytes of a file or their base64 is needed")


def picture_id(picture: Picture, folder: Path | None = None) -> str:
    """Equal for equal pictures: the path within `folder`, in one spelling, or the hash of the bytes."""
    if isinstance(picture, Path):
        whole, base = Path(normpath(picture)), Path(normpath(folder)) if folder else None
        return str(whole.relative_to(base) if base and whole.is_relative_to(base) else whole)
    return blake2b(picture, digest_size=10).hexdigest()


def _of_text(text: str, folder: Path | None) -> list[Picture]:
    if not text.strip():
        return []
    if text.startswith("data:"):
        head, _, body = text.partition(",")
        return [_decoded(body) if head.endswith(";base64") else unquote_to_bytes(body)]
    if re.match(r"https?://", text):
        raise ValueError(f"the picture {text:.100} is an address; download it and give its path")
    if len(text) > LONGEST_PATH:
        return [_decoded(text)]
    if BASE64.fullmatch(text):
        with suppress(ValueError):  # a path of these letters alone, without a suffix
            if (held := _decoded(text)).startswith(MAGIC):
                return [held]
    found = listed(text)
    if isinstance(found, list) and all(isinstance(part, str) for part in found):
        return pictures(found, folder)
    return [(folder or Path()) / text]


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise ValueError(f"a picture of {len(text):,} letters is neither a path nor base64 ({error})") from None
