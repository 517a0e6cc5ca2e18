"""`facings evaluate --learning-curve`: what a project's first photos bring, on photos that were not learned from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backend.settings import Settings
from model.quality import Truth
from model.renderer.shelves import render_shelf
from scripts.labels import KnownPhoto
from scripts.measure import learning_curve as curve

SIZE_WH = (640, 480)


def known(folder: Path, count: int) -> list[KnownPhoto]:
    photos = []
    for number in range(count):
        shelf = render_shelf(300 + number, SIZE_WH)
        path = folder / f"{number}.jpg"
        Image.fromarray(shelf.photo_rgb).save(path, quality=95)
        truth = Truth(size_wh=SIZE_WH, boxes_xyxy=shelf.boxes_xyxy.astype(np.float64))
        photos.append(KnownPhoto(number=number, path=path, truth=truth))
    return photos


def test_the_curve_has_a_point_for_each_number_of_photos_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(curve, "RENDERED", 1)
    monkeypatch.setattr("backend.learning.forgetting.SHELVES", 1)
    settings = Settings(device="cpu", learn_minutes=0.05)
    points = list(curve.learning_curve(settings, known(tmp_path, 10), seeds=1))
    assert [(point.seed, point.photos) for point in points] == [(0, 0), (0, 5)]
    assert points[0].minutes == 0
    assert points[1].minutes > 0
    assert points[1].learned == (1 if points[1].is_promoted else 0)
    assert all(0 < point.ap < 1 and point.corrections > 0 for point in points)
    curve.print_curve(iter(points))
    assert "5 photos: " in capsys.readouterr().out


def test_a_seed_cuts_the_photos_in_the_same_way_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut: list[list[str]] = []
    point = curve.Point(
        seed=0, photos=0, learned=0, ap=0.5, ap50=0.5, corrections=1, score_threshold=0.5, is_promoted=False,
        minutes=0, rendered_ap=0.5,
    )  # fmt: skip

    def noted(_: Settings, submitted: list[KnownPhoto], others: list[KnownPhoto], seed: int) -> curve.Point:
        cut.append([entry.path.name for entry in others])
        return point

    monkeypatch.setattr(curve, "_point", noted)
    photos = known(tmp_path, 6)
    for _ in range(2):
        list(curve.learning_curve(Settings(), photos, seeds=2, counts=[0]))
    assert cut[:2] == cut[2:]
    assert cut[0] != cut[1]
