"""Files and folders that a run writes: checked before it begins, and whole or not there at its end.

Knows file systems, and how boxes are drawn on a photo. Knows neither the formats of boxes nor the engine.

A file that exists is replaced in one step and keeps its permissions. Where the path is a link, the file that it leads
to is replaced and the link stays.
"""

from __future__ import annotations

import errno
import io
import os
import secrets
import shutil
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from backend.errors import CommandError, OptionError
from backend.photos.files import SUFFIXES

if TYPE_CHECKING:
    from model import Photo

BOX_COLOUR = (0, 220, 60)
JPEG_SIDE_PX = 65_500  # the longest side that libjpeg writes
PROBE_BYTES = 4096  # the usual block: an empty file fits on a full disk
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}
# A file that is mounted into a container, or another user's in a shared folder: it can be written, but not replaced.
NOT_REPLACEABLE = {errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EACCES}


def check_outputs(
    *,
    out: Path | None = None,
    out_is_folder: bool = False,
    report: Path | None = None,
    draw: Path | None = None,
    photos: Sequence[Path] = (),
) -> None:
    """Raises OptionError where an output cannot be written, or would overwrite a photo or another output.

    To be called before the first photo is read: one line names the option and the path. Leaves no file behind.

    out: a file or, with `out_is_folder`, a folder for the boxes. report: a file. draw: a folder for drawings.
    photos: the files and folders that photos are read from.
    """
    files = {"--report": report} if out_is_folder else {"--out": out, "--report": report}
    folders = {"--out": out, "--draw": draw} if out_is_folder else {"--draw": draw}
    file_places = [_Place(option, path) for option, path in files.items() if path is not None]
    folder_places = [_Place(option, path) for option, path in folders.items() if path is not None]
    for place in file_places:
        place.check_file()
    for place in folder_places:
        place.check_folder()
    for one, other in combinations([*file_places, *folder_places], 2):
        if _is_same(one.real, other.real):
            raise OptionError(f"{one.option} and {other.option}: expected different paths, got {one} and {other}")
    if out_is_folder and out is not None:
        out_place = folder_places[0]
        for place in (*file_places, *folder_places[1:]):
            if _is_inside(place.real, out_place.real) or _is_inside(out_place.real, place.real):
                raise OptionError(
                    f"{place.option} {place}: expected a path neither inside nor around --out {out_place}"
                )
    _check_photos(photos, file_places, [place for place in folder_places if place.option == "--draw"])


def _check_photos(photos: Sequence[Path], files: Sequence[_Place], drawings: Sequence[_Place]) -> None:
    """No photo is overwritten, and no drawing becomes a photo of the next run."""
    real_photos = [Path(os.path.realpath(path)) for path in photos]
    sources = {path for path in real_photos if path.is_dir()}
    # A photo may be a link: neither the link nor the file it leads to may be drawn over.
    links = {Path(os.path.realpath(path.parent)) for path in photos if not path.is_dir()}
    folders_of_files = links | {path.parent for path in real_photos if path not in sources}
    for place in files:
        if any(_is_same(place.real, path) for path in real_photos if path not in sources):
            raise OptionError(f"{place.option} {place}: expected another file than the photo")
    for place in drawings:
        for folder in sources:
            if _is_inside(place.real, folder) or _is_inside(folder, place.real):
                raise OptionError(
                    f"{place.option} {place}: expected a folder neither inside nor around the photos in "
                    f"{str(folder)!r}: its drawings would be photos of the next run"
                )
        if any(_is_same(place.real, folder) for folder in folders_of_files):
            raise OptionError(f"{place.option} {place}: expected another folder than that of the photos")


class _Place:
    """A path that an option gave. real: where it leads, links followed."""

    def __init__(self, option: str, path: Path) -> None:
        self.option, self._path = option, path
        self.real = Path(os.path.realpath(path))

    def __str__(self) -> str:
        return repr(str(self._path))

    def check_file(self) -> None:
        with self._os_errors():
            kind = _kind_of(self.real)
            if kind not in (None, "a file"):
                raise self._refusal(f"expected a file, got {kind}")
            if self.real.suffix.lower() in SUFFIXES:
                raise self._refusal("expected a file that is no photo")
            self._check_parent("a file")
            if kind is None:
                _try_writing(self.real)
            elif not os.access(self.real, os.W_OK):
                raise self._refusal("expected a file that may be overwritten, got a read-only one")
            else:
                _try_writing(_partial_path(self.real))

    def check_folder(self) -> None:
        with self._os_errors():
            kind = _kind_of(self.real)
            if kind not in (None, "a folder"):
                raise self._refusal(f"expected a folder, got {kind}")
            self._check_parent("a folder")
            if kind is None:
                self.real.mkdir()
            try:
                _try_writing(_partial_path(self.real / "file"))
            finally:
                if kind is None:
                    self.real.rmdir()

    def _check_parent(self, kind: str) -> None:
        if not self.real.parent.is_dir():
            raise self._refusal(f"expected {kind} in an existing folder, got {str(self.real.parent)!r}")

    def _refusal(self, message: str) -> OptionError:
        return OptionError(f"{self.option} {self}: {message}")

    @contextmanager
    def _os_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._refusal(f"cannot be written: {error.strerror or error}") from error


def _kind_of(path: Path) -> str | None:
    """What the path leads to, in words; None where nothing is there. Raises OSError."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    return "a file" if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "something else")


def _try_writing(path: Path) -> None:
    """Writes a new file and removes it. Raises OSError.

    Only trying tells: permission bits know nothing of full disks, quotas, read-only and network file systems.
    """
    with path.open("xb", buffering=0) as file:
        try:
            file.write(bytes(PROBE_BYTES))
        finally:
            path.unlink()


def _is_same(one: Path, other: Path) -> bool:
    """Whether two real paths are, or would be, the same file or folder."""
    exists = one.exists(), other.exists()
    if all(exists):
        return one.samefile(other)
    if any(exists):
        return False
    # Neither is there, so that only their names tell; many file systems ignore case and the form of accents.
    return _folded(one.name) == _folded(other.name) and _is_same(one.parent, other.parent)


def _is_inside(inner: Path, outer: Path) -> bool:
    return any(_is_same(path, outer) for path in (inner, *inner.parents))


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", name).casefold())


class GrowingFile:
    """A file that is written piece by piece under a temporary name in its folder, and renamed when it is whole.

    For a `with` statement: left without `commit`, it leaves no trace, and what was in its place is still there.
    Every method raises CommandError, in one line that names the path, where the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._real = Path(os.path.realpath(path))
        self._partial = _partial_path(self._real)
        with os_errors_as_command_error(path):
            kind = _kind_of(self._real)
            if kind not in (None, "a file"):
                raise CommandError(f"{str(path)!r}: expected a file, got {kind}")
            self._file = self._partial.open("xb")  # not with tempfile, whose files nobody else may read
            if kind is not None:
                self._keep_permissions()

    def __enter__(self) -> GrowingFile:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # of a full disk, which was reported by what failed first
            self._file.close()
        with suppress(OSError):
            self._partial.unlink(missing_ok=True)

    def write(self, data: bytes | str) -> None:
        """Adds to the file. Text becomes UTF-8, with an escape for what has no UTF-8."""
        with os_errors_as_command_error(self._path):
            self._file.write(data.encode(errors="backslashreplace") if isinstance(data, str) else data)

    def commit(self) -> None:
        """Puts the file in its place; nothing can be added any more."""
        with os_errors_as_command_error(self._path):
            self._file.close()
            try:
                self._partial.replace(self._real)
            except OSError as error:
                if error.errno not in NOT_REPLACEABLE or not self._real.is_file():
                    raise
                shutil.copyfile(self._partial, self._real)

    def _keep_permissions(self) -> None:
        status = self._real.stat()
        with suppress(OSError):  # only root gives files away
            os.fchown(self._file.fileno(), status.st_uid, status.st_gid)
        with suppress(OSError):  # file systems without permissions
            os.fchmod(self._file.fileno(), stat.S_IMODE(status.st_mode))


def write_whole(path: Path, data: bytes | str) -> None:
    """Writes a file in one piece, whole or not at all. Raises CommandError as GrowingFile does."""
    with GrowingFile(path) as file:
        file.write(data)
        file.commit()


@contextmanager
def os_errors_as_command_error(path: Path) -> Iterator[None]:
    """Turns an OSError, such as that of a full disk, into a CommandError of one line that names the path."""
    try:
        yield
    except OSError as error:
        raise CommandError(f"{str(path)!r}: cannot be written: {error.strerror or error}") from error


def _partial_path(path: Path) -> Path:
    """A name in the same folder that nobody else uses, and that fits where the name of the path itself just fits."""
    start = path.name.encode(errors="replace")[:40].decode(errors="ignore")
    return path.with_name(f".{start}.{secrets.token_hex(4)}.partial")


def draw_boxes(photo: Photo, boxes_xyxy: npt.NDArray[np.float32], path: Path) -> str | None:
    """Writes the photo with its boxes as a JPEG file. Returns None, or in one line why there is no drawing.

    boxes_xyxy: `[N, 4]`, in photo pixels. path: see `names.drawing_names`; the folders on the way are made. A photo
    with a side that is too long for JPEG is drawn smaller. Never raises: a drawing is worth less than boxes.
    """
    try:
        content = _jpeg(photo, boxes_xyxy)
        with os_errors_as_command_error(path):
            Path(os.path.realpath(path.parent)).mkdir(parents=True, exist_ok=True)
            if path.is_symlink():  # it may lead to a photo
                path.unlink()
        write_whole(path, content)
    except CommandError as error:
        return str(error)
    except Exception as error:
        return f"{str(path)!r}: cannot be drawn: {type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _jpeg(photo: Photo, boxes_xyxy: npt.NDArray[np.float32]) -> bytes:
    from PIL import Image, ImageDraw

    image = Image.fromarray(photo.pixels)
    scale = min(1.0, JPEG_SIDE_PX / max(image.size))
    if scale < 1:
        width, height = (max(1, int(side * scale)) for side in image.size)
        image = image.resize((width, height))
    canvas = ImageDraw.Draw(image)
    line_px = max(2, round(max(image.size) / 800))
    for box in boxes_xyxy:
        canvas.rectangle((box * scale).tolist(), outline=BOX_COLOUR, width=line_px)
    # Into memory first, since Pillow reports a full disk as an encoder's error.
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    return content.getvalue()
