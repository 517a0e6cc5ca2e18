"""How long the stages of the work on the device take.

Knows clocks and the stages' names. On a GPU a stage ends when its work is queued, unless its answer is fetched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

#: tile: cut out, resize and normalise. encode: the network on the tiles. propose: its head's answer as boxes.
#: decode: the decoder on prompts, and their boxes read from its masks. merge: one box for each facing from all tiles.
Stage = Literal["tile", "encode", "propose", "decode", "merge"]
Timed = Callable[[Stage], AbstractContextManager[None]]


def untimed(_: Stage) -> AbstractContextManager[None]:
    """For who does not want to know."""
    return nullcontext()


def timed_for(observe: Callable[[str, float], None]) -> Timed:
    """Calls `observe` with each stage's name and its seconds, unless it failed."""

    @contextmanager
    def timed(stage: Stage) -> Iterator[None]:
        began = time.monotonic()
        yield
        observe(stage, time.monotonic() - began)

    return timed
