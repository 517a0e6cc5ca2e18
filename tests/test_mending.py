"""Odd and damaged image files: what Chromium shows is read, with the same pixels; what lacks too much is refused."""

from __future__ import annotations

import base64
import zlib

import image_kinds
import numpy as np
import pytest
from image_kinds import AS_IN_CHROMIUM, BETTER_THAN_CHROMIUM, PICTURE, REFUSED, png, saved, with_segment

from backend.errors import PhotoDecodeError, PhotoError
from backend.photos.decoding import decode_photo
from backend.photos.mending import MISSING_SHARE

_DRAW = """async content => {
    const image = new Image();
    image.src = `data:image/jpeg;base64,${content}`;
    try { await image.decode(); } catch { return null; }
    const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight).getContext('2d');
    canvas.fillStyle = 'white';
    canvas.fillRect(0, 0, image.naturalWidth, image.naturalHeight);
    canvas.drawImage(image, 0, 0);
    const pixels = canvas.getImageData(0, 0, image.naturalWidth, image.naturalHeight).data;
    let text = '';
    for (let i = 0; i < pixels.length; i += 8192) text += String.fromCharCode(...pixels.subarray(i, i + 8192));
    return [image.naturalWidth, image.naturalHeight, btoa(text)];
}"""


def decoded(content: bytes) -> np.ndarray:
    return decode_photo(content, max_pixels=1_000_000).pixels.astype(int)


def test_what_chromium_shows_is_read_with_the_same_pixels(chromium: str) -> None:
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page()
        drawn = {
            name: page.evaluate(_DRAW, base64.b64encode(content).decode()) for name, content in AS_IN_CHROMIUM.items()
        }
        browser.close()
    for name, answer in drawn.items():
        assert answer is not None, f"{name}: Chromium does not show it"
        width, height, text = answer
        pixels = np.frombuffer(base64.b64decode(text), np.uint8).reshape(height, width, 4)[..., :3]
        ours = decoded(AS_IN_CHROMIUM[name])
        assert ours.shape == pixels.shape, name
        assert np.abs(ours - pixels).mean() < 2, name


@pytest.mark.parametrize("name", AS_IN_CHROMIUM)
def test_what_a_browser_shows_is_read(name: str) -> None:
    assert sorted(decoded(AS_IN_CHROMIUM[name]).shape) in ([3, 96, 128], [3, 640, 960])


@pytest.mark.parametrize("name", BETTER_THAN_CHROMIUM)
def test_what_lacks_only_its_end_is_read_and_the_end_repeats_the_last_row(name: str) -> None:
    content, whole = BETTER_THAN_CHROMIUM[name]
    pixels, expected = decoded(content), decoded(whole)
    if content.startswith(b"BM"):  # from the bottom up
        pixels, expected = pixels[::-1], expected[::-1]
    there = int(len(expected) * (1 - MISSING_SHARE))
    np.testing.assert_array_equal(pixels[:there], expected[:there])
    differ = (pixels != expected).any(axis=(1, 2))
    if differ.any():
        after = int(differ.argmax()) + 2  # the row before the end may be there in part
        assert (pixels[after:] == pixels[after - 1]).all()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_the_reason(name: str) -> None:
    content, words = REFUSED[name]
    with pytest.raises(PhotoDecodeError, match=words):
        decoded(content)


def test_a_photo_that_is_turned_is_filled_where_its_file_ends() -> None:
    turned = saved(image_kinds.LARGE, "JPEG", quality=90, exif=image_kinds.TURNED.tobytes())
    pixels, expected = decoded(turned[: len(turned) * 99 // 100]), decoded(turned)
    np.testing.assert_array_equal(pixels[:, 60:], expected[:, 60:])
    assert (pixels[:, 0] == pixels[:, 10]).all()  # the bottom of the file is on the left


@pytest.mark.parametrize(
    "content",
    [
        png([(b"IHDR", b"\xff\xff\xff\xff" * 2 + b"\x08\x02\x00\x00\x00"), (b"IDAT", b"")], wrong=[b"IHDR"]),
        png([(b"IHDR", b"\x00\x00\x00\x00\xff\xff\xff\xff\x08\x02\x00\x00\x00"), (b"IDAT", b"")], wrong=[b"IHDR"]),
        png([(b"IHDR", b"\x00\x00\x00\x09" * 2 + b"\x08\x09\x00\x00\x00"), (b"IDAT", b"")], wrong=[b"IHDR"]),
        png([(b"IHDR", b"\x00\x00\x00\x09" * 2 + b"\x08\x02\x00\x00\x00"), (b"IDAT", zlib.compress(bytes(10**8)))]),
        png([(b"IDAT", b"")]),
        b"\xff\xd8" + b"\xff" * 1_000_000,
        b"\xff\xd8" + b"\xff\xe1\x00\x02" * 100_000,
        b"\xff\xd8\xff\xda\x00\x00",
        b"BM" + b"\xff" * 200,
        b"BM" + bytes(200),
    ],
)
def test_headers_that_lie_cost_neither_time_nor_memory(content: bytes) -> None:
    try:
        decode_photo(content, max_pixels=1000)
    except PhotoError:
        return
    assert decode_photo(content, max_pixels=1000).pixels.shape == (9, 9, 3)


def test_settings_of_pillow_that_hold_for_the_whole_process_stay() -> None:
    from PIL import ImageFile, PngImagePlugin

    before = ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    for content, _ in BETTER_THAN_CHROMIUM.values():
        decoded(content)
    decoded(AS_IN_CHROMIUM["PNG with 80 MB of text"])
    assert before == (
        ImageFile.LOAD_TRUNCATED_IMAGES,
        PngImagePlugin.MAX_TEXT_CHUNK,
        PngImagePlugin.MAX_TEXT_MEMORY,
    )


def test_metadata_that_says_how_to_decode_is_kept_when_a_jpeg_is_mended() -> None:
    cmyk = saved(PICTURE.convert("CMYK"), "JPEG", quality=95)
    np.testing.assert_array_equal(decoded(with_segment(0xE2, b"MPF\x00MM", jpeg=cmyk)), decoded(cmyk))
    rgb = saved(PICTURE, "JPEG", keep_rgb=True, quality=95)
    np.testing.assert_array_equal(decoded(with_segment(0xE2, b"MPF\x00MM", jpeg=rgb)), decoded(rgb))
