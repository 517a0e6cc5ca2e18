"""What several subcommands share: their options, and how settings, engines and projects are opened for them.

Knows the options' names and the environment. Everything heavy is imported where it is needed, so that `--help` answers
at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backend.errors import OptionError

if TYPE_CHECKING:
    from backend.label_studio.project import Project, Selection
    from backend.settings import Settings
    from model import Engine, EngineOptions

PhotosOption = Annotated[Path, typer.Option(help="Folder of photos.", show_default=False)]
CheckpointOption = Annotated[
    str | None,
    typer.Option(
        help="facings-nano, sam2.1_hiera_tiny, _small, _base_plus, _large, or a path to weights; "
        "by default as in the environment.",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N; by default as in the environment.", show_default=False)
]
ThresholdOption = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Keep boxes of this score and above; by default the checkpoint's own."),
]
ProjectOption = Annotated[
    int | None, typer.Option(help="Number of a Label Studio project, as in its address.", show_default=False)
]
UrlOption = Annotated[
    str | None, typer.Option(help="Label Studio's address; by default LABEL_STUDIO_URL.", show_default=False)
]
ApiKeyOption = Annotated[
    str | None,
    typer.Option(help="Access token, personal or legacy; by default LABEL_STUDIO_API_KEY.", show_default=False),
]
ViewOption = Annotated[
    int | None, typer.Option(help="Only the tasks of this tab of the Data Manager.", show_default=False)
]
IdsOption = Annotated[str | None, typer.Option(help="Only these tasks: 5,7,9.", show_default=False)]
LimitOption = Annotated[
    int | None, typer.Option(min=1, help="At most so many tasks that need boxes.", show_default=False)
]
PatienceOption = Annotated[
    float, typer.Option(min=0, help="Seconds to try again while Label Studio is away, before the run stops.")
]
ReportOption = Annotated[Path | None, typer.Option(help="JSON file for the summary.", show_default=False)]


def read_settings(**given: str | float | None) -> Settings:
    """What the environment asks for, with what the command line asks for over it."""
    from backend.settings import Settings

    options = {name.upper(): str(value) for name, value in given.items() if value is not None}
    return Settings.from_env({**os.environ, **options})


def engine_options(checkpoint: str | None, device: str | None, score_threshold: float | None = None) -> EngineOptions:
    return read_settings(checkpoint=checkpoint, device=device, score_threshold=score_threshold).engine_options()


def settings_of_project(url: str | None, api_key: str | None, **given: str | int | float | None) -> Settings:
    """Those with Label Studio's address and a token for it, from the options or the environment."""
    known = os.environ.get("LABEL_STUDIO_URL", "").strip().rstrip("/")
    if url is not None and api_key is None and known not in ("", url.strip().rstrip("/")):
        raise OptionError(f"--api-key: expected the token for {url!r}; LABEL_STUDIO_API_KEY belongs to {known!r}")
    settings = read_settings(label_studio_url=url, label_studio_api_key=api_key, **given)
    for option, value in (("url", settings.label_studio_url), ("api-key", settings.label_studio_api_key)):
        if value is None:
            variable = {"url": "LABEL_STUDIO_URL", "api-key": "LABEL_STUDIO_API_KEY"}[option]
            raise OptionError(f"--project: expected --{option} or {variable}, got neither")
    return settings


def selection(ids: str | None, view: int | None) -> Selection:
    from backend.label_studio.project import Selection

    if ids is not None and view is not None:
        raise OptionError("expected --ids or --view, got both")
    if ids is None:
        return Selection(view=view)
    try:
        numbers = [int(part) for part in ids.split(",")]
    except ValueError:
        raise OptionError(f"--ids: expected numbers such as 5,7,9, got {ids!r}") from None
    return Selection(ids=list(dict.fromkeys(numbers)))


def refuse(beside: str, given: Mapping[str, object]) -> None:
    """Raises OptionError for the first option that was given beside one that it does not go with."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise OptionError(f"--{name}: does not go with {beside}")


@contextmanager
def open_project(settings: Settings, number: int | None, patience_s: float) -> Iterator[Project]:
    """The project. A request to terminate ends the block as Ctrl-C does."""
    from backend.label_studio.project import Project
    from scripts.demo.processes import signals_as_interrupt

    url, api_key = settings.label_studio_url, settings.label_studio_api_key
    if url is None or api_key is None or number is None:
        raise OptionError("--project: expected a number, and Label Studio's address and token")
    with signals_as_interrupt(), Project(url, api_key, number, patience_s=patience_s) as project:
        yield project


def show_warnings() -> None:
    """Lets the engine's warnings through to standard error; its errors arrive as exceptions."""
    import logging

    handler = logging.StreamHandler()
    handler.addFilter(lambda record: record.levelno < logging.ERROR)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, format="facings: %(message)s")


@contextmanager
def open_engine(options: EngineOptions) -> Iterator[Engine]:
    from model import Sam2Engine

    show_warnings()
    engine = Sam2Engine(options)
    try:
        engine.wait_ready()
        yield engine
    finally:
        engine.close()
