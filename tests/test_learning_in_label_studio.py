"""Corrections in a real Label Studio become a threshold, and a detector that serves the project: the whole way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import Studio, running_facings
from learners import shelf_project, small_disk, submit, wait_for, write_tuned
from projects import SHELF_BOXES

from backend.label_studio.project import Project
from backend.learning.collect import collect
from backend.learning.store import ProjectStore
from backend.photos.loader import PhotoLoader
from backend.settings import Settings
from scripts.demo.demo import ROOT
from scripts.demo.label_studio_client import Client


@pytest.fixture(scope="module")
def weak(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector that learns a lot at once: its confidence is partly noise."""
    return write_tuned(tmp_path_factory.mktemp("weights") / "weak.safetensors", noise=2.0)


#: What anybody may send; none of it may keep the project from learning.
BAD_WEBHOOKS: list[dict[str, Any]] = [
    {"action": "START_TRAINING"},
    {"action": "START_TRAINING", "project": "3"},
    {"action": "START_TRAINING", "project": {"id": -1}},
    {"action": "START_TRAINING", "project": {"id": True}},
    {"action": "START_TRAINING", "project": {"id": 10**9}},
    {"action": "ANNOTATION_CREATED", "project": {"id": 10**9}, "annotation": {"result": "nonsense"}},
]


def settings_for(studio: Studio, folder: Path, **more: str) -> dict[str, str]:
    """The environment of a Facings that learns below `folder`."""
    learned = str(folder / "learned")
    return {"LABEL_STUDIO_URL": studio.url, "LABEL_STUDIO_API_KEY": studio.account.token, "STATE_DIR": learned, **more}


def served_version(client: Client, project: int, task: int) -> str:
    client.retrieve_predictions(project, [task])
    (found,) = [one for one in client.tasks(project) if one["id"] == task]
    return max(found["predictions"], key=lambda prediction: prediction["id"])["model_version"]


def test_start_training_brings_a_version_that_serves_and_can_be_rolled_back(
    studio: Studio, tmp_path: Path, weak: Path, chromium: str
) -> None:
    client = studio.client
    project, tasks = shelf_project(client, tmp_path, 8)
    settings = settings_for(studio, tmp_path, DETECTOR=str(weak), LEARN_MINUTES="0.7")
    with running_facings(tmp_path, **settings) as url:
        backend = client.connect_backend(project, url)
        for body in BAD_WEBHOOKS:
            assert requests.post(f"{url}/webhook", json=body, timeout=10).status_code == 200
        first = served_version(client, project, tasks[0][0])
        assert first.startswith("weak-")
        for task, _ in tasks[1:]:
            client.retrieve_predictions(project, [task])
        submit(client, tasks)
        client.delete_task(tasks[-1][0])  # before it is read, as its photo may be
        client.start_training(backend)
        store = wait_for(lambda: ProjectStore.find(tmp_path / "learned", project))
        (made,) = wait_for(store.versions)
        assert (made.learned + made.kept_aside, made.parent, made.is_promoted) == (7, "weak", True)
        assert served_version(client, project, tasks[0][0]).startswith(f"project-{project}-v1-")
        look_at_the_page(f"{url}/projects/{project}", chromium)
        assert f'facings_project_version{{project="{project}"}} 1.0' in requests.get(f"{url}/metrics", timeout=10).text

        run_facings("project", "rollback", str(project), **settings)
        assert "Boxes come from <code>weak-" in requests.get(f"{url}/projects/{project}", timeout=10).text
        assert "nothing new was submitted" in run_facings("project", "learn", str(project), **settings)
        listed = run_facings("project", "versions", str(project), **settings)
        assert "version 1, learned from 3 photos" in listed
        assert "* the weights that it began with" in listed
        assert "0 photos were submitted" in requests.get(f"{url}/projects/999", timeout=10).text


def look_at_the_page(address: str, chromium: str) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        assert "corrections per 100 facings" in page.inner_text("body")
        assert page.locator("circle").count() == 7
        assert page.locator("tr.serves").count() == 1
        browser.close()


def run_facings(*arguments: str, **settings: str) -> str:
    command = [sys.executable, "-m", "scripts.cli", *arguments]
    environ = {**os.environ, "CHECKPOINT": "facings-nano", "DEVICE": "cpu", **settings}
    ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_from_five_photos_on_the_threshold_is_the_one_that_needs_the_fewest_corrections(
    studio: Studio, tmp_path: Path
) -> None:
    client = studio.client
    project, tasks = shelf_project(client, tmp_path, 6)
    settings = settings_for(studio, tmp_path, SCORE_THRESHOLD="0.97")
    with running_facings(tmp_path, **settings) as url:
        client.connect_backend(project, url)
        before = served_version(client, project, tasks[0][0])
        submit(client, tasks)
        store = wait_for(lambda: ProjectStore.find(tmp_path / "learned", project))
        threshold = wait_for(lambda: store.state().score_threshold)
        assert threshold < 0.97
        assert served_version(client, project, tasks[0][0]) != before


def test_a_killed_training_leaves_the_project_as_it_was_and_goes_on(studio: Studio, tmp_path: Path, weak: Path) -> None:
    client = studio.client
    project, tasks = shelf_project(client, tmp_path, 5)
    submit(client, tasks)
    settings = settings_for(
        studio, tmp_path, DETECTOR=str(weak), LEARN_MINUTES="0.2", CHECKPOINT="facings-nano", DEVICE="cpu"
    )
    command = [sys.executable, "-m", "backend.learning", str(project)]
    environ = {**os.environ, **settings}
    long = {**environ, "LEARN_MINUTES": "10"}
    with subprocess.Popen(command, cwd=ROOT, env=long, stderr=subprocess.DEVNULL) as killed:
        store = wait_for(lambda: ProjectStore.find(tmp_path / "learned", project))
        wait_for(lambda: (progress := store.progress()) is not None and progress.stage == "learning")
        other = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
        killed.send_signal(signal.SIGKILL)
    assert other.returncode == 1
    assert "a training of it goes on already" in other.stderr
    assert (store.versions(), store.state().serving, store.progress()) == ([], None, None)
    ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert len(store.versions()) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"LABEL_STUDIO_URL": "http://127.0.0.1:1"}, "no training: .*127.0.0.1:1"),
        ({"LABEL_STUDIO_API_KEY": "wrong"}, "no training: .*401"),
        ({}, "no training: expected at least 5 submitted photos with boxes, got 0"),
        ({"STATE_DIR": "/proc/nowhere"}, "no training: .*/proc/nowhere"),
    ],
    ids=["Label Studio is away", "a wrong token", "nothing was submitted", "a folder that cannot be written"],
)
def test_a_training_that_cannot_be_is_one_line(
    studio: Studio, tmp_path: Path, changes: dict[str, str], reason: str
) -> None:
    project = studio.client.create_project("nothing", SHELF_BOXES)
    settings = settings_for(studio, tmp_path, **changes)
    command = [sys.executable, "-m", "backend.learning", str(project)]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert re.search(reason, ended.stderr), ended.stderr
    assert json.dumps(studio.account.token) not in ended.stderr


def test_a_training_on_a_full_disk_is_one_line(studio: Studio, tmp_path: Path) -> None:
    project, tasks = shelf_project(studio.client, tmp_path, 5)
    submit(studio.client, tasks)
    command = [sys.executable, "-m", "backend.learning", str(project)]
    with small_disk(tmp_path / "disk", kilobytes=256) as disk:
        settings = settings_for(studio, disk)
        ended = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, check=False
        )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert re.search(r"no training: .*No space left", ended.stderr), ended.stderr


def test_of_many_photos_the_latest_count_as_many_as_a_folder_may_hold(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, tasks = shelf_project(studio.client, tmp_path, 5)
    order = [tasks[place] for place in (3, 0, 4, 1)]  # the third is never submitted
    submit(studio.client, order)
    settings = Settings.from_env(settings_for(studio, tmp_path))
    with Project(studio.url, studio.account.token, number, retry_budget_s=10) as project:
        store = ProjectStore.of(tmp_path / "learned", project.key)
        assert store is not None

        def collected() -> list[str]:
            photos = collect(project, PhotoLoader(settings), store)
            assert sorted(path.name for path in store.photo_path("").iterdir()) == sorted(one.file for one in photos)
            return [photo.key.partition(".")[0] for photo in photos]

        wanted = [str(task) for task, _ in order]
        assert collected() == wanted
        monkeypatch.setattr("backend.learning.collect.MAX_PHOTOS", 2)
        assert collected() == wanted[-2:]
        latest = store.photo_path(store.photos()[-1].file).stat().st_size
        monkeypatch.setattr("backend.learning.collect.MAX_BYTES", latest + 1)
        assert collected() == wanted[-1:]
