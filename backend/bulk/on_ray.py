"""Bulk pre-annotation on many machines: the same run in several processes, each with an engine of its own.

Knows Ray. What travels are the ids of tasks, and reports: every actor asks Label Studio for its tasks, fetches their
photos and uploads their predictions itself. So what holds for a single process, that it may be killed at any time,
holds for each of them; when an actor dies, Ray starts it again and repeats its chunks, and the repeated chunk finds out
what is done.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from backend.bulk.choice import Wanted, count_of, tasks_to_do
from backend.bulk.jobs import preannotate_project, version_for
from backend.bulk.pipeline import POLL_S, Show, Tally, show_nothing
from backend.bulk.report import Report
from backend.bulk.service import BulkService
from backend.bulk.uploads import Uploads
from backend.errors import CommandError, Interrupted, extra_needed
from backend.label_studio.project import Project, Selection
from backend.label_studio.retry import ProjectError

if TYPE_CHECKING:
    from backend.settings import Settings

# Tasks that an actor takes in one piece. It works on two chunks at once, so that the engine is busy while one ends.
TASKS_PER_CHUNK = 128
CHUNKS_AT_ONCE = 2
OBJECT_STORE_BYTES = 128 << 20  # only ids and reports travel
PLACEMENT_TIMEOUT_S = 120.0  # until a cluster that is busy otherwise has resources for the first actor


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """address: of a running Ray, or `local` for one on this machine as long as the run lasts.

    actors: engines at the same time; None takes one for each GPU, else one. gpus: of each actor; None takes one where
    there are any and the device is not a CPU.
    """

    address: str
    actors: int | None = None
    gpus: float | None = None


@dataclass(frozen=True, kw_only=True)
class ActorResources:
    """How many actors there are, and what each of them gets of its node."""

    actors: int
    cpus: int
    gpus: float


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What each actor has to know; it travels to other machines, its token too, and is never printed."""

    project_id: int
    settings: Settings = field(repr=False)
    wanted: Wanted
    score_threshold: float | None
    retry_budget_s: float


@dataclass(frozen=True, kw_only=True)
class ChunkReport:
    """What became of a chunk. busy_s: seconds in which the actor's engine had a photo, of any chunk, and that no other
    chunk has reported."""

    report: Report
    busy_s: float


class RayWorker:
    """An actor: an engine, resident, and a project. Thread-safe: it works on several chunks at once."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment
        self._service = BulkService.open(assignment.settings)
        self._lock = threading.Lock()
        self._project: Project | None = None
        self._reported_busy_s = 0.0

    def started(self) -> None:
        """Answers as soon as the cluster has placed the actor; the weights may still be loading."""

    def version(self) -> str:
        """The engine's, when it is ready."""
        self._service.engine.wait_ready()
        return self._service.engine.version

    def preannotate(self, task_ids: Sequence[int], version: str) -> ChunkReport:
        """Predictions on those of the tasks that need one. version: the one that its engine is expected to have."""
        if self.version() != version:
            raise CommandError(f"expected {version} on every machine, got {self.version()}: give one --checkpoint")
        assignment = self._assignment
        wanted = replace(assignment.wanted, selection=Selection(ids=task_ids), limit=None)
        report = preannotate_project(
            self._service, self._opened_project(), wanted, score_threshold=assignment.score_threshold
        )
        return ChunkReport(report=report, busy_s=self._newly_busy_s())

    def close(self) -> None:
        """Ends the engine and the connections."""
        self._service.close()
        if self._project is not None:
            self._project.__exit__()

    def _opened_project(self) -> Project:
        assignment, settings = self._assignment, self._assignment.settings
        with self._lock:
            if self._project is None:
                self._project = Project(
                    str(settings.label_studio_url),
                    str(settings.label_studio_api_key),
                    assignment.project_id,
                    retry_budget_s=assignment.retry_budget_s,
                )
            return self._project

    def _newly_busy_s(self) -> float:
        """The seconds that no chunk has reported yet: those of two chunks at once must not count twice."""
        with self._lock:
            before, self._reported_busy_s = self._reported_busy_s, self._service.busy_s
            return self._reported_busy_s - before


def preannotate_on_ray(
    cluster: Cluster, project: Project, assignment: Assignment, *, show: Show = show_nothing
) -> Report:
    """As `preannotate_project` does it, by the actors of a cluster. This machine needs neither a GPU nor weights."""
    ray = _import_ray()
    wanted = assignment.wanted
    tally = Tally(total=count_of(project, wanted))
    busy_s, deleted = 0.0, 0
    stopped: CommandError | None = None
    with connected(ray, cluster):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        resources = plan_actors(nodes, cluster, device=assignment.settings.device)
        actors = start_actors(ray, resources, assignment)
        engine = engine_version(ray, actors, resources)
        version = version_for(engine, project.label_config, assignment.score_threshold)
        uploads = Uploads(project, version, again=wanted.again)  # for what a kill left double
        try:
            ids = []
            for task in tasks_to_do(project, version, wanted, tally, on_held=uploads.verify):
                ids.append(task.id)
                show(tally)
            tally.started = time.monotonic()
            for chunk in _finished_chunks(ray, actors, engine, _chunks(ids, len(actors)), lambda: show(tally)):
                report = chunk.report
                tally.done += report.photos
                tally.boxes += report.boxes
                tally.skipped.update(report.skipped)
                tally.failures += report.failures
                busy_s += chunk.busy_s
                deleted += report.duplicates_deleted
                if report.stopped is not None:
                    stopped = report.stopped
                    break
            show(tally)
        except ProjectError as error:
            stopped = error
        except KeyboardInterrupt:
            stopped = Interrupted("interrupted")
        tally.ended = time.monotonic()
    return Report(
        photos=tally.done,
        boxes=tally.boxes,
        skipped=dict(tally.skipped),
        failures=tally.failures,
        seconds=tally.seconds,
        photos_per_s=tally.photos_per_s,
        engine_busy=busy_s / resources.actors / tally.seconds if tally.seconds else 0.0,
        model_version=version,
        retries=project.retries,
        duplicates_deleted=uploads.deleted + deleted,
        stopped=stopped,
    )


def plan_actors(nodes: Sequence[Mapping[str, float]], cluster: Cluster, *, device: str) -> ActorResources:
    """The most that each of equal actors can have of one node, out of what the nodes have.

    nodes: what each has, as Ray names it. Raises CommandError when they cannot hold the actors.
    """
    gpus = cluster.gpus
    if gpus is None:
        gpus = 1.0 if device != "cpu" and any(node.get("GPU", 0) for node in nodes) else 0.0
    if gpus > 1 and gpus != int(gpus):
        raise CommandError(f"--gpus: expected a fraction below one, or a whole number, got {gpus:g}")

    def capacity(cpus: int) -> int:
        return sum(_capacity_of(node, cpus, gpus) for node in nodes)

    actors = cluster.actors or (max(1, capacity(1)) if gpus else 1)
    # Without a GPU the engine computes with all that an actor has; with one, processors decode photos.
    most = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    cpus = next((cpus for cpus in range(most, 0, -1) if capacity(cpus) >= actors), None)
    if cpus is None:
        raise CommandError(
            f"--ray: expected nodes that hold {actors} actors of {format_resources(1, gpus)} at least, "
            f"found space for {capacity(1)}: " + _format_nodes(nodes)
        )
    return ActorResources(actors=actors, cpus=cpus, gpus=gpus)


def _capacity_of(node: Mapping[str, float], cpus: int, gpus: float) -> int:
    """How many actors a node holds."""
    actors = int(node.get("CPU", 0) // cpus)
    if not gpus:
        return actors
    whole = int(node.get("GPU", 0))
    # Ray gives parts of one GPU only. The last digits of a part like 0.2 must not cost an actor.
    return min(actors, whole * int(1 / gpus + 1e-6) if gpus <= 1 else whole // int(gpus))


def _format_nodes(nodes: Sequence[Mapping[str, float]]) -> str:
    kinds = Counter(format_resources(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes)
    return "; ".join(f"{count} with {kind}" for kind, count in kinds.items()) or "no nodes"


def format_resources(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPUs and {gpus:g} GPUs"


@contextmanager
def connected(ray: Any, cluster: Cluster) -> Iterator[None]:
    """A connection to the cluster, and errors of Ray in one line."""
    local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        ray.init(
            address=cluster.address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(local if cluster.address == "local" else {}),
        )
        yield
    except (ConnectionError, ray.exceptions.RayError) as error:
        raise CommandError(f"--ray {cluster.address}: {_innermost(error)}") from error
    finally:
        ray.shutdown()


def start_actors(ray: Any, resources: ActorResources, assignment: Assignment) -> list[Any]:
    """The actors. Ray starts those that die again and repeats what they were at, as often as it takes."""
    actor = ray.remote(
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=CHUNKS_AT_ONCE,
    )(RayWorker)
    return [actor.remote(assignment) for _ in range(resources.actors)]


def engine_version(ray: Any, actors: Sequence[Any], resources: ActorResources) -> str:
    """The version of the actors' engines, asked of the first that is placed.

    Raises CommandError when the cluster has no resources for any of them for a while.
    """
    starting = {actor.started.remote(): actor for actor in actors}
    started, _ = ray.wait(list(starting), timeout=PLACEMENT_TIMEOUT_S)
    if not started:
        free = ray.available_resources()
        raise CommandError(
            f"--ray: expected a node with {format_resources(resources.cpus, resources.gpus)} free within "
            f"{PLACEMENT_TIMEOUT_S:g} s, "
            f"got {format_resources(free.get('CPU', 0), free.get('GPU', 0))} free in the whole cluster"
        )
    return str(_result(ray, starting[started[0]].version.remote()))


def _chunks(ids: Sequence[int], actors: int) -> list[Sequence[int]]:
    """The tasks in parts of nearly equal size; small projects too are for all actors."""
    count = min(len(ids), max(actors * CHUNKS_AT_ONCE, -(-len(ids) // TASKS_PER_CHUNK)))
    return [ids[number::count] for number in range(count)]


def _finished_chunks(
    ray: Any, actors: Sequence[Any], version: str, chunks: Sequence[Sequence[int]], poll: Callable[[], None]
) -> Iterator[ChunkReport]:
    """The chunks' reports as they come. An actor gets its first chunks when the cluster has placed it.

    poll: called several times a second.
    """
    todo = deque(chunks)
    # Each actor stands here as often as it can work at the same time.
    starting = {actor.started.remote(): actor for actor in actors for _ in range(CHUNKS_AT_ONCE)}
    working: dict[Any, Any] = {}
    while todo or working:
        finished, _ = ray.wait([*working, *starting], timeout=POLL_S)
        poll()
        for reference in finished:
            actor = starting.pop(reference, None)
            result = _result(ray, reference)
            if actor is None:
                actor = working.pop(reference)
                yield result
            if todo:
                working[actor.preannotate.remote(todo.popleft(), version)] = actor


def _result(ray: Any, reference: Any) -> Any:
    """What a call of an actor gave. Raises its CommandError as it was, without Ray's trace around it."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, CommandError):
            raise error.cause from None
        raise


def _import_ray() -> Any:
    with extra_needed("ray", "--ray"):
        import ray
    return ray


def _innermost(error: BaseException) -> str:
    """The line about what happened in an actor, without Ray's own traces."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[-1]
