"""Rectangles of a project, redrawn with box prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Studio
from fakes import FakeEngine, painted_photo
from PIL import Image

from backend.bulk import tighten as command
from backend.bulk.choice import Wanted
from backend.bulk.service import BulkService
from backend.label_studio.label_config import parse_label_config
from backend.label_studio.project import Project
from backend.label_studio.regions import boxes_from_regions, regions_from_detections
from backend.settings import Settings
from model import Detections, Engine, EngineOptions, Photo, Sam2Engine
from model.quality import paired_iou
from scripts.demo.demo import LABEL_CONFIG
from scripts.labels import read_truth
from scripts.measure.prompts import jitter_boxes

SHELVES = Path(__file__).parents[2] / "shared" / "shelves_dev"
CONFIG = parse_label_config(LABEL_CONFIG.read_text())
SIZE_WH = (200, 100)
RED, BLUE = (80, 20, 120, 60), (10, 10, 20, 20)
VERSION = f"{FakeEngine().version}-tight"


def regions_of(boxes_xyxy: Any, size_wh: tuple[int, int] = SIZE_WH) -> list[dict[str, Any]]:
    boxes = np.array(boxes_xyxy, np.float32).reshape(-1, 4)
    (image,) = CONFIG.images
    return regions_from_detections(Detections(boxes_xyxy=boxes, scores=np.ones(len(boxes))), size_wh, image)


def photo() -> Photo:
    return Photo(pixels=painted_photo({(255, 0, 0): RED, (0, 0, 255): BLUE}))


def redraw(regions: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], command.Moved]:
    movement = command.Movement()
    service = BulkService.open(Settings(), engine=FakeEngine())
    redrawn = command.redraw(service, photo(), regions, "image", movement)
    return redrawn, movement.summary()


def test_without_rectangles_nothing_moves() -> None:
    redrawn, moved = redraw([])
    assert (redrawn, moved.boxes, moved.mean_iou) == ([], 0, 1.0)


def test_rectangles_become_tight_and_keep_their_labels_and_everything_else_stays() -> None:
    rough = regions_of([(70, 15, 125, 70), (8, 8, 22, 22)])
    rough[0]["value"]["rectanglelabels"] = ["drink"]
    choice = {"id": "c", "type": "choices", "from_name": "kind", "to_name": "image", "value": {"choices": ["shelf"]}}

    redrawn, moved = redraw([rough[0], choice, rough[1]])

    assert boxes_from_regions(redrawn, SIZE_WH).tolist() == [list(RED), list(BLUE)]
    assert [region["value"].get("rectanglelabels") for region in redrawn] == [["drink"], None, ["facing"]]
    assert redrawn[1]["value"] == choice["value"]
    assert (moved.boxes, moved.unmoved) == (2, 0)
    assert 0.5 < moved.mean_iou < 0.6


def test_rectangles_on_another_image_of_the_task_stay() -> None:
    front, back = regions_of([(70, 15, 125, 70), (70, 15, 125, 70)])
    back["to_name"] = "back"

    redrawn, moved = redraw([front, back])

    assert boxes_from_regions(redrawn, SIZE_WH).tolist() == [list(RED), [70, 15, 125, 70]]
    assert (moved.boxes, redrawn[1]["to_name"]) == (1, "back")


def test_a_turned_rectangle_becomes_upright() -> None:
    (turned,) = regions_of([(100, 10, 140, 50)])
    turned["value"]["rotation"] = 45

    ((region,), _) = redraw([turned])

    assert region["value"]["rotation"] == 0
    assert boxes_from_regions([region], SIZE_WH).tolist() == [list(RED)]


@pytest.mark.parametrize("source", command.Source)
def test_a_project_gets_new_predictions_and_keeps_what_it_has(
    studio: Studio, tmp_path: Path, source: command.Source
) -> None:
    client = studio.client
    Image.fromarray(photo().pixels).save(tmp_path / "painted.png")
    number = client.create_project("tighten", LABEL_CONFIG.read_text())
    task, other = client.upload(number, dict.fromkeys(("a.png", "b.png"), tmp_path / "painted.png"))
    rough = regions_of([(70, 15, 125, 70)])
    client.annotate(task, rough)
    settings = Settings(label_studio_url=studio.url, label_studio_api_key=studio.account.token)
    with (
        BulkService.open(settings, engine=FakeEngine()) as service,
        Project(studio.url, studio.account.token, number, retry_budget_s=1) as project,
    ):
        body = {"task": task, "result": regions_of([(8, 8, 22, 22)]), "score": 1.0, "model_version": "by hand"}
        project.post([json.dumps(body).encode()])
        for expected in ((1, {"without rectangles": 1}), (0, {"already up to date": 1, "without rectangles": 1})):
            report, _ = command.tighten(service, project, Wanted(), source=source)
            assert (report.photos, report.skipped, report.failures) == (*expected, [])

    held = {task["id"]: task for task in client.tasks(number)}
    version = VERSION + ("" if source is command.Source.predictions else "-annotations")
    found = {prediction["model_version"]: prediction["result"] for prediction in held[task]["predictions"]}
    assert sorted(found) == sorted(["by hand", version])
    expected_box = BLUE if source is command.Source.predictions else RED
    assert boxes_from_regions(found[version], SIZE_WH).tolist() == [list(expected_box)]
    assert held[task]["annotations"][0]["result"][0]["value"] == rough[0]["value"]
    assert held[other]["predictions"] == []


@pytest.fixture(scope="module")
def nano() -> Iterator[Engine]:
    engine = Sam2Engine(EngineOptions(checkpoint="facings-nano", device="cpu"))
    engine.wait_ready()
    yield engine
    engine.close()


@pytest.mark.skipif(not SHELVES.is_dir(), reason="needs the shelves of ../shared")
def test_rough_boxes_on_real_shelves_come_closer_to_the_truth(nano: Engine) -> None:
    before, after = [], []
    service = BulkService.open(Settings(), engine=nano)
    for photo in read_truth(SHELVES / "coco.json", SHELVES / "images", limit=1).photos:
        shelf = service.photo(photo.path)
        known = photo.truth.boxes_xyxy[:40]
        rough = jitter_boxes(known, photo.truth.size_wh, np.random.default_rng(photo.number))
        regions = regions_of(rough, shelf.size_wh)
        redrawn = command.redraw(service, shelf, regions, "image", command.Movement())
        before.append(paired_iou(rough, known))
        after.append(paired_iou(boxes_from_regions(redrawn, shelf.size_wh), known))
    assert np.concatenate(after).mean() > np.concatenate(before).mean() + 0.02
