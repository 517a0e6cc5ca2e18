"""The photo of a task: from the address in its data to a decoded Photo, from memory when it was asked for a moment ago.

Knows what an address in a task may look like and where Label Studio serves it. Leaves hosts to `addresses`, HTTP to
`downloads`, object stores to `stores`, tokens to `tokens` and image files to `decoding`. Knows neither label configs
nor boxes.

Address in the task               Where the photo is read
/data/upload/…, any other /…      Label Studio
/data/local-files/?d=…            the folder LOCAL_FILES_ROOT when it is set, else Label Studio
s3://, gs://, azure://            the store itself where OBJECT_STORES allows it, else Label Studio's
                                  /tasks/<id>/resolve/, which answers or redirects to the storage
http://, https://                 that host; with the token only on Label Studio's own origin
data:…                            the address itself

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
import time
from collections.abc import Callable, Hashable
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
from backend.photos.addresses import LABEL_LENGTH, Address, parse_address, without_query
from backend.photos.cache import PhotoCache, PhotoCacheStats
from backend.photos.decoding import decode_photo
from backend.photos.downloads import Download, Downloader
from backend.photos.files import read_photo
from backend.photos.inline import is_inline, read_inline
from backend.photos.stores import STORE_SCHEMES, ObjectStores
from backend.photos.tokens import LabelStudio
from backend.settings import MIB, Settings
from model.types import DeadlineExceeded, Photo

KEPT_S = 600.0
SCHEMES = ("http://", "https://", *STORE_SCHEMES)
LOCAL_FILES_PATH = "/data/local-files/"


@dataclass(frozen=True, kw_only=True)
class Access:
    """Label Studio's address and a token for it, as one /setup named them; empty when none did."""

    label_studio_url: str = ""
    token: str = field(default="", repr=False)


class PhotoLoader:
    """Loads the photos of tasks. Thread-safe; two requests for the same photo at the same time read it once."""

    def __init__(self, settings: Settings) -> None:
        with photo_label("LABEL_STUDIO_URL"):
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
        self._stores = ObjectStores(settings.object_stores or (), max_bytes=settings.max_photo_bytes)
        self._photos = PhotoCache(max_bytes=settings.photo_cache_mb * MIB, keep_s=KEPT_S)

    def load(
        self,
        value: str,
        *,
        task_id: int | str | None = None,
        access: Access | None = None,
        deadline: float | None = None,
    ) -> Photo:
        """The photo behind the address in a task.

        value: the address, see the module's table. task_id: needed for stores that Label Studio reads.
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
        """The photo in an image file of this machine, named by the user who runs it. Raises PhotoError."""
        return read_photo(path, max_bytes=self._max_bytes, max_pixels=self._max_pixels)

    def stats(self) -> PhotoCacheStats:
        """What the kept photos are good for so far."""
        return self._photos.stats()

    def _label_studio_for(self, access: Access) -> LabelStudio | None:
        if self._label_studio is not None:
            address = self._label_studio
        elif access.label_studio_url:
            with photo_label(without_query(access.label_studio_url)):
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
        if is_inline(value):
            return _Source(key=hashlib.blake2b(value.encode()).digest(), read=lambda _: self._inline(value))
        if self._local_files_root is not None and _is_local_files(value):
            path = _local_path(value, self._local_files_root)
            return _Source(key=path, read=lambda _: self._local_file(path))
        if self._stores.allows(value):
            return _Source(key=value, read=lambda until: self._stored(value, until))
        if value.startswith(STORE_SCHEMES):
            if not str(task_id).isdecimal():
                raise PhotoForbidden(
                    "expected a task of Label Studio, or an address that OBJECT_STORES allows, got neither"
                )
            uri = base64.urlsafe_b64encode(value.encode()).decode()
            address = _known(label_studio).address.at(f"/tasks/{task_id}/resolve/?fileuri={uri}")
        elif value.startswith("/") and not value.startswith("//"):
            address = _known(label_studio).address.at(value)
        elif value.lower().startswith(("http://", "https://")):
            address = parse_address(value)
            return _Source(key=address, read=lambda until: self._download(address, label_studio, until))
        else:
            raise PhotoForbidden(f"expected /…, {', '.join(SCHEMES)} or data:, got another kind of address")

        def read(until: float) -> Download:
            with photo_label(address.label):  # which the task's own address does not tell
                return self._download(address, label_studio, until)

        return _Source(key=address, read=read)

    def _download(self, address: Address, label_studio: LabelStudio | None, until: float) -> Download:
        return self._downloader.get(address, label_studio=label_studio, until=until)

    def _inline(self, value: str) -> Download:
        content, content_type = read_inline(value)
        self._check_size(len(content))
        return Download(content=content, content_type=content_type)

    def _stored(self, address: str, until: float) -> Download:
        return Download(content=self._stores.read(address, until=until), content_type="")

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


def _label(value: str) -> str:
    """The address of a photo as it may stand in a message."""
    if is_inline(value):
        return without_query(value.partition(",")[0]) + ",…"
    if _is_local_files(value):
        return f"{LOCAL_FILES_PATH}?d={_local_files_name(value)}"[:LABEL_LENGTH]
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
    query = value.partition("?")[2].partition("#")[0]
    return parse_qs(query, errors="surrogateescape").get("d", [""])[-1]  # a file's name may hold any bytes


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
