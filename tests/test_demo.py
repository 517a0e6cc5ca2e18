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

import pytest
from conftest import ACCOUNT

from scripts.demo.demo import ROOT, render_samples
from scripts.demo.label_studio_server import Client
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
            tasks = Client(url, ACCOUNT.token).tasks(int(project))
            found.append([(task["id"], len(task["predictions"])) for task in tasks])
            process.send_signal(stop)
            assert process.wait(timeout=60) == 0, process.stderr.read()
        assert not any(map(port_in_use, ports))

    assert [predictions for _, predictions in found[0]] == [1, 1]
    assert found[1] == found[0]


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
