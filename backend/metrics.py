"""Counters and histograms for Prometheus: one registry for each Service.

Knows prometheus_client and the statistics of the engine and the photo cache. Every label has a bounded set of values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from model import Engine, Lane, Stage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

STATES = ("loading", "ready", "failed", "closed")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)

Outcome = Literal["done", "failed", "deadline"]


class CacheStats(Protocol):
    """Counts of a cache since the start; its size now."""

    @property
    def hits(self) -> int: ...
    @property
    def misses(self) -> int: ...
    @property
    def bytes(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class ProjectFigures:
    """What a project's detector learned. version: number of the one that serves, 0 for none of its own. corrections:
    per 100 facings with it, on photos kept aside."""

    project: int
    version: int
    corrections: float | None
    is_training: bool


class PhotoCache(Protocol):
    """What knows how well the cache of decoded photos works."""

    def stats(self) -> CacheStats: ...


class Metrics:
    """What is counted while the process runs; an Observer of the engine. Thread-safe."""

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
        self._errors = Counter(
            "facings_errors", "Failed requests and failed photos, by kind.", ["kind"], registry=self._registry
        )
        self._photos = Counter(
            "facings_photos",
            "Photos by outcome: done, failed, or not done because the deadline passed.",
            ["outcome"],
            registry=self._registry,
        )
        self._boxes = Counter(
            "facings_boxes",
            "Boxes in answers: for whole photos (dense), or for prompts (prompt).",
            ["mode"],
            registry=self._registry,
        )
        self._queue_wait = Histogram(
            "facings_queue_wait_seconds",
            "Time from a call of the engine until the device thread takes it, by lane.",
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

    def watch(self, engine: Engine, photos: PhotoCache) -> None:
        """Adds the engine's state and queues and both caches, read at each scrape."""
        self._registry.register(_Collector(engine, photos))

    def watch_projects(self, figures: Callable[[], Sequence[ProjectFigures]]) -> None:
        """Adds what projects learned, read at each scrape."""
        self._registry.register(_ProjectsCollector(figures))

    def waited(self, lane: Lane, seconds: float) -> None:
        """One call's time from the caller until the device thread took it."""
        self._queue_wait.labels(lane).observe(seconds)

    def stage(self, stage: Stage, seconds: float) -> None:
        """Time on the device of one stage, such as "encode"."""
        self._engine_seconds.labels(stage).observe(seconds)

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """One answered request."""
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def count_error(self, kind: str) -> None:
        """One failed request or photo."""
        self._errors.labels(kind).inc()

    def count_photo(self, outcome: Outcome) -> None:
        """One photo that somebody asked about."""
        self._photos.labels(outcome).inc()

    def count_boxes(self, mode: Literal["dense", "prompt"], boxes: int) -> None:
        """Boxes of one answer."""
        self._boxes.labels(mode).inc(boxes)

    def serve(self, port: int) -> None:
        """Shows the metrics on a port of their own, to the end of the process. For transports without HTTP.

        Raises OSError when the port is in use.
        """
        start_http_server(port, registry=self._registry)

    def exposition(self) -> bytes:
        """All metrics, as CONTENT_TYPE."""
        return generate_latest(self._registry)


class _Collector(Collector):
    def __init__(self, engine: Engine, photos: PhotoCache) -> None:
        self._engine = engine
        self._photos = photos

    def collect(self) -> Iterator[Metric]:
        state = GaugeMetricFamily(
            "facings_engine_state", "1 for the engine's present state, 0 for the others.", labels=["state"]
        )
        for name in STATES:
            state.add_metric([name], float(name == self._engine.state))
        yield state
        engine = self._engine.stats()
        queued = GaugeMetricFamily("facings_queued", "Calls of the engine that wait or run, by lane.", labels=["lane"])
        queued.add_metric(["interactive"], engine.queued_interactive)
        queued.add_metric(["bulk"], engine.queued_bulk)
        yield queued
        yield CounterMetricFamily("facings_cache_hits", "Tiles whose features were in the cache.", engine.cache_hits)
        yield CounterMetricFamily("facings_cache_misses", "Tiles that had to be encoded.", engine.cache_misses)
        yield GaugeMetricFamily("facings_cache_bytes", "Size of the cached features.", engine.cache_bytes)
        yield GaugeMetricFamily("facings_cache_entries", "Tiles whose features are cached.", engine.cache_entries)
        photos = self._photos.stats()
        yield CounterMetricFamily("facings_photo_cache_hits", "Photos that were in the cache.", photos.hits)
        yield CounterMetricFamily("facings_photo_cache_misses", "Photos that had to be read.", photos.misses)
        yield GaugeMetricFamily("facings_photo_cache_bytes", "Size of the cached photos.", photos.bytes)


class _ProjectsCollector(Collector):
    def __init__(self, figures: Callable[[], Sequence[ProjectFigures]]) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        version = GaugeMetricFamily(
            "facings_project_version", "The project's own version that serves it; 0: none.", labels=["project"]
        )
        corrections = GaugeMetricFamily(
            "facings_project_corrections_per_100",
            "Corrections per 100 facings with that version, on photos kept aside.",
            labels=["project"],
        )
        training = GaugeMetricFamily(
            "facings_project_training", "1 while the project's detector is trained.", labels=["project"]
        )
        for figures in self._figures():
            name = [str(figures.project)]
            version.add_metric(name, figures.version)
            training.add_metric(name, float(figures.is_training))
            if figures.corrections is not None:
                corrections.add_metric(name, figures.corrections)
        yield from (version, corrections, training)
