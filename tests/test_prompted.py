"""Prompts anywhere on photos, with real weights: every answer holds its prompt, or there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from official import TINY, with_random_weights
from PIL import Image

from model import Engine, EngineOptions, Photo, Sam2Engine
from model.renderer.shelves import render_shelf
from scripts.measure.prompts import holds_prompt, random_prompts

REAL_PHOTOS = Path(__file__).parents[2] / "shared" / "shelves_dev" / "images"


@pytest.fixture(scope="module")
def bundled() -> Iterator[Engine]:
    engine = Sam2Engine(EngineOptions(checkpoint="facings-nano", device="cpu"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def shelf() -> Photo:
    return Photo(pixels=render_shelf(31, (1200, 900)).photo_rgb)


@pytest.mark.parametrize("want_masks", [False, True])
def test_answers_of_the_bundled_checkpoint_hold_their_prompts(bundled: Engine, shelf: Photo, want_masks: bool) -> None:
    bundled.preannotate(shelf)
    prompts = random_prompts(shelf.size_wh, 60, np.random.default_rng(int(want_masks)))
    answers = bundled.refine(shelf, prompts, want_masks=want_masks)
    held = [holds_prompt(*one, shelf.size_wh) for one in zip(answers, prompts, strict=True)]
    assert all(held), [prompts[index] for index in np.flatnonzero(~np.array(held))]
    assert sum(map(bool, map(len, answers))) > 20


def test_answers_on_a_real_photo_hold_their_prompts(bundled: Engine) -> None:
    photos = sorted(REAL_PHOTOS.glob("*.jpg"))
    if not photos:
        pytest.skip("no ../shared/shelves_dev: a folder of real shelf photos, which is not part of the project")
    photo = Photo(pixels=np.asarray(Image.open(photos[0]).convert("RGB")))
    bundled.preannotate(photo)
    prompts = random_prompts(photo.size_wh, 40, np.random.default_rng(2))
    answers = bundled.refine(photo, prompts)
    assert all(holds_prompt(*one, photo.size_wh) for one in zip(answers, prompts, strict=True))


def test_answers_of_random_official_weights_hold_their_prompts(tmp_path: Path, shelf: Photo) -> None:
    random_tiny = with_random_weights(TINY, tmp_path)
    options = EngineOptions(
        checkpoint=str(random_tiny.weights), checkpoint_config=random_tiny.config, device="cpu", proposals="grid"
    )
    engine = Sam2Engine(options)
    prompts = random_prompts(shelf.size_wh, 24, np.random.default_rng(3))
    answers = engine.refine(shelf, prompts)
    engine.close()
    assert all(holds_prompt(*one, shelf.size_wh) for one in zip(answers, prompts, strict=True))
