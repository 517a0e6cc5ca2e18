"""Bytes of an image file → Photo: orientation, colour, depth and transparency as the annotator's browser shows them.

Knows Pillow. Knows neither where the bytes come from nor Label Studio.

What is made of the kinds of images:
orientation     EXIF's is applied, so that boxes fit what the browser shows
transparency    laid on white, the background of packshots
16 bits         the full range is scaled to 8 bits (never clipped)
32 bits, float  the image's own range is scaled to 8 bits: there is no other convention
animation       the first frame
CMYK            converted without colour profiles: colours shift a little, edges do not
"""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from backend.errors import PhotoDecodeError, PhotoTooLarge
from model.types import Photo

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "MPO")
EXIF_ORIENTATION = 0x0112
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


def raise_pillow_limit(max_pixels: int) -> None:
    """Lets Pillow open images of up to `max_pixels` without its own warning. Process-wide; never lowers the limit."""
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)


def decode_photo(content: bytes, *, max_pixels: int, content_type: str = "") -> Photo:
    """The photo in `content`.

    content_type: as its server named it, for messages; empty when unknown.
    max_pixels: largest width × height, judged by the header before anything is decoded.
    Raises PhotoTooLarge, and PhotoDecodeError for anything that is not one whole image of FORMATS.
    """
    kind = f" of {content_type[:60]!r}" if content_type else ""
    if not content:
        raise PhotoDecodeError(f"expected an image, got 0 bytes{kind}")
    try:
        image = Image.open(io.BytesIO(content), formats=_formats())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PhotoTooLarge(f"expected at most {max_pixels:,} pixels, got more: {error}") from None
    except MemoryError:
        raise
    except Exception:  # damaged headers make plugins raise nearly anything
        raise PhotoDecodeError(
            f"expected a {', '.join(_formats())} image, got {len(content):,} bytes{kind} "
            f"that begin with {content[:12]!r}"
        ) from None
    width, height = image.size
    if width * height > max_pixels:
        raise PhotoTooLarge(f"expected at most {max_pixels:,} pixels, got {width} x {height}")
    try:
        orientation = _orientation(image)
        rgb = _rgb(image)
        if orientation in UPRIGHT:
            rgb = rgb.transpose(UPRIGHT[orientation])
        return Photo(pixels=np.asarray(rgb))
    except MemoryError:
        raise
    except Exception as error:  # as above: OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise PhotoDecodeError(f"expected a whole {image.format} image, got a damaged one: {error}") from None


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow has. All other decoders stay out of reach of what strangers upload."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 when there is none that can be read.

    Read from the EXIF block only, as browsers do: `getexif` would also take it from XMP. Pillow turns TIFF by itself.
    """
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
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _gray(values: npt.NDArray[np.generic]) -> Image.Image:
    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")
