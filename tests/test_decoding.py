"""Image files of many kinds become the pixels that a browser would show, or one clear line."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from backend.errors import PhotoDecodeError, PhotoError, PhotoTooLarge
from backend.photos.decoding import decode_photo

Pixels = npt.NDArray[np.uint8]


def decoded(content: bytes, *, content_type: str = "", max_pixels: int = 1_000_000) -> Pixels:
    return decode_photo(content, content_type=content_type, max_pixels=max_pixels).pixels


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def corners(width: int = 24, height: int = 16) -> Pixels:
    """Red, green, blue and yellow quarters: no two orientations look alike."""
    pixels = np.zeros((height, width, 3), np.uint8)
    y, x = height // 2, width // 2
    pixels[:y, :x], pixels[:y, x:], pixels[y:, :x], pixels[y:, x:] = (
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 0),
    )
    return pixels


# What to do with the stored rows and columns, by EXIF's own words on where row 0 and column 0 belong.
UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored, 1),
    9: lambda stored: stored,
}


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied_to_the_pixels(orientation: int) -> None:
    content = saved(Image.fromarray(corners()), "PNG", exif=exif(orientation))
    np.testing.assert_array_equal(decoded(content), UPRIGHT[orientation](corners()))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"exif": exif(6), "quality": 95, "subsampling": 0}),
        ("AVIF", {"exif": exif(6), "quality": 95, "subsampling": "4:4:4"}),
        ("TIFF", {"tiffinfo": {0x0112: 6}}),
        ("TIFF", {"tiffinfo": {0x0112: 6}, "compression": "tiff_deflate"}),
    ],
)
def test_every_format_with_an_orientation_comes_upright_once(kind: str, options: dict[str, Any]) -> None:
    pixels = decoded(saved(Image.fromarray(corners()), kind, **options)).astype(int)
    expected = np.rot90(corners(), -1).astype(int)
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).mean() < 12


def test_an_orientation_that_browsers_do_not_read_is_not_applied() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for metadata in ({"xmp": xmp}, {"exif": exif(6)}):  # Chromium shows WebP as it is stored
        content = saved(Image.fromarray(corners()), "WEBP", lossless=True, **metadata)
        np.testing.assert_array_equal(decoded(content), corners())


def test_a_damaged_exif_block_costs_nothing_but_the_orientation() -> None:
    content = saved(Image.fromarray(corners()), "PNG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xffgarbage")
    np.testing.assert_array_equal(decoded(content), corners())


def test_cmyk_gets_the_colours_it_means() -> None:
    content = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)  # magenta and yellow ink: red
    red, green, blue = decoded(content)[8, 8]
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_sixteen_bits_are_scaled_and_not_clipped(byte_order: str) -> None:
    levels = np.array([[0, 257, 128 * 257, 200 * 257, 65535]], f"{byte_order}u2")
    mode = "I;16" if byte_order == "<" else "I;16B"
    image = Image.frombytes(mode, (5, 1), levels.tobytes())
    kinds = ["PNG", "TIFF"] if byte_order == "<" else ["TIFF"]
    for kind in kinds:
        assert decoded(saved(image, kind))[0].tolist() == [[v, v, v] for v in (0, 1, 128, 200, 255)]


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0.0, 0.5, 1.0]], np.float32),
        np.array([[-3.0, 0.0, 3.0]], np.float32),
        np.array([[0, 50_000, 100_000]], np.int32),
    ],
)
def test_images_without_a_fixed_range_use_their_own(values: npt.NDArray[Any]) -> None:
    assert decoded(saved(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 128, 255]


def test_float_pixels_that_are_no_numbers_and_flat_images_do_not_break_the_photo() -> None:
    odd = np.array([[np.nan, np.inf, 1.0]], np.float32)
    assert decoded(saved(Image.fromarray(odd), "TIFF"))[0, :, 0].tolist() == [0, 0, 255]
    assert decoded(saved(Image.fromarray(np.full((1, 2), 7.0, np.float32)), "TIFF")).max() == 0


def palette_image() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    return image


RED, GREEN, BLUE, WHITE, BLACK = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]


@pytest.mark.parametrize(
    ("content", "first_row"),
    [
        (saved(Image.new("1", (2, 1), 1), "PNG"), [WHITE, WHITE]),
        (saved(Image.new("L", (2, 1), 9), "PNG"), [[9, 9, 9]] * 2),
        (saved(Image.new("LA", (1, 1), (0, 0)), "PNG"), [WHITE]),
        (saved(Image.new("RGBA", (1, 1), (255, 0, 0, 255)), "PNG"), [RED]),
        (saved(Image.new("RGBA", (1, 1), (255, 0, 0, 0)), "PNG"), [WHITE]),
        (saved(Image.new("RGBA", (1, 1), (255, 0, 0, 51)), "PNG"), [[255, 204, 204]]),
        (saved(Image.new("RGBA", (1, 1), (0, 0, 255, 0)), "WEBP", lossless=True, exact=True), [WHITE]),
        (saved(palette_image(), "PNG"), [RED, GREEN, BLUE]),
        (saved(palette_image(), "PNG", transparency=1), [RED, WHITE, BLUE]),
        (saved(palette_image(), "PNG", transparency=b"\xff\xff\x00"), [RED, GREEN, WHITE]),
        (saved(palette_image(), "GIF", transparency=2), [RED, GREEN, WHITE]),
        (saved(palette_image(), "BMP"), [RED, GREEN, BLUE]),
        (saved(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", transparency=(1, 2, 3)), [WHITE]),
        (saved(Image.new("RGB", (1, 1)), "TIFF"), [BLACK]),
    ],
)
def test_palettes_gray_and_transparency_become_rgb_on_white(content: bytes, first_row: list[list[int]]) -> None:
    assert decoded(content)[0].tolist() == first_row


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = decoded(saved(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert (pixels == RED).all()


def test_a_stereo_photo_is_its_first_view() -> None:
    views = [Image.new("RGB", (16, 16), colour) for colour in ("white", "black")]
    assert decoded(saved(views[0], "MPO", save_all=True, append_images=views[1:])).min() > 250


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\x00" * 99))
        + chunk(b"IEND", b"")
    )


NOISE = np.random.default_rng(7).integers(0, 256, (64, 64, 3), np.uint8)
JPEG = saved(Image.fromarray(NOISE), "JPEG")


@pytest.mark.parametrize(
    ("content", "content_type", "error", "words"),
    [
        (b"", "", PhotoDecodeError, "got 0 bytes"),
        (b"", "image/jpeg", PhotoDecodeError, "got 0 bytes of 'image/jpeg'"),
        (b"\x00" * 100, "", PhotoDecodeError, "got 100 bytes that begin with"),
        (
            b"<!DOCTYPE html><p>Log in",
            "text/html",
            PhotoDecodeError,
            "24 bytes of 'text/html' that begin with b'<!DOCTYPE ht",
        ),
        (b'{"detail": "no"}', "application/json", PhotoDecodeError, "of 'application/json'"),
        (JPEG[:2], "", PhotoDecodeError, "expected a JPEG, PNG"),
        (JPEG[: len(JPEG) // 2], "", PhotoDecodeError, "a whole image, got one that ends early: 75% of it is missing"),
        (saved(Image.fromarray(NOISE), "PNG")[:-2000], "", PhotoDecodeError, "ends early: 1.% of it is missing"),
        (saved(Image.fromarray(NOISE), "GIF")[:200], "", PhotoDecodeError, "expected a"),
        (saved(Image.fromarray(NOISE), "WEBP")[:200], "", PhotoDecodeError, "expected a"),
        (saved(Image.fromarray(NOISE), "TIFF")[:5000], "", PhotoDecodeError, "expected a"),
        (saved(Image.fromarray(NOISE), "PPM"), "", PhotoDecodeError, "expected a JPEG, PNG"),
        (saved(Image.fromarray(NOISE), "PCX"), "", PhotoDecodeError, "expected a JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "", PhotoDecodeError, "expected a JPEG, PNG"),
        (png_that_claims(60_000, 60_000), "", PhotoTooLarge, "at most 4,096 pixels, got more"),
        (png_that_claims(10_000, 10_000), "", PhotoTooLarge, "at most 4,096 pixels, got "),
        (png_that_claims(65, 64), "", PhotoTooLarge, "at most 4,096 pixels, got 65 x 64"),
        (png_that_claims(64, 64), "", PhotoDecodeError, "ends early: 99% of it is missing"),
    ],
)
def test_what_is_no_photo_is_refused_with_one_line(
    content: bytes, content_type: str, error: type[PhotoError], words: str
) -> None:
    with pytest.raises(PhotoError, match=words) as caught:
        decoded(content, content_type=content_type, max_pixels=4096)
    assert type(caught.value) is error
    assert str(caught.value).startswith("expected ")
    assert "\n" not in str(caught.value)


def test_any_cut_or_flipped_file_gives_pixels_or_one_clear_error() -> None:
    random = np.random.default_rng(3)
    small = Image.fromarray(NOISE[:16, :16])
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"):
        whole = saved(small, kind, **({"exif": exif(6)} if kind in ("JPEG", "PNG", "WEBP") else {}))
        for _ in range(60):
            content = bytearray(whole)
            for place in random.integers(0, len(whole), 3):
                content[place] = random.integers(0, 256)
            cut = int(random.integers(1, len(whole) + 1))
            with suppress(PhotoError):  # anything else fails the test
                assert decoded(bytes(content[:cut]), max_pixels=10_000).size <= 30_000
