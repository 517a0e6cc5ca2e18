"""`facings demo`, the command behind `make run`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
from conftest import ACCOUNT

from backend.errors import CommandError
from scripts.demo.demo import ROOT
from scripts.demo.label_studio_client import Client
from scripts.demo.photos import demo_photos, render_samples
from scripts.demo.processes import LOOPBACK, free_port, port_in_use


@contextmanager
def running_demo(*options: str | Path | int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The demo in a process of its own, and what it prints when everything stands."""
    command = [sys.executable, "-m", "scripts.cli", "demo", *map(str, options)]
    environ = os.environ | {"CHECKPOINT": "facings-nano", "DEVICE": "cpu"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    with process:
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if "Ctrl-C" in line:
                    break
            else:
                pytest.fail(process.stderr.read())
            yield process, "".join(lines)
        finally:
            process.send_signal(signal.SIGTERM)


def libraries_of(pid: int) -> set[str]:
    """Names of the files that a process has in its memory."""
    return {Path(region.path).name for region in psutil.Process(pid).memory_maps()}


def test_the_demo_stands_with_boxed_photos_until_interrupted_and_a_second_run_finds_them(
    migrated_data: Path, tmp_path: Path
) -> None:
    photos, data = tmp_path / "photos", tmp_path / "data"
    render_samples(photos, range(2), (640, 480))
    shutil.copytree(migrated_data, data / "label-studio")
    (data / "account.json").write_text(json.dumps(asdict(ACCOUNT)))
    found = []

    for stop in (signal.SIGINT, signal.SIGTERM):
        ports = free_port(), free_port()
        options = ("--port", ports[0], "--label-studio-port", ports[1], "--data", data, "--photos", photos)
        with running_demo(*options) as (process, printed):
            assert ACCOUNT.email in printed
            assert ACCOUNT.password in printed
            url, project = re.search(r"(http://\S+)/projects/(\d+)/data", printed).groups()
            assert not libraries_of(process.pid) & {"libtorch_cpu.so", "libtorch.so", "cv2.abi3.so"}
            tasks = Client(url, ACCOUNT.token).tasks(int(project))
            found.append([(task["id"], len(task["predictions"])) for task in tasks])
            process.send_signal(stop)
            assert process.wait(timeout=60) == 0, process.stderr.read()
        assert not any(map(port_in_use, ports))

    assert [predictions for _, predictions in found[0]] == [1, 1]
    assert found[1] == found[0]


def test_sample_shelves_are_rendered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = render_samples(tmp_path, [3], (320, 240))
    monkeypatch.setattr("model.renderer.shelves.render_shelf", lambda *_: pytest.fail("rendered again"))
    assert render_samples(tmp_path, [3], (320, 240)) == [path]


def test_the_photos_of_a_folder_keep_their_folders_in_their_names_and_what_is_left_out_is_counted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    render_samples(tmp_path / "store 1", [3], (320, 240))
    (tmp_path / "notes.txt").touch()
    assert demo_photos(tmp_path, tmp_path) == {"store_1--shelf-3.jpg": tmp_path / "store 1" / "shelf-3.jpg"}
    assert "left out 1: 1 .txt" in capfd.readouterr().err


def test_a_folder_without_photos_ends_the_demo_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"expected photos .*found none"):
        demo_photos(tmp_path, tmp_path)


@pytest.mark.parametrize(("option", "variable"), [("--port", "PORT"), ("--label-studio-port", "LS_PORT")])
def test_a_port_in_use_ends_the_demo_with_one_line(option: str, variable: str, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen()
        port = listener.getsockname()[1]
        others = {"--port": free_port(), "--label-studio-port": free_port(), option: port}
        options = [str(part) for pair in others.items() for part in pair]

        ended = subprocess.run(
            [sys.executable, "-m", "scripts.cli", "demo", "--data", tmp_path, *options],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    assert ended.returncode == 1
    assert re.fullmatch(rf"facings: port {port}, .* {variable}\n", ended.stderr), ended.stderr
