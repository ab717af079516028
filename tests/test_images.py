"""Opening pictures: every colour mode comes out as upright RGB, and what is broken is named in one sentence."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffprune.io.image import FORMATS, open_image, pad_to_square

RAMP = np.add.outer(np.arange(12) * 20, np.arange(16) * 2).astype(np.uint8)  # [12 16], all rows and columns differ


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def off(expected: np.ndarray, image: Image.Image) -> int:
    """How far the worst channel of a picture is from a grey one, [12 16]."""
    assert image.mode == "RGB" and image.size == (16, 12)
    return int(np.abs(np.asarray(image).astype(int) - expected[..., None].astype(int)).max())


def test_every_source_gives_the_same_picture() -> None:
    drawn, path = Image.fromarray(RAMP), Path("ramp.png")
    drawn.save(path)
    data = path.read_bytes()
    kinds: list[Any] = [path, str(path), data, bytearray(data), drawn, {"bytes": data, "path": None}, {"path": "ramp.png"}]
    for source in [*kinds, {"bytes": data, "path": "elsewhere.png"}, Image.open(path)]:
        assert off(RAMP, open_image(source)) == 0


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    deep = RAMP.astype(np.uint16) * 257
    deep[0, 0], expected = 65535, RAMP.copy()
    expected[0, 0] = 255
    image = Image.fromarray(deep)
    assert off(expected, open_image(saved(image))) == 0
    assert off(expected, open_image(saved(image, "TIFF"))) == 0
    assert off(expected, open_image(saved(image, "PPM"))) == 0
    assert off(expected, open_image(image.convert("I"))) == 0
    assert open_image(Image.fromarray(np.array([[128]], np.uint16))).getpixel((0, 0)) == (0, 0, 0)
    assert open_image(Image.fromarray(np.array([[129]], np.uint16))).getpixel((0, 0)) == (1, 1, 1)


def test_colour_modes() -> None:
    assert off(RAMP, open_image(saved(Image.fromarray(RAMP).convert("CMYK"), "TIFF"))) <= 1
    assert off(RAMP, open_image(saved(Image.fromarray(RAMP).convert("CMYK"), "JPEG", quality=100, subsampling=0))) <= 4
    assert off(RAMP, open_image(saved(Image.fromarray(RAMP).convert("YCbCr"), "TIFF"))) <= 3
    bits = Image.fromarray(RAMP > 100)
    assert off(np.where(RAMP > 100, 255, 0), open_image(saved(bits))) == 0


def test_transparency_lies_on_white() -> None:
    colours = np.zeros((12, 16, 4), np.uint8)
    colours[..., 3] = RAMP
    assert off(255 - RAMP, open_image(saved(Image.fromarray(colours)))) <= 1
    assert off(255 - RAMP, open_image(saved(Image.fromarray(colours).convert("LA")))) <= 1
    palette = Image.new("P", (16, 12), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.paste(0, (0, 0, 8, 12))
    for kind in ("PNG", "GIF"):
        shown = open_image(saved(palette, kind, transparency=0))
        assert shown.getpixel((0, 0)) == (255, 255, 255) and shown.getpixel((15, 11)) == (10, 20, 30)
    assert open_image(saved(palette, "PNG", transparency=bytes([128, 255]))).getpixel((0, 0)) == (127, 127, 127)
    deep = RAMP.astype(np.uint16) * 257
    clear = np.where(np.equal(RAMP, RAMP[3, 5]), 255, RAMP)
    assert np.any(clear != RAMP) and off(clear, open_image(saved(Image.fromarray(deep), transparency=int(deep[3, 5])))) == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int) -> None:
    """Oracle: the transformations of the EXIF standard written with numpy, from the stored to the upright picture."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = {
        1: RAMP, 2: RAMP[:, ::-1], 3: RAMP[::-1, ::-1], 4: RAMP[::-1], 5: RAMP.T, 6: np.rot90(RAMP, -1),
        7: RAMP[::-1, ::-1].T, 8: np.rot90(RAMP, 1),
    }[orientation]  # fmt: skip
    found = np.asarray(open_image(saved(Image.fromarray(RAMP), exif=exif)))[..., 0]
    assert np.array_equal(found, upright)


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        red, _, blue = open_image(saved(frames[0], kind, save_all=True, append_images=frames[1:])).getpixel((1, 1))  # type: ignore[misc]
        assert red > 200 > 50 > blue, kind


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
def test_a_truncated_file_is_named(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    whole = saved(Image.fromarray(noise), kind)
    for share in (0.9, 0.5, 0.1):
        Path("cut.img").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match=r"cut\.img"):
            open_image("cut.img")


@pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow reads no AVIF")
def test_a_damaged_avif_is_named() -> None:
    """Its decoder raises what no other does."""
    whole = saved(Image.fromarray(RAMP), "AVIF")
    at = whole.index(b"iloc")
    Path("damaged.avif").write_bytes(whole[:at] + b"free" + whole[at + 4 :])
    with pytest.raises(ValueError, match=r"damaged\.avif"):
        open_image("damaged.avif")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (b"", "empty"),
        (b"not a picture", "no image of a format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of a format"),
        (Path("absent.png"), "no image file absent.png"),
        (Path("."), "cannot be read"),
        (None, "NoneType; a path"),
        ({"bytes": None, "path": None}, "NoneType; a path"),
        ({"bytes": b"\x89PNG\r\n\x1a\n", "path": "half.png"}, "half.png"),
        (bomb(60000, 60000), "more than 25000000"),
        (bomb(12000, 12000), "12000 x 12000"),
        (bomb(9000, 9000), "9000 x 9000"),
        (bomb(4000, 4000), "damaged or cut short"),
        (bomb(0, 5), "image"),
        (Image.new("RGB", (0, 4)), "no pixels: it is 0 x 4"),
        (Image.new("F", (2, 2)), "fractions"),
        (Image.fromarray(np.array([[-3]], np.int32)), "whole numbers from -3"),
    ],
)
def test_a_bad_picture_is_refused_in_one_sentence(source: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        open_image(source)
    assert "\n" not in str(refused.value)


def test_the_cap_and_the_name_are_the_callers() -> None:
    with pytest.raises(ValueError, match="row 7 has 16 x 12 pixels; at most 100"):
        open_image(saved(Image.fromarray(RAMP)), max_pixels=100, name="row 7")
    open_image(saved(Image.fromarray(RAMP)), max_pixels=192)


def test_damaged_metadata_do_not_spoil_a_picture() -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"
    assert off(RAMP, open_image(saved(Image.fromarray(RAMP).convert("RGB"), "JPEG", exif=exif, quality=100, subsampling=0))) <= 3


@pytest.mark.parametrize(("size", "corner"), [((4, 7), (1, 0)), ((7, 4), (0, 1)), ((5, 5), (0, 0)), ((1, 4), (1, 0))])
def test_padding_centres_on_the_mean_colour(size: tuple[int, int], corner: tuple[int, int]) -> None:
    shown = pad_to_square(Image.new("RGB", size, "red"))
    expected = np.empty((max(size), max(size), 3), np.uint8)
    expected[:] = (122, 116, 104)
    expected[corner[1] : corner[1] + size[1], corner[0] : corner[0] + size[0]] = (255, 0, 0)
    assert np.array_equal(np.asarray(shown), expected)
