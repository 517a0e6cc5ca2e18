"""Runs over a project of a real Label Studio as processes: side by side, and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Studio
from PIL import Image
from projects import SHELF_BOXES, held, new_project

from backend.bulk import choice
from backend.bulk.choice import Shard
from model.renderer.shelves import render_shelf
from scripts.demo.demo import ROOT
from scripts.demo.label_studio_client import Client


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
