"""Photos in files and folders of this machine: found, and read ahead of the engine.

Knows files and their names. Knows neither Label Studio nor the formats that boxes are written in.

Left out of a folder, and counted: files whose suffix is not one of SUFFIXES; hidden files and folders, whose names
begin with a dot (thumbnails, version control, macOS's `._1.jpg`); links that lead nowhere or to what was found already.
A hidden folder, or a file with any suffix, is taken when it is named itself.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from backend.errors import CommandError, FacingsError, PhotoTooLarge, PhotoUnreachable, photo_label

if TYPE_CHECKING:
    from model import Photo

# Of all that `decoding` reads.
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp", ".avif", ".avifs"}
    | {".gif", ".bmp", ".dib", ".tif", ".tiff"}
)
AHEAD = 2  # decoded photos waiting for the engine
LISTED_REASONS = 5

Item = TypeVar("Item")
Read = TypeVar("Read")


@dataclass(frozen=True, kw_only=True)
class FoundPhoto:
    """An image file. relative: its path below the deepest folder that holds everything that was searched.

    So `store1/a.jpg` and `store2/a.jpg` keep different names where both folders are searched.
    """

    path: Path
    relative: Path

    @property
    def name(self) -> str:
        """The relative path with forward slashes, as `display_name`."""
        return display_name(self.relative.as_posix())

    @property
    def quoted(self) -> str:
        """The relative path as it stands in an address: it leads to the file, whatever bytes its name has."""
        return quote(os.fsencode(self.relative.as_posix()))


@dataclass(frozen=True, kw_only=True)
class FoundPhotos:
    """Image files in the order of their names, folder by folder, each file once.

    left_out: how many entries were passed over, by their suffix (`.txt`) or the reason (`hidden`).
    """

    photos: tuple[FoundPhoto, ...]
    left_out: Mapping[str, int]


def find_photos(paths: Sequence[Path]) -> FoundPhotos:
    """The photos that the paths name: files as they are, folders with all that is below them, links followed.

    Raises CommandError for a path that does not exist, and when no photo is found.
    """
    found: list[FoundPhoto] = []
    left_out: Counter[str] = Counter()
    seen: set[Path] = set()
    folders = [os.path.abspath(path if path.is_dir() else path.parent) for path in paths]  # noqa: PTH100  keeps links
    root = os.path.commonpath(folders) if folders else os.curdir
    for path in paths:
        if path.is_dir():
            candidates = _photos_below(path, left_out)
        elif path.is_file():
            candidates = [path]
        else:
            raise CommandError(f"{display_name(path)!r}: expected a photo or a folder of photos, found no such file")
        new = []
        for candidate in candidates:
            real = candidate.resolve()
            if real in seen:
                left_out["found twice"] += 1
            else:
                seen.add(real)
                new.append(FoundPhoto(path=candidate, relative=Path(os.path.relpath(candidate, root))))
        found += sorted(new, key=lambda photo: photo.name)
    if not found:
        places = ", ".join(repr(display_name(path)) for path in paths)
        suffixes = ", ".join(sorted(SUFFIXES))
        raise CommandError(f"{places}: expected photos ({suffixes}), found none{_in_brackets(left_out)}")
    return FoundPhotos(photos=tuple(found), left_out=dict(left_out.most_common()))


def format_left_out(left_out: Mapping[str, int]) -> str:
    """Such as "left out 7: 5 .txt, 2 hidden"; empty when nothing was left out."""
    if not left_out:
        return ""
    listed = sorted(left_out.items(), key=lambda item: -item[1])
    parts = [f"{count:,} {reason}" for reason, count in listed[:LISTED_REASONS]]
    if others := sum(count for _, count in listed[LISTED_REASONS:]):
        parts.append(f"{others:,} others")
    return f"left out {sum(left_out.values()):,}: {', '.join(parts)}"


def display_name(path: Path | str) -> str:
    """The path as it may stand in messages and JSON: bytes of a name that are not UTF-8 become `\\xe9`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read_ahead(items: Iterable[Item], read: Callable[[Item], Read]) -> Iterator[tuple[Item, Read | Exception]]:
    """Each item with what `read` gives for it, in order; the next ones are read meanwhile, in one other thread.

    A FacingsError or OSError of `read` is given in place of its result; any other exception is raised.
    """

    def outcome(item: Item) -> Read | Exception:
        try:
            return read(item)
        except (FacingsError, OSError) as error:
            return error

    with ThreadPoolExecutor(1, thread_name_prefix="decode") as pool:
        waiting: deque[tuple[Item, Future[Read | Exception]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(outcome, item)))
            if len(waiting) > AHEAD:
                item, future = waiting.popleft()
                yield item, future.result()
        while waiting:
            item, future = waiting.popleft()
            yield item, future.result()


def read_photo(path: Path, *, max_pixels: int, max_bytes: int | None = None) -> Photo:
    """The photo in a file. Raises PhotoError, whose message begins with the file's name.

    max_pixels: largest width × height. max_bytes: of the file; None for no limit.
    """
    from backend.photos.decoding import decode_photo  # imports torch, which finding photos does not need

    with photo_label(display_name(path.name)):
        try:
            size = path.stat().st_size
            if max_bytes is not None and size > max_bytes:
                raise PhotoTooLarge(f"expected at most {max_bytes:,} bytes, got {size:,}")
            content = path.read_bytes()
        except OSError as error:
            raise PhotoUnreachable(f"expected a readable file, got: {error.strerror}") from None
        return decode_photo(content, max_pixels=max_pixels)


def read_pixels(path: Path, *, max_pixels: int) -> npt.NDArray[np.uint8]:
    """The pixels of the photo in a file, uint8 `[H, W, 3]`. Raises PhotoError as `read_photo` does."""
    return read_photo(path, max_pixels=max_pixels).pixels


def _photos_below(folder: Path, left_out: Counter[str]) -> list[Path]:
    """Files first, then links, so that a photo keeps the name of its file. Counts in `left_out` what is passed over."""
    files: list[Path] = []
    links: list[Path] = []
    folders = deque([folder])
    linked_folders: deque[Path] = deque()  # searched last, for the same reason
    visited: set[Path] = set()
    while folders or linked_folders:
        current = folders.popleft() if folders else linked_folders.popleft()
        real = current.resolve()
        if real in visited:  # two links to one folder, or one that leads back up
            left_out["folder found twice"] += 1
            continue
        visited.add(real)
        try:
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError:
            left_out["folder that cannot be read"] += 1
            continue
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith("."):
                left_out["hidden"] += 1
            elif _is(path.is_dir):
                (linked_folders if entry.is_symlink() else folders).append(path)
            elif path.suffix.lower() not in SUFFIXES:
                left_out[display_name(path.suffix.lower()) or "without suffix"] += 1
            elif not _is(path.is_file):
                left_out["link that leads nowhere" if entry.is_symlink() else "not a file"] += 1
            else:
                (links if entry.is_symlink() else files).append(path)
    return [*files, *links]


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a folder on the way to a link's target may not be entered
        return False


def _in_brackets(left_out: Mapping[str, int]) -> str:
    text = format_left_out(left_out)
    return f" ({text})" if text else ""
