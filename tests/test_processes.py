"""Servers as child processes: nothing stays behind, and every failure names its reason."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest

from backend.errors import CommandError
from scripts.console import signals_as_interrupt
from scripts.demo.processes import LOOPBACK, Server, free_port, port_in_use, require_free_port

# Prints the id of a child that ignores SIGTERM, then waits.
FAMILY = """
import subprocess, sys, time
ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(0, flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", ignore], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""


def start(program: str, folder: Path) -> Server:
    command = [sys.executable, "-c", program]
    return Server("the program", command, environ=os.environ, cwd=folder, log=folder / "log" / "program.log")


def test_leaving_the_block_ends_the_server_and_all_its_descendants(tmp_path: Path) -> None:
    with start(FAMILY, tmp_path) as server:
        server.wait_until(lambda: server.log.read_text().endswith("\n"), timeout_s=60, what="running")
        child = psutil.Process(int(server.log.read_text()))

    gone, _ = psutil.wait_procs([child], timeout=60)
    assert gone
    assert not psutil.pid_exists(server.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent death signal is Linux's")
def test_a_server_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    program = f"""
import os, pathlib, sys, time
from scripts.demo.processes import Server
folder = pathlib.Path({str(tmp_path)!r})
server = Server("x", [sys.executable, "-c", "import time; time.sleep(600)"], environ=os.environ, cwd=folder,
                log=folder / "log")
print(server.pid, flush=True)
time.sleep(600)
"""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as parent:
        server = psutil.Process(int(parent.stdout.readline()))
        parent.kill()

    gone, _ = psutil.wait_procs([server], timeout=60)
    assert gone


def test_a_server_that_ends_by_itself_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    with (
        start("print('first'); raise SystemExit('no such file: shelf.db')", tmp_path) as server,
        pytest.raises(CommandError, match=r"(?s)the program stopped with exit status 1; .*no such file: shelf\.db"),
    ):
        server.wait_until(lambda: False, timeout_s=60, what="ready")


def test_a_server_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    with (
        start("import time; time.sleep(600)", tmp_path) as server,
        pytest.raises(CommandError, match="the program: not ready after 0 s"),
    ):
        server.wait_until(lambda: False, timeout_s=0, what="ready")


def test_a_port_in_use_is_named_with_the_variable_that_chooses_another() -> None:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen()
        port = listener.getsockname()[1]

        with pytest.raises(CommandError, match=rf"port {port}, meant for Facings, is in use: .* PORT"):
            require_free_port(port, name="Facings", variable="PORT")


def test_a_free_port_is_not_in_use() -> None:
    port = free_port()

    assert not port_in_use(port)
    require_free_port(port, name="Facings", variable="PORT")


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN], ids=["in a terminal", "under nohup"])
def test_a_hang_up_ends_a_command_unless_it_is_ignored(handler: signal.Handlers) -> None:
    before = signal.signal(signal.SIGHUP, handler)
    try:
        with (
            pytest.raises(KeyboardInterrupt) if handler is signal.SIG_DFL else nullcontext(),
            signals_as_interrupt(),
        ):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is handler
    finally:
        signal.signal(signal.SIGHUP, before)
