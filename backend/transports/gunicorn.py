"""The backend under gunicorn: one worker with many threads, so that one copy of the weights serves everybody.

Knows gunicorn and sockets. The worker builds the app after the fork, because a device and threads do not survive one;
what is slow to import is imported before, so that a worker answers as soon as it exists.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from backend.errors import CommandError, extra_needed

if TYPE_CHECKING:
    from flask import Flask

    from backend.settings import Settings
    from backend.transports.grpc_server import Server as GrpcServer

# How long a thread waits for the next bytes of a request's body.
READ_TIMEOUT_S = 30.0
# The master replaces a worker whose main thread gave no sign of life for so long. Far more than it should ever need: a
# machine that swaps memory can stop the thread for a while.
WORKER_TIMEOUT_S = 300
# How long requests in progress may take to end after SIGTERM.
GRACEFUL_TIMEOUT_S = 10

WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def serve(settings: Settings, create: Callable[[Settings], Flask] | None = None) -> None:
    """Serves until SIGTERM or SIGINT, and then ends the process. Raises CommandError when the port is in use.

    create: makes the app; None: that for Label Studio.
    """
    listener = _listen_on(settings.host, settings.port)
    if settings.grpc_port is not None:
        _check_grpc(settings, settings.grpc_port)

    from gunicorn.app.base import BaseApplication

    from backend.reporting import configure_logging
    from backend.transports.label_studio_app import create_app

    make_app = create or create_app
    configure_logging(settings.log_level)

    class Application(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
        app: Flask
        grpc_server: GrpcServer | None = None

        def load_config(self) -> None:
            options = {
                "bind": f"fd://{listener.fileno()}",
                "proc_name": "facings",
                "workers": 1,
                "worker_class": "gthread",
                "threads": settings.threads,
                "timeout": WORKER_TIMEOUT_S,
                "graceful_timeout": GRACEFUL_TIMEOUT_S,
                "control_socket_disable": True,
                "worker_exit": lambda _server, _worker: self.close(),
            }
            for name, value in options.items():
                self.cfg.set(name, value)

        def close(self) -> None:
            if self.grpc_server is not None:
                self.grpc_server.close()
            if (learning := self.app.extensions.get("facings_learning")) is not None:
                learning.close()
            self.app.extensions["facings"].close()

        def load(self) -> WsgiApp:
            self.app = make_app(settings)
            if settings.grpc_port is not None:
                from backend.transports.grpc_server import Server  # its threads begin after the fork

                self.grpc_server = Server(self.app.extensions["facings"], settings)
            return with_read_timeout(self.app)

    Application().run()


def _check_grpc(settings: Settings, port: int) -> None:
    """Raises CommandError for what gRPC cannot use: before the fork, since a worker's failure is a traceback."""
    with extra_needed("grpc", "--grpc"):
        import grpc_health  # noqa: F401
        import grpc_reflection  # noqa: F401
    if settings.grpc_tls_cert is not None:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
                settings.grpc_tls_cert, settings.grpc_tls_key
            )
        except OSError as error:  # ssl.SSLError, too
            reason = error.strerror or error
            raise CommandError(
                f"GRPC_TLS_CERT and GRPC_TLS_KEY: expected a certificate and its key (PEM): {reason}"
            ) from error
    _listen_on(settings.host, port, setting="GRPC_PORT").close()


def with_read_timeout(app: WsgiApp) -> WsgiApp:
    """`app`, with READ_TIMEOUT_S as the limit of each wait for a request's body."""

    def call(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        environ["gunicorn.socket"].settimeout(READ_TIMEOUT_S)
        return app(environ, start_response)

    return call


def _listen_on(host: str, port: int, setting: str = "PORT") -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise CommandError(
            f"port {port} of {host!r} is unavailable ({error.strerror}): stop what listens there, or choose another "
            f"port with {setting}"
        ) from error
    return listener
