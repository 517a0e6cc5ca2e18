"""Image files that Pillow refuses and browsers show, written anew so that Pillow reads them too.

Knows the byte layout of JPEG, PNG and BMP. Knows neither Pillow nor photos. Nothing here changes Pillow's own settings,
which hold for the whole process.

JPEG  metadata that cannot be parsed is left out; the end marker is added where it is missing
PNG   all chunks that do not bear on the pixels are left out, checksums are made anew, missing rows are added
BMP   missing rows are added
Added rows repeat the row before them. When more than MISSING_SHARE of the rows are missing, the file is refused: what
the annotator sees would have boxes where there is nothing.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from backend.errors import PhotoDecodeError

MISSING_SHARE = 0.05  # of a photo's rows

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_UP = b"\x02"  # PNG's filter that adds the row above
_INFLATED_AT_ONCE = 1 << 10  # bytes of compressed data: what a damaged place may cost

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_SOS, _APP0, _APP1, _APP14, _COM = 0xDA, 0xE0, 0xE1, 0xEE, 0xFE
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_MOST_SEGMENTS = 10_000
_SEGMENT = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")  # libjpeg reads on to the next one
_SEGMENT_IN_SCANS = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_FILLER = b"\x55" * 4096  # reads as pixels of some kind, and is enough for one block of each component


@dataclass(frozen=True, kw_only=True)
class Mended:
    """An image file that may be read. other_end: the same with other pixels where the data ends, if it ends too early:
    the first row in which the two differ is the first one that is missing."""

    content: bytes
    other_end: bytes | None = None


def mended(content: bytes, *, max_raw_bytes: int) -> Iterator[Mended]:
    """Ways to read a file that Pillow refuses, cheapest first; none for formats that are not known here.

    max_raw_bytes: of a PNG's pixels, more are not inflated. Raises PhotoDecodeError when too many rows are missing.
    """
    if content.startswith(PNG_SIGNATURE):
        yield from _png(content, max_raw_bytes)
    elif content.startswith(_SOI):
        yield from _jpeg(content)
    elif content.startswith(b"BM"):
        yield from _bmp(content)


def check_missing(missing: int, of: int) -> None:
    """Raises PhotoDecodeError when more than MISSING_SHARE is missing."""
    if missing > of * MISSING_SHARE:
        raise PhotoDecodeError(f"expected a whole image, got one that ends early: {missing / of:.0%} of it is missing")


# -- PNG -------------------------------------------------------------------------------------------------------------


def _png(content: bytes, max_raw_bytes: int) -> Iterator[Mended]:
    header, kept, data = None, [], bytearray()
    for name, chunk in _png_chunks(content):
        if name == b"IHDR":
            header = chunk
        elif name == b"IDAT":
            data += chunk
        elif name == b"PLTE" or name == b"eXIf" or (name == b"tRNS" and _is_transparency(header, chunk)):
            kept.append((name, chunk))
        elif name == b"IEND":
            break
    if header is None or len(header) != 13:
        return
    start = [(b"IHDR", header), *kept]
    yield Mended(content=_png_of(start, bytes(data)))
    parts = _png_parts(header)
    size = sum(stride * rows for stride, rows in parts)
    if not 0 < size <= max_raw_bytes:
        return
    raw = _inflated(bytes(data), size)
    check_missing(size - len(raw), size)
    there, added = 0, b""
    for stride, rows in parts:
        rows_there = 0 if added else min(rows, (len(raw) - there) // stride)
        there += stride * rows_there
        added += (_UP + bytes(stride - 1)) * (rows - rows_there)
    yield Mended(content=_png_of(start, zlib.compress(raw[:there] + added, 1)))


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = len(PNG_SIGNATURE)
    while at + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content, at)
        yield name, content[at + 8 : at + 8 + length]
        at += 12 + length


def _png_of(chunks: list[tuple[bytes, bytes]], data: bytes) -> bytes:
    whole = [*chunks, (b"IDAT", data), (b"IEND", b"")]
    return PNG_SIGNATURE + b"".join(
        struct.pack(">I", len(chunk)) + name + chunk + struct.pack(">I", zlib.crc32(name + chunk))
        for name, chunk in whole
    )


def _is_transparency(header: bytes | None, chunk: bytes) -> bool:
    colour_type = header[9] if header is not None and len(header) == 13 else None
    return len(chunk) == {0: 2, 2: 6}.get(colour_type or 0) if colour_type in (0, 2) else colour_type == 3


def _png_parts(header: bytes) -> list[tuple[int, int]]:
    """Of each pass: bytes of a row with its filter byte, and rows. One pass unless interlaced; none if not PNG's."""
    width, height, depth, colour_type, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    bits = depth * _PNG_CHANNELS.get(colour_type, 0)
    if not bits:
        return []
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    parts = []
    for x, y, dx, dy in passes:
        columns, rows = -((x - width) // dx), -((y - height) // dy)
        if columns > 0 and rows > 0:
            parts.append((1 + (columns * bits + 7) // 8, rows))
    return parts


def _inflated(data: bytes, size: int) -> bytes:
    """As much of zlib data as can be read, its checksum aside. size: at most so many bytes."""
    inflate, raw = zlib.decompressobj(-zlib.MAX_WBITS), bytearray()
    try:
        for start in range(2, len(data), _INFLATED_AT_ONCE):
            piece = data[start : start + _INFLATED_AT_ONCE]
            while piece and len(raw) < size and not inflate.eof:
                raw += inflate.decompress(piece, size - len(raw))
                piece = inflate.unconsumed_tail
    except zlib.error:
        pass  # what came before the damaged place
    return bytes(raw)


# -- JPEG ------------------------------------------------------------------------------------------------------------


def _jpeg(content: bytes) -> Iterator[Mended]:
    head, at, progressive, components = bytearray(_SOI), 2, False, b""
    for _ in range(_MOST_SEGMENTS):
        found = _SEGMENT.search(content, at)
        if found is None:
            return
        at, marker = found.start(), content[found.start() + 1]
        segment = content[at : at + 2 + int.from_bytes(content[at + 2 : at + 4])]
        if len(segment) < 4:
            return
        if marker in _FRAMES and len(segment) > 10:
            progressive, components = marker & 3 == 2, segment[10::3]
        if marker == _SOS:
            break
        if _is_needed(marker, segment):
            head += segment
        at += len(segment)
    else:
        return
    rest = content[at:]
    if _EOI in rest:
        yield Mended(content=bytes(head) + rest)
        return
    if not _scans_are_there(rest, components, progressive):
        raise PhotoDecodeError("expected a whole image, got one that ends early: some of its scans are missing")
    begun = bytes(head) + rest.rstrip(b"\xff")
    yield Mended(content=begun + _EOI, other_end=begun + _FILLER + _EOI)


def _is_needed(marker: int, segment: bytes) -> bool:
    """Whether it matters for decoding: all but metadata; of these JFIF's and Adobe's colours and EXIF's orientation."""
    if marker == _APP0:
        return segment[4:9] == b"JFIF\x00" and len(segment) >= 16
    if marker == _APP14:
        return segment[4:9] == b"Adobe" and len(segment) >= 16
    if marker == _APP1:
        return segment[4:10] == b"Exif\x00\x00"
    return not (_APP0 <= marker <= 0xEF or marker == _COM)


def _scans_are_there(rest: bytes, components: bytes, progressive: bool) -> bool:
    """Whether a scan has begun for each coefficient of each component, to its last bit."""
    needed = {(component, k) for component in components for k in range(64 if progressive else 1)}
    for match in islice(_SEGMENT_IN_SCANS.finditer(rest), _MOST_SEGMENTS):
        at = match.start()
        if rest[at + 1] != _SOS or len(rest) < at + 5:
            continue
        count = rest[at + 4]
        parameters = rest[at + 5 + 2 * count : at + 8 + 2 * count]
        if len(parameters) < 3:
            break
        first, last, approximation = parameters if progressive else (0, 0, 0)
        if approximation & 15 == 0:
            scanned = rest[at + 5 : at + 5 + 2 * count : 2]
            needed -= {(component, k) for component in scanned for k in range(first, last + 1)}
    return not needed


# -- BMP -------------------------------------------------------------------------------------------------------------


def _bmp(content: bytes) -> Iterator[Mended]:
    if len(content) < 54:
        return
    offset, header_size, width, height, _, bits, compression = struct.unpack_from("<IIiiHHI", content, 10)
    stride = (width * bits + 31) // 32 * 4
    whole = offset + stride * abs(height)
    if header_size < 40 or compression not in (0, 3) or stride <= 0 or not whole - len(content) > 0:
        return
    missing = whole - len(content)
    check_missing(missing, stride * abs(height))
    last_row = content[-stride:]
    yield Mended(content=content + (last_row * (missing // stride + 1))[:missing])
