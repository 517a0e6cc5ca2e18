"""A Label Studio of one's own: installed and started.

Knows Label Studio 1.23.2 and its start variables; its API stands in label_studio_client. Knows nothing of Facings: the
demo and the tests put the two together.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from backend.errors import CommandError
from scripts.demo.label_studio_client import Account
from scripts.demo.processes import LOOPBACK, Server

VERSION = "1.23.2"
LOCK_DIR = Path(__file__).parent / "label_studio_env"
START_TIMEOUT_S = 300.0  # the migrations of a new data folder take half a minute on two idle cores


def install(environment: Path, *, uv: str) -> Path:
    """Brings `environment` to exactly the locked packages and returns the `label-studio` command in it.

    Takes a second when they are there already. Raises CommandError when they cannot be installed.
    """
    if not (LOCK_DIR / "uv.lock").is_file():
        raise CommandError(f"{str(LOCK_DIR)!r}: expected Label Studio's uv.lock; run this in a checkout of Facings")
    command = [uv, "sync", "--locked", "--quiet", "--project", str(LOCK_DIR)]
    try:
        subprocess.run(  # noqa: S603
            command,
            env={**_without_virtual_env(os.environ), "UV_PROJECT_ENVIRONMENT": str(environment.resolve())},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            text=True,
        )
    except FileNotFoundError as error:
        raise CommandError("uv is not on PATH: run this through make, which installs it") from error
    except subprocess.CalledProcessError as error:
        raise CommandError(f"Label Studio {VERSION} could not be installed: {error.stderr.strip()}") from error
    return environment / "bin" / "label-studio"


def start(
    executable: Path, data: Path, account: Account, *, port: int, log: Path, legacy_tokens: bool = True
) -> Server:
    """Starts Label Studio on a free port of the loopback address, its files in `data`, and returns without waiting.

    It may reach backends on this machine, which Label Studio forbids by default. `account` and
    `legacy_tokens` count only when `data` is new.
    """
    data.mkdir(parents=True, exist_ok=True)
    environ = {
        **_without_virtual_env(os.environ),
        "HOME": str(data),
        "LABEL_STUDIO_BASE_DATA_DIR": str(data),
        "LABEL_STUDIO_HOST": f"http://{LOOPBACK}:{port}",
        "LABEL_STUDIO_USERNAME": account.email,
        "LABEL_STUDIO_PASSWORD": account.password,
        "LABEL_STUDIO_USER_TOKEN": account.token,
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true" if legacy_tokens else "false",
        "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",
        "ML_BLOCK_LOCAL_IP": "false",
        "SSRF_PROTECTION_ENABLED": "false",
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
    }
    command: list[str | Path] = [executable, "start", "--no-browser", "--internal-host", LOOPBACK, "-p", str(port)]
    return Server("Label Studio", command, environ=environ, cwd=data, log=log)


def _without_virtual_env(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
