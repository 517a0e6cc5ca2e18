"""Decoded photos that were asked for a moment ago, by key; each is read by one thread at a time.

Knows keys, time and memory. Knows neither addresses nor how a photo is read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from cachetools import TTLCache

from backend.errors import PhotoUnreachable
from model.types import Photo


@dataclass(frozen=True, kw_only=True)
class PhotoCacheStats:
    """Counts since the start. A request that waited for another one's fetch of the same photo is a hit."""

    hits: int
    misses: int
    entries: int
    bytes: int


class PhotoCache:
    """At most `max_bytes` of pixels, least recently used out first, none older than `keep_s`. Thread-safe."""

    def __init__(self, *, max_bytes: int, keep_s: float) -> None:
        self._lock = threading.Lock()
        self._kept: TTLCache[Hashable, Photo] = TTLCache(
            max_bytes, keep_s, timer=time.monotonic, getsizeof=lambda photo: photo.pixels.nbytes
        )
        self._reading: dict[Hashable, tuple[Future[Photo], float]] = {}  # with the time the reader gives up
        self._hits = 0
        self._misses = 0

    def get(self, key: Hashable, read: Callable[[], Photo], *, until: float) -> Photo:
        """The photo of `key`: kept, or from another thread that is reading it, or from `read`.

        until: `time.monotonic()` value at which waiting for another thread ends. Raises what that or `read` raises.
        """
        while True:
            with self._lock:
                photo = self._kept.get(key)
                if photo is not None:
                    self._hits += 1
                    return photo
                if key not in self._reading:
                    self._misses += 1
                    mine: Future[Photo] = Future()
                    self._reading[key] = mine, until
                    break
                others, others_until = self._reading[key]
            try:
                photo = others.result(timeout=max(0.0, until - time.monotonic()))
            except PhotoUnreachable:
                if others_until <= time.monotonic() < until:
                    continue  # that reader had less time than there is here
                raise
            except TimeoutError:
                raise PhotoUnreachable("expected an answer in time, got none") from None
            with self._lock:
                self._hits += 1
            return photo
        try:
            photo = read()
        except BaseException as error:
            with self._lock:
                del self._reading[key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._reading[key]
            with suppress(ValueError):  # larger than the cache
                self._kept[key] = photo
        mine.set_result(photo)
        return photo

    def stats(self) -> PhotoCacheStats:
        """The counts so far."""
        with self._lock:
            self._kept.expire()
            return PhotoCacheStats(
                hits=self._hits, misses=self._misses, entries=len(self._kept), bytes=int(self._kept.currsize)
            )
