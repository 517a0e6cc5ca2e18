"""What the person at the terminal sees of a running command: progress, and expected failures.

Knows rich, and how seconds are told. Progress goes to standard error, so that standard output holds results only: a bar
on a terminal, plain lines in a file or a CI log.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from backend.bulk.pipeline import Tally

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 10.0


def track(items: Iterable[Item], *, total: int, label: str) -> Iterator[Item]:
    """The items, unchanged, with progress on standard error. An item counts as done when the next is asked for."""
    shown = _bar if sys.stderr.isatty() else _lines
    return shown(items, total, label)


def _bar(items: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(items, total=total, description=label)


def _lines(items: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    started = said = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            print(f"{label}: {done}/{total}, {said - started:.0f} s", file=sys.stderr, flush=True)
        yield item
    print(f"{label}: {total}/{total}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


@contextmanager
def tally_shown(label: str) -> Iterator[Callable[[Tally], None]]:
    """A function that shows how far a long run is, to be called as often as one likes."""
    if not sys.stderr.isatty():
        said = time.monotonic()

        def say(tally: Tally) -> None:
            nonlocal said
            if time.monotonic() - said >= SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                print(f"{label}: {_told(tally)}", file=sys.stderr, flush=True)

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"))
    with Progress(*columns, console=Console(stderr=True), auto_refresh=True) as progress:
        bar = progress.add_task(label, total=None, told="")

        def draw(tally: Tally) -> None:
            processed = tally.done + tally.skipped + len(tally.failures)
            progress.update(bar, completed=processed, total=tally.total, told=_told(tally))

        yield draw


def _told(tally: Tally) -> str:
    """A run in one line: what is behind it, how fast it goes, and the time that is left."""
    processed = tally.done + tally.skipped + len(tally.failures)
    parts = [
        f"{processed}/{'?' if tally.total is None else tally.total}",
        f"{tally.photos_per_s:.2f} photos/s",
        f"{tally.boxes} boxes",
        f"{len(tally.failures)} failed",
    ]
    if tally.skipped:
        parts.insert(1, f"{tally.skipped} needed nothing")
    if (left_s := tally.left_s) is not None:
        parts.append(f"{duration(left_s)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as a person tells them: 42 s, 3 min 5 s, 2 h 7 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
