"""Bulk pre-annotation of projects of a real Label Studio, reliable and not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Studio
from fakes import FakeEngine, painted_photo
from PIL import Image
from proxies import Fault, unreliable

from backend.bulk import choice, jobs, pipeline, task_photos
from backend.bulk.choice import Shard, Wanted
from backend.bulk.formats import Format, open_writer
from backend.bulk.pipeline import Tally
from backend.bulk.report import Report
from backend.bulk.service import BulkService
from backend.bulk.sinks import ProjectSink
from backend.bulk.tighten import Source, tighten
from backend.errors import CommandError, Interrupted
from backend.label_studio import retry
from backend.label_studio.project import Project, Selection
from backend.label_studio.retry import Unavailable
from backend.settings import Settings
from model.renderer.shelves import render_shelf
from scripts import preannotate as printing
from scripts.demo.demo import ROOT
from scripts.demo.label_studio_client import Client

SHELF_BOXES = (ROOT / "label_config" / "shelf_boxes.xml").read_text()
VERSION = FakeEngine().version
ALL = Selection()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(task_photos, "LOAD_PAUSE_S", 0.02)
    monkeypatch.setattr(ProjectSink, "batch", 8)
    monkeypatch.setattr(ProjectSink, "batch_limit", 8)


@pytest.fixture(scope="module")
def photo_address(studio: Studio, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where this Label Studio serves a photo with two areas of one colour."""
    path = tmp_path_factory.mktemp("painted") / "painted.png"
    Image.fromarray(painted_photo({(255, 0, 0): (80, 20, 120, 60), (0, 0, 255): (10, 10, 20, 20)})).save(path)
    project = studio.client.create_project("photos of others", SHELF_BOXES)
    (task,) = studio.client.upload(project, {path.name: path})
    return str(studio.client.task(task)["data"]["image"])


def new_project(client: Client, addresses: Sequence[str]) -> tuple[int, list[int]]:
    """A project with a task for each address: its number and the tasks' ids."""
    number = client.create_project("bulk", SHELF_BOXES)
    return number, client.import_tasks(number, [{"image": address} for address in addresses]) if addresses else []


def preannotate(
    studio: Studio,
    number: int,
    *,
    url: str | None = None,
    token: str | None = None,
    retry_budget_s: float = 20,
    seconds: float = 0.0,
    show: Callable[[Tally], None] = lambda _: None,
    **wanted: Any,
) -> Report:
    """A run with an engine that boxes areas of one colour, and takes some seconds for each photo."""
    url, token = url or studio.url, token or studio.account.token
    settings = Settings(label_studio_url=url, label_studio_api_key=token)
    with (
        BulkService.open(settings, engine=FakeEngine(seconds=seconds)) as service,
        Project(url, token, number, retry_budget_s=retry_budget_s) as project,
    ):
        return jobs.preannotate_project(service, project, Wanted(**wanted), show=show)


def store(studio: Studio, number: int, predictions: Sequence[tuple[int, str]]) -> None:
    """Empty predictions, by task and version, sent one after the other."""
    with Project(studio.url, studio.account.token, number, retry_budget_s=1) as project:
        for task, version in predictions:
            body = {"task": task, "result": [], "score": 0.0, "model_version": version}
            assert project.post([json.dumps(body).encode()]) == 1


def held(client: Client, number: int) -> dict[int, list[str]]:
    """The versions of the predictions of each task."""
    return {task["id"]: [p["model_version"] for p in task["predictions"]] for task in client.tasks(number)}


def test_every_task_gets_a_prediction_and_a_second_run_finds_nothing_to_do(studio: Studio, photo_address: str) -> None:
    number, tasks = new_project(studio.client, [photo_address] * 20)

    first, second = preannotate(studio, number), preannotate(studio, number)

    assert (first.photos, first.boxes, first.failures, first.stopped) == (20, 40, [], None)
    assert (second.photos, second.skipped) == (0, {choice.UP_TO_DATE: 20})
    assert held(studio.client, number) == {task: [VERSION] for task in tasks}
    (prediction,) = studio.client.tasks(number)[0]["predictions"]
    assert prediction["score"] == 0.85
    assert [region["value"]["x"] for region in prediction["result"]] == [40, 5]


@pytest.mark.parametrize("kind", ["legacy", "personal"])
def test_either_kind_of_token_will_do(studio: Studio, personal_token: str, photo_address: str, kind: str) -> None:
    number, tasks = new_project(studio.client, [photo_address] * 3)
    token = personal_token if kind == "personal" else studio.account.token

    assert preannotate(studio, number, token=token).photos == 3
    assert held(studio.client, number) == {task: [VERSION] for task in tasks}


def test_an_access_token_that_label_studio_no_longer_takes_is_exchanged_anew(
    studio: Studio, personal_token: str, photo_address: str
) -> None:
    number, (task,) = new_project(studio.client, [photo_address])

    def refused_once(method: str, path: str, before: int) -> Fault | None:
        return "401" if before == 0 and path.endswith(("/api/tasks/", "/import/predictions")) else None

    with unreliable(studio.url, refused_once) as proxy:
        with Project(proxy.url, personal_token, number, retry_budget_s=1) as project:
            assert project.look([task]).keys() == {task}
            body = {"task": task, "result": [], "score": 0.0, "model_version": VERSION}
            assert project.post([json.dumps(body).encode()]) == 1
        assert (proxy.faults, proxy.count("POST", "/api/token/refresh/")) == (["401", "401"], 3)


@pytest.mark.parametrize("kind", ["legacy", "personal"])
def test_a_token_that_label_studio_never_takes_is_rejected_and_not_tried_again(
    studio: Studio, personal_token: str, photo_address: str, kind: str
) -> None:
    number, _ = new_project(studio.client, [photo_address])
    token = personal_token if kind == "personal" else studio.account.token
    with (
        unreliable(
            studio.url, lambda method, path, before: "401" if path.startswith("/api/projects/") else None
        ) as proxy,
        pytest.raises(CommandError, match=r"401 .*--api-key or LABEL_STUDIO_API_KEY"),
    ):
        Project(proxy.url, token, number, retry_budget_s=1)
    assert proxy.count("GET", f"/api/projects/{number}/") == (2 if kind == "personal" else 1)


def test_a_limit_does_not_count_what_is_skipped(studio: Studio, photo_address: str) -> None:
    number, tasks = new_project(studio.client, [photo_address] * 6)
    store(studio, number, [(task, VERSION) for task in tasks[:2]])
    tally = Tally(total=3)
    with Project(studio.url, studio.account.token, number, retry_budget_s=1) as project:
        wanted = Wanted(limit=3)
        assert [task.id for task in choice.tasks_to_do(project, VERSION, wanted, tally)] == tasks[2:5]
    assert (tally.skipped.total(), tally.total) == (2, 5)


def test_failed_photos_are_listed_with_their_tasks_and_the_others_are_done(studio: Studio, photo_address: str) -> None:
    broken = "data:image/png;base64,bm8gcGhvdG8="
    addresses = [photo_address, broken, "/data/none.jpg", "http://[shelf].jpg", photo_address]
    number, tasks = new_project(studio.client, addresses)

    report = preannotate(studio, number)

    assert report.photos == 2
    assert sorted(int(failure.key) for failure in report.failures) == tasks[1:4]
    reasons = {failure.key: failure.reason for failure in report.failures}
    assert "404" in reasons[tasks[2]]
    assert "[shelf].jpg" in reasons[tasks[3]]
    assert [bool(versions) for versions in held(studio.client, number).values()] == [True, False, False, False, True]


def faults_by_turns(method: str, path: str, before: int) -> Fault | None:
    """Every third request of a kind fails, each time in another way; uploads fail more often than not."""
    faults: tuple[Fault, ...] = ("500", "429", "drop", "swallow")
    if path.startswith("/api/"):
        faults = (*faults, "page")
    if path.endswith("/import/predictions"):
        return ("swallow", "500", None, "page", "drop", "429", "twice", None, None)[before % 9]  # type: ignore[return-value]
    return faults[before // 3 % len(faults)] if before % 3 == 2 else None


def test_nothing_is_lost_and_nothing_is_twice_when_label_studio_fails_every_third_time(
    studio: Studio, photo_address: str
) -> None:
    number, tasks = new_project(studio.client, [photo_address] * 60)

    with unreliable(studio.url, faults_by_turns) as proxy:
        report = preannotate(studio, number, url=proxy.url)

    assert set(proxy.faults) == {"429", "500", "page", "drop", "swallow", "twice"}
    assert report.failures == []
    assert report.retries > 0
    assert report.duplicates_deleted > 0
    assert held(studio.client, number) == {task: [VERSION] for task in tasks}


def test_a_run_stops_when_label_studio_stays_away_and_the_next_one_goes_on(studio: Studio, photo_address: str) -> None:
    number, tasks = new_project(studio.client, [photo_address] * 40)
    uploads = 0

    def gone_after_two_uploads(method: str, path: str, before: int) -> Fault | None:
        nonlocal uploads
        uploads += path.endswith("/import/predictions")
        return "drop" if uploads > 2 else None

    with unreliable(studio.url, gone_after_two_uploads) as proxy:
        stopped = preannotate(studio, number, url=proxy.url, retry_budget_s=0.5)
    stored = sum(bool(versions) for versions in held(studio.client, number).values())
    resumed = preannotate(studio, number)

    assert isinstance(stopped.stopped, Unavailable)
    assert "Label Studio at http" in str(stopped.stopped)
    assert stored == 16
    assert (resumed.skipped, resumed.photos) == ({choice.UP_TO_DATE: 16}, 24)
    assert held(studio.client, number) == {task: [VERSION] for task in tasks}


def test_two_predictions_of_the_version_become_one_and_other_versions_stay(studio: Studio, photo_address: str) -> None:
    number, (task, other) = new_project(studio.client, [photo_address] * 2)
    store(studio, number, [(task, VERSION), (task, "older"), (task, VERSION)])

    report = preannotate(studio, number)

    assert report.duplicates_deleted == 1
    assert {i: sorted(v) for i, v in held(studio.client, number).items()} == {
        task: [VERSION, "older"],
        other: [VERSION],
    }


def test_again_replaces_the_prediction_of_the_version_and_no_other(studio: Studio, photo_address: str) -> None:
    number, tasks = new_project(studio.client, [photo_address] * 3)
    store(studio, number, [(tasks[0], "older")])
    preannotate(studio, number)
    before = {task["id"]: {p["id"] for p in task["predictions"]} for task in studio.client.tasks(number)}

    with unreliable(studio.url, faults_by_turns) as proxy:
        report = preannotate(studio, number, url=proxy.url, again=True)

    assert report.photos == 3
    after = {task["id"]: task["predictions"] for task in studio.client.tasks(number)}
    assert {i: sorted(p["model_version"] for p in found) for i, found in after.items()} == {
        tasks[0]: [VERSION, "older"],
        tasks[1]: [VERSION],
        tasks[2]: [VERSION],
    }
    assert all(p["id"] not in before[i] for i, found in after.items() for p in found if p["model_version"] == VERSION)


def test_a_version_that_begins_with_another_ones_name_is_another_one(studio: Studio, photo_address: str) -> None:
    number, tasks = new_project(studio.client, [photo_address] * 2)
    store(studio, number, [(task, f"{VERSION}-ab12") for task in tasks])

    assert preannotate(studio, number).photos == 2


def test_tasks_are_chosen_by_number_by_view_by_limit_and_by_their_annotations(
    studio: Studio, photo_address: str
) -> None:
    client = studio.client
    number, tasks = new_project(client, [photo_address] * 8)
    client.annotate(tasks[0], [])
    filters = {"filter": "filter:tasks:total_predictions", "operator": "equal", "type": "Number", "value": 0}
    view = client.create_view(number, {"conjunction": "and", "items": [filters]})

    def predicted() -> list[int]:
        return [task for task, versions in held(client, number).items() if versions]

    assert preannotate(studio, number, selection=Selection(ids=[tasks[5], tasks[6]])).photos == 2
    assert preannotate(studio, number, only_unlabeled=True, limit=2).photos == 2
    assert predicted() == [tasks[1], tasks[2], tasks[5], tasks[6]]
    # The view shows tasks without predictions only: fewer and fewer while the run goes on.
    assert preannotate(studio, number, selection=Selection(view=view)).photos == 4
    assert predicted() == tasks


def test_a_task_that_is_not_there_is_reported_like_a_failed_photo(studio: Studio, photo_address: str) -> None:
    number, (task,) = new_project(studio.client, [photo_address])

    report = preannotate(studio, number, selection=Selection(ids=[task, 10_000_000]))

    assert report.photos == 1
    assert [failure.key for failure in report.failures] == [10_000_000]


@pytest.mark.parametrize("kind", Format)
def test_boxes_of_a_project_go_into_a_file_and_the_project_stays_as_it_is(
    studio: Studio, photo_address: str, tmp_path: Path, kind: Format
) -> None:
    number, tasks = new_project(studio.client, [photo_address] * 2)
    settings = Settings(label_studio_url=studio.url, label_studio_api_key=studio.account.token)
    with (
        BulkService.open(settings, engine=FakeEngine()) as service,
        Project(studio.url, studio.account.token, number, retry_budget_s=1) as project,
        open_writer(tmp_path / "out", kind, config=project.label_config, model_version=VERSION) as writer,
    ):
        report = jobs.export_project(service, project, Wanted(), writer)

    assert (report.photos, report.boxes) == (2, 4)
    assert held(studio.client, number) == {task: [] for task in tasks}
    if kind is Format.yolo:
        stem = Path(photo_address).stem
        names = sorted(path.name for path in (tmp_path / "out" / "labels").rglob("*.txt"))
        assert names == sorted([f"{stem}.txt", f"{stem}-{tasks[1]}.txt"])
        return
    written = json.loads((tmp_path / "out").read_text())
    if kind is Format.coco:
        assert [row["image_id"] for row in written["annotations"]] == [tasks[0], tasks[0], tasks[1], tasks[1]]
    else:
        again, _ = new_project(studio.client, [])
        studio.client.import_whole_tasks(again, written)
        assert list(held(studio.client, again).values()) == [[VERSION]] * 2


FRONT_AND_BACK = """<View>
<Image name="front" value="$front"/><RectangleLabels name="box" toName="front"><Label value="facing"/></RectangleLabels>
<Image name="back" value="$back"/><RectangleLabels name="box2" toName="back"><Label value="facing"/></RectangleLabels>
</View>"""


def test_all_photos_of_a_task_are_boxed_tightened_and_exported(
    studio: Studio, photo_address: str, tmp_path: Path
) -> None:
    number = studio.client.create_project("front and back", FRONT_AND_BACK)
    (task,) = studio.client.import_tasks(number, [{"front": photo_address, "back": photo_address}])
    settings = Settings(label_studio_url=studio.url, label_studio_api_key=studio.account.token)
    with (
        BulkService.open(settings, engine=FakeEngine()) as service,
        Project(studio.url, studio.account.token, number, retry_budget_s=1) as project,
        open_writer(tmp_path / "coco.json", Format.coco, config=project.label_config, model_version=VERSION) as writer,
    ):
        assert jobs.preannotate_project(service, project, Wanted()).boxes == 4
        report, moved = tighten(service, project, Wanted(), source=Source.predictions)
        assert (report.boxes, moved.boxes, moved.unmoved) == (4, 4, 4)
        assert jobs.export_project(service, project, Wanted(), writer).boxes == 4

    predictions = studio.client.task(task)["predictions"]
    regions = {p["model_version"]: [(r["from_name"], r["to_name"]) for r in p["result"]] for p in predictions}
    expected = [("box", "front")] * 2 + [("box2", "back")] * 2
    assert regions == {VERSION: expected, f"{VERSION}-tight": expected}
    written = json.loads((tmp_path / "coco.json").read_text())
    assert [len(written[part]) for part in ("images", "annotations")] == [2, 4]


def test_a_failed_photo_of_a_task_is_listed_and_costs_its_other_photo_no_boxes(
    studio: Studio, photo_address: str
) -> None:
    number = studio.client.create_project("front and back", FRONT_AND_BACK)
    (task,) = studio.client.import_tasks(number, [{"front": photo_address, "back": "/data/none.jpg"}])

    report = preannotate(studio, number)

    assert (report.photos, report.boxes) == (1, 2)
    assert [(failure.key, "none.jpg" in failure.reason) for failure in report.failures] == [(task, True)]
    assert held(studio.client, number) == {task: [VERSION]}


def test_ctrl_c_stores_what_is_done_and_says_how_to_continue(
    studio: Studio, photo_address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    number, tasks = new_project(studio.client, [photo_address] * 40)
    is_pressed = False

    def press(tally: Tally) -> None:
        nonlocal is_pressed
        if tally.done and not is_pressed:
            is_pressed = True
            raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "POLL_S", 0.01)
    with unreliable(studio.url, faults_by_turns) as proxy:
        report = preannotate(studio, number, url=proxy.url, seconds=0.05, show=press)

    assert isinstance(report.stopped, Interrupted)
    assert printing.finish(report, printing.Place(name=f"project {number}"), None) == 130
    assert "run the same command again to continue" in capsys.readouterr().err
    stored = sum(bool(versions) for versions in held(studio.client, number).values())
    assert 0 < report.photos == stored < 40
    assert preannotate(studio, number).photos == 40 - stored
    assert held(studio.client, number) == {task: [VERSION] for task in tasks}


def test_a_dry_run_prints_what_would_be_done_and_does_nothing(
    studio: Studio, photo_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    number, _ = new_project(studio.client, [photo_address] * 3)
    preannotate(studio, number, limit=1)

    with Project(studio.url, studio.account.token, number, retry_budget_s=1) as project:
        tally = jobs.dry_run(project, VERSION, Wanted())
        printing.print_dry_run_of_project(project, VERSION, Wanted(), tally)

    assert capsys.readouterr().out.splitlines() == [
        f"would add predictions of {VERSION} on 2 tasks of project {number} ('bulk')",
        "skipped 1 tasks: 1 already up to date",
    ]
    assert len([task for task, versions in held(studio.client, number).items() if versions]) == 1


@pytest.mark.parametrize(
    ("number", "token", "selection", "message"),
    [
        (None, "wrong", ALL, "401"),
        (10_000_000, None, ALL, "404"),
        (None, None, Selection(view=10_000_000), "404"),
        (None, None, Selection(view=-1), "expected one of project"),
    ],
)
def test_what_label_studio_rejects_is_one_line(
    studio: Studio, photo_address: str, number: int | None, token: str | None, selection: Selection, message: str
) -> None:
    own, _ = new_project(studio.client, [photo_address])
    if selection.view == -1:
        selection = Selection(view=studio.client.create_view(new_project(studio.client, [photo_address])[0], {}))

    with pytest.raises(CommandError, match=message) as caught:
        preannotate(studio, number or own, token=token, selection=selection)

    assert "\n" not in str(caught.value)
    assert studio.account.token not in str(caught.value)


def test_two_shards_in_two_processes_cover_every_task_once(studio: Studio, tmp_path: Path) -> None:
    path = tmp_path / "shelf.jpg"
    Image.fromarray(render_shelf(0, (320, 240)).photo_rgb).save(path)
    (photo,) = studio.client.tasks(_uploaded(studio.client, {path.name: path}))
    number, tasks = new_project(studio.client, [photo["data"]["image"]] * 9)
    environ = {**os.environ, "LABEL_STUDIO_API_KEY": studio.account.token, "OMP_NUM_THREADS": "1"}
    options = ["--checkpoint", "facings-nano", "--device", "cpu"]
    reports = [tmp_path / f"{shard}.json" for shard in (1, 2)]

    processes = [
        subprocess.Popen(
            [*run_command(studio, str(number), *options), "--shard", f"{shard}/2", "--report", str(report)],
            cwd=ROOT,
            env=environ,
            stderr=subprocess.PIPE,
            text=True,
        )
        for shard, report in enumerate(reports, 1)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]

    assert [process.returncode for process in processes] == [0, 0], errors
    assert {task: len(versions) for task, versions in held(studio.client, number).items()} == dict.fromkeys(tasks, 1)
    done = [json.loads(report.read_text()) for report in reports]
    assert sorted(counts["photos"] for counts in done) == [4, 5]
    assert [counts["duplicates_deleted"] for counts in done] == [0, 0]


@pytest.mark.parametrize("count", [1, 2, 8])
def test_every_task_belongs_to_one_shard(count: int) -> None:
    shards = [Shard(number=number, count=count) for number in range(1, count + 1)]
    assert all(sum(shard.holds(task) for shard in shards) == 1 for task in range(100))


@pytest.mark.parametrize(("number", "count"), [(0, 8), (9, 8), (-1, 8), (1, 0)])
def test_a_shard_that_does_not_exist_is_refused(number: int, count: int) -> None:
    with pytest.raises(ValueError, match="shard: expected"):
        Shard(number=number, count=count)


def run_command(studio: Studio, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "scripts.cli", "project", "preannotate", *arguments, "--url", studio.url]


def test_killed_at_any_moment_it_goes_on_and_each_of_200_tasks_has_one_prediction(
    studio: Studio, tmp_path: Path
) -> None:
    """The real command with the real checkpoint. Tasks share photos, so that most features are known."""
    names = {}
    for seed in (0, 2):
        names[f"{seed}.jpg"] = tmp_path / f"{seed}.jpg"
        Image.fromarray(render_shelf(seed, (320, 240)).photo_rgb).save(names[f"{seed}.jpg"])
    client = studio.client
    addresses = [task["data"]["image"] for task in client.tasks(_uploaded(client, names))]
    number, tasks = new_project(client, addresses * 100)
    environ = {**os.environ, "LABEL_STUDIO_API_KEY": studio.account.token, "OMP_NUM_THREADS": "1"}
    arguments = run_command(studio, str(number), "--checkpoint", "facings-nano", "--device", "cpu")

    process = subprocess.Popen(arguments, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        give_up = time.monotonic() + 240
        while not (stored := client.project(number)["total_predictions_number"]):
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            assert time.monotonic() < give_up
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert 0 < stored < 200
    report = tmp_path / "report.json"
    again = subprocess.run(
        [*arguments, "--report", str(report)], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300
    )

    assert again.returncode == 0, again.stderr
    found = {task["id"]: task["predictions"] for task in client.tasks(number)}
    assert {task: len(predictions) for task, predictions in found.items()} == dict.fromkeys(tasks, 1)
    (version,) = {p["model_version"] for predictions in found.values() for p in predictions}
    counts = json.loads(report.read_text())
    skipped = counts["skipped"][choice.UP_TO_DATE]
    assert (counts["model_version"], skipped + counts["photos"]) == (version, 200)
    assert skipped >= stored
    assert all(predictions[0]["result"] for predictions in found.values())


def _uploaded(client: Client, photos: dict[str, Path]) -> int:
    number = client.create_project("photos", SHELF_BOXES)
    client.upload(number, photos)
    return number
