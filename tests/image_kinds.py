"""Image files of the kinds that the docstring of backend.photos.decoding lists, most of them odd or damaged."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Chunks = Sequence[tuple[bytes, bytes]]


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _picture(width: int, height: int) -> Image.Image:
    """A slope of colours with two boxes on it: no two rows are alike."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=-1).astype(np.uint8)
    pixels[20:40, 30:60] = (250, 20, 20)
    pixels[60:90, 80:120] = (10, 200, 40)
    return Image.fromarray(pixels)


PICTURE = _picture(128, 96)
LARGE = _picture(640, 960)  # of which a row of JPEG's blocks is less than 2 %
TURNED = Image.Exif()
TURNED[0x0112] = 6


# -- PNG -------------------------------------------------------------------------------------------------------------


def png_chunk(name: bytes, data: bytes, *, right: bool = True) -> bytes:
    checksum = zlib.crc32(name + data) ^ (0 if right else 1)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def png(chunks: Chunks, *, wrong: Sequence[bytes] = ()) -> bytes:
    """wrong: names of the chunks whose checksums are."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(name, data, right=name not in wrong) for name, data in chunks)


def png_chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at < len(content):
        length = int.from_bytes(content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


PNG = saved(PICTURE, "PNG")
_IHDR, *_REST = png_chunks(PNG)
_IDAT = b"".join(data for name, data in _REST if name == b"IDAT")
_EXIF = next(chunk for chunk in png_chunks(saved(PICTURE, "PNG", exif=TURNED.tobytes())) if chunk[0] == b"eXIf")
_LONG = zlib.compress(b"a" * 1_500_000)
_END = (b"IEND", b"")


def with_chunks(*extra: tuple[bytes, bytes], wrong: Sequence[bytes] = ()) -> bytes:
    return png([_IHDR, *extra, *_REST], wrong=wrong)


def _interlaced(image: Image.Image) -> bytes:
    pixels, rows = np.asarray(image), b""
    for x, y, dx, dy in (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ):
        rows += b"".join(b"\x00" + row.tobytes() for row in pixels[y::dy, x::dx])
    header = struct.pack(">IIBBBBB", *image.size, 8, 2, 0, 0, 1)
    return png([(b"IHDR", header), (b"IDAT", zlib.compress(rows)), _END])


def _deep(colour_type: int, channels: int) -> bytes:
    pixels = np.dstack([np.asarray(PICTURE), np.full((96, 128), 255)])[..., -channels:].astype(">u2") * 257
    header = struct.pack(">IIBBBBB", 128, 96, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in pixels)
    return png([(b"IHDR", header), (b"IDAT", zlib.compress(rows)), _END])


# -- JPEG ------------------------------------------------------------------------------------------------------------

JPEG = saved(PICTURE, "JPEG", quality=92)
LARGE_JPEG = saved(LARGE, "JPEG", quality=90)
LARGE_PROGRESSIVE = saved(LARGE, "JPEG", quality=90, progressive=True)
LARGE_PNG = saved(LARGE, "PNG")


def with_segment(marker: int, data: bytes, *, jpeg: bytes = JPEG) -> bytes:
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data + jpeg[2:]


def share(content: bytes, part: float) -> bytes:
    return content[: int(len(content) * part)]


# -- BMP -------------------------------------------------------------------------------------------------------------


def bmp(
    pixels: npt.NDArray[Any], bits: int, *, masks: bytes = b"", header_size: int = 40, compression: int = 0
) -> bytes:
    """pixels: rows from the bottom up."""
    data = pixels.tobytes()
    header = struct.pack("<IiiHHIIiiII", header_size, 128, 96, 1, bits, compression, len(data), 2835, 2835, 0, 0)
    header = (header + masks).ljust(header_size, b"\x00")
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(data), 0, 0, 14 + len(header)) + header + data


_BGR = np.ascontiguousarray(np.asarray(PICTURE)[::-1, :, ::-1])
_BGRA = np.dstack([_BGR, np.zeros((96, 128), np.uint8)])
_MASKS = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
EMPTY_ALPHA = bmp(_BGRA, 32, masks=_MASKS, header_size=124, compression=3)
_RGB555 = sum((_BGR[..., c].astype(np.uint16) >> 3) << 5 * c for c in range(3)).astype("<u2")  # type: ignore[union-attr]


# -- the kinds -------------------------------------------------------------------------------------------------------

# Read, and Chromium shows the same pixels.
AS_IN_CHROMIUM: dict[str, bytes] = {
    "JPEG": JPEG,
    "JPEG, progressive": saved(PICTURE, "JPEG", progressive=True),
    "JPEG, gray": saved(PICTURE.convert("L"), "JPEG"),
    "JPEG, CMYK": saved(PICTURE.convert("CMYK"), "JPEG"),
    "JPEG, RGB": saved(PICTURE, "JPEG", keep_rgb=True),
    "JPEG, 4:2:2": saved(PICTURE, "JPEG", subsampling=1),
    "JPEG, arithmetic coding in name only": JPEG.replace(b"\xff\xc0", b"\xff\xc9", 1),
    "JPEG turned by EXIF": saved(PICTURE, "JPEG", exif=TURNED.tobytes()),
    "JPEG with bytes after it": JPEG + b"more" * 99,
    "JPEG with bytes between segments": JPEG[:20] + b"\x01\x02\x03" + JPEG[20:],
    "JPEG with damaged EXIF": with_segment(0xE1, b"Exif\x00\x00" + b"\xff" * 22),
    "JPEG with a short JFIF": JPEG[:2] + b"\xff\xe0\x00\x07JFIF\x00" + JPEG[20:],
    "JPEG with a damaged list of views": with_segment(0xE2, b"MPF\x00" + b"\xff" * 14),
    "JPEG with a short list of views": with_segment(0xE2, b"MPF\x00MM"),
    "JPEG with a short Adobe segment": with_segment(0xEE, b"Adobe\x00"),
    "JPEG with a damaged colour profile": with_segment(0xE2, b"ICC_PROFILE\x00\x01\x01xxxx"),
    "JPEG with damaged data": JPEG[:1600] + bytes([JPEG[1600] ^ 0x55]) + JPEG[1601:],
    "JPEG, progressive, without its end marker": LARGE_PROGRESSIVE[:-2],
    "MPO": saved(PICTURE, "MPO", save_all=True, append_images=[PICTURE.rotate(180)]),
    "MPO whose second view is cut": share(saved(PICTURE, "MPO", save_all=True, append_images=[PICTURE]), 0.8),
    "PNG": PNG,
    "PNG, interlaced": _interlaced(PICTURE),
    "PNG, 16 bits": _deep(2, 3),
    "PNG, 16 bits with alpha": _deep(6, 4),
    "PNG, animated": saved(PICTURE, "PNG", save_all=True, append_images=[PICTURE.rotate(180)]),
    "PNG, animated, with another picture for old programs": saved(
        PICTURE, "PNG", save_all=True, default_image=True, append_images=[PICTURE.rotate(180)]
    ),
    "PNG turned by EXIF": saved(PICTURE, "PNG", exif=TURNED.tobytes()),
    "PNG turned by EXIF, with a wrong checksum": with_chunks(_EXIF, (b"tEXt", b"a\x00b"), wrong=[b"tEXt"]),
    "PNG with compressed text of over 1 MB": with_chunks((b"zTXt", b"a\x00\x00" + _LONG)),
    "PNG with international text of over 1 MB": with_chunks((b"iTXt", b"a\x00\x01\x00\x00\x00" + _LONG)),
    "PNG with a colour profile of over 1 MB": with_chunks((b"iCCP", b"a\x00\x00" + _LONG)),
    "PNG with 80 MB of text": with_chunks(*[(b"zTXt", b"a\x00\x00" + _LONG)] * 60),
    "PNG with a wrong checksum of text": with_chunks((b"tEXt", b"a\x00b"), wrong=[b"tEXt"]),
    "PNG with a wrong checksum of an unknown chunk": with_chunks((b"abCd", b""), wrong=[b"abCd"]),
    "PNG with a wrong checksum of pixels": with_chunks(wrong=[b"IDAT"]),
    "PNG with a wrong checksum within its pixels": png([_IHDR, (b"IDAT", _IDAT[:-4] + bytes(4)), _END]),
    "PNG with short chunks": with_chunks((b"cHRM", b"a"), (b"acTL", b"a")),
    "PNG with a transparency of another size": with_chunks((b"tRNS", b"a")),
    "PNG without its end": PNG[:-12],
    "PNG with bytes after it": PNG + b"more" * 99,
    "GIF": saved(PICTURE.quantize(64), "GIF"),
    "GIF without its end": saved(PICTURE.quantize(64), "GIF")[:-1],
    "GIF, animated": saved(PICTURE.quantize(64), "GIF", save_all=True, append_images=[PICTURE.rotate(180)]),
    "WebP": saved(PICTURE, "WEBP"),
    "WebP, lossless": saved(PICTURE, "WEBP", lossless=True),
    "WebP, animated": saved(PICTURE, "WEBP", lossless=True, save_all=True, append_images=[PICTURE.rotate(180)]),
    "WebP with EXIF that turns": saved(PICTURE, "WEBP", exif=TURNED.tobytes()),
    "WebP with bytes after it": saved(PICTURE, "WEBP") + b"more" * 9,
    "AVIF": saved(PICTURE, "AVIF"),
    "AVIF turned": saved(PICTURE, "AVIF", exif=TURNED.tobytes()),
    "BMP": saved(PICTURE, "BMP"),
    "BMP, 32 bits": bmp(_BGRA, 32),
    "BMP, 16 bits": bmp(_RGB555, 16),
    "BMP, version 5, without alpha": bmp(_BGRA, 32, header_size=124),
    "BMP with bytes after it": saved(PICTURE, "BMP") + b"more" * 9,
}

LARGE_CMYK = saved(LARGE.convert("CMYK"), "JPEG", quality=90)
BMP = saved(PICTURE, "BMP")

# Read, as the second file is; Chromium shows all but the last rows, or nothing.
BETTER_THAN_CHROMIUM: dict[str, tuple[bytes, bytes]] = {
    "JPEG without its end marker": (LARGE_JPEG[:-2], LARGE_JPEG),
    "JPEG that lacks 1 % of its bytes": (share(LARGE_JPEG, 0.99), LARGE_JPEG),
    "JPEG, CMYK, that lacks 1 % of its bytes": (share(LARGE_CMYK, 0.99), LARGE_CMYK),
    "JPEG, progressive, that lacks 0.2 % of its bytes": (share(LARGE_PROGRESSIVE, 0.998), LARGE_PROGRESSIVE),
    "PNG that lacks 1 % of its bytes": (share(LARGE_PNG, 0.99), LARGE_PNG),
    "BMP that lacks 3 % of its bytes": (share(BMP, 0.97), BMP),
    "BMP with an empty alpha channel": (EMPTY_ALPHA, PNG),
    "PNG with a wrong checksum of its header": (with_chunks(wrong=[b"IHDR"]), PNG),
    "TIFF": (saved(PICTURE, "TIFF"), PNG),
}

_SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'

# Refused, with words of the reason.
REFUSED: dict[str, tuple[bytes, str]] = {
    "JPEG cut in half": (share(LARGE_JPEG, 0.5), "ends early: 5.% of it is missing"),
    "JPEG, progressive, cut in half": (share(LARGE_PROGRESSIVE, 0.5), "ends early: some of its scans are missing"),
    "JPEG, 12 bits": (JPEG.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c", 1), "expected a JPEG"),
    "JPEG, lossless": (JPEG.replace(b"\xff\xc0", b"\xff\xc3", 1), "expected a whole JPEG"),
    "JPEG with bytes before it": (b"\r\n" + JPEG, "expected a JPEG"),
    "PNG cut in half": (share(LARGE_PNG, 0.5), r"ends early: \d\d% of it is missing"),
    "PNG, interlaced, cut in half": (share(_interlaced(PICTURE), 0.5), "ends early: 50% of it is missing"),
    "GIF cut": (share(saved(PICTURE.quantize(64), "GIF"), 0.99), "expected a whole GIF"),
    "WebP cut": (share(saved(PICTURE, "WEBP"), 0.99), "expected a JPEG"),
    "AVIF cut": (share(saved(PICTURE, "AVIF"), 0.99), "expected a whole AVIF"),
    "BMP cut in half": (share(saved(PICTURE, "BMP"), 0.5), "ends early: 50% of it is missing"),
    "SVG": (_SVG, "got SVG"),
    "SVG with a header": (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- shelf -->\n' + _SVG, "got SVG"),
    "icon": (saved(PICTURE, "ICO"), "got an icon"),
    "HEIC": (b"\x00\x00\x00\x18ftypheic" + bytes(200), "got HEIC"),
    "JPEG XL": (b"\xff\x0a" + bytes(99), "got JPEG XL"),
    "JPEG 2000": (saved(PICTURE, "JPEG2000"), "got JPEG 2000"),
    "PDF": (saved(PICTURE, "PDF"), "got PDF"),
    "TGA": (saved(PICTURE, "TGA"), "got .* bytes that begin with"),
}
