"""The Service of bulk runs: each photo is read once, and what the engine's time is spent on is measured.

Knows the Service. Knows neither sources nor sinks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Self

from backend.metrics import Metrics
from backend.photos.loader import PhotoLoader
from backend.service import Service
from backend.settings import Settings
from model import Engine


class BulkService(Service):
    """A Service that keeps no photos, and knows for how long its engine had one. Thread-safe."""

    def __init__(self, *, engine: Engine, photos: PhotoLoader, metrics: Metrics) -> None:
        super().__init__(engine=engine, photos=photos, metrics=metrics)
        self._lock = threading.Lock()
        self._working = 0
        self._working_since = 0.0
        self._worked_s = 0.0

    @classmethod
    def open(cls, settings: Settings, *, engine: Engine | None = None) -> Self:
        return super().open(replace(settings, photo_cache_mb=0), engine=engine)

    @property
    def busy_s(self) -> float:
        """Seconds in which the engine had at least one photo."""
        with self._lock:
            return self._worked_s + (time.monotonic() - self._working_since if self._working else 0.0)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        with self._lock:
            if not self._working:
                self._working_since = time.monotonic()
            self._working += 1
        try:
            yield
        finally:
            with self._lock:
                self._working -= 1
                if not self._working:
                    self._worked_s += time.monotonic() - self._working_since
