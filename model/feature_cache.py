"""A least-recently-used cache bounded in bytes, with counted hits and misses. Knows nothing of what it holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


V = TypeVar("V", bound=Sized)


@dataclass(frozen=True, kw_only=True)
class CacheStats:
    hits: int
    misses: int
    entries: int
    nbytes: int


class FeatureCache(Generic[V]):
    """Holds at most `limit_bytes` of values; an entry larger than that is not kept at all.

    Not locked: it belongs to the device thread. `stats` may be read from anywhere.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._entries: OrderedDict[Hashable, V] = OrderedDict()
        self._nbytes = self._hits = self._misses = 0

    def get(self, key: Hashable) -> V | None:
        """The value of `key`, now the most recently used, or None."""
        value = self._entries.get(key)
        if value is None:
            self._misses += 1
            return None
        self._entries.move_to_end(key)
        self._hits += 1
        return value

    def put(self, key: Hashable, value: V) -> None:
        """Keeps `value`, dropping the least recently used ones to make room."""
        if key in self._entries:
            self._nbytes -= self._entries.pop(key).nbytes
        if value.nbytes > self._limit_bytes:
            return
        self._entries[key] = value
        self._nbytes += value.nbytes
        while self._nbytes > self._limit_bytes:
            _, dropped = self._entries.popitem(last=False)
            self._nbytes -= dropped.nbytes

    def stats(self) -> CacheStats:
        return CacheStats(hits=self._hits, misses=self._misses, entries=len(self._entries), nbytes=self._nbytes)
