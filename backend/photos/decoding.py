"""Bytes of an image file → Photo: orientation, colour, depth and transparency as the annotator's browser shows them.

Knows Pillow. Knows neither where the bytes come from nor Label Studio. What is read was compared with Chromium, pixel
by pixel; tests/image_kinds.py holds a file of each kind.

What is read, whatever the file's suffix and content type say:
JPEG, MPO       baseline, progressive, gray, CMYK, any sampling; of MPO the first view
PNG             1 to 16 bits, palette, interlaced; of an animation the first frame
GIF, WebP, AVIF of an animation the first frame
BMP             1 to 32 bits, run lengths, all versions; TIFF, which browsers do not show
with faults     metadata that is damaged or over 1 MB, wrong checksums, bytes after the end, a missing end marker; JPEG,
                PNG and BMP of which up to 5 % of the rows are missing: the last row that is there is repeated

What is refused, with the reason:
cut files       JPEG, PNG and BMP of which more is missing, any cut GIF, WebP or AVIF; Chromium shows a part of some
other formats   SVG, icons, HEIC, JPEG XL, JPEG 2000, PDF and the rest; no decoder but those of FORMATS is reached
rare BMP        bit masks of other layouts than Pillow's, 2 bits, run lengths with jumps

What is made of it:
orientation     EXIF's is applied where Chromium does so, which is everywhere but in WebP
transparency    laid on white, the background of packshots; a BMP whose alpha is empty is taken as opaque
16 bits         the full range is scaled to 8 bits (never clipped)
32 bits, float  the image's own range is scaled to 8 bits: there is no other convention
colour          profiles and gamma are not applied: colours shift a little, edges do not
"""

from __future__ import annotations

import io
import re
import threading
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from backend.errors import PhotoDecodeError, PhotoTooLarge
from backend.photos.mending import Mended, check_missing, mended
from model.types import Photo

RAW_BYTES_PER_PIXEL = 5  # 8 bits of red, green, blue and alpha, and the filter bytes of narrow rows
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "MPO")
# What is worth a name of its own in the message that refuses it.
NOT_READ = tuple(
    (re.compile(signature, re.DOTALL), name)
    for signature, name in (
        (
            rb"(\xef\xbb\xbf)?\s*((<\?xml|<!--|<!DOCTYPE svg).{0,4000})?<svg",
            "SVG, a drawing without pixels; export it as PNG",
        ),
        (rb".{4}ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", "HEIC, which browsers do not show either; export it as JPEG"),
        (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "JPEG XL; export it as JPEG"),
        (rb"\xff\x4f\xff\x51|\x00\x00\x00\x0cjP  ", "JPEG 2000; export it as JPEG"),
        (rb"\x00\x00[\x01\x02]\x00[^\x00]\x00", "an icon; export it as PNG"),
        (rb"%PDF-", "PDF; export its photos as JPEG"),
    )
)
EXIF_ORIENTATION = 0x0112
_PILLOW_LIMIT = threading.Lock()
# What brings an image of each EXIF orientation upright (EXIF 2.32, 4.6.4 A).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_photo(content: bytes, *, max_pixels: int, content_type: str = "") -> Photo:
    """The photo in `content`. Raises PhotoTooLarge, and PhotoDecodeError for what is not read.

    content_type: as its server named it, for messages only; empty when unknown.
    max_pixels: largest width × height, judged by the header before anything is decoded.
    """
    kind = f" of {content_type[:60]!r}" if content_type else ""
    if not content:
        raise PhotoDecodeError(f"expected an image, got 0 bytes{kind}")
    _raise_pillow_limit(max_pixels)
    try:
        return _decode(Mended(content=content), max_pixels, kind)
    except PhotoDecodeError as error:
        refused = error
    attempts = mended(content, max_raw_bytes=RAW_BYTES_PER_PIXEL * max_pixels)
    while (attempt := next(attempts, None)) is not None:
        try:
            return _decode(attempt, max_pixels, kind)
        except PhotoDecodeError as error:
            refused = error
    raise refused


def _decode(file: Mended, max_pixels: int, kind: str) -> Photo:
    image = _opened(file.content, max_pixels, kind)
    try:
        orientation = _orientation(image)
        if getattr(image, "default_image", False):  # of an animated PNG, for programs that cannot show animations
            image.seek(1)
        if file.other_end is not None:
            _fill_missing_rows(image, _opened(file.other_end, max_pixels, kind))
        rgb = _rgb(image)
        if orientation in UPRIGHT:
            rgb = rgb.transpose(UPRIGHT[orientation])
        return Photo(pixels=np.asarray(rgb))
    except (MemoryError, PhotoDecodeError):
        raise
    except Exception as error:  # damaged data make plugins raise nearly anything
        raise PhotoDecodeError(f"expected a whole {image.format} image, got a damaged one: {error}") from None


def _opened(content: bytes, max_pixels: int, kind: str) -> Image.Image:
    """The image with its header read and judged, its pixels not decoded yet."""
    try:
        image = Image.open(io.BytesIO(content), formats=_formats())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PhotoTooLarge(f"expected at most {max_pixels:,} pixels, got more: {error}") from None
    except MemoryError:
        raise
    except Exception:  # as above: OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        got = next((name for signature, name in NOT_READ if signature.match(content)), None)
        if got is None:
            got = f"{len(content):,} bytes{kind} that begin with {content[:12]!r}"
        raise PhotoDecodeError(f"expected a {', '.join(_formats())} image, got {got}") from None
    width, height = image.size
    if width * height > max_pixels:
        raise PhotoTooLarge(f"expected at most {max_pixels:,} pixels, got {width} x {height}")
    return image


def _fill_missing_rows(image: Image.Image, other: Image.Image) -> None:
    """Repeats the last row that is there in those that are missing, which are those where the two differ."""
    differ = (np.asarray(image) != np.asarray(other)).reshape(image.height, -1).any(1)
    if differ.any():
        first = int(differ.argmax())
        check_missing(image.height - first, image.height)
        row = image.crop((0, first - 1, image.width, first))
        image.paste(row.resize((image.width, image.height - first)), (0, first))


def _raise_pillow_limit(max_pixels: int) -> None:
    """Lets Pillow open images of up to `max_pixels` without its own warning. Process-wide; never lowers the limit."""
    with _PILLOW_LIMIT:
        if Image.MAX_IMAGE_PIXELS is not None:
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow has. All other decoders stay out of reach of what strangers upload."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 when there is none that can be read.

    Read from the EXIF block only, as browsers do: `getexif` would also take it from XMP. Chromium shows WebP as it is
    stored, whatever orientation its EXIF block has. Pillow turns TIFF by itself.
    """
    if image.format == "WEBP":
        return 1
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif") or b"")
        return int(exif.get(EXIF_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block is no reason to lose the photo
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _gray((np.asarray(image).astype(np.uint32) + 128) // 257)
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        low, high = values.min(), values.max()
        return _gray((values - low) * (255 / (high - low) if high > low else 0))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if image.format == "BMP" and rgba.getchannel("A").getextrema() == (0, 0):
            return rgba.convert("RGB")  # by a program that left alpha empty
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _gray(values: npt.NDArray[np.generic]) -> Image.Image:
    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")
