"""How long the engine's work waits and takes: the interface of whoever wants to know, and a clock for it.

Knows clocks and the stages' names. On a GPU a stage ends when its work is queued, unless its answer is fetched.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

from model.types import Lane

#: tile: cut out, resize and normalise. encode: the network on the tiles. propose: its head's answer as boxes.
#: decode: the decoder on prompts, and their boxes read from its masks. merge: one box for each facing from all tiles.
Stage = Literal["tile", "encode", "propose", "decode", "merge"]


class Observer(Protocol):
    """Is given the seconds that work takes. Called on the device thread, so that it must return at once."""

    def waited(self, lane: Lane, seconds: float) -> None:
        """A request or job of `lane` begins, after so many seconds in its queue."""
        ...

    def stage(self, stage: Stage, seconds: float) -> None:
        """A stage has ended; one that failed is left out."""
        ...


class _Unobserved:
    def waited(self, lane: Lane, seconds: float) -> None:
        """Nobody wants to know."""

    def stage(self, stage: Stage, seconds: float) -> None:
        """Nobody wants to know."""


UNOBSERVED: Observer = _Unobserved()


@contextmanager
def timed(observer: Observer, stage: Stage) -> Iterator[None]:
    """Gives `observer` the seconds of what is done inside, unless it fails."""
    began = time.monotonic()
    yield
    observer.stage(stage, time.monotonic() - began)
