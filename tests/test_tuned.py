"""One engine for several users: each with its own weights or threshold, on the network of SAM 2 that is there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from learners import THRESHOLD, write_tuned

import model.engine
import model.loading
from model import CheckpointError, EngineOptions, Photo, Prompt, Sam2Engine
from model.checkpoints import BUNDLED_WEIGHTS, Checkpoint
from model.renderer.shelves import render_shelf


@pytest.fixture(scope="module")
def engine() -> Iterator[Sam2Engine]:
    engine = Sam2Engine(EngineOptions(checkpoint="facings-nano", device="cpu"))
    engine.wait_ready(120)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def photo() -> Photo:
    return Photo(pixels=render_shelf(21, (800, 600)).photo_rgb)


@pytest.fixture(scope="module")
def timid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that are less sure of everything."""
    return write_tuned(tmp_path_factory.mktemp("weights") / "timid.safetensors", bias=-2.0)


def click(photo: Photo) -> Prompt:
    width, height = photo.size_wh
    return Prompt(points_xy=np.float32([[width / 2, height / 2]]), is_foreground=np.array([True]))


def test_other_weights_answer_for_one_user_and_the_others_keep_theirs(
    engine: Sam2Engine, photo: Photo, timid: Path
) -> None:
    before = engine.preannotate(photo, score_threshold=0.1)
    tuned = engine.tuned(timid)
    found = tuned.preannotate(photo, score_threshold=0.1)
    assert found.scores.max() < before.scores.max()
    assert np.array_equal(engine.preannotate(photo, score_threshold=0.1).boxes_xyxy, before.boxes_xyxy)
    assert tuned.version.startswith("timid-")
    assert tuned.score_threshold == THRESHOLD
    assert len(tuned.preannotate(photo)) == (found.scores >= THRESHOLD).sum()


def test_clicks_are_answered_together_each_with_the_weights_of_its_user(
    engine: Sam2Engine, photo: Photo, timid: Path
) -> None:
    """The weights differ in the detector alone, so both users get the same kind of answer."""
    tuned = engine.tuned(timid)
    boxes = [one.refine(photo, [click(photo)])[0] for one in (engine, tuned)]
    assert [len(found) for found in boxes] == [1, 1]


def test_a_threshold_alone_changes_the_version_and_needs_no_other_weights(engine: Sam2Engine, photo: Photo) -> None:
    tuned = engine.tuned(score_threshold=0.2)
    assert tuned.score_threshold == 0.2
    assert tuned.version not in ("", engine.version)
    assert len(tuned.preannotate(photo)) == len(engine.preannotate(photo, score_threshold=0.2))
    assert tuned.version == engine.tuned(score_threshold=0.2).version
    assert tuned.version != engine.tuned(score_threshold=0.3).version


def test_only_so_many_weights_are_loaded_and_the_others_come_back(
    photo: Photo, timid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.engine, "MAX_TUNED", 1)
    loads: list[str] = []
    load = model.loading.load

    def counted(*args: object, **kwargs: object) -> object:
        loads.append(args[0].checkpoint.name)  # type: ignore[attr-defined]
        return load(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(model.engine, "load", counted)
    engine = Sam2Engine(EngineOptions(checkpoint="facings-nano", device="cpu"))
    try:
        users = [engine.tuned(timid), engine.tuned(write_tuned(tmp_path / "bold.safetensors", bias=1.0))]
        scores = [user.preannotate(photo, score_threshold=0.1).scores.max() for user in users * 2]
        assert loads == ["facings-nano", "timid", "bold", "timid", "bold"]
        assert scores[:2] == scores[2:]
        assert len(engine._tuned) == 1
    finally:
        engine.close()


def test_sam2_is_prompted_with_the_boxes_of_the_users_detector_and_loaded_once(
    headless: Checkpoint, photo: Photo, timid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks: list[str] = []
    network = model.loading.Network

    def counted(checkpoint: Checkpoint, *args: object, **kwargs: object) -> object:
        networks.append(checkpoint.name)
        return network(checkpoint, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(model.loading, "Network", counted)
    options = EngineOptions(checkpoint=str(headless.weights), checkpoint_config=headless.config, device="cpu")
    engine = Sam2Engine(options)
    try:
        tuned = engine.tuned(timid)
        assert tuned.version.startswith("headless-")
        assert tuned.version != engine.version
        before = engine.preannotate(photo, score_threshold=0.1)
        assert tuned.preannotate(photo, score_threshold=0.1).scores.max() < before.scores.max()
        assert len(tuned.refine(photo, [click(photo)])[0]) == 1
        assert networks == ["headless", "facings-nano", "timid"]
    finally:
        engine.close()


def test_weights_that_cannot_be_used_are_refused_at_once(
    engine: Sam2Engine, headless: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="no file at"):
        engine.tuned(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(BUNDLED_WEIGHTS.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        engine.tuned(tmp_path / "cut.safetensors")
    grid = Sam2Engine(EngineOptions(checkpoint="facings-nano", device="cpu", proposals="grid"))
    try:
        with pytest.raises(CheckpointError, match="with proposals from a grid no detector is used"):
            grid.tuned(BUNDLED_WEIGHTS)
    finally:
        grid.close()
