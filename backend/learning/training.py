"""A project's detector learns from its photos, and serves only if that made it better.

Knows which photos are learned from and which are kept aside, how long a training goes on, and what better means.
Meant for a process of its own, with the lowest priority; it may be killed at any time, and goes on when it is started
again.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from backend.errors import CommandError
from backend.label_studio.project import Project
from backend.learning.collect import collect
from backend.learning.forgetting import forget_less
from backend.learning.store import Figures, KnownPhoto, Progress, ProjectStore, Version
from backend.photos.files import read_photo, read_pixels
from backend.photos.loader import PhotoLoader
from backend.reporting import log_event
from backend.settings import Settings
from model import Detections, EngineOptions, Sam2Engine
from model.checkpoints import BUNDLED, BUNDLED_WEIGHTS, calibrated_threshold, find_checkpoint
from model.device import choose_placement
from model.quality import CANDIDATE_SCORE, SWEEP, Truth, average_precision, count_corrections, nearest_good
from model.sam2_module import has_proposal_head
from model.training.samples import LabelledPhoto

KEPT_ASIDE_SHARE = 0.2
LEAST_KEPT_ASIDE = 4
LEAST_LEARNED = 1
PROMOTION_MARGIN = 0.03  # by which share corrections have to fall
MEASUREMENTS = 4  # of a training: after each quarter of its time
PATIENCE = 2  # measurements without a better one, after which a training ends
LOCK_WAIT_S = 10.0  # for a server that reads what was submitted

Show = Callable[[str], None]


class _Enough(Exception):
    """The training has stopped getting better."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training made. weights: its best checkpoint. before, after: of the weights at the start, and of these."""

    before: Figures
    after: Figures
    weights: Path
    minutes: float

    @property
    def is_better(self) -> bool:
        """Whether it is better by more than chance and choice explain."""
        return self.after.corrections <= (1 - PROMOTION_MARGIN) * self.before.corrections


@dataclass(frozen=True, kw_only=True)
class Split:
    """The project's photos: those that are learned from, and those that never are."""

    learned: tuple[KnownPhoto, ...]
    kept_aside: tuple[KnownPhoto, ...]


def learn(settings: Settings, project: Project, *, show: Show) -> Version | None:
    """Reads what was submitted, trains, measures, and lets the new version serve if it is better.

    settings: with STATE_DIR. Returns the new version; None where nothing was submitted since the last one. show: told
    what goes on. Raises CommandError for too few photos and for a training that goes on already, ProjectError where
    Label Studio cannot be asked, OSError where the disk is full.
    """
    store = ProjectStore.of(Path(str(settings.state_dir)), project.key)
    if store is None:
        raise CommandError(f"project {project.id}: expected a key such as 3.1795244969, got {project.key!r}")
    with store.locked(wait_s=LOCK_WAIT_S):
        store.report(Progress(stage="reading"))
        show("reading photos and annotations")
        photos = collect(project, PhotoLoader(settings), store)
        parts = split(photos, store)
        parent, weights = serving_weights(settings, store)
        digest = _digest(photos, parent)
        versions = store.versions()
        if versions and versions[-1].learned_from == digest:
            return None
        show(f"learning from {len(parts.learned)} photos, {len(parts.kept_aside)} are kept aside to measure on")
        threshold = store.state().score_threshold
        if threshold is None:
            threshold = calibrated_threshold(find_checkpoint(str(weights), config=None, has_gpu=False)) or 0.0
        run = store.run / digest[:16]
        for other in store.run.glob("*"):
            if other != run and other.is_dir():
                shutil.rmtree(other, ignore_errors=True)  # of other photos: it cannot go on
        trained = fine_tune(
            run,
            [LabelledPhoto(path=store.photo_path(photo.file), boxes_xyxy=photo.boxes_xyxy) for photo in parts.learned],
            weights,
            partial(measure, settings, store, parts.kept_aside, threshold),
            origin=first_weights(settings)[1],
            max_pixels=settings.max_photo_pixels,
            minutes=settings.learn_minutes,
            device=settings.device,
            show=show,
            report=store.report,
        )
        version = _keep(store, parts, trained, parent=parent, digest=digest)
        shutil.rmtree(store.run, ignore_errors=True)
        return version


def split(photos: Sequence[KnownPhoto], store: ProjectStore) -> Split:
    """The project's photos in two parts; see `keys_kept_aside`. Raises CommandError where too few are left to learn
    from."""
    state = store.state()
    chosen = keys_kept_aside([photo.key for photo in photos], state.kept_aside, state.learned)
    aside = tuple(photo for photo in photos if photo.key in chosen)
    learned = tuple(photo for photo in photos if photo.key not in chosen)
    if len(aside) < LEAST_KEPT_ASIDE or len(learned) < LEAST_LEARNED:
        raise CommandError(
            f"expected at least {LEAST_KEPT_ASIDE + LEAST_LEARNED} submitted photos with boxes, got {len(photos)}"
        )
    store.change(
        kept_aside=tuple(sorted({*state.kept_aside, *chosen})),
        learned=tuple(sorted({*state.learned, *(photo.key for photo in learned)})),
    )
    return Split(learned=learned, kept_aside=aside)


def keys_kept_aside(keys: Sequence[str], before: Collection[str] = (), learned: Collection[str] = ()) -> set[str]:
    """Which photos are never learned from: a fifth, at least LEAST_KEPT_ASIDE; chosen by a hash of their names.

    before: those that were kept aside already, which stay so. learned: those that were learned from, which can never be
    measured on.
    """
    chosen = {key for key in keys if key in before}
    free = sorted((key for key in keys if key not in chosen and key not in learned), key=_hash)
    wanted = max(LEAST_KEPT_ASIDE, math.ceil(KEPT_ASIDE_SHARE * len(keys)))
    return chosen | set(free[: max(0, wanted - len(chosen))])


def serving_weights(settings: Settings, store: ProjectStore) -> tuple[str, Path]:
    """What serves the project, and its weights: a version of its own, else the detector of the settings."""
    serving = store.state().serving
    for version in store.versions():
        if version.number == serving:
            return f"version {version.number}", store.weights(version)
    return first_weights(settings)


def first_weights(settings: Settings) -> tuple[str, Path]:
    """The detector that a project begins with, and its weights."""
    if settings.detector is not None:
        return Path(settings.detector).stem, Path(settings.detector)
    own = Path(settings.checkpoint)
    if own.suffix == ".safetensors" and has_proposal_head(find_checkpoint(str(own), config=None, has_gpu=False).config):
        return own.stem, own
    return BUNDLED, BUNDLED_WEIGHTS


def measure(
    settings: Settings, store: ProjectStore, photos: Sequence[KnownPhoto], score_threshold: float, weights: Path
) -> Figures:
    """How good the boxes of a detector are on photos with known boxes. score_threshold: in force now."""
    engine = Sam2Engine(EngineOptions(checkpoint=str(weights), device=settings.device, cache_bytes=0))
    read = partial(read_photo, max_pixels=settings.max_photo_pixels)
    try:
        engine.wait_ready()
        found = [
            engine.preannotate(read(store.photo_path(photo.file)), score_threshold=CANDIDATE_SCORE) for photo in photos
        ]
    finally:
        engine.close()
    return figures_of([photo.truth for photo in photos], found, score_threshold)


def figures_of(truths: Sequence[Truth], found: Sequence[Detections], score_threshold: float) -> Figures:
    """Of detections with a score from CANDIDATE_SCORE on. score_threshold: in force now."""
    precision = average_precision(truths, found)
    chosen = nearest_good(count_corrections(truths, found, SWEEP), score_threshold)
    return Figures(
        corrections=chosen.per_100(), ap=precision.ap, ap50=precision.ap50, score_threshold=chosen.score_threshold
    )


def fine_tune(
    run: Path,
    learned: Sequence[LabelledPhoto],
    start_from: Path,
    measure: Callable[[Path], Figures],
    *,
    origin: Path,
    max_pixels: int,
    minutes: float,
    device: str,
    seed: int = 0,
    show: Show,
    report: Callable[[Progress], None],
) -> Trained:
    """Trains a detector on photos with known boxes; goes on where one was killed that had the same folder.

    measure: figures of a checkpoint on photos kept aside. The weights that are best there are taken, of at most
    MEASUREMENTS + 1; so their figure is a little better than it will be on other photos. Where they find rendered
    shelves much worse than the project's first weights, `origin`, they are moved back towards those at the start.
    show, report: as in `learn`.
    """
    from model.training.loop import train
    from model.training.options import TrainOptions, for_few_photos
    from model.training.samples import LabelledPhotos

    run.mkdir(parents=True, exist_ok=True)
    best_path = run / "best.safetensors"
    is_unchanged = not (run / "last.pt").exists()  # the first weights that are exported are those of the start
    measured: list[Figures] = []
    best = 0  # its place among them

    def measured_on(checkpoint: Path) -> Figures:
        nonlocal best
        report(Progress(stage="measuring", photos=len(learned)))
        figures = measure(checkpoint)
        show(f"{figures.corrections:.1f} corrections per 100 facings, AP {figures.ap:.3f}")
        measured.append(figures)
        if len(measured) == 1 or figures.corrections < measured[best].corrections:
            best = len(measured) - 1
            shutil.copyfile(checkpoint, best_path)
        return figures

    def score(checkpoint: Path) -> dict[str, float]:
        nonlocal is_unchanged
        figures = measured[0] if is_unchanged else measured_on(checkpoint)
        is_unchanged = False
        if len(measured) - 1 - best >= PATIENCE:
            raise _Enough
        return {"score_threshold": figures.score_threshold}

    def progress(figures: Mapping[str, float]) -> None:
        if "minutes_left" in figures:
            report(Progress(stage="learning", photos=len(learned), minutes_left=figures["minutes_left"]))

    options = TrainOptions(
        out=run,
        minutes=minutes,
        start_from=start_from,
        labelled=LabelledPhotos(photos=tuple(learned), read=partial(read_pixels, max_pixels=max_pixels)),
        seed=seed,
        device=str(choose_placement(device).device),
        workers=1,
        resume=True,
        report_every=2,
        save_every_s=60,
        score_every_s=60 * minutes / MEASUREMENTS,
    )
    started = time.monotonic()
    measured_on(start_from)
    try:
        train(for_few_photos(options), progress, score=score)
    except _Enough:
        show("no better any more: the training ends early")
    after = measured[best]
    if best:
        report(Progress(stage="measuring", photos=len(learned)))
        if share := forget_less(best_path, start_from, origin=origin, device=device):
            after = measure(best_path)
            show(f"{share:.0%} of what was learned is given up, since rendered shelves were forgotten")
            show(f"{after.corrections:.1f} corrections per 100 facings, AP {after.ap:.3f}")
    return Trained(before=measured[0], after=after, weights=best_path, minutes=(time.monotonic() - started) / 60)


def _keep(store: ProjectStore, parts: Split, trained: Trained, *, parent: str, digest: str) -> Version:
    """Keeps the version, and lets it serve if it is better."""
    number = store.next_number()
    before, after = trained.before, trained.after
    version = Version(
        number=number,
        parent=parent,
        weights=f"project-{store.project_id}-v{number}.safetensors",
        sha256=hashlib.sha256(trained.weights.read_bytes()).hexdigest(),
        learned=len(parts.learned),
        kept_aside=len(parts.kept_aside),
        learned_from=digest,
        minutes=round(trained.minutes, 2),
        before=before,
        after=after,
        is_promoted=trained.is_better,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    store.add(version, trained.weights)
    if version.is_promoted:
        store.change(serving=number, score_threshold=after.score_threshold)
    log_event(
        logging.INFO,
        "version_made",
        project=store.project_id,
        version=number,
        corrections_before=before.corrections,
        corrections_after=after.corrections,
        promoted=str(version.is_promoted).lower(),
    )
    return version


def roll_back(store: ProjectStore, number: int | None) -> None:
    """Lets another version serve; None: the weights that the project began with. Raises CommandError for one that the
    project does not have."""
    with store.locked():
        versions = {version.number: version for version in store.versions()}
        if number is not None and number not in versions:
            known = ", ".join(map(str, versions)) or "none"
            raise CommandError(f"project {store.project_id}: expected one of its versions ({known}), got {number}")
        threshold = None if number is None else versions[number].after.score_threshold
        store.change(serving=number, score_threshold=threshold)


def lowest_priority() -> None:
    """Lets this process work only where no other wants to."""
    os.nice(19)
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _digest(photos: Sequence[KnownPhoto], parent: str) -> str:
    """Of what would be learned: the same photos with the same annotations on the same weights have the same."""
    rows = sorted(f"{photo.key} {photo.annotation}" for photo in photos)
    return hashlib.sha256("\n".join([parent, *rows]).encode()).hexdigest()


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
