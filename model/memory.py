"""How many items a call is given: as many as the device's memory holds, found by trying.

Knows how torch reports that memory ran out; nothing of networks. What one item takes depends on the checkpoint, the
precision and the GPU, so that a table of sizes would be wrong somewhere; a batch that does not fit is halved instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch

from model.types import DeviceMemoryError

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class BatchSize:
    """The most items of one call. Starts high and is halved, for good, when the device's memory does not hold them.

    Not locked: it belongs to the device thread.
    """

    def __init__(self, what: str, items: int) -> None:
        self._what = what
        self.items = items

    def run(self, call: Callable[[Sequence[Item]], Answer], items: Sequence[Item]) -> list[Answer]:
        """The answers of `call` to parts of the items, in order.

        Raises DeviceMemoryError when not even one item fits.
        """
        answers: list[Answer] = []
        rest = items
        while rest:
            part = rest[: self.items]
            try:
                answers.append(call(part))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = _memory_error(f"one of the {self._what} of this checkpoint", error)
            else:
                rest = rest[len(part) :]
                continue
            # Here and not above: what the call held is freed with the error that it raised.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(part) == 1:
                raise failure
            self.items = len(part) // 2
            log.warning("out of device memory: %d %s at a time from now on, not %d", self.items, self._what, len(part))
        return answers


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of at most `size`."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


@contextmanager
def reserved(device: torch.device, nbytes: int) -> Iterator[None]:
    """Keeps `nbytes` of a GPU's memory from what is done inside; nothing on a CPU.

    Raises DeviceMemoryError when the GPU does not have them.
    """
    held = None
    if device.type == "cuda":
        try:
            held = torch.empty(nbytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise _memory_error("the feature cache", error) from error
    try:
        yield
    finally:
        del held


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of torch means that the memory of a GPU, or of this machine, ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def limit_memory(device: torch.device, max_mb: int) -> None:
    """Holds torch to `max_mb` MiB of a GPU's memory from now on: asked for more, it reports that memory ran out. The
    driver's own few hundred MiB come on top. A CPU has no such limit."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max_mb * 2**20 / total), device)


def _memory_error(what: str, error: Exception) -> DeviceMemoryError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]  # a MemoryError has no message of its own
    return DeviceMemoryError(
        f"the device's memory does not hold {what}: raise max_device_mb, lower cache_bytes or choose a smaller "
        f"checkpoint ({reason})"
    )
