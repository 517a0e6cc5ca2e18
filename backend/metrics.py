"""Counters and histograms for Prometheus: one registry for each app.

Knows prometheus_client, and an engine's observer and statistics. Every label has a bounded set of values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from backend.photos.loader import PhotoLoader
    from model import Engine, Lane, Stage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

STATES = ("loading", "ready", "failed", "closed")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)

Outcome = Literal["done", "failed", "deadline"]


class Metrics:
    """What is counted while the app runs. Thread-safe."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Counter("facings_requests", "Requests answered.", ["route", "status"], registry=self._registry)
        self._request_seconds = Histogram(
            "facings_request_seconds",
            "From a request to its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._errors = Counter("facings_errors", "Failed requests and failed tasks.", ["kind"], registry=self._registry)
        self._photos = Counter(
            "facings_photos",
            "Tasks by outcome: done, failed, or not done because the deadline passed.",
            ["outcome"],
            registry=self._registry,
        )
        self._boxes = Counter(
            "facings_boxes",
            "Boxes handed out: for whole photos (dense), or for prompts.",
            ["mode"],
            registry=self._registry,
        )
        self._queue_wait = Histogram(
            "facings_queue_wait_seconds",
            "From asking the engine until it begins.",
            ["lane"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._engine_seconds = Histogram(
            "facings_engine_seconds",
            "Time on the device, by stage.",
            ["stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )

    def watch(self, engine: Engine, photos: PhotoLoader) -> None:
        """Also tells the engine's state and queues and both caches, read when somebody asks."""
        self._registry.register(_Collector(engine, photos))

    def waited(self, lane: Lane, seconds: float) -> None:
        """As an engine's observer: a request or job began, after so many seconds in its queue."""
        self._queue_wait.labels(lane).observe(seconds)

    def stage(self, stage: Stage, seconds: float) -> None:
        """As an engine's observer: a stage of the work on the device ended."""
        self._engine_seconds.labels(stage).observe(seconds)

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """One answered request."""
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def count_error(self, kind: str) -> None:
        """One failed request or task."""
        self._errors.labels(kind).inc()

    def count_photo(self, outcome: Outcome) -> None:
        """One task."""
        self._photos.labels(outcome).inc()

    def count_boxes(self, mode: Literal["dense", "prompt"], boxes: int) -> None:
        """Boxes of one photo."""
        self._boxes.labels(mode).inc(boxes)

    def exposition(self) -> bytes:
        """Everything, as CONTENT_TYPE."""
        return generate_latest(self._registry)


class _Collector(Collector):
    def __init__(self, engine: Engine, photos: PhotoLoader) -> None:
        self._engine = engine
        self._photos = photos

    def collect(self) -> Iterator[Metric]:
        state = GaugeMetricFamily("facings_engine_state", "1 for the state the engine is in.", labels=["state"])
        for name in STATES:
            state.add_metric([name], float(name == self._engine.state))
        yield state
        engine = self._engine.stats()
        queued = GaugeMetricFamily("facings_queued", "Work that waits or runs, by lane.", labels=["lane"])
        queued.add_metric(["interactive"], engine.queued_interactive)
        queued.add_metric(["bulk"], engine.queued_bulk)
        yield queued
        yield CounterMetricFamily("facings_cache_hits", "Tiles whose features were known.", engine.cache_hits)
        yield CounterMetricFamily("facings_cache_misses", "Tiles that had to be encoded.", engine.cache_misses)
        yield GaugeMetricFamily("facings_cache_bytes", "Size of the features kept.", engine.cache_bytes)
        yield GaugeMetricFamily("facings_cache_entries", "Tiles whose features are kept.", engine.cache_entries)
        photos = self._photos.stats()
        yield CounterMetricFamily("facings_photo_cache_hits", "Photos that were at hand.", photos.hits)
        yield CounterMetricFamily("facings_photo_cache_misses", "Photos that had to be fetched.", photos.misses)
        yield GaugeMetricFamily("facings_photo_cache_bytes", "Size of the photos kept.", photos.bytes)
