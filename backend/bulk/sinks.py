"""Where the boxes of a run go: predictions into a project, or photos with their boxes into a file.

Knows uploads and writers. Knows neither photos' pixels nor the engine.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from backend.bulk.formats import BoxedTask, Writer
from backend.bulk.pipeline import Outcome
from backend.bulk.uploads import Uploads


class ProjectSink:
    """Predictions go to their tasks; the key of a job is the task's ID.

    A batch goes up when so many predictions are there, or the first has waited so long: little is lost when the machine
    dies, and a Label Studio that takes seconds for a request, as it does with 100,000 tasks, gets larger ones.
    """

    batch, batch_limit, batch_wait_s = 32, 256, 5.0

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads

    def put(self, outcomes: Sequence[Outcome[bytes]]) -> Mapping[str | int, str]:
        made = {int(outcome.key): outcome.result.made for outcome in outcomes if outcome.result is not None}
        return dict(self._uploads.put(made).items()) if made else {}

    def close(self) -> None:
        self._uploads.close()


class FileSink:
    """Photos with their boxes go to a writer, in the order of their jobs."""

    batch, batch_limit, batch_wait_s = 1, 64, 0.0

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._next = 0
        self._early: list[tuple[int, BoxedTask | None]] = []
        self._added = 0

    def put(self, outcomes: Sequence[Outcome[BoxedTask]]) -> Mapping[str | int, str]:
        for outcome in outcomes:
            heapq.heappush(self._early, (outcome.number, None if outcome.result is None else outcome.result.made))
        while self._early and self._early[0][0] == self._next:
            self._add_first()
        return {}

    def close(self) -> None:
        """The rest, without those that an interrupted run never did."""
        while self._early:
            self._add_first()

    def finish(self, *, is_complete: bool) -> bool:
        """Completes the file of an ended run. False, and no file, when an incomplete run has no photo for it."""
        self.close()
        if is_complete or self._added:
            self._writer.finish()
        return is_complete or self._added > 0

    def _add_first(self) -> None:
        number, boxed = heapq.heappop(self._early)
        self._next = number + 1
        if boxed is not None:
            self._writer.add(boxed)
            self._added += 1
