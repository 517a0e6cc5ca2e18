"""Memory of a process that trains: kept when it is freed. Knows glibc."""

from __future__ import annotations

import ctypes

# Options and values of glibc's mallopt: no buffer is mapped on its own or given back, the heap grows by 256 MiB, and
# threads share one.
MALLOC_OPTIONS = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 2**28), "M_ARENA_MAX": (-8, 1)}


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, where its C library is glibc.

    Torch frees its large buffers after each step. Given back to the system, each of their pages is faulted in again by
    the next one: 150,000 page faults a step. Meant for a process that trains and does nothing else.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in MALLOC_OPTIONS.values():
            mallopt(option, value)
