"""Image decoding: every source becomes an upright 8-bit RGB image, or an error of one sentence."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import warnings
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from diffprune.core.errors import first_line
from diffprune.io.stored_picture import pictures

MAX_PIXELS = 25_000_000  # 75 MB of RGB; a few kilobytes of PNG can claim a hundred times as much
CLIP_MEAN = (122, 116, 104)  # CLIP's mean times 255, truncated: what LLaVA-1.5 pads with
# Formats that are decoded in this process. Others Pillow knows start programs (EPS) or read documents (PDF).
Image.init()
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 * 2**20  # comments of editors are no damage
FORMATS: list[str] = [
    f for f in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO") if f in Image.OPEN
]
TO_8_BIT = [round(value / 257) for value in range(65536)]
# What Pillow's decoders are known to raise on damaged bytes; RuntimeError is that of AVIF.
DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError, KeyError, OverflowError, RuntimeError, struct.error,
    zlib.error,
)  # fmt: skip


def open_image(source: Any, *, max_pixels: int = MAX_PIXELS, name: str = "") -> Image.Image:
    """The picture in `source` as RGB, 8 bits per channel.

    source: a PIL image, or a picture as a row stores it (`stored_picture`): a path, bytes, base64, a data URI, a mapping of these.
    name:   what messages call the picture; by default its path.

    The orientation in EXIF is applied, transparency is laid on white, 16 bits are scaled to 8 (65535 -> 255), of an animation
    the first frame counts. Colour profiles are not applied: neither do the processors of the models we know. A JPEG with a mark of
    its end before all its rows comes with a grey rest: its decoder knows, and Pillow does not say.

    Raises:
        ValueError: no picture, damaged or truncated, without pixels, more than `max_pixels`, or with values of unknown white.
    """
    if isinstance(source, Mapping):
        inner = source.get("bytes")
        named = name or str(source.get("path") or "")
        return open_image(source.get("path") if inner is None else inner, max_pixels=max_pixels, name=named)
    if isinstance(source, str | list | tuple):
        found = pictures(source)
        if len(found) != 1:
            raise ValueError(f"{name or 'an image'} is {len(found) or 'no'} pictures; one is needed")
        source = found[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged metadata and palettes, of no consequence for the pixels we return
        if isinstance(source, Image.Image):
            called = name or "the image"
            _check_size(source, called, max_pixels)
            return _decoded(source, called)
        if isinstance(source, os.PathLike):
            source = Path(source)
            return _read(source, name or shortened(str(source)), max_pixels)
        if isinstance(source, bytes | bytearray | memoryview):
            return _read(io.BytesIO(source), name or f"an image of {len(source)} bytes", max_pixels)
    raise ValueError(f"{name or 'an image'} is {type(source).__name__}; a path, the bytes of a file or a PIL image is needed")


def shortened(text: str, most: int = 200) -> str:
    """A name for a message: of a longer one the start and the end."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def digest(image: Image.Image) -> bytes:
    """Of an image's size and RGB values: equal pictures have equal ones, wherever they are from."""
    return hashlib.sha256(f"{image.size} ".encode() + image.convert("RGB").tobytes()).digest()


def pad_to_square(image: Image.Image, background: tuple[int, int, int] = CLIP_MEAN) -> Image.Image:
    """The image centred on a square of its longer side; an odd pixel goes below or to the right, as in LLaVA-1.5."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _read(file: Path | io.BytesIO, name: str, max_pixels: int) -> Image.Image:
    try:
        opened = Image.open(file, formats=FORMATS)
    except FileNotFoundError:
        raise ValueError(f"there is no image file {name}") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{name} unpacks to far more than {max_pixels} pixels, the most an image may have") from None
    except UnidentifiedImageError:
        size = file.stat().st_size if isinstance(file, Path) else len(file.getvalue())
        what = f"no image of a format we read: {', '.join(FORMATS)}" if size else "an empty file, no image"
        raise ValueError(f"{name} is {what}") from None
    except DAMAGE as error:
        raise ValueError(f"{name} cannot be read as an image ({first_line(error)})") from None
    with opened:
        _check_size(opened, name, max_pixels)
        return _decoded(opened, name)


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    """Before anything is unpacked: a file of a few kilobytes can claim gigabytes of pixels."""
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"{name} has no pixels: it is {width} x {height}")
    if width * height > max_pixels:
        raise ValueError(f"{name} has {width} x {height} pixels; at most {max_pixels} are unpacked, so scale it down first")


def _decoded(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
    except DAMAGE as error:
        raise ValueError(f"{name} is damaged or cut short ({first_line(error)})") from None
    with suppress(*DAMAGE):  # damaged metadata do not spoil a picture
        if image.getexif().get(0x0112, 1) != 1:
            image = ImageOps.exif_transpose(image)
    return _rgb(image, name)


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I"):
        image = image.convert("I")
        low, high = image.getextrema()
        if low < 0 or high > 65535:  # type: ignore[operator]
            raise ValueError(f"{name} holds whole numbers from {low} to {high}, whose white is unknown; save it with 8 or 16 bits")
        grey = image.point(TO_8_BIT, "L")
        if isinstance(key := image.info.get("transparency"), int) and 0 <= key <= 65535:  # of a 16-bit PNG: this value is no ink
            grey.paste(255, mask=image.point([255 * (value == key) for value in range(65536)], "L"))
        return grey.convert("RGB")
    if image.mode == "F":
        raise ValueError(f"{name} holds fractions, whose white is unknown; save it with 8 or 16 bits per channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
