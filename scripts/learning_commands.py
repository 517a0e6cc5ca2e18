"""`facings project learn` and its neighbours: what a project's detector learned from its annotators.

Knows the options of these subcommands, and prints; the work is done by backend.learning.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backend.errors import CommandError, OptionError
from scripts.bulk_commands import ProjectArgument, project_app
from scripts.console import signals_as_interrupt
from scripts.options import open_project, read_settings

if TYPE_CHECKING:
    from backend.learning.store import ProjectStore
    from backend.settings import Settings

StateOption = Annotated[
    Path | None, typer.Option(help="Folder of what is learned; by default STATE_DIR.", show_default=False)
]


@project_app.command("learn")
def learn_project(
    project: ProjectArgument,
    state_dir: StateOption = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.05, help="Longest training; by default LEARN_MINUTES.", show_default=False)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N; by default as in the environment.", show_default=False)
    ] = None,
) -> None:
    """Let a project's detector learn from the photos that its annotators submitted.

    Label Studio is that of LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY. Works with the lowest priority, and goes on where
    it was killed. A fifth of the photos is kept aside; the new version serves the project if it needs fewer corrections
    there. A running server with the same STATE_DIR takes it at its next request.

    \b
    Examples:
      facings project learn 3
      facings project learn 3 --state-dir /srv/facings --minutes 30 --device cuda
    """
    from backend.learning.training import learn, lowest_priority
    from model.training.heap import keep_freed_memory

    settings = _settings(state_dir, learn_minutes=minutes, device=device)
    lowest_priority()
    keep_freed_memory()
    with signals_as_interrupt(), open_project(settings, project, 120.0) as opened:
        version = learn(settings, opened, show=lambda line: print(line, flush=True))
    print("nothing new was submitted since the last version" if version is None else version.describe())


@project_app.command("versions")
def versions_of_project(project: ProjectArgument, state_dir: StateOption = None) -> None:
    """List the versions of a project's detector with their figures; the last line is JSON.

    \b
    Examples:
      facings project versions 3
    """
    store = _store(_settings(state_dir), project)
    serving = store.state().serving
    for version in store.versions():
        print(f"{'*' if version.number == serving else ' '} {version.describe()}")
    if serving is None:
        print("* the weights that it began with")
    print(json.dumps({"serving": serving, "versions": [asdict(version) for version in store.versions()]}))


@project_app.command("rollback")
def roll_back_project(
    project: ProjectArgument,
    to: Annotated[
        int | None, typer.Option(help="Number of the version; by default the weights that it began with.")
    ] = None,
    state_dir: StateOption = None,
) -> None:
    """Let an earlier version of a project's detector serve again.

    \b
    Examples:
      facings project rollback 3
      facings project rollback 3 --to 2
    """
    from backend.learning.training import roll_back

    roll_back(_store(_settings(state_dir), project), to)
    print(f"project {project}: {'the weights that it began with' if to is None else f'version {to}'} now serves")


def _settings(state_dir: Path | None, **given: str | float | None) -> Settings:
    settings = read_settings(state_dir=None if state_dir is None else str(state_dir), **given)
    if settings.state_dir is None:
        raise OptionError("expected the folder of what is learned in --state-dir or STATE_DIR, got neither")
    return settings


def _store(settings: Settings, project: int) -> ProjectStore:
    from backend.learning.store import ProjectStore

    store = ProjectStore.find(Path(str(settings.state_dir)), project)
    if store is None:
        raise CommandError(
            f"project {project}: expected one that learned something in {settings.state_dir!r}, got none"
        )
    return store
