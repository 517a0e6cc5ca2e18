"""Photos in object stores, read with this process's own credentials: s3://, gs://, azure://.

Knows which addresses may be read there, and fsspec, whose file systems find their credentials in the usual places (see
docs/stores.md). Knows neither Label Studio nor pixels. What a store or its library says in an error may quote a request
with its signature, so only its kind stands in messages.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

from backend.errors import (
    CommandError,
    PhotoDecodeError,
    PhotoForbidden,
    PhotoMissing,
    PhotoTooLarge,
    PhotoUnreachable,
    SettingsError,
    extra_needed,
)

STORE_SCHEMES = ("s3://", "gs://", "azure://", "azure-blob://")
_FILE_SYSTEMS = {"s3": "s3", "gs": "gcs", "azure": "az"}  # as fsspec names them
_REFUSED = ("403", "AccessDenied", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch")
_EMPTY = ("416", "InvalidRange")


class ObjectStores:
    """The object stores that may be read. Thread-safe.

    prefixes: addresses such as `s3://shelves/2026`; what lies below one of them may be read, and nothing else.
    max_bytes: the largest object that is read. Raises SettingsError when the packages for a store are not installed.
    """

    def __init__(self, prefixes: tuple[str, ...], *, max_bytes: int) -> None:
        self._prefixes = tuple(_folder(_normal(prefix)) for prefix in prefixes)
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._opened: dict[str, Any] = {}
        for scheme in {prefix.partition("://")[0] for prefix in self._prefixes}:
            _require(scheme)

    def allows(self, address: str) -> bool:
        """Whether the address lies below one of the prefixes."""
        return _normal(address).startswith(self._prefixes) if self._prefixes else False

    def read(self, address: str, *, until: float) -> bytes:
        """The object's bytes. until: `time.monotonic()` value by which they have to be there.

        Raises PhotoMissing, PhotoForbidden, PhotoTooLarge, PhotoDecodeError where it is empty, and PhotoUnreachable.
        """
        scheme, _, path = _normal(address).partition("://")
        if any(part in ("", ".", "..") for part in path.split("/")) or path.count("/") < 1:
            raise PhotoForbidden(f"expected {scheme}://bucket/name, got empty parts, . or .. in it")
        started = time.monotonic()
        store = self._store(scheme)
        reading = asyncio.run_coroutine_threadsafe(store._cat_file(path, start=0, end=self._max_bytes + 1), store.loop)
        try:
            content = bytes(reading.result(timeout=max(0.0, until - started)))
        except TimeoutError:
            reading.cancel()
            raise PhotoUnreachable(
                f"expected an answer, got: no end within {time.monotonic() - started:.1f} s"
            ) from None
        except FileNotFoundError:
            raise PhotoMissing("expected an object there, got none") from None
        except Exception as error:  # of three libraries, without a common base
            raise _photo_error(error) from None
        if len(content) > self._max_bytes:
            raise PhotoTooLarge(f"expected at most {self._max_bytes:,} bytes, got more")
        if not content:
            raise _empty()
        return content

    def _store(self, scheme: str) -> Any:
        with self._lock:
            if scheme not in self._opened:
                import fsspec

                try:
                    self._opened[scheme] = fsspec.filesystem(
                        _FILE_SYSTEMS[scheme], skip_instance_cache=True, use_listings_cache=False
                    )
                except Exception as error:  # likewise
                    reason = type(error).__name__
                    raise PhotoForbidden(f"expected credentials for {scheme}://, got none: {reason}") from None
            return self._opened[scheme]


def _normal(address: str) -> str:
    scheme, separator, path = address.partition("://")
    return ("azure" if scheme == "azure-blob" else scheme) + separator + path


def _folder(prefix: str) -> str:
    return prefix if prefix.endswith("/") else f"{prefix}/"


def _require(scheme: str) -> None:
    try:
        with extra_needed("stores", f"OBJECT_STORES with {scheme}://"):
            import fsspec

            fsspec.get_filesystem_class(_FILE_SYSTEMS[scheme])
    except CommandError as error:
        raise SettingsError(str(error)) from None


def _empty() -> PhotoDecodeError:
    return PhotoDecodeError("expected an image file, got an empty object")


def _photo_error(error: Exception) -> Exception:
    """A store's error as one of a photo: its kind, and a code or status where it has one."""
    causes = [error, error.__cause__]
    codes = [str(code) for cause in causes for code in _codes(cause)]
    reason = ", ".join(dict.fromkeys([type(error).__name__, *codes]))
    if any(code in _EMPTY for code in codes):
        return _empty()
    if isinstance(error, PermissionError) or any("redentials" in type(cause).__name__ for cause in causes):
        return PhotoForbidden(f"expected credentials that may read it, got: {reason}")
    if any(code in _REFUSED for code in codes):
        return PhotoForbidden(f"expected credentials that may read it, got: {reason}")
    return PhotoUnreachable(f"expected an answer of the store, got: {reason}")


def _codes(error: BaseException | None) -> list[Any]:
    response = getattr(error, "response", None)
    of_aws = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return [code for code in (of_aws, getattr(error, "status_code", None), getattr(error, "code", None)) if code]
