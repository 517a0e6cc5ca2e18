"""What several subcommands share: their options, and how settings, engines and projects are opened for them.

Knows the options' names and the environment. Everything heavy is imported where it is needed, so that `--help` answers
at once.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from backend.errors import OptionError

if TYPE_CHECKING:
    from backend.bulk.choice import Shard
    from backend.bulk.service import BulkService
    from backend.label_studio.project import Project, Selection
    from backend.settings import Settings
    from model import EngineOptions

Choice = TypeVar("Choice", bound=StrEnum)

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
ReportOption = Annotated[Path | None, typer.Option(help="JSON file for the summary.", show_default=False)]
FormatOption = Annotated[str, typer.Option("--format", help="coco, label-studio (import JSON) or yolo.")]


@dataclass(frozen=True, kw_only=True)
class ProjectOptions:
    """What every `facings project` command takes; `with_project_options` makes options of the fields."""

    url: Annotated[
        str | None, typer.Option(help="Label Studio's address; by default LABEL_STUDIO_URL.", show_default=False)
    ] = None
    api_key: Annotated[
        str | None,
        typer.Option(help="Access token, personal or legacy; by default LABEL_STUDIO_API_KEY.", show_default=False),
    ] = None
    view: Annotated[
        int | None, typer.Option(help="Only the tasks of this tab of the Data Manager.", show_default=False)
    ] = None
    ids: Annotated[str | None, typer.Option(help="Only the tasks with these IDs: 5,7,9.", show_default=False)] = None
    shard: Annotated[
        str | None,
        typer.Option(
            help="Only a part of the tasks: 2/8 is the second of eight parts. Eight processes with 1/8 to 8/8 do all.",
            show_default=False,
        ),
    ] = None
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many tasks that need boxes.", show_default=False)
    ] = None
    retry_budget: Annotated[
        float, typer.Option(min=0, help="Seconds to try again while Label Studio is away, before the run stops.")
    ] = 300.0
    report: ReportOption = None
    checkpoint: CheckpointOption = None
    device: DeviceOption = None

    def settings(self, *, score_threshold: float | None = None) -> Settings:
        """The environment's settings with these options over it; with Label Studio's address and a token for it."""
        known = os.environ.get("LABEL_STUDIO_URL", "").strip().rstrip("/")
        if self.url is not None and self.api_key is None and known not in ("", self.url.strip().rstrip("/")):
            raise OptionError(f"--api-key: expected the token for {self.url!r}; LABEL_STUDIO_API_KEY is for {known!r}")
        settings = read_settings(
            label_studio_url=self.url,
            label_studio_api_key=self.api_key,
            checkpoint=self.checkpoint,
            device=self.device,
            score_threshold=score_threshold,
        )
        if settings.label_studio_url is None:
            raise OptionError("expected Label Studio's address in --url or LABEL_STUDIO_URL, got neither")
        if settings.label_studio_api_key is None:
            raise OptionError("expected an access token in --api-key or LABEL_STUDIO_API_KEY, got neither")
        return settings

    def selection(self) -> Selection:
        """Which tasks --ids or --view name."""
        from backend.label_studio.project import Selection

        if self.ids is not None and self.view is not None:
            raise OptionError("expected --ids or --view, got both")
        if self.ids is None:
            return Selection(view=self.view)
        try:
            numbers = [int(part) for part in self.ids.split(",")]
        except ValueError:
            raise OptionError(f"--ids: expected task IDs such as 5,7,9, got {self.ids!r}") from None
        return Selection(ids=list(dict.fromkeys(numbers)))

    def parsed_shard(self) -> Shard:
        """The part of the tasks that --shard names; without it, all."""
        from backend.bulk.choice import ALL_SHARDS, Shard

        if self.shard is None:
            return ALL_SHARDS
        try:
            number, count = (int(part) for part in self.shard.split("/"))
            return Shard(number=number, count=count)
        except ValueError:
            raise OptionError(
                f"--shard: expected a part and the number of parts, from 1/8 to 8/8, got {self.shard!r}"
            ) from None


def with_project_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of ProjectOptions in place of its parameter `options`."""
    hints = get_type_hints(ProjectOptions, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    shared = [
        inspect.Parameter(field.name, keyword, default=field.default, annotation=hints[field.name])
        for field in fields(ProjectOptions)
    ]
    signature = inspect.signature(command, eval_str=True)
    own = [parameter.replace(kind=keyword) for name, parameter in signature.parameters.items() if name != "options"]

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        options = ProjectOptions(**{parameter.name: given.pop(parameter.name) for parameter in shared})
        command(options=options, **given)

    parameters = [*own, *shared]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def read_settings(**given: str | float | None) -> Settings:
    """What the environment asks for, with what the command line asks for over it."""
    from backend.settings import Settings

    options = {name.upper(): str(value) for name, value in given.items() if value is not None}
    return Settings.from_env({**os.environ, **options})


def engine_options(checkpoint: str | None, device: str | None, score_threshold: float | None = None) -> EngineOptions:
    return read_settings(checkpoint=checkpoint, device=device, score_threshold=score_threshold).engine_options()


@contextmanager
def open_project(settings: Settings, project_id: int, retry_budget_s: float) -> Iterator[Project]:
    """The project, at the address and with the token of the settings."""
    from backend.label_studio.project import Project

    url, api_key = str(settings.label_studio_url), str(settings.label_studio_api_key)
    with Project(url, api_key, project_id, retry_budget_s=retry_budget_s) as project:
        yield project


@contextmanager
def open_bulk_service(settings: Settings) -> Iterator[BulkService]:
    """A service whose engine is ready."""
    from backend.bulk.service import BulkService

    show_warnings()
    with BulkService.open(settings) as service:
        service.engine.wait_ready()
        yield service


def show_warnings() -> None:
    """Lets the engine's warnings through to standard error; its errors arrive as exceptions."""
    import logging

    handler = logging.StreamHandler()
    handler.addFilter(lambda record: record.levelno < logging.ERROR)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, format="facings: %(message)s")


def one_of(kinds: type[Choice], option: str, value: str) -> Choice:
    """One of a few words. Raises OptionError, which unlike Typer's own error is one line."""
    if value not in {*kinds}:
        raise OptionError(f"{option}: expected {', '.join(kinds)}, got {value!r}")
    return kinds(value)
