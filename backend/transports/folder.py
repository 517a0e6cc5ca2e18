"""A watched folder: photos go in, boxes come out as files.

Knows files and folders, and the formats of boxes. A photo is taken when nobody writes to it any more. Taking it moves
it into the watcher's own folder below IN/.facings, so that of several watchers only one has it. Its boxes are written,
each file whole or not at all, and only then is it moved to OUT/done, or to OUT/failed with the reason. A watcher holds
a lock on its folder; one that was killed holds none, and the next look of another watcher puts its photos back.

    IN/a.jpg, IN/a.prompt                                 the photo; prompts for it, JSON as in transports.messages
    OUT/a.jpg.json or OUT/a.jpg.coco.json or OUT/a.txt    boxes
    OUT/a.jpg.mask.png, OUT/a.jpg.opex.json               all masks in one picture, and their outlines in OPEX
    OUT/done/a.jpg                                        the photo, afterwards
    OUT/failed/a.jpg, OUT/failed/a.jpg.error.json         one that cannot be boxed, and why
"""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath

import numpy as np

from backend.bulk.formats import BoxedPhoto, BoxedTask, Format, open_writer, yolo_rows
from backend.bulk.jobs import default_label_config
from backend.bulk.outputs import os_errors_as_command_error, write_whole
from backend.errors import CommandError, EngineFailure, FacingsError, PromptError, RequestError, extra_needed
from backend.photos.files import SUFFIXES, display_name
from backend.reporting import log_event
from backend.service import Service
from backend.transports.fields import read_object
from backend.transports.messages import (
    PhotoAnswer,
    PhotoRequest,
    answer,
    answer_to_json,
    error_to_json,
    read_prompt,
)
from backend.transports.opex import opex
from model import Detections, Prompt

HIDDEN = ".facings"
PROMPT_SUFFIX = ".prompt"
MAX_PROMPT_BYTES = 1 << 20
LOOK_EVERY_S = 1.0
RETRY_AFTER_S = 10.0  # when boxes cannot be written: a full disk, a network drive that is away
AT_ONCE = 2  # photos: one is decoded while the engine has another


class BoxFormat(StrEnum):
    """How the boxes of a photo are written."""

    json = "json"
    coco = "coco"
    yolo = "yolo"


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """source, target: the folders IN and OUT; neither is inside the other.

    want_masks: also write the masks, as PNG and OPEX. needs_prompt: take a photo only together with its prompt file.
    settle_s: seconds for which a photo's file must not change before it is taken. polling: look at the folder every
    second instead of waiting for the system to report changes, which it does not for network drives.
    """

    source: Path
    target: Path
    kind: BoxFormat = BoxFormat.json
    want_masks: bool = False
    needs_prompt: bool = False
    score_threshold: float | None = None
    settle_s: float = 2.0
    polling: bool = False


@dataclass(frozen=True, kw_only=True)
class _Taken:
    """A photo in the watcher's own folder. name: its path below IN."""

    name: PurePosixPath
    photo: Path
    prompt: Path | None


@dataclass(kw_only=True)
class Counts:
    """What a watcher did so far."""

    done: int = 0
    failed: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, *, failed: bool) -> None:
        with self._lock:
            self.done += not failed
            self.failed += failed


def watch(service: Service, options: WatchOptions, stop: threading.Event) -> Counts:
    """Boxes photos until `stop` is set; those that were begun are finished. Raises CommandError for wrong folders."""
    with extra_needed("watch", "facings watch"):
        import watchfiles

    _check_folders(options)
    counts = Counts()
    with _own_folder(options.source) as own, ThreadPoolExecutor(AT_ONCE, thread_name_prefix="photo") as pool:
        log_event(logging.INFO, "watching", source=str(options.source), target=str(options.target))
        changes = watchfiles.watch(
            options.source,
            stop_event=stop,
            rust_timeout=int(LOOK_EVERY_S * 1000),
            yield_on_timeout=True,
            force_polling=options.polling,
            ignore_permission_denied=True,
            raise_interrupt=False,
        )
        seen: dict[Path, tuple[tuple[int, int], float]] = {}
        running: set[Future[None]] = set()
        for _ in changes:
            _put_back_of_the_dead(options.source, own)
            for taken in _take(options, own, seen):
                running.add(pool.submit(_box, service, options, taken, counts, stop))
                while len(running) >= AT_ONCE:
                    running = _ended(running)
                if stop.is_set():
                    break
        wait(running)
    return counts


def _ended(running: set[Future[None]]) -> set[Future[None]]:
    """Waits until one has ended, and returns those that have not. Raises what it raised."""
    done, waiting = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    return waiting


def _check_folders(options: WatchOptions) -> None:
    if not options.source.is_dir():
        raise CommandError(f"{str(options.source)!r}: expected an existing folder of photos")
    source, target = options.source.resolve(), options.target.resolve()
    if source == target or target.is_relative_to(source):
        raise CommandError(f"{str(options.target)!r}: expected a folder outside of the one that is watched")
    if source.is_relative_to(target):
        raise CommandError(f"{str(options.source)!r}: expected a folder outside of the one for boxes")
    with os_errors_as_command_error(options.target):
        options.target.mkdir(parents=True, exist_ok=True)


# -- taking photos -----------------------------------------------------------------------------------------------------


@contextmanager
def _own_folder(source: Path) -> Iterator[Path]:
    """A folder of this watcher alone, locked while it lives; empty and gone at the end."""
    name = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns():x}"
    own, unlocked = source / HIDDEN / name, source / HIDDEN / f".{name}"
    with os_errors_as_command_error(own):
        unlocked.mkdir(parents=True)
        lock = (unlocked / "lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unlocked.rename(own)  # others look for folders without a dot: those of the dead have no lock
    try:
        yield own
    finally:
        _put_back(own, source)
        lock.close()
        shutil.rmtree(own, ignore_errors=True)


def _put_back_of_the_dead(source: Path, own: Path) -> None:
    """Puts back the photos of watchers that no longer live: nobody holds the lock of their folder."""
    for folder in (source / HIDDEN).iterdir():
        if folder == own or folder.name.startswith(".") or not (folder / "lock").is_file():
            continue
        with suppress(OSError), (folder / "lock").open("w") as lock:  # held by another, or gone meanwhile
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if count := _put_back(folder, source):
                log_event(logging.WARNING, "put_back", photos=count, watcher=folder.name)
            shutil.rmtree(folder, ignore_errors=True)


def _put_back(folder: Path, source: Path) -> int:
    """Moves all photos and prompts of a watcher's folder back to where they came from; returns how many."""
    taken = [path for path in (folder / "taken").rglob("*") if path.is_file()]
    for path in taken:
        place = source / path.relative_to(folder / "taken")
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)
    return len(taken)


def _take(options: WatchOptions, own: Path, seen: dict[Path, tuple[tuple[int, int], float]]) -> Iterator[_Taken]:
    """The photos that nobody writes to any more, each moved to the watcher's own folder when its turn comes."""
    present: set[Path] = set()
    for path in _photos_in(options.source):
        present.add(path)
        prompt = path.with_suffix(PROMPT_SUFFIX)
        if options.needs_prompt and not prompt.is_file():
            continue
        if not _is_settled(path, seen, options.settle_s):
            continue
        name = path.relative_to(options.source)
        place = own / "taken" / name
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)
        except OSError:  # another watcher was quicker
            continue
        moved = place.with_suffix(PROMPT_SUFFIX)
        with suppress(OSError):
            prompt.rename(moved)
        yield _Taken(name=PurePosixPath(name), photo=place, prompt=moved if moved.is_file() else None)
    for path in seen.keys() - present:
        del seen[path]


def _photos_in(source: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(folder, name)


def _is_settled(path: Path, seen: dict[Path, tuple[tuple[int, int], float]], settle_s: float) -> bool:
    """Whether size and time of change are what they were `settle_s` ago. Clocks of other machines do not matter."""
    try:
        status = path.stat()
    except OSError:
        return False
    now, state = time.monotonic(), (status.st_size, status.st_mtime_ns)
    before, since = seen.get(path, (None, now))
    if state != before:
        seen[path] = (state, now)
        return settle_s <= 0
    return now - since >= settle_s


# -- boxing them -------------------------------------------------------------------------------------------------------


def _box(service: Service, options: WatchOptions, taken: _Taken, counts: Counts, stop: threading.Event) -> None:
    """Boxes one photo. Never raises: a photo that cannot be done now goes back to where it came from."""
    try:
        try:
            found = answer(service, _request(options, taken))
            _write(options, taken, found)
        except CommandError:
            raise
        except Exception as error:
            reason = service.failed(error)
            if isinstance(reason, EngineFailure) and reason.retryable:
                raise CommandError(str(reason)) from error
            _set_aside(options, taken, reason)
            counts.add(failed=True)
            return
        _move(taken.photo, options.target / "done" / taken.name)
        if taken.prompt:
            _move(taken.prompt, options.target / "done" / taken.name.with_suffix(PROMPT_SUFFIX))
        counts.add(failed=False)
        log_event(logging.INFO, "boxed", photo=display_name(str(taken.name)), boxes=len(found.boxes))
    except (CommandError, OSError) as error:
        name = display_name(str(taken.name))
        log_event(logging.ERROR, "not_done", photo=name, reason=str(error), again_in_s=RETRY_AFTER_S)
        for path in filter(None, (taken.photo, taken.prompt)):
            place = options.source / taken.name.with_suffix(path.suffix)
            with suppress(OSError):
                path.rename(place)
        stop.wait(RETRY_AFTER_S)


def _request(options: WatchOptions, taken: _Taken) -> PhotoRequest:
    """Raises PromptError, RequestError."""
    prompts: tuple[Prompt, ...] = ()
    if taken.prompt is not None:
        prompts = _prompts(taken.prompt)
    return PhotoRequest(
        photo=taken.photo,
        prompts=prompts,
        want_masks=options.want_masks,
        score_threshold=options.score_threshold,
    )


def _prompts(path: Path) -> tuple[Prompt, ...]:
    """One prompt, or the list of them under "prompts"."""
    size = path.stat().st_size
    if size > MAX_PROMPT_BYTES:
        raise RequestError(f"{path.name!r}: expected at most {MAX_PROMPT_BYTES:,} bytes, got {size:,}")
    content = read_object(path.read_bytes(), where=repr(path.name))
    listed = content.get("prompts", [content])
    if not isinstance(listed, list) or not listed:
        raise PromptError(f"{path.name!r}: prompts: expected a list of prompts")
    return tuple(read_prompt(prompt, f"{path.name!r}") for prompt in listed)


def _write(options: WatchOptions, taken: _Taken, found: PhotoAnswer) -> None:
    """Writes the photo's boxes, and its masks where they are wanted. Raises CommandError."""
    base = options.target / taken.name
    with os_errors_as_command_error(base.parent):
        base.parent.mkdir(parents=True, exist_ok=True)
    if options.kind is BoxFormat.json:
        write_whole(_beside(base, ".json"), json.dumps(answer_to_json(found)) + "\n")
    else:
        config = default_label_config()
        photo = BoxedPhoto(
            image=config.images[0], name=display_name(str(taken.name)), size_wh=found.size_wh, detections=_all(found)
        )
        if options.kind is BoxFormat.yolo:
            labels = config.images[0].boxes.labels
            write_whole(base.with_suffix(".txt"), "".join(yolo_rows(photo, labels)))
        else:
            out = _beside(base, ".coco.json")
            with open_writer(out, Format.coco, config=config, model_version=found.model_version) as writer:
                writer.add(BoxedTask(id=1, data={}, photos=[photo]))
                writer.finish()
    if options.want_masks:
        write_whole(_beside(base, ".mask.png"), _masks_png(found))
        described = opex(found, photo_id=display_name(taken.name.stem), label="facing", meta={})
        write_whole(_beside(base, ".opex.json"), json.dumps(described) + "\n")


def _beside(path: Path, suffix: str) -> Path:
    """With the photo's own suffix, since a.jpg and a.png may be different photos."""
    return path.with_name(path.name + suffix)


def _all(found: PhotoAnswer) -> Detections:
    return Detections(
        boxes_xyxy=np.array([box.box_xyxy for box in found.boxes], np.float32).reshape(-1, 4),
        scores=np.array([box.score for box in found.boxes], np.float32),
    )


def _masks_png(found: PhotoAnswer) -> bytes:
    """The photo's size, 16 bits a pixel: 0 where no mask is, else the number of the box from 1, the best on top."""
    from PIL import Image

    canvas = np.zeros((found.size_wh[1], found.size_wh[0]), np.uint16)
    for number, box in reversed(list(enumerate(found.boxes, 1))):
        if box.mask is not None:
            height, width = box.mask.bitmap.shape
            window = canvas[box.mask.top : box.mask.top + height, box.mask.left : box.mask.left + width]
            window[box.mask.bitmap[: window.shape[0], : window.shape[1]]] = number
    content = io.BytesIO()
    Image.fromarray(canvas).save(content, "PNG", compress_level=1)
    return content.getvalue()


def _set_aside(options: WatchOptions, taken: _Taken, reason: FacingsError) -> None:
    """Moves a photo that cannot be boxed to OUT/failed, with the reason beside it. Raises OSError, CommandError."""
    place = options.target / "failed" / taken.name
    with os_errors_as_command_error(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
    write_whole(_beside(place, ".error.json"), json.dumps(error_to_json(reason)) + "\n")
    _move(taken.photo, place)
    if taken.prompt:
        _move(taken.prompt, place.with_suffix(PROMPT_SUFFIX))
    log_event(
        logging.WARNING, "photo_failed", photo=display_name(str(taken.name)), kind=reason.kind, reason=str(reason)
    )


def _move(path: Path, place: Path) -> None:
    """Moves a file, whole or not at all, also to another file system. Raises OSError."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.replace(place)
    except OSError:
        partial = place.with_name(f".{place.name[:40]}.partial")
        shutil.copyfile(path, partial)
        partial.replace(place)
        path.unlink()
