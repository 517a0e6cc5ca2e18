"""The demo without Label Studio: a page for one photo, in this process, with one engine.

Knows where Gradio's files go and what is printed. What the page does is known by backend.transports.page.
"""

from __future__ import annotations

import os
import sys
import tempfile

from backend.errors import extra_needed
from backend.settings import Settings
from scripts.console import signals_as_interrupt
from scripts.demo.processes import require_free_port


def page(settings: Settings) -> None:
    """Serves the page until Ctrl-C or SIGTERM. Raises CommandError, EngineError.

    GRADIO_ variables of the environment do not count: some of them open folders or a tunnel to this machine.
    """
    require_free_port(settings.port, name="the page", variable="PORT")
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    with signals_as_interrupt(), tempfile.TemporaryDirectory(prefix="facings-page-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        print("loading the page and its checkpoint", file=sys.stderr, flush=True)
        with extra_needed("page", "--page"):
            import gradio  # noqa: F401  of the modules that follow, any other import error is no missing extra
        from backend.reporting import configure_logging
        from backend.service import Service
        from backend.transports.page import serve

        configure_logging(settings.log_level)
        try:
            with Service.open(settings) as service:
                service.engine.wait_ready()
                serve(settings, service, _announce)
        except KeyboardInterrupt:
            print("\nstopping", file=sys.stderr)


def _announce(url: str) -> None:
    print(f"\n  Page  {url}\n\nCtrl-C stops it.", flush=True)
