"""A project's photos on a local Ray cluster of two actors, one of which is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import Studio
from PIL import Image

from model.training.shelves import render_shelf
from scripts.demo import LABEL_CONFIG, ROOT

pytest.importorskip("ray", reason="needs the extra ray")

TASKS = 120
ACTOR = "MapWorker"


def actors_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of Ray's actors below the command."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if any(ACTOR in part for part in child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def test_an_actor_is_killed_and_every_task_has_one_prediction(studio: Studio, tmp_path: Path) -> None:
    client = studio.client
    Image.fromarray(render_shelf(2, (320, 240)).photo_rgb).save(tmp_path / "shelf.jpg")
    source = client.create_project("photo", LABEL_CONFIG.read_text())
    (photo,) = client.upload(source, {"shelf.jpg": tmp_path / "shelf.jpg"})
    number = client.create_project("ray", LABEL_CONFIG.read_text())
    tasks = client.import_tasks(number, [client.task(photo)["data"]] * TASKS)
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "scripts.cli", "preannotate", "--project", str(number), "--url", studio.url]
    command += ["--ray", "local", "--actors", "2", "--checkpoint", "facings-nano", "--device", "cpu"]
    environ = {**os.environ, "LABEL_STUDIO_API_KEY": studio.account.token}

    with subprocess.Popen(
        [*command, "--report", str(report)],
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            give_up = time.monotonic() + 400
            while not (stored := client.project(number)["total_predictions_number"]):
                assert process.poll() is None, process.stdout.read() if process.stdout else ""
                assert time.monotonic() < give_up
                time.sleep(0.1)
            actors = actors_of(process)
            actors[0].send_signal(signal.SIGKILL)
            told, _ = process.communicate(timeout=400)
        finally:
            process.kill()

    assert process.returncode == 0, told
    assert len(actors) == 2
    assert stored < TASKS
    held = {task["id"]: len(task["predictions"]) for task in client.tasks(number)}
    assert held == dict.fromkeys(tasks, 1)
    counts = json.loads(report.read_text())
    assert counts["photos"] + counts["needed_nothing"] == TASKS
