"""The photo of a task: from the address in its data to a decoded Photo, from memory when it was asked for a moment ago.

Knows what an address in a task may look like and where Label Studio serves it. Leaves hosts to `addresses`, HTTP to
`downloads`, tokens to `tokens` and image files to `decoding`. Knows neither label configs nor boxes.

Address in the task               Where the photo is read
/data/upload/…, any other /…      Label Studio
/data/local-files/?d=…            the folder LOCAL_FILES_ROOT when it is set, else Label Studio
s3://, gs://, azure-blob://       Label Studio's /tasks/<id>/resolve/, which answers or redirects to the storage
http://, https://                 that host; with the token only on Label Studio's own origin
data:…;base64,…                   the address itself

Decoded photos are kept for KEPT_S seconds after they were read, within PHOTO_CACHE_MB. So a photo that is replaced, or
a token that is withdrawn, counts after that time at the latest. What one token has opened is not given to another.
"""

from __future__ import annotations

import base64
import hashlib
import os
import posixpath
import reprlib
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs

from backend.errors import (
    PhotoDecodeError,
    PhotoForbidden,
    PhotoTooLarge,
    PhotoUnreachable,
    SettingsError,
    photo_label,
)
from backend.photos.addresses import SHOWN_LENGTH, parse_address, without_query
from backend.photos.decoding import decode_photo, raise_pillow_limit
from backend.photos.downloads import Download, Downloader
from backend.photos.files import read_photo
from backend.photos.tokens import LabelStudio
from backend.settings import MIB, Settings
from model.types import DeadlineExceeded, Photo

KEPT_S = 600.0
CLOUD_SCHEMES = ("s3://", "gs://", "azure-blob://")
SCHEMES = ("http://", "https://", *CLOUD_SCHEMES)
LOCAL_FILES_PATH = "/data/local-files/"


@dataclass(frozen=True, kw_only=True)
class Access:
    """Label Studio's address and a token for it, as one /setup named them; empty when none did."""

    label_studio_url: str = ""
    token: str = field(default="", repr=False)


@dataclass(frozen=True, kw_only=True)
class PhotoCacheStats:
    """Counts since the start. A request that waited for another one's fetch of the same photo is a hit."""

    hits: int
    misses: int
    entries: int
    bytes: int


class PhotoLoader:
    """Loads the photos of tasks. Thread-safe; two requests for the same photo at the same time read it once."""

    def __init__(self, settings: Settings) -> None:
        self._label_studio = parse_address(settings.label_studio_url) if settings.label_studio_url else None
        self._api_key = settings.label_studio_api_key
        self._local_files_root = Path(settings.local_files_root).resolve() if settings.local_files_root else None
        if self._local_files_root == Path("/"):
            raise SettingsError("LOCAL_FILES_ROOT: expected the folder of the photos, got '/', which opens every file")
        self._max_bytes = settings.max_photo_bytes
        self._max_pixels = settings.max_photo_pixels
        self._fetch_timeout_s = settings.fetch_timeout_s
        self._downloader = Downloader(
            allow_private=settings.allow_private_addresses,
            # Only an address from the settings: the one in a /setup may come from anybody.
            trusted=self._label_studio.origin if self._label_studio else None,
            max_bytes=settings.max_photo_bytes,
        )
        self._photos = _PhotoCache(max_bytes=settings.photo_cache_mb * MIB)
        raise_pillow_limit(settings.max_photo_pixels)

    def load(
        self,
        value: str,
        *,
        task_id: int | str | None = None,
        access: Access | None = None,
        deadline: float | None = None,
    ) -> Photo:
        """The photo behind the address in a task.

        value: the address, see the module's table. task_id: needed for cloud storage.
        access: as Label Studio sent it to /setup; the settings come first.
        deadline: `time.monotonic()` value, or None for no other limit than FETCH_TIMEOUT_S.
        Raises PhotoUnreachable, PhotoForbidden, PhotoTooLarge, PhotoDecodeError; DeadlineExceeded when only `deadline`
        was in the way.
        """
        until = time.monotonic() + self._fetch_timeout_s
        if deadline is not None:
            until = min(until, deadline)
        if not isinstance(value, str) or not value.strip() or not _is_unicode(value):
            raise PhotoDecodeError(f"photo: expected its address in the task's data, got {reprlib.repr(value)}")
        value = value.strip()
        label = _label(value)
        with photo_label(label):
            try:
                return self._load(value, task_id, self._label_studio_for(access or Access()), until)
            except PhotoUnreachable:
                if deadline is not None and time.monotonic() >= deadline:
                    raise DeadlineExceeded(f"{label!r}: the deadline passed while the photo was read") from None
                raise

    def decode(self, content: bytes, *, name: str = "photo") -> Photo:
        """The photo in an image file's bytes. name: for messages. Raises PhotoTooLarge, PhotoDecodeError."""
        with photo_label(name):
            self._check_size(len(content))
            return decode_photo(content, max_pixels=self._max_pixels)

    def read_file(self, path: Path) -> Photo:
        """The photo in an image file of this machine, named by whoever runs it. Raises PhotoError."""
        return read_photo(path, max_bytes=self._max_bytes, max_pixels=self._max_pixels)

    def stats(self) -> PhotoCacheStats:
        """What the kept photos are good for so far."""
        return self._photos.stats()

    def _label_studio_for(self, access: Access) -> LabelStudio | None:
        if self._label_studio is not None:
            address = self._label_studio
        elif access.label_studio_url:
            address = parse_address(access.label_studio_url)
        else:
            return None
        return LabelStudio(address=address, token=(self._api_key or access.token).strip())

    def _load(self, value: str, task_id: int | str | None, label_studio: LabelStudio | None, until: float) -> Photo:
        source = self._locate(value, task_id, label_studio)

        def read() -> Photo:
            download = source.read(until)
            return decode_photo(download.content, content_type=download.content_type, max_pixels=self._max_pixels)

        opener = label_studio.identity if label_studio else ""
        return self._photos.get((opener, source.key), read, until=until)

    def _locate(self, value: str, task_id: int | str | None, label_studio: LabelStudio | None) -> _Source:
        if value[:5].lower() == "data:":
            return _Source(key=hashlib.blake2b(value.encode()).digest(), read=lambda _: self._inline(value))
        if self._local_files_root is not None and _is_local_files(value):
            path = _local_path(value, self._local_files_root)
            return _Source(key=path, read=lambda _: self._local_file(path))
        if value.startswith(CLOUD_SCHEMES):
            if not str(task_id).isdecimal():
                raise PhotoUnreachable(f"expected a task id to resolve it with, got {task_id!r}")
            uri = base64.urlsafe_b64encode(value.encode()).decode()
            address = _known(label_studio).address.at(f"/tasks/{task_id}/resolve/?fileuri={uri}")
        elif value.startswith("/") and not value.startswith("//"):
            address = _known(label_studio).address.at(value)
        elif value.lower().startswith(("http://", "https://")):
            address = parse_address(value)
        else:
            raise PhotoForbidden(f"expected /…, {', '.join(SCHEMES)} or data:, got another kind of address")
        return _Source(
            key=address, read=lambda until: self._downloader.get(address, label_studio=label_studio, until=until)
        )

    def _inline(self, value: str) -> Download:
        header, _, payload = value.partition(",")
        if not header.lower().endswith(";base64"):
            raise PhotoDecodeError("expected data:<type>;base64,<content>, got another kind of data address")
        self._check_size(len(payload) * 3 // 4)
        try:
            content = base64.b64decode(payload, validate=True)
        except ValueError:
            raise PhotoDecodeError("expected valid base64, got other characters") from None
        return Download(content=content, content_type=header[len("data:") : -len(";base64")])

    def _local_file(self, path: Path) -> Download:
        try:
            # The path is resolved: a link there now was put there since. Non-blocking, in case it is a pipe.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                facts = os.fstat(descriptor)
                if not stat.S_ISREG(facts.st_mode):
                    raise PhotoDecodeError("expected a file below LOCAL_FILES_ROOT, got a folder or a device")
                self._check_size(facts.st_size)
                with os.fdopen(descriptor, "rb", closefd=False) as file:
                    return Download(content=file.read(facts.st_size), content_type="")
            finally:
                os.close(descriptor)
        except OSError as error:
            raise PhotoUnreachable(f"expected a file below LOCAL_FILES_ROOT, got: {error.strerror}") from None

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise PhotoTooLarge(f"expected at most {self._max_bytes:,} bytes, got {size:,}")


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where a photo is read. key: equal for equal photos. read: takes the `time.monotonic()` value to be done by."""

    key: Hashable
    read: Callable[[float], Download]


class _PhotoCache:
    """Photos by key: least recently used out first, none older than KEPT_S, each read by one thread at a time."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, tuple[Photo, float]] = OrderedDict()
        self._kept_bytes = 0
        self._reading: dict[Hashable, tuple[Future[Photo], float]] = {}  # with the time the reader gives up
        self._hits = 0
        self._misses = 0

    def get(self, key: Hashable, read: Callable[[], Photo], *, until: float) -> Photo:
        """The photo of `key`: kept, or from another thread that is reading it, or from `read`."""
        while True:
            with self._lock:
                photo = self._fresh(key)
                if photo is not None:
                    self._hits += 1
                    return photo
                if key not in self._reading:
                    self._misses += 1
                    mine: Future[Photo] = Future()
                    self._reading[key] = mine, until
                    break
                others, others_until = self._reading[key]
            try:
                photo = others.result(timeout=max(0.0, until - time.monotonic()))
            except PhotoUnreachable:
                if others_until <= time.monotonic() < until:
                    continue  # that reader had less time than there is here
                raise
            except TimeoutError:
                raise PhotoUnreachable("expected an answer in time, got none") from None
            with self._lock:
                self._hits += 1
            return photo
        try:
            photo = read()
        except BaseException as error:
            with self._lock:
                del self._reading[key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._reading[key]
            self._keep(key, photo)
        mine.set_result(photo)
        return photo

    def stats(self) -> PhotoCacheStats:
        with self._lock:
            return PhotoCacheStats(
                hits=self._hits, misses=self._misses, entries=len(self._kept), bytes=self._kept_bytes
            )

    def _fresh(self, key: Hashable) -> Photo | None:
        photo, read_at = self._kept.get(key, (None, 0.0))
        if photo is None:
            return None
        if time.monotonic() >= read_at + KEPT_S:
            self._drop(key)
            return None
        self._kept.move_to_end(key)
        return photo

    def _keep(self, key: Hashable, photo: Photo) -> None:
        if photo.pixels.nbytes > self._max_bytes:
            return
        self._kept[key] = (photo, time.monotonic())
        self._kept_bytes += photo.pixels.nbytes
        while self._kept_bytes > self._max_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: Hashable) -> None:
        photo, _ = self._kept.pop(key)
        self._kept_bytes -= photo.pixels.nbytes


def _label(value: str) -> str:
    """The address of a photo as it may stand in a message."""
    if value[:5].lower() == "data:":
        return without_query(value.partition(",")[0]) + ",…"
    if _is_local_files(value):
        return f"{LOCAL_FILES_PATH}?d={_local_files_name(value)}"[:SHOWN_LENGTH]
    return without_query(value)


def _is_unicode(value: str) -> bool:
    """False for half of a surrogate pair, which JSON can carry and no address can."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_local_files(value: str) -> bool:
    return value.partition("?")[0].rstrip("/") == LOCAL_FILES_PATH.rstrip("/")


def _local_files_name(value: str) -> str:
    return parse_qs(value.partition("?")[2].partition("#")[0]).get("d", [""])[-1]


def _local_path(value: str, root: Path) -> Path:
    # As Label Studio reads it: always below the root, also with a leading slash.
    name = posixpath.normpath(_local_files_name(value)).lstrip("/")
    try:
        path = (root / name).resolve()
    except (OSError, RuntimeError, ValueError):  # endless links; NUL characters
        raise PhotoForbidden("expected a path below LOCAL_FILES_ROOT, got one that leads nowhere") from None
    if not path.is_relative_to(root):
        raise PhotoForbidden("expected a path below LOCAL_FILES_ROOT, got one that leads out of it")
    return path


def _known(label_studio: LabelStudio | None) -> LabelStudio:
    if label_studio is None:
        raise PhotoUnreachable("expected to know Label Studio's address, from /setup or LABEL_STUDIO_URL")
    return label_studio
