"""Learning in a running server: which weights serve a project, its threshold, and when its detector learns.

Knows the engine's tuned users, the projects' folders, and child processes. Trainings run in a child process
(`python -m backend.learning`), one at a time, with the lowest priority. What a project's folder says counts, whoever
wrote it: a version that was trained or rolled back elsewhere serves here from the next request on.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cachetools import LRUCache

from backend.errors import CommandError
from backend.label_studio.project import Project
from backend.learning.collect import collect
from backend.learning.store import KnownPhoto, ProjectStore
from backend.metrics import ProjectFigures
from backend.reporting import log_event
from backend.service import Service
from backend.settings import Settings
from model import Detections, EngineError, Sam2Engine
from model.quality import CANDIDATE_SCORE, SWEEP, count_corrections, nearest_good

LEAST_FOR_THRESHOLD = 5  # photos
PHOTOS_FOR_THRESHOLD = 40  # the latest; each is looked at once
THRESHOLD_MARGIN = 0.01  # by which share corrections have to fall for another threshold
SETTLE_S = 5.0  # after an annotation, in case more follow
RETRY_BUDGET_S = 30.0
MAX_PROJECTS = 1000
START_TRAINING = "START_TRAINING"
ANNOTATION_ACTIONS = ("ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_CREATED", "ANNOTATIONS_DELETED")


@dataclass(frozen=True, kw_only=True)
class _Tuned:
    """A project's service, and the state of its folder that it was made from."""

    changed_at: int
    service: Service


class Learning:
    """What projects learned, for the requests of a server. Thread-safe.

    settings: with STATE_DIR. service: with the engine's own weights; serves projects that learned nothing yet.
    """

    def __init__(self, settings: Settings, service: Service, engine: Sam2Engine) -> None:
        self._settings = settings
        self._service = service
        self._engine = engine
        self._state_dir = Path(str(settings.state_dir))
        self._services: LRUCache[str, _Tuned] = LRUCache(MAX_PROJECTS)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._dirty: set[int] = set()  # projects with new annotations
        self._wanted: set[int] = set()  # projects whose training was asked for
        self._child: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._looked_at: LRUCache[tuple[str, str], Detections] = LRUCache(10 * PHOTOS_FOR_THRESHOLD)
        self._threads = [
            threading.Thread(target=loop, name=name, daemon=True)
            for name, loop in (("thresholds", self._thresholds), ("trainings", self._trainings))
        ]
        for thread in self._threads:
            thread.start()

    def service_of(self, project_key: str) -> Service:
        """What answers the project's requests: with its own detector and threshold, where it has them."""
        store = ProjectStore.of(self._state_dir, project_key)
        changed_at = store.changed_at() if store is not None else 0
        if store is None or not changed_at or self._service.engine.state != "ready":
            return self._service
        with self._lock:
            kept = self._services.get(project_key)
        if kept is None or kept.changed_at != changed_at:
            kept = _Tuned(changed_at=changed_at, service=self._tuned(store))
            with self._lock:
                self._services[project_key] = kept
        return kept.service

    def find(self, project_id: int) -> ProjectStore:
        """The folder of the project with this id; an empty one where nothing was submitted yet."""
        found = ProjectStore.find(self._state_dir, project_id)
        return found or ProjectStore(self._state_dir / "projects" / f"{project_id}-0", project_id)

    def figures(self) -> list[ProjectFigures]:
        """Of all projects that learned, for the metrics."""
        stores = [ProjectStore.of(self._state_dir, path.name) for path in (self._state_dir / "projects").glob("*")]
        return [_figures(store) for store in stores if store is not None]

    def happened(self, action: str, project_id: int) -> None:
        """Takes note of what Label Studio reports. Returns at once: an annotator's saving waits for it."""
        with self._changed:
            if action == START_TRAINING:
                self._wanted.add(project_id)
            elif action in ANNOTATION_ACTIONS:
                self._dirty.add(project_id)
            if len(self._wanted) > MAX_PROJECTS or len(self._dirty) > MAX_PROJECTS:
                self._wanted, self._dirty = set(), set()  # nobody has so many: somebody invents them
            self._changed.notify_all()

    def close(self) -> None:
        """Ends a training that goes on; it can be resumed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            if self._child is not None:
                self._child.terminate()

    def _tuned(self, store: ProjectStore) -> Service:
        state = store.state()
        weights = None
        for version in store.versions():
            if version.number == state.serving:
                weights = store.weights(version)
        try:
            if state.serving is not None and (weights is None or not store.is_whole(state.serving)):
                raise CommandError(f"expected version {state.serving} whole in {store.folder.name}, got less")
            engine = self._engine.tuned(weights, score_threshold=state.score_threshold)
        except (EngineError, CommandError) as error:
            log_event(logging.ERROR, "version_unusable", project=store.project_id, reason=str(error))
            return self._service
        log_event(logging.INFO, "version_serves", project=store.project_id, model_version=engine.version)
        return self._service.with_engine(engine)

    # -- the threshold -----------------------------------------------------------------------------------------------

    def _thresholds(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._dirty)
                self._changed.wait_for(lambda: self._closed, timeout=SETTLE_S)
                if self._closed:
                    return
                if not self._dirty:  # forgotten meanwhile, see `happened`
                    continue
                project_id = self._dirty.pop()
            _in_one_line(self._set_threshold, project_id)

    def _set_threshold(self, project_id: int) -> None:
        """Reads what was submitted, and takes the threshold that would have cost the fewest corrections there."""
        with self._project(project_id) as project:
            store = ProjectStore.of(self._state_dir, project.key)
            if store is None or store.is_locked():
                return  # looked at again when the training has ended
            with store.locked():
                photos = collect(project, self._service.photos, store)
            service = self.service_of(project.key)
            state = store.state()
            new = new_since_the_last_version(store, photos)
            if state.serving is not None:  # of the others its detector is surer than it will be of new ones
                photos = [photo for photo in photos if photo.key in state.kept_aside]
            if len(photos) >= LEAST_FOR_THRESHOLD:
                self._choose_threshold(store, service, photos[-PHOTOS_FOR_THRESHOLD:])
            every = self._settings.learn_every
            if every and new >= every:
                self.happened(START_TRAINING, project_id)

    def _choose_threshold(self, store: ProjectStore, service: Service, photos: list[KnownPhoto]) -> None:
        serving = store.state().serving
        found = []
        for photo in photos:
            key = service.engine.version, photo.file
            if key not in self._looked_at:
                pixels = service.photo(store.photo_path(photo.file))
                self._looked_at[key] = service.engine.preannotate(pixels, score_threshold=CANDIDATE_SCORE, lane="bulk")
            found.append(self._looked_at[key])
        truths = [photo.truth for photo in photos]
        in_force = service.engine.score_threshold
        best = nearest_good(count_corrections(truths, found, SWEEP), in_force)
        (now,) = count_corrections(truths, found, [in_force])
        if best.per_100() > (1 - THRESHOLD_MARGIN) * now.per_100():
            return
        if store.is_locked():
            return  # as above
        with store.locked():
            if store.state().serving != serving:
                return  # it was chosen for another version's scores
            store.change(score_threshold=best.score_threshold)
        log_event(
            logging.INFO,
            "threshold_chosen",
            project=store.project_id,
            photos=len(photos),
            score_threshold=best.score_threshold,
            corrections_before=now.per_100(),
            corrections_after=best.per_100(),
        )

    # -- trainings ---------------------------------------------------------------------------------------------------

    def _trainings(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._wanted)
                if self._closed:
                    return
                project_id = self._wanted.pop()
            _in_one_line(self._train, project_id)

    def _train(self, project_id: int) -> None:
        """One training in a child process, from its start to its end."""
        with self._project(project_id):
            pass  # it exists: a process for one that somebody invented would cost seconds
        log_event(logging.INFO, "training_begins", project=project_id)
        command = [sys.executable, "-m", "backend.learning", str(project_id)]
        with self._changed:
            if self._closed:
                return
            self._child = subprocess.Popen(  # noqa: S603
                command, env=self._settings.child_environ(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )
        status = self._child.wait()
        self._child = None
        level = logging.WARNING if status else logging.INFO
        log_event(level, "training_ended", project=project_id, exit_status=status)
        with self._changed:
            self._dirty.add(project_id)  # what was submitted meanwhile
            self._changed.notify_all()

    def _project(self, project_id: int) -> Project:
        url, key = str(self._settings.label_studio_url), str(self._settings.label_studio_api_key)
        return Project(url, key, project_id, retry_budget_s=RETRY_BUDGET_S)


def _figures(store: ProjectStore) -> ProjectFigures:
    serving = store.state().serving
    versions = {version.number: version for version in store.versions()}
    return ProjectFigures(
        project=store.project_id,
        version=serving or 0,
        corrections=versions[serving].after.corrections if serving in versions else None,
        is_training=store.progress() is not None,
    )


def learning_of(settings: Settings, service: Service) -> Learning | None:
    """Learning as the settings ask for; None without STATE_DIR, or where the engine cannot be tuned."""
    if settings.state_dir is None or not isinstance(service.engine, Sam2Engine):
        return None
    learning = Learning(settings, service, service.engine)
    service.metrics.watch_projects(learning.figures)
    return learning


def _in_one_line(work: Callable[[int], None], project_id: int) -> None:
    """Does the work of a thread that must not end: what goes wrong is one line in the log."""
    try:
        work(project_id)
    except Exception as error:
        log_event(logging.WARNING, "learning_failed", project=project_id, reason=f"{type(error).__name__}: {error}")


def new_since_the_last_version(store: ProjectStore, photos: Sequence[KnownPhoto]) -> int:
    """How many photos came. Once older ones are left out their number stays, but new ones have new keys."""
    state, versions = store.state(), store.versions()
    more = len(photos) - (versions[-1].learned + versions[-1].kept_aside if versions else 0)
    unseen = {photo.key for photo in photos} - {*state.learned, *state.kept_aside}
    return max(more, len(unseen))
