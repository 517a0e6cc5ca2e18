"""Files that a run writes: checked before it begins, whole or not there at its end.

Knows file systems. Knows neither boxes' formats nor the engine.
"""

from __future__ import annotations

import io
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from backend.errors import CommandError, OptionError

if TYPE_CHECKING:
    from model import Photo


def check_outputs(
    *,
    out: Path | None = None,
    out_is_folder: bool = False,
    report: Path | None = None,
    draw: Path | None = None,
    photos: Sequence[Path] = (),
) -> None:
    """Raises OptionError, in one line that names the option and the path, where an output cannot be written or would
    overwrite something else. Call it before the first photo is read; it leaves no file behind.

    out: file or, with `out_is_folder` (YOLO), folder for the boxes. report: file. draw: folder for drawings.
    photos: files and folders that the photos are read from.
    """
    raise NotImplementedError


class GrowingFile:
    """A file that is written piece by piece and takes its place when it is whole.

    Use it in a `with` statement: left without `commit`, it leaves no trace, and what was at `path` before is still
    there. Raises CommandError, in one line that names `path`, where it cannot be written.
    """

    def __init__(self, path: Path) -> None: ...

    def __enter__(self) -> GrowingFile: ...

    def __exit__(self, *_: object) -> None: ...

    def write(self, data: bytes | str) -> None: ...

    def commit(self) -> None: ...


def write_whole(path: Path, data: bytes | str) -> None:
    """Writes a file in one piece, as UTF-8 where it is text. Raises CommandError as GrowingFile does."""


def draw_boxes(photo: Photo, boxes_xyxy: npt.NDArray[np.float32], path: Path) -> str | None:
    """Writes the photo with its boxes as a JPEG, and makes the folders on the way; None, or why there is no drawing.

    Never raises. A photo that is too large for JPEG is drawn smaller. The name: see `names.drawing_names`.
    """
    raise NotImplementedError
