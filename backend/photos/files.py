"""Photos in folders: found, decoded as the backend does it, drawn on.

Knows files and the backend's decoder; neither COCO nor the engine.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from backend.errors import CommandError, FacingsError
from backend.photos.decoding import decode_photo, raise_pillow_limit
from backend.settings import Settings

if TYPE_CHECKING:
    from model import Photo

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
AHEAD = 2  # decoded photos waiting for the engine
BOX_COLOUR = (0, 220, 60)


def find_photos(folder: Path) -> list[Path]:
    """All photos under a folder, by suffix, in the order of their names. Raises CommandError when there is none."""
    if not folder.is_dir():
        raise CommandError(f"{str(folder)!r}: expected a folder of photos")
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not paths:
        raise CommandError(f"{str(folder)!r}: expected photos ({', '.join(sorted(SUFFIXES))}), found none")
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


def read_ahead(paths: Iterable[Path]) -> Iterator[tuple[Path, Photo | Exception]]:
    """Each path with its photo, or with the reason why there is none; the next ones are decoded meanwhile."""
    max_pixels = Settings.from_env(os.environ).max_photo_pixels
    raise_pillow_limit(max_pixels)
    with ThreadPoolExecutor(1, thread_name_prefix="decode") as pool:
        waiting: deque[tuple[Path, Future[Photo | Exception]]] = deque()
        for path in paths:
            waiting.append((path, pool.submit(_read, path, max_pixels)))
            if len(waiting) > AHEAD:
                path, photo = waiting.popleft()
                yield path, photo.result()
        while waiting:
            path, photo = waiting.popleft()
            yield path, photo.result()


def read_pixels(path: Path) -> npt.NDArray[np.uint8]:
    """The photo's pixels, uint8 `[H, W, 3]`. Raises what hinders it."""
    return read_photo(path).pixels


def read_photo(path: Path) -> Photo:
    """The photo in a file, as the backend decodes it. Raises FacingsError or OSError."""
    max_pixels = Settings.from_env(os.environ).max_photo_pixels
    raise_pillow_limit(max_pixels)
    return decode_photo(path.read_bytes(), shown=path.name, content_type="", max_pixels=max_pixels)


def _read(path: Path, max_pixels: int) -> Photo | Exception:
    try:
        return decode_photo(path.read_bytes(), shown=path.name, content_type="", max_pixels=max_pixels)
    except (FacingsError, OSError) as error:
        return error


def draw_boxes(photo: Photo, boxes_xyxy: npt.NDArray[np.float32], path: Path) -> None:
    """Writes the photo with its boxes, in the format of the path's suffix; makes the folders on the way."""
    from PIL import Image, ImageDraw

    image = Image.fromarray(photo.pixels)
    canvas = ImageDraw.Draw(image)
    width = max(2, round(max(photo.size_wh) / 800))
    for box in boxes_xyxy:
        canvas.rectangle(box.tolist(), outline=BOX_COLOUR, width=width)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=85)
