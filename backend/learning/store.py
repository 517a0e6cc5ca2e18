"""A project's folder in STATE_DIR: its photos with known boxes, the versions of its detector, and which one serves.

Knows files; nothing of Label Studio, engines or training. Every file is whole or not there, so that any process may be
killed at any time. One process at a time trains or changes which version serves (`locked`); everybody may read.

STATE_DIR/projects/<id>-<created>/
    state.json          which version serves, the threshold, which photos are kept aside
    photos.json         each photo with known boxes, and what was corrected on it
    photos/             the photos
    versions/<n>/       weights and version.json of each version, also of those that were not promoted
    run/                the training that goes on: what it needs to be resumed, and progress.json
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from backend.errors import CommandError
from backend.settings import Settings
from model.quality import Truth
from model.types import FloatArray

_KEY = re.compile(r"(\d+)[.-](\d+)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class State:
    """serving: number of the version that serves; None: the engine's own weights. score_threshold: of the project;
    None: that of the weights. kept_aside, learned: photos that are only measured on, and those that were learned
    from."""

    serving: int | None = None
    score_threshold: float | None = None
    kept_aside: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Figures:
    """How good boxes are on the photos kept aside. corrections: per 100 facings, at the threshold that would serve."""

    corrections: float
    ap: float
    ap50: float
    score_threshold: float


@dataclass(frozen=True, kw_only=True)
class Version:
    """One version of the project's detector.

    parent: version of the weights that it began with. learned, kept_aside: numbers of photos. learned_from: digest of
    the photos' annotations. minutes: of training. before, after: of the parent's weights and of these. made_at: ISO
    8601.
    """

    number: int
    parent: str
    weights: str
    sha256: str
    learned: int
    kept_aside: int
    learned_from: str
    minutes: float
    before: Figures
    after: Figures
    is_promoted: bool
    made_at: str

    def describe(self) -> str:
        """Its figures, in one line."""
        outcome = "serves" if self.is_promoted else "is kept aside, since it is no better"
        return (
            f"version {self.number}, learned from {self.learned} photos in {self.minutes:.0f} min, {outcome}: "
            f"{self.before.corrections:.1f} → {self.after.corrections:.1f} corrections per 100 facings on "
            f"{self.kept_aside} photos kept aside"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class KnownPhoto:
    """A photo whose annotation was submitted.

    key: names it in the project. annotation: id of its annotation and when that changed. file: its name below photos/.
    boxes_xyxy: of all its facings, `[N, 4]`. missed, false, to_drag: what the annotator corrected of the boxes that
    were there before; None where there were none. submitted_at: ISO 8601.
    """

    key: str
    annotation: str
    file: str
    size_wh: tuple[int, int]
    boxes_xyxy: FloatArray = field(repr=False)
    submitted_at: str
    missed: int | None = None
    false: int | None = None
    to_drag: int | None = None

    @property
    def truth(self) -> Truth:
        return Truth(size_wh=self.size_wh, boxes_xyxy=self.boxes_xyxy.astype(np.float64))

    @property
    def corrections(self) -> int | None:
        """How many boxes were corrected; None where none were there before."""
        if self.missed is None or self.false is None or self.to_drag is None:
            return None
        return self.missed + self.false + self.to_drag


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a training does now. stage: reading, learning or measuring. minutes_left: of learning; None: not known."""

    stage: str
    photos: int = 0
    minutes_left: float | None = None


class ProjectStore:
    """One project's folder. All methods raise OSError where the disk does."""

    def __init__(self, folder: Path, project_id: int) -> None:
        self.folder, self.project_id = folder, project_id

    @classmethod
    def of(cls, state_dir: Path, key: str) -> ProjectStore | None:
        """The project's folder, which need not exist. key: as Label Studio names a project, "3.1795244969": its id and
        when it was created. None for another kind of key."""
        match = _KEY.fullmatch(key)
        if match is None:
            return None
        return cls(state_dir / "projects" / f"{match[1]}-{match[2]}", int(match[1]))

    @classmethod
    def find(cls, state_dir: Path, project_id: int) -> ProjectStore | None:
        """The folder of the newest project with this id; None where there is none."""
        folders = [path for path in (state_dir / "projects").glob(f"{project_id}-*") if _KEY.fullmatch(path.name)]
        newest = max(folders, key=lambda path: int(path.name.partition("-")[2]), default=None)
        return None if newest is None else cls(newest, project_id)

    @property
    def key(self) -> str:
        """As Label Studio names the project."""
        return self.folder.name.replace("-", ".")

    def state(self) -> State:
        """What serves, and what is kept aside."""
        content = _read(self.folder / "state.json")
        if not content:
            return State()
        lists = {name: tuple(content.get(name, ())) for name in ("kept_aside", "learned")}
        known = {field.name for field in fields(State)}
        return State(**{name: value for name, value in {**content, **lists}.items() if name in known})

    def change(self, **changes: Any) -> State:
        """Writes the state with these fields changed."""
        state = replace(self.state(), **changes)
        _write(self.folder / "state.json", asdict(state))
        return state

    def changed_at(self) -> int:
        """Changes whenever the state does; 0 where there is none yet."""
        try:
            return (self.folder / "state.json").stat().st_mtime_ns
        except OSError:
            return 0

    def photos(self) -> list[KnownPhoto]:
        """The photos with known boxes, in the order in which they were submitted."""
        rows = _read(self.folder / "photos.json").get("photos", [])
        photos = [
            KnownPhoto(
                **{
                    **row,
                    "size_wh": tuple(row["size_wh"]),
                    "boxes_xyxy": np.array(row["boxes_xyxy"], np.float32).reshape(-1, 4),
                }
            )
            for row in rows
        ]
        return sorted(photos, key=lambda photo: (photo.submitted_at, photo.key))

    def write_photos(self, photos: Sequence[KnownPhoto]) -> None:
        """Replaces the list of photos; files of others are deleted."""
        rows = [{**vars(photo), "boxes_xyxy": photo.boxes_xyxy.round(2).tolist()} for photo in photos]
        _write(self.folder / "photos.json", {"photos": rows})
        kept = {photo.file for photo in photos}
        for path in self.photo_path("").glob("*"):
            if path.name not in kept:
                path.unlink(missing_ok=True)

    def photo_path(self, file: str) -> Path:
        return self.folder / "photos" / file

    def versions(self) -> list[Version]:
        """All versions, the oldest first; one whose facts cannot be read is left out."""
        found = []
        for path in (self.folder / "versions").glob("*/version.json"):
            with contextlib.suppress(KeyError, TypeError):
                content = _read(path)
                figures = {name: Figures(**content[name]) for name in ("before", "after")}
                found.append(Version(**{**content, **figures}))
        return sorted(found, key=lambda version: version.number)

    def weights(self, version: Version) -> Path:
        return self.folder / "versions" / str(version.number) / version.weights

    def is_whole(self, number: int) -> bool:
        """Whether the version's weights are there as they were made."""
        for version in self.versions():
            if version.number == number:
                with contextlib.suppress(OSError), self.weights(version).open("rb") as file:
                    return hashlib.file_digest(file, "sha256").hexdigest() == version.sha256
        return False

    def next_number(self) -> int:
        """Of the next version."""
        return 1 + max((version.number for version in self.versions()), default=0)

    def add(self, version: Version, weights: Path) -> None:
        """Keeps a version with its weights, which are moved."""
        folder = self.folder / "versions" / str(version.number)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(weights, folder / f".{version.weights}")
        (folder / f".{version.weights}").replace(folder / version.weights)
        _write(folder / "version.json", asdict(version))

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def progress(self) -> Progress | None:
        """What a training does now; None where none goes on."""
        if not self.is_locked():
            return None
        content = _read(self.run / "progress.json")
        return Progress(**content) if content else None

    def report(self, progress: Progress) -> None:
        """Tells others how far the training is."""
        _write(self.run / "progress.json", asdict(progress))

    @contextlib.contextmanager
    def locked(self, *, wait_s: float = 0.0) -> Iterator[None]:
        """Alone in changing the project, while the block runs. Raises CommandError where another process is, for longer
        than `wait_s`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            until = time.monotonic() + wait_s
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= until:
                        raise CommandError(f"project {self.project_id}: a training of it goes on already") from None
                    time.sleep(0.1)
            yield

    def is_locked(self) -> bool:
        """Whether another process, or another part of this one, holds `locked`."""
        try:
            with (self.folder / "lock").open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False


def learned_settings(settings: Settings, project_key: str) -> Settings:
    """The settings with the detector and the threshold that serve the project, where it learned any. A run that begins
    with them keeps them, whatever is learned meanwhile. score_threshold: one that was given stays."""
    store = ProjectStore.of(Path(settings.state_dir), project_key) if settings.state_dir is not None else None
    if store is None:
        return settings
    state, detector = store.state(), settings.detector
    for version in store.versions():
        if version.number == state.serving:
            detector = str(store.weights(version))
    given = settings.score_threshold
    return replace(settings, detector=detector, score_threshold=state.score_threshold if given is None else given)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file, or one that was damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(content))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
