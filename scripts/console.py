"""What the person at the terminal sees of a running command: progress, and expected failures.

Knows rich. Progress goes to standard error, so that standard output holds results only: a bar on a terminal, plain
lines in a file or a CI log.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 10.0


class CommandError(Exception):
    """An expected failure of a command, told in one line."""


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
