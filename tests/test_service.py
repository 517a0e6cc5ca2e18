"""The Service: photos and prompts in, boxes out, without JSON and HTTP."""

from __future__ import annotations

import inspect
import time
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeEngine, data_url, painted_photo
from PIL import Image

from backend import errors
from backend.errors import FacingsError
from backend.service import LOADING_WAIT_S, Service
from backend.settings import Settings
from model import DeadlineExceeded, EngineError, NotReady, Prompt

RED = (255, 0, 0)
PIXELS = painted_photo({RED: (20, 20, 60, 60)})

KINDS: list[type[FacingsError]] = [
    value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, FacingsError)
]


def new_service(engine: FakeEngine | None = None) -> Service:
    return Service.open(Settings(), engine=engine or FakeEngine())


def counts(service: Service) -> dict[str, float]:
    lines = service.metrics.exposition().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_a_photo_comes_from_an_address_from_bytes_or_from_a_file(tmp_path: Path) -> None:
    service, path = new_service(), tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path)
    photos = [service.photo(source) for source in (data_url(PIXELS), path.read_bytes(), path)]
    assert all((photo.pixels == PIXELS).all() for photo in photos)


def test_all_facings_of_a_photo_come_with_its_size_and_what_made_them() -> None:
    service = new_service()
    answer = service.preannotate(service.photo(data_url(PIXELS)))
    assert answer.detections.boxes_xyxy.tolist() == [[20, 20, 60, 60]]
    assert (answer.size_wh, answer.model_version) == ((200, 100), "fake-12345678")
    assert counts(service)['facings_photos_total{outcome="done"}'] == 1
    assert counts(service)['facings_boxes_total{mode="dense"}'] == 1


def test_each_prompt_has_its_answer_with_a_mask_where_one_is_wanted() -> None:
    service = new_service()
    prompt = Prompt(points_xy=np.array([[30, 30]], np.float32), is_foreground=np.array([True]))
    (answer,) = service.refine(service.photo(data_url(PIXELS)), [prompt], want_masks=True)
    assert answer.detections.boxes_xyxy.tolist() == [[20, 20, 60, 60]]
    assert answer.detections.masks is not None
    assert answer.detections.masks[0].bitmap.sum() == 40 * 40
    assert counts(service)['facings_boxes_total{mode="prompt"}'] == 1


@pytest.mark.parametrize(
    ("error", "kind", "outcome"),
    [
        (errors.PhotoDecodeError("no photo"), "photo_decode", "failed"),
        (EngineError("out of memory"), "engine", "failed"),
        (NotReady("loading"), "not_ready", "failed"),
        (DeadlineExceeded("too late"), "deadline", "deadline"),
        (RuntimeError("unforeseen"), "internal", "failed"),
    ],
)
def test_a_failure_is_counted_by_its_kind_and_by_the_photos_outcome(error: Exception, kind: str, outcome: str) -> None:
    service = new_service()
    assert service.failed(error).kind == kind
    assert counts(service)[f'facings_errors_total{{kind="{kind}"}}'] == 1
    assert counts(service)[f'facings_photos_total{{outcome="{outcome}"}}'] == 1


def test_only_what_may_pass_by_itself_is_worth_trying_again() -> None:
    assert {error.__name__ for error in KINDS if error.retryable} == {
        "PhotoUnreachable",
        "EngineNotReady",
        "EngineDeadline",
    }


@pytest.mark.parametrize(
    ("state", "is_alive", "is_ready"),
    [("ready", True, True), ("loading", True, False), ("failed", False, False), ("closed", False, False)],
)
def test_an_engine_is_alive_while_it_loads_and_ready_afterwards(state: str, is_alive: bool, is_ready: bool) -> None:
    service = new_service(FakeEngine(state=state, failure="no weights"))  # type: ignore[arg-type]
    for check, passes in ((service.check_alive, is_alive), (service.check_ready, is_ready)):
        if passes:
            check()
        else:
            with pytest.raises(NotReady, match="no weights" if not is_alive else "fake is loading"):
                check()


def test_weights_that_are_loading_are_waited_for_only_a_moment_and_not_beyond_the_deadline() -> None:
    waits: list[float | None] = []
    engine = FakeEngine()
    engine.wait_ready = waits.append  # type: ignore[method-assign, assignment]
    service = new_service(engine)
    service.wait_ready()
    service.wait_ready(deadline=time.monotonic() + 1000)
    service.wait_ready(deadline=time.monotonic() - 1)
    assert waits == [LOADING_WAIT_S, LOADING_WAIT_S, 0.0]


def test_a_closed_service_has_a_closed_engine() -> None:
    engine = FakeEngine()
    with new_service(engine) as service:
        assert service.engine is engine
    assert engine.state == "closed"
