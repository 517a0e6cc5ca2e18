"""Names of photos: read from a task's address, and made safe for the files that are written for a photo.

Knows addresses, and what file systems, other operating systems and line-based lists refuse in a name. Touches no file.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from itertools import chain, count
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

from backend.photos.files import SUFFIXES

NO_PHOTO, DATA_URL = "no photo", "data URL"
NAME_BYTES = 255  # the longest name of a file or folder on every common file system
PATH_BYTES = 1024  # below a folder that has a path itself; macOS takes 1024 in all, Linux 4096

_LOCAL_FILES = re.compile(r"(^|/)local-files/?$")
_LABELS_SUFFIX = ".txt"
_REFUSED = frozenset('<>:"|?*\\')  # by Windows
_UNPRINTABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})  # control characters, surrogates, line and paragraph separators
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])\s*(\.|$)", re.IGNORECASE)  # Windows


def photo_name(address: object) -> str:
    """What the photo of a task is called: the path of its address below the host, decoded, with forward slashes.

    For Label Studio's local files, all of `?d=`. An upload keeps the prefix that makes its name unique. One printable
    line, never empty, without the parts `.` and `..`; it may be long, and two photos may share it. "data URL" or
    "no photo" where the address has no path.
    """
    if not isinstance(address, str):
        return NO_PHOTO
    if address[:5].lower() == "data:":
        return DATA_URL
    try:
        url = urlsplit(address)
    except ValueError:  # loading the photo reports what is wrong with its address
        return NO_PHOTO
    is_local = _LOCAL_FILES.search(url.path)
    path = parse_qs(url.query).get("d", [""])[-1] if is_local else unquote(url.path)
    return printable("/".join(_parts(path))) or NO_PHOTO


def printable(name: str) -> str:
    """The name in one line that is valid UTF-8: the name of a file can hold line breaks and any bytes."""
    return "".join(c.encode("unicode_escape").decode() if _is_unprintable(c) else c for c in name)


class FileNames:
    """Gives each photo a file name of its own: a path below a folder, with forward slashes.

    A portable name is UTF-8, has no character that Windows or a list of lines refuses, no part of over 255 bytes, and
    at most 1024 bytes in all. It ends in the suffix of a photo, and no folder in it does. No two names are equal, even
    without their suffixes (the labels of `a.jpg` and `a.png` would share `a.txt`) and on file systems that ignore case
    or the form of accents. A name that is safe and free is kept; where it is taken, the photo's id is added, so that
    the same photos in the same order get the same names. Not thread-safe; remembers eight bytes of each name.

    suffix: of all names, in place of their own; None keeps theirs, and adds .jpg where there is none of a photo.
    is_portable: False also keeps what is a path on this machine only, for photos that are files already; such names
    are unique as they stand.
    """

    def __init__(self, suffix: str | None = None, *, is_portable: bool = True) -> None:
        self._suffix = suffix
        self._is_portable = is_portable
        self._taken: set[int] = set()

    def name(self, photo: str, image_id: int) -> str:
        """A name for the photo called `photo` that no other photo has got."""
        if not self._is_portable and _is_path_below(photo) and self._take(photo):
            return photo
        parts = _parts(photo) or ["photo"]
        file = PurePosixPath(parts.pop())
        own = file.suffix if file.suffix.lower() in SUFFIXES else ""
        stem, suffix = _safe(file.name.removesuffix(own)), self._suffix or own or ".jpg"
        tags = chain(["", f"-{image_id}"], (f"-{image_id}-{number}" for number in count(2)))
        return next(name for tag in tags if self._take(name := _joined(parts, stem, tag, suffix)))

    def _take(self, name: str) -> bool:
        """Whether the name was free; it is taken now."""
        if self._is_portable:
            path = PurePosixPath(name).with_suffix("").as_posix()
            name = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", path).casefold())
        digest = int(_digest(name, size=8), 16)
        is_free = digest not in self._taken
        self._taken.add(digest)
        return is_free


def drawing_names(photos: Iterable[str]) -> list[str]:
    """A file name for the drawing of each photo, a JPEG: `a.jpg` for `a.jpg`, and `b.jpg` for `b.png`."""
    names = FileNames(".jpg")
    return [names.name(photo, number) for number, photo in enumerate(photos, 1)]


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part.strip() not in ("", ".", "..")]


def _is_path_below(name: str) -> bool:
    """Whether it is a relative path that leads nowhere but into its folder, and short enough for a file system."""
    parts = name.split("/")
    sizes = [len(part.encode(errors="surrogatepass")) for part in parts]
    is_short = max(sizes) <= NAME_BYTES and sum(sizes) + len(sizes) <= 4 * PATH_BYTES
    return is_short and parts == _parts(name) and "\0" not in name


def _joined(folders: list[str], stem: str, tag: str, suffix: str) -> str:
    free_bytes = NAME_BYTES - max(len(suffix), len(_LABELS_SUFFIX))
    file = _shortened(stem, free_bytes - len(tag)) + tag + suffix
    path = "/".join([*(_shortened(_safe_folder(folder), NAME_BYTES) for folder in folders), file])
    return path if len(path.encode()) < PATH_BYTES else f"{_digest('/'.join(folders))}/{file}"


def _safe(part: str) -> str:
    safe = "".join("_" if c in _REFUSED or _is_unprintable(c) else c for c in part)
    return f"_{safe}" if not safe.strip() or _DEVICE.match(safe) else safe


def _safe_folder(part: str) -> str:
    safe = _safe(part)
    ends_badly = safe[-1] in ". " or PurePosixPath(safe).suffix.lower() in {*SUFFIXES, _LABELS_SUFFIX}
    return f"{safe}_" if ends_badly else safe


def _shortened(part: str, size: int) -> str:
    """At most so many bytes; a digest of the whole part stands for what is cut off."""
    encoded = part.encode()
    if len(encoded) <= size:
        return part
    tail = "-" + _digest(part)
    return encoded[: size - len(tail)].decode(errors="ignore") + tail


def _digest(text: str, size: int = 4) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=size).hexdigest()


def _is_unprintable(character: str) -> bool:
    return unicodedata.category(character) in _UNPRINTABLE
