"""Servers as child processes: started in a group of their own, awaited, and stopped with all their descendants.

Knows processes, ports and log files. Knows nothing of what the servers do.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from backend.errors import CommandError

LOOPBACK = "127.0.0.1"
POLL_S = 0.1
STOP_TIMEOUT_S = 10.0
LOG_LINES = 15
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def free_port() -> int:
    """A port of the loopback address on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def port_in_use(port: int) -> bool:
    """Whether anything accepts connections on this port of the loopback address."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((LOOPBACK, port)) == 0


def require_free_port(port: int, *, name: str, variable: str) -> None:
    """Raises CommandError, in one line, when something listens on the port already."""
    if port_in_use(port):
        raise CommandError(
            f"port {port}, meant for {name}, is in use: stop what listens there, or choose another port with {variable}"
        )


class Server:
    """A child process with its log. Leaving the `with` block ends it and everything it started.

    It also gets SIGTERM when this process dies without leaving the block (Linux only).
    """

    def __init__(
        self, name: str, command: Sequence[str | Path], *, environ: Mapping[str, str], cwd: Path, log: Path
    ) -> None:
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603
                [str(part) for part in command],
                env=dict(environ),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Process id, which is also the id of the process group."""
        return self._process.pid

    def wait_until(self, condition: Callable[[], bool], *, timeout_s: float, what: str) -> None:
        """Polls until `condition` holds. Raises CommandError with the log's end when the process ends or time is up."""
        give_up = time.monotonic() + timeout_s
        while not condition():
            self.require_running()
            if time.monotonic() > give_up:
                raise CommandError(f"{self.name}: not {what} after {timeout_s:.0f} s; {self._log_end()}")
            time.sleep(POLL_S)

    def require_running(self) -> None:
        """Raises CommandError with the log's end when the process has ended."""
        if (status := self._process.poll()) is not None:
            raise CommandError(f"{self.name} stopped with exit status {status}; {self._log_end()}")

    def stop(self) -> None:
        """Ends the whole process group: politely, then for certain. Does nothing a second time."""
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            return  # nobody is left in the group

    def _log_end(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "\n".join([f"the end of {self.log}:", *(f"  {line}" for line in lines)])


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
