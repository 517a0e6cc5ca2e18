"""Shelves rendered by many processes, handed over through shared memory, as fast as one process can take them.

Knows processes and the renderer; not what is learned. A bounded number of pictures waits: each process owns a few slots
of one memory-mapped file, and renders on once a slot is free again.
"""

from __future__ import annotations

import mmap
import multiprocessing
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import cast

import numpy as np
import numpy.typing as npt

from model.renderer.shelves import load_textures, render_shelf
from model.training.samples import FACING_PX
from model.types import FloatArray, PixelArray

SLOTS_PER_PROCESS = 6
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  (a file there never goes to a disk)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rendered:
    """pixels: uint8 `[S, S, 3]`. ids: uint16 `[S, S]`, i + 1 where facing i is visible. boxes_xyxy: float32 `[N, 4]`.

    The arrays are views of a slot: copy what is to stay.
    """

    pixels: PixelArray
    ids: npt.NDArray[np.uint16]
    boxes_xyxy: FloatArray


class RenderPool:
    """An endless iterator of rendered shelves of `side_px`; a context manager, which ends its processes.

    Picture i of a seed is always the same, their order is not.
    """

    def __init__(self, *, processes: int, side_px: int, seed: int, textures: Path | None) -> None:
        self.side_px = side_px
        length = processes * SLOTS_PER_PROCESS * _slot_bytes(side_px)
        is_roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2 * length
        folder = SHARED_MEMORY if is_roomy else None
        self._file = tempfile.NamedTemporaryFile(dir=folder, prefix="facings-render-")  # noqa: SIM115
        self._file.truncate(length)
        self._memory = _slots(Path(self._file.name), side_px)
        context = multiprocessing.get_context("spawn")  # OpenCV's threads do not survive a fork
        self._pipes: list[Connection] = []
        self._processes = []
        for number in range(processes):
            own, other = context.Pipe()
            first_slot = number * SLOTS_PER_PROCESS
            arguments = (other, Path(self._file.name), first_slot, side_px, seed, number, processes, textures)
            process = context.Process(target=_render, args=arguments, daemon=True)
            process.start()
            other.close()
            self._pipes.append(own)
            self._processes.append(process)

    def __enter__(self) -> RenderPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._file.close()

    def ready(self, timeout_s: float | None = 0.0) -> Iterator[Rendered]:
        """The pictures that are there; waits up to `timeout_s` for the first one (None: for ever).

        Each is valid until the next one is asked for. Raises EOFError when a process has ended by itself.
        """
        for pipe in cast(list[Connection], wait(self._pipes, timeout_s)):
            while pipe.poll():
                slot, boxes = pipe.recv()
                pixels, ids = _arrays(self._memory[slot], self.side_px)
                yield Rendered(pixels=pixels, ids=ids, boxes_xyxy=boxes)
                pipe.send(slot)


def _render(
    pipe: Connection,
    path: Path,
    first_slot: int,
    side_px: int,
    seed: int,
    number: int,
    processes: int,
    textures_folder: Path | None,
) -> None:
    import cv2

    cv2.setNumThreads(1)
    textures = load_textures(textures_folder) if textures_folder else None
    memory = _slots(path, side_px)
    free = list(range(first_slot, first_slot + SLOTS_PER_PROCESS))
    index = number
    try:
        while True:
            key = (seed << 32) + index
            index += processes
            rng = np.random.default_rng(key)
            facing_px = FACING_PX[0] + (FACING_PX[1] - FACING_PX[0]) * rng.random() ** 2
            shelf = render_shelf(key, (side_px, side_px), textures=textures, facing_px=facing_px, decoys=True)
            while not free or pipe.poll():
                free.append(pipe.recv())
            slot = free.pop()
            pixels, ids = _arrays(memory[slot], side_px)
            pixels[:], ids[:] = shelf.photo_rgb, shelf.instance_ids
            pipe.send((slot, shelf.boxes_xyxy))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return


def _slot_bytes(side_px: int) -> int:
    return side_px * side_px * 5


def _slots(path: Path, side_px: int) -> npt.NDArray[np.uint8]:
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    return np.frombuffer(memory, np.uint8).reshape(-1, _slot_bytes(side_px))


def _arrays(slot: npt.NDArray[np.uint8], side_px: int) -> tuple[PixelArray, npt.NDArray[np.uint16]]:
    split = side_px * side_px * 3
    return slot[:split].reshape(side_px, side_px, 3), slot[split:].view(np.uint16).reshape(side_px, side_px)
