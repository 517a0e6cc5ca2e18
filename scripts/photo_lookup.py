"""Which file of a folder a name in a truth file means.

Knows paths and files; nothing of boxes' formats.

A name is a path, as deep as the truth file has it. It means the file at this path below the folder; else, of the photos
below the folder with the same last name, the one whose path ends as the name does for the most folders. Several that
agree equally are ambiguous. A file that a name means with its whole path, or with more of it than another name does, is
not that other's: its own is missing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from backend.errors import CommandError
from backend.photos.files import FoundPhoto, display_name, find_photos
from model.quality import Truth

WHOLE_PATH = 10_000  # more folders than any path has


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledName:
    """A photo of a truth file, by name.

    number: as of KnownPhoto. names: links to it, of which one is right, each as the paths that it may have, the most
    probable first; at least one.
    """

    number: int
    names: tuple[tuple[str, ...], ...]
    truth: Truth


def find_files(folder: Path, entries: Sequence[LabelledName]) -> list[Path | str]:
    """The file of each entry; or, as a text of one line, why there is none.

    Raises CommandError when there is no such folder.
    """
    if not folder.is_dir():
        raise CommandError(f"{display_name(folder)!r}: expected a folder of photos")
    lookup = _Lookup(folder)
    outcomes = [lookup.find(entry) for entry in entries]
    best: defaultdict[Path, int] = defaultdict(int)
    for outcome in outcomes:
        if isinstance(outcome, _Match):
            best[outcome.path] = max(best[outcome.path], outcome.agreement)
    found: list[Path | str] = []
    for outcome in outcomes:
        if isinstance(outcome, str):
            found.append(outcome)
        elif outcome.agreement < best[outcome.path]:
            found.append(f"{outcome.name!r}: missing; {display_name(outcome.path)!r} is another photo of the file")
        else:
            found.append(outcome.path)
    return found


@dataclass(frozen=True, kw_only=True)
class _Match:
    """agreement: how many names at the end of both paths are equal."""

    name: str
    path: Path
    agreement: int


class _Lookup:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._by_last_name: Mapping[str, Sequence[FoundPhoto]] | None = None

    def find(self, entry: LabelledName) -> _Match | str:
        """The file of an entry, or why there is none, in one line."""
        matches: dict[Path, _Match] = {}
        ambiguous: list[str] = []
        for paths in entry.names:
            for name in paths:
                found = self._matching(name)
                if len(found) == 1:
                    matches.setdefault(found[0].path, found[0])
                elif found:
                    ambiguous += [display_name(match.path.relative_to(self._folder)) for match in found]
                if found:
                    break
        if len(matches) == 1 and not ambiguous:
            return next(iter(matches.values()))
        wanted = " or ".join(repr(paths[0]) for paths in entry.names)
        candidates = sorted({*ambiguous, *(display_name(path.relative_to(self._folder)) for path in matches)})
        if candidates:
            return f"{wanted}: ambiguous: expected one such photo, found {', '.join(map(repr, candidates))}"
        return f"{wanted}: missing in {display_name(self._folder)!r}"

    def _matching(self, name: str) -> list[_Match]:
        """All files that the name may equally well mean."""
        parts = _parts(name)
        if not parts:
            return []
        whole = self._folder.joinpath(*parts)
        try:
            if whole.is_file():
                return [_Match(name=name, path=whole, agreement=WHOLE_PATH)]
        except (OSError, ValueError):  # a name too long, or with a zero in it
            return []
        if self._by_last_name is None:
            self._by_last_name = self._index()
        matches = [
            _Match(name=name, path=photo.path, agreement=_agreement(parts, photo.path.relative_to(self._folder).parts))
            for photo in self._by_last_name.get(parts[-1], ())
        ]
        most = max((match.agreement for match in matches), default=0)
        return [match for match in matches if match.agreement == most]

    def _index(self) -> Mapping[str, Sequence[FoundPhoto]]:
        index: defaultdict[str, list[FoundPhoto]] = defaultdict(list)
        try:
            photos = find_photos([self._folder]).photos
        except CommandError:  # there are none at all
            photos = ()
        for photo in photos:
            index[photo.path.name].append(photo)
        return index


def _parts(name: str) -> tuple[str, ...]:
    """Folders and last name, below any folder: without a root, and without what `..` would leave."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    ups = [place for place, part in enumerate(parts) if part == ".."]
    return tuple(parts[ups[-1] + 1 :] if ups else parts)


def _agreement(one: Sequence[str], other: Sequence[str]) -> int:
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
