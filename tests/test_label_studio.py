"""Facings through the API of a real Label Studio."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Studio, running_facings
from PIL import Image

from backend.label_studio.label_config import parse_label_config
from backend.label_studio.regions import regions_from_detections
from model import Detections
from model.boxes import iou_matrix
from model.renderer.shelves import Shelf, render_shelf
from scripts.demo.label_studio_client import ApiError, Client
from scripts.labels import read_truth

LABEL_CONFIGS = sorted((Path(__file__).parents[1] / "label_config").glob("*.xml"))
SHELF_BOXES, SHELF_CLASSES = (
    next(path.read_text() for path in LABEL_CONFIGS if path.stem == stem) for stem in ("shelf_boxes", "shelf_classes")
)
CHOICES_ONLY = """<View><Image name="image" value="$image"/>
    <Choices name="kind" toName="image"><Choice value="shelf"/></Choices></View>"""
REPEATER = """<View><Repeater on="$photos" indexFlag="{{i}}"><Image name="image_{{i}}" value="$photos[{{i}}]"/>
    <RectangleLabels name="box_{{i}}" toName="image_{{i}}"><Label value="facing"/></RectangleLabels>
    </Repeater></View>"""
# Two photos in nested keys, each with boxes and clicks of its own, and a plan without boxes.
TWO_PHOTOS = """<View>
    <Image name="front" value="$shelf.front"/><Image name="back" value="$more[1].url"/>
    <Image name="plan" value="$plan"/>
    <KeyPointLabels name="front_click" toName="front" smart="true"><Label value="click"/></KeyPointLabels>
    <KeyPointLabels name="back_click" toName="back" smart="true"><Label value="click"/></KeyPointLabels>
    <RectangleLabels name="front_box" toName="front" smart="false"><Label value="facing"/></RectangleLabels>
    <RectangleLabels name="back_box" toName="back" smart="false"><Label value="facing"/></RectangleLabels></View>"""
SIZE_WH = (640, 480)


@dataclass(frozen=True, kw_only=True)
class ShelfTask:
    """A task whose photo was rendered, so that its boxes are known."""

    id: int
    shelf: Shelf

    def keypoint(self, facing: int) -> dict[str, Any]:
        """A click into the middle of a facing, as the labelling page sends it while no label is selected."""
        x0, y0, x1, y1 = self.shelf.boxes_xyxy[facing]
        width, height = SIZE_WH
        return {
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": {
                "x": float(x0 + x1) / 2 / width * 100,
                "y": float(y0 + y1) / 2 / height * 100,
                "width": 0.2,
                "labels": [],
            },
            "is_positive": True,
            "id": f"prompt{facing}",
            "from_name": "point",
            "to_name": "image",
            "type": "keypoint",
            "origin": "manual",
        }

    def overlap(self, region: Mapping[str, Any], facing: int) -> float:
        """Intersection over union of a region that Label Studio holds with a facing of the photo."""
        value, (width, height) = region["value"], SIZE_WH
        x, y = value["x"] / 100 * width, value["y"] / 100 * height
        box = np.array([[x, y, x + value["width"] / 100 * width, y + value["height"] / 100 * height]], np.float32)
        return float(iou_matrix(box, self.shelf.boxes_xyxy[facing : facing + 1])[0, 0])


def shelf_tasks(client: Client, project: int, folder: Path, seeds: range) -> list[ShelfTask]:
    """Uploads rendered shelves."""
    shelves = {f"shelf-{seed}.jpg": render_shelf(seed, SIZE_WH) for seed in seeds}
    for name, shelf in shelves.items():
        Image.fromarray(shelf.photo_rgb).save(folder / name, quality=92)
    tasks = client.upload(project, {name: folder / name for name in shelves})
    return [ShelfTask(id=task, shelf=shelf) for task, shelf in zip(tasks, shelves.values(), strict=True)]


def largest_facings(shelf: Shelf, count: int) -> list[int]:
    """The facings with the largest boxes."""
    sides = shelf.boxes_xyxy[:, 2:] - shelf.boxes_xyxy[:, :2]
    return [int(facing) for facing in np.argsort(-sides.prod(1))[:count]]


def predicted(client: Client, project: int) -> dict[int, list[dict[str, Any]]]:
    """Task id → its predictions, without the tasks that have none."""
    return {task["id"]: task["predictions"] for task in client.tasks(project) if task["predictions"]}


def retrieve_until_nothing_is_added(client: Client, project: int) -> list[int]:
    """Presses "Retrieve predictions" again and again; the number of predicted tasks after each time."""
    counts = [0]
    while not counts[1:] or counts[-1] > counts[-2]:
        client.retrieve_predictions(project)
        counts.append(len(predicted(client, project)))
    return counts[1:]


@pytest.mark.parametrize("path", LABEL_CONFIGS, ids=lambda path: path.stem)
def test_every_label_config_of_the_project_loads_in_label_studio_and_connects(
    studio: Studio, facings: str, path: Path
) -> None:
    project = studio.client.create_project(path.stem, path.read_text())

    studio.client.connect_backend(project, facings)

    (backend,) = studio.client.backends(project)
    assert (backend["state"], backend["is_interactive"], backend["error_message"]) == ("CO", True, None)


@pytest.mark.parametrize(
    ("label_config", "message"),
    [
        (CHOICES_ONLY, "add RectangleLabels name=.*with a Label value=.* inside"),
        (REPEATER, "a Repeater around images is not supported"),
    ],
)
def test_a_label_config_without_boxes_is_refused_with_a_message_that_names_what_to_add(
    studio: Studio, facings: str, label_config: str, message: str
) -> None:
    project = studio.client.create_project("no boxes", label_config)

    with pytest.raises(ApiError, match=message) as refusal:
        studio.client.connect_backend(project, facings)

    assert refusal.value.status == 400


def test_boxes_taken_out_of_the_label_config_later_are_an_error_of_the_backend(studio: Studio, facings: str) -> None:
    project = studio.client.create_project("boxes taken out", SHELF_BOXES)
    studio.client.connect_backend(project, facings)

    studio.client.set_label_config(project, CHOICES_ONLY)

    (backend,) = studio.client.backends(project)
    assert backend["state"] == "ER"
    assert "RectangleLabels" in backend["error_message"]


def test_retrieving_predictions_boxes_every_photo_but_the_one_that_fails(
    studio: Studio, facings: str, tmp_path: Path
) -> None:
    client = studio.client
    project = client.create_project("thirty photos", SHELF_BOXES)
    tasks = [task.id for task in shelf_tasks(client, project, tmp_path, range(100, 129))]
    cut = tmp_path / "cut.jpg"
    cut.write_bytes((tmp_path / "shelf-100.jpg").read_bytes()[:300])
    client.upload(project, {cut.name: cut})
    client.connect_backend(project, facings)

    retrieve_until_nothing_is_added(client, project)

    found = predicted(client, project)
    assert sorted(found) == tasks
    assert all(len(predictions) == 1 for predictions in found.values())
    # On a dim piece of shelf with a handful of facings the small checkpoint may find none with confidence.
    assert sum(bool(predictions[0]["result"]) for predictions in found.values()) >= 25


def test_more_photos_than_fit_the_deadline_are_done_by_asking_again(
    studio: Studio, facings: str, servers_dir: Path, tmp_path: Path
) -> None:
    client = studio.client
    project = client.create_project("deadline", SHELF_BOXES)
    tasks = [task.id for task in shelf_tasks(client, project, tmp_path, range(200, 216))]
    backend = client.connect_backend(project, facings)
    started = time.monotonic()
    client.retrieve_predictions(project, tasks[:3])
    deadline_s = max(1.0, 1.2 * (time.monotonic() - started))  # for three or four of the other thirteen

    with running_facings(servers_dir, DEADLINE_S=f"{deadline_s:.2f}") as hurried:
        client.move_backend(backend, project, hurried)
        counts = retrieve_until_nothing_is_added(client, project)

    assert counts[0] < len(tasks), counts
    assert counts[-1] == len(tasks), counts


def test_two_annotators_on_two_photos_each_get_the_box_of_their_own_photo(
    studio: Studio, facings: str, tmp_path: Path
) -> None:
    client = studio.client
    project = client.create_project("two annotators", SHELF_BOXES)
    backend = client.connect_backend(project, facings)
    mine, yours = shelf_tasks(client, project, tmp_path, range(300, 302))
    clicks = [
        (task, facing)
        for pair in zip(
            *([(task, facing) for facing in largest_facings(task.shelf, 8)] for task in (mine, yours)), strict=True
        )
        for task, facing in pair
    ]

    def answer(click: tuple[ShelfTask, int]) -> float:
        task, facing = click
        # A client each: a session of requests is not for two threads.
        own = Client(studio.url, studio.account.token)
        (region,) = own.annotate_interactively(backend, task.id, [task.keypoint(facing)])["data"]["result"]
        return task.overlap(region, facing)

    with ThreadPoolExecutor(2) as annotators:
        overlaps = list(annotators.map(answer, clicks))

    assert np.median(overlaps) > 0.6, overlaps


def test_two_projects_with_different_labels_share_one_backend(studio: Studio, facings: str, tmp_path: Path) -> None:
    client = studio.client
    asked = []
    for title, label_config, labels in (("boxes", SHELF_BOXES, []), ("classes", SHELF_CLASSES, ["drink"])):
        project = client.create_project(title, label_config)
        backend = client.connect_backend(project, facings)
        (task,) = shelf_tasks(client, project, tmp_path, range(400, 401))
        point = task.keypoint(largest_facings(task.shelf, 1)[0])
        # With a label selected, the page sends the point once more, as an item of the control that has the label.
        value = {**point["value"], "labels": labels, "rectanglelabels": labels}
        labelled = [{**point, "from_name": "box", "type": "rectanglelabels", "value": value}] if labels else []
        asked.append((backend, task.id, [point, *labelled]))

    answers = [client.annotate_interactively(backend, task, prompts) for backend, task, prompts in asked * 2]

    labels = [answer["data"]["result"][0]["value"]["rectanglelabels"] for answer in answers]
    assert labels == [["facing"], ["drink"]] * 2


def test_each_photo_of_a_task_gets_its_own_boxes_and_one_that_fails_costs_the_other_nothing(
    studio: Studio, facings: str, tmp_path: Path
) -> None:
    client = studio.client
    uploads = client.create_project("uploads", SHELF_BOXES)
    shelves = shelf_tasks(client, uploads, tmp_path, range(604, 606))
    front, back = (task["data"]["image"] for task in client.tasks(uploads))
    project = client.create_project("two photos", TWO_PHOTOS)
    backend = client.connect_backend(project, facings)
    whole, partly = client.import_tasks(
        project,
        [
            {"shelf": {"front": front}, "more": [None, {"url": back}], "plan": front},
            {"shelf": {"front": front}, "more": [None, {"url": "/data/upload/0/missing.jpg"}], "plan": front},
        ],
    )

    client.retrieve_predictions(project)

    regions = {task: predictions[0]["result"] for task, predictions in predicted(client, project).items()}
    for name, shelf in zip(("front", "back"), shelves, strict=True):
        of_image = [region for region in regions[whole] if region["to_name"] == name]
        assert {region["from_name"] for region in of_image} == {f"{name}_box"}
        facings_found = [
            max(shelf.overlap(region, facing) for region in of_image) > 0.5
            for facing in range(len(shelf.shelf.boxes_xyxy))
        ]
        assert np.mean(facings_found) > 0.5, name
    assert {region["to_name"] for region in regions[whole]} == {"front", "back"}
    assert len(regions[partly]) == sum(region["to_name"] == "front" for region in regions[whole])
    assert {region["to_name"] for region in regions[partly]} == {"front"}

    (facing,) = largest_facings(shelves[1].shelf, 1)
    click = {**shelves[1].keypoint(facing), "from_name": "back_click", "to_name": "back", "type": "keypointlabels"}
    (region,) = client.annotate_interactively(backend, whole, [click])["data"]["result"]
    assert (region["to_name"], region["from_name"]) == ("back", "back_box")
    assert shelves[1].overlap(region, facing) > 0.5


def test_what_annotators_submitted_is_read_from_an_export(studio: Studio, tmp_path: Path) -> None:
    project = studio.client.create_project("export", SHELF_BOXES)
    done, untouched = shelf_tasks(studio.client, project, tmp_path, range(70, 72))
    config = parse_label_config(SHELF_BOXES).images[0]
    boxes = done.shelf.boxes_xyxy
    detections = Detections(boxes_xyxy=boxes, scores=np.ones(len(boxes), np.float32))
    studio.client.annotate(done.id, regions_from_detections(detections, SIZE_WH, config))
    export = tmp_path / "export.json"
    export.write_text(json.dumps(studio.client.export(project)))
    (photo,) = read_truth(export, tmp_path).photos
    assert (photo.number, photo.path.name, photo.truth.size_wh) == (done.id, "shelf-70.jpg", SIZE_WH)
    assert np.abs(photo.truth.boxes_xyxy - boxes).max() < 0.01
    assert untouched.id != photo.number


@pytest.fixture
def without_legacy_tokens(studio: Studio) -> Iterator[Client]:
    """A client of a Label Studio that takes personal access tokens only, as long as the test runs."""
    client = Client.login(studio.url, studio.account)
    client.allow_tokens(legacy=False, personal=True)
    yield client
    client.allow_tokens(legacy=True, personal=True)


def test_photos_are_fetched_with_a_personal_access_token_where_legacy_tokens_are_off(
    studio: Studio, without_legacy_tokens: Client, personal_token: str, servers_dir: Path, tmp_path: Path
) -> None:
    client = without_legacy_tokens
    project = client.create_project("personal token", SHELF_BOXES)
    tasks = [task.id for task in shelf_tasks(client, project, tmp_path, range(500, 502))]

    with running_facings(servers_dir, LABEL_STUDIO_URL=studio.url, LABEL_STUDIO_API_KEY=personal_token) as facings:
        client.connect_backend(project, facings)
        client.retrieve_predictions(project)

    assert sorted(predicted(client, project)) == tasks
