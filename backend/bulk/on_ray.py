"""Bulk pre-annotation on many machines: the same run in several processes, each with an engine of its own.

Knows Ray Data. What travels are the numbers of tasks, and how they ended: every actor asks Label Studio for its tasks,
fetches their photos and uploads their predictions itself. So what holds for a single process, that it may be killed any
time, holds for each of them; when an actor dies, Ray gives its tasks to another, which finds out what is done.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from backend.bulk.jobs import (
    INTERRUPTED,
    Ending,
    ProjectSink,
    Report,
    Wanted,
    count_of,
    jobs_of,
    load_photo,
    photo_loader,
    predicted,
    report_of,
    tasks_to_do,
)
from backend.bulk.pipeline import POLL_S, Busy, Job, Run, Tally
from backend.errors import CommandError
from backend.label_studio.project import Project, Selection, Unavailable
from scripts.console import tally_shown

if TYPE_CHECKING:
    from backend.settings import Settings
    from model import Photo

# Tasks that an actor takes in one piece. It works on two such lots at once, so that the engine is busy while one ends.
TASKS_PER_LOT = 128
LOTS_AT_ONCE = 2
TOTALS = -1  # stands for a task in the row that tells of a whole lot
OBJECT_STORE_BYTES = 128 << 20  # only numbers travel
ROOM_S = 120.0  # until a cluster that is busy otherwise has room for the first engine


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """address: of a running Ray, or `local` for one on this machine as long as the run lasts.

    actors: engines at the same time; None takes one for each GPU, else one. gpus: of each actor; None takes one where
    where there are any and the device is not a CPU.
    """

    address: str
    actors: int | None = None
    gpus: float | None = None


@dataclass(frozen=True, kw_only=True)
class Share:
    """How many actors there are, and what each of them gets of its node."""

    actors: int
    cpus: int
    gpus: float

    @property
    def resources(self) -> dict[str, float]:
        """As Ray takes them."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What each actor has to know; it travels to other machines, its token too, but is never shown."""

    number: int
    settings: Settings = field(repr=False)
    wanted: Wanted
    score_threshold: float | None
    patience_s: float
    version: str


class Worker:
    """An actor: an engine, resident, and a project. Thread-safe: it works on several lots at once."""

    def __init__(self, assignment: Assignment) -> None:
        from model import Sam2Engine

        settings = assignment.settings
        self._assignment = assignment
        self._engine = Sam2Engine(settings.engine_options())
        self._engine.wait_ready()
        if self._engine.version != assignment.version:
            raise CommandError(
                f"expected {assignment.version} on every machine, got {self._engine.version}: give one --checkpoint"
            )
        url, api_key = str(settings.label_studio_url), str(settings.label_studio_api_key)
        self._project = Project(url, api_key, assignment.number, patience_s=assignment.patience_s)
        self._loader = photo_loader(settings)
        self._busy, self._told_busy_s, self._telling = Busy(), 0.0, threading.Lock()

    def __call__(self, lot: dict[str, Any]) -> dict[str, Any]:
        """Boxes the tasks of these numbers; a row for each that failed, and one with the counts.

        The last count is of seconds in which the engine had a photo, of any lot, since a lot told of them.
        """
        from backend.bulk.uploads import Uploads
        from model import NotReady

        assignment, project = self._assignment, self._project
        tally = Tally()
        uploads = Uploads(project, assignment.version, again=assignment.wanted.again)
        ids = [int(task) for task in lot["data"]]
        wanted = replace(assignment.wanted, selection=Selection(ids=ids), limit=None)
        tasks = tasks_to_do(project, assignment.version, wanted, tally, on_held=uploads.verify)
        load = partial(load_photo, loader=self._loader, project=project)
        jobs = jobs_of(tasks, load, project.label_config)

        def work(job: Job, photo: Photo, _: Busy) -> tuple[bytes, int]:
            return predicted(
                job,
                photo,
                self._busy,
                engine=self._engine,
                config=project.label_config,
                score_threshold=assignment.score_threshold,
            )

        stopped = ""
        try:
            Run(jobs, work, ProjectSink(uploads), tally, fatal=(NotReady,), stopping=threading.Event()).finish()
        except Unavailable as error:
            stopped = str(error)
        rows = [{"task": job.key, "shown": job.shown, "why": why} for job, why in tally.failures]
        rows.append({"task": TOTALS, "shown": "", "why": stopped})
        counts = (tally.done, tally.boxes, tally.skipped, uploads.deleted, self._newly_busy_s())
        return {
            **{name: np.array([row[name] for row in rows], dtype=object) for name in ("shown", "why")},
            "task": np.array([row["task"] for row in rows], np.int64),
            "counts": np.array([counts] * len(rows), np.float64),
        }

    def _newly_busy_s(self) -> float:
        """The seconds that no lot has told of yet: those of two lots at once shall not count twice."""
        with self._telling:
            before, self._told_busy_s = self._told_busy_s, self._busy.seconds
            return self._told_busy_s - before


def preannotate_on_ray(
    cluster: Cluster,
    project: Project,
    wanted: Wanted,
    settings: Settings,
    *,
    patience_s: float,
    score_threshold: float | None = None,
) -> Report:
    """As `preannotate_project` does it, by the actors of a cluster. This machine needs neither a GPU nor weights."""
    from backend.bulk.uploads import Uploads

    ray = _import_ray()
    tally = Tally(total=count_of(project, wanted))
    ending, deleted = Ending(tally=tally), 0
    with connected(ray, cluster):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        share = share_of(nodes, cluster, device=settings.device)
        version = engine_version(ray, share, settings)
        assignment = Assignment(
            number=project.number,
            settings=settings,
            wanted=wanted,
            score_threshold=score_threshold,
            patience_s=patience_s,
            version=version,
        )
        uploads = Uploads(project, version, again=wanted.again)  # none from here, but what a kill left double
        try:
            with _shown(tally):
                ids = [task.id for task in tasks_to_do(project, version, wanted, tally, on_held=uploads.verify)]
                tally.started = time.monotonic()
                for row in _rows(ray, share, assignment, ids):
                    if row["task"] != TOTALS:
                        job = Job(number=0, key=int(row["task"]), shown=row["shown"], load=_not_here)
                        tally.failures.append((job, row["why"]))
                        continue
                    done, boxes, skipped, gone, busy_s = row["counts"]
                    tally.done += int(done)
                    tally.boxes += int(boxes)
                    tally.skipped += int(skipped)
                    tally.busy_s += float(busy_s) / share.actors
                    deleted += int(gone)
                    if row["why"]:
                        ending.stopped = row["why"]
                        break
        except Unavailable as error:
            ending.stopped = str(error)
        except KeyboardInterrupt:
            ending.stopped = INTERRUPTED
        tally.ended = time.monotonic()
    return report_of(ending, version, project=project, deleted=uploads.deleted + deleted)


def share_of(nodes: Sequence[Mapping[str, float]], cluster: Cluster, *, device: str) -> Share:
    """The largest equal shares that so many actors can have, each of one node, out of what the nodes are said to have.

    nodes: what each has, as Ray names it. Raises CommandError when they cannot hold the actors.
    """
    gpus = cluster.gpus
    if gpus is None:
        gpus = 1.0 if device != "cpu" and any(node.get("GPU", 0) for node in nodes) else 0.0
    if gpus > 1 and gpus != int(gpus):
        raise CommandError(f"--gpus: expected a part of one or a whole number, got {gpus:g}")

    def room(cpus: int) -> int:
        return sum(_room_of(node, cpus, gpus) for node in nodes)

    actors = cluster.actors or (max(1, room(1)) if gpus else 1)
    # Without a GPU the engine computes with all that an actor has; with one, processors decode photos.
    most = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    cpus = next((cpus for cpus in range(most, 0, -1) if room(cpus) >= actors), None)
    if cpus is None:
        raise CommandError(
            f"--ray: expected nodes that hold {actors} actors of {_told(1, gpus)} at least, got room for {room(1)}: "
            + _nodes_told(nodes)
        )
    return Share(actors=actors, cpus=cpus, gpus=gpus)


def _room_of(node: Mapping[str, float], cpus: int, gpus: float) -> int:
    """How many actors a node holds."""
    room = int(node.get("CPU", 0) // cpus)
    if not gpus:
        return room
    whole = int(node.get("GPU", 0))
    # Ray gives parts of one GPU only. The last digits of a part like 0.2 shall not cost an actor.
    return min(room, whole * int(1 / gpus + 1e-6) if gpus <= 1 else whole // int(gpus))


def _nodes_told(nodes: Sequence[Mapping[str, float]]) -> str:
    kinds = Counter(_told(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes)
    return "; ".join(f"{count} with {kind}" for kind, count in kinds.items()) or "no nodes"


def _told(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPUs and {gpus:g} GPUs"


@contextmanager
def _shown(tally: Tally) -> Iterator[None]:
    """Shows the tally several times a second, since lots come minutes apart, and once more at the end."""
    over = threading.Event()
    with tally_shown("preannotate") as show:

        def repeat() -> None:
            while not over.wait(POLL_S):
                show(tally)

        thread = threading.Thread(target=repeat, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            show(tally)


@contextmanager
def connected(ray: Any, cluster: Cluster) -> Iterator[None]:
    """A connection to the cluster, and errors of Ray in one line."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
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


def engine_version(ray: Any, share: Share, settings: Settings) -> str:
    """The version of the engine that an actor will have, asked where one will be.

    Raises CommandError when the cluster has no room for an actor and gets none for a while.
    """
    said = ray.remote(**share.resources)(_version).remote(settings)
    if not ray.wait([said], timeout=ROOM_S)[0]:
        free = ray.available_resources()
        raise CommandError(
            f"--ray: expected a node with {_told(share.cpus, share.gpus)} free within {ROOM_S:g} s, "
            f"got {_told(free.get('CPU', 0), free.get('GPU', 0))} free in the whole cluster"
        )
    ray.get(next(said))
    return str(ray.get(next(said)))


def _version(settings: Settings) -> Iterator[str]:
    """Something as soon as it runs, then the version: reading weights may take long, and is no want of room."""
    from model import Sam2Engine

    yield ""
    engine = Sam2Engine(settings.engine_options())
    try:
        engine.wait_ready()
        yield engine.version
    finally:
        engine.close()


def _rows(ray: Any, share: Share, assignment: Assignment, ids: list[int]) -> Iterator[dict[str, Any]]:
    """What the actors say, in the order in which they are done."""
    if not ids:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Small projects too are for all actors.
    count = max(share.actors * LOTS_AT_ONCE, -(-len(ids) // TASKS_PER_LOT))
    lots = [lot for lot in np.array_split(np.array(ids, np.int64), count) if len(lot)]
    done = ray.data.from_numpy(lots).map_batches(
        Worker,
        fn_constructor_args=(assignment,),
        batch_size=None,
        # Ray Data starts dead actors again and repeats what they were at, as often as it takes.
        compute=ray.data.ActorPoolStrategy(
            size=share.actors,
            max_tasks_in_flight_per_actor=LOTS_AT_ONCE,
            max_concurrent_calls_per_actor=LOTS_AT_ONCE,
            enable_true_multi_threading=True,  # else Ray keeps lots apart, for fear for a GPU that the engine guards
        ),
        **share.resources,
    )
    yield from done.iter_rows()


def _not_here() -> Photo:
    raise AssertionError("the job was another process's")


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise CommandError("--ray: expected the extra ray, got none: install facings[ray]") from None
    return ray


def _innermost(error: BaseException) -> str:
    """The line that says what happened in an actor, under Ray's own traces."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[-1]
