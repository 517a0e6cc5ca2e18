"""What the person at the terminal sees of a running command: progress, and lines of text.

Knows rich, and how to write durations. Progress goes to standard error, so that standard output holds results only: a
bar on a terminal, plain lines in a file or a CI log.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from backend.bulk.pipeline import Tally

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 10.0


def track(items: Iterable[Item], *, total: int, label: str) -> Iterator[Item]:
    """The items, unchanged, with progress on standard error. An item counts as done when the next is asked for."""
    return (_bar if sys.stderr.isatty() else _lines)(items, total, label)


def print_lines(lines: Iterable[str], *, to: TextIO | None = None) -> None:
    """Prints, on standard output by default. A reader that went away, or a full disk, costs the text and no more."""
    stream = to or sys.stdout
    try:
        for line in lines:
            print(line, file=stream)
        if stream is not None:
            stream.flush()
    except OSError:
        with suppress(OSError, ValueError), Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())  # else Python fails once more when it ends


def _bar(items: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(items, total=total, description=label)


def _lines(items: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    started = printed = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - printed >= SECONDS_BETWEEN_LINES:
            printed = time.monotonic()
            print(f"{label}: {done}/{total}, {printed - started:.0f} s", file=sys.stderr, flush=True)
        yield item
    print(f"{label}: {total}/{total}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


@contextmanager
def progress(label: str) -> Iterator[Callable[[Tally], None]]:
    """A function that shows how far a long run is, to be called as often as one likes."""
    if not sys.stderr.isatty():
        printed = time.monotonic()

        def print_line(tally: Tally) -> None:
            nonlocal printed
            if time.monotonic() - printed >= SECONDS_BETWEEN_LINES:
                printed = time.monotonic()
                print_lines([f"{label}: {format_progress(tally)}"], to=sys.stderr)

        yield print_line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=Console(stderr=True), auto_refresh=True) as bars:
        bar = bars.add_task(label, total=None, text="")

        def draw(tally: Tally) -> None:
            bars.update(bar, completed=tally.processed, total=tally.total, text=format_progress(tally))

        yield draw


def format_progress(tally: Tally) -> str:
    """A run in one line: what is behind it, how fast it goes, and the time that is left."""
    parts = [f"{tally.processed}/{'?' if tally.total is None else tally.total}"]
    if tally.skipped:
        parts.append(f"{tally.skipped.total()} skipped")
    parts += [f"{tally.photos_per_s:.2f} photos/s", f"{tally.boxes} boxes", f"{len(tally.failures)} failed"]
    if (left_s := tally.left_s) is not None:
        parts.append(f"{format_duration(left_s)} left")
    return ", ".join(parts)


def format_duration(seconds: float) -> str:
    """Such as 42 s, 3 min 5 s, 2 h 7 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
