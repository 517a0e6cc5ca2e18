"""What a run did, as values and as JSON.

Knows counts and reasons. Prints nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from backend.bulk.pipeline import Failure
from backend.errors import CommandError


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run did.

    photos: photos, or tasks of a project, that got boxes; boxes: of them all.
    skipped: how many needed none, by reason. left_out: entries of folders that are no photos, by suffix or reason.
    failures: photos without boxes, of tasks too that have other photos with boxes.
    failed_drawings: photos with boxes whose drawing could not be written.
    engine_busy: share of `seconds` in which the engine had a photo.
    stopped: what ended the run early, or None. is_stored: whether the boxes are where they belong; False when the run
    stopped before its file was written.
    """

    photos: int
    boxes: int
    skipped: Mapping[str, int]
    failures: Sequence[Failure]
    seconds: float
    photos_per_s: float
    engine_busy: float
    model_version: str
    retries: int = 0
    duplicates_deleted: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    failed_drawings: Sequence[Failure] = ()
    stopped: CommandError | None = None
    is_stored: bool = True

    def as_json(self) -> str:
        """All of it, as an object with the fields' names. `key` of a failure: the task's ID, or the photo's number."""
        return json.dumps({entry.name: _plain(getattr(self, entry.name)) for entry in fields(self)}, indent=1) + "\n"


def _plain(value: Any) -> Any:
    match value:
        case float():
            return round(value, 3)
        case CommandError():
            return str(value)
        case Mapping():
            return dict(value)
        case list() | tuple():
            return [vars(failure) for failure in value]
    return value
