"""The command `facings`: parses, calls, prints.

Knows the subcommands, and how an expected failure is reported: one line on standard error and a non-zero exit status.
Everything heavy is imported by the subcommand that needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from backend.errors import CommandError, FacingsError, Interrupted, OptionError
from scripts import learning_commands  # noqa: F401  adds its commands to project_app
from scripts.bulk_commands import preannotate, project_app
from scripts.model_commands import benchmark, evaluate, export, pretrain, train
from scripts.options import CheckpointOption, DeviceOption, read_settings
from scripts.transport_commands import redis_predict, redis_recv, redis_send, sagemaker, watch, worker

app = typer.Typer(
    name="facings",
    help="Boxes every facing of a retail shelf, in Label Studio or without it.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default=False)] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 9090 by default.", show_default=False)] = None,
    threads: Annotated[int | None, typer.Option(help="Requests answered at once.", show_default=False)] = None,
    grpc: Annotated[bool, typer.Option("--grpc", help="Also answer gRPC, on GRPC_PORT, by default 50051.")] = False,
    checkpoint: CheckpointOption = None,
    device: DeviceOption = None,
) -> None:
    """Run the backend for a Label Studio.

    Everything can also be set through the environment (HOST, PORT, CHECKPOINT, ...); an option given here comes first.

    \b
    Examples:
      facings serve
      facings serve --port 9191 --checkpoint sam2.1_hiera_small
      facings serve --grpc
      LABEL_STUDIO_URL=https://labels.example.com LABEL_STUDIO_API_KEY=... facings serve
    """
    from backend.transports import gunicorn as command

    settings = read_settings(host=host, port=port, threads=threads, checkpoint=checkpoint, device=device)
    if grpc and settings.grpc_port is None:
        settings = replace(settings, grpc_port=50051)
    command.serve(settings)


@app.command()
def demo(
    photos: Annotated[
        Path | None, typer.Option(help="Folder of photos to label; rendered shelves by default.", show_default=False)
    ] = None,
    port: Annotated[int, typer.Option(envvar="PORT", help="Port of the backend.")] = 9090,
    label_studio_port: Annotated[int, typer.Option(envvar="LS_PORT", help="Port of Label Studio.")] = 8080,
    data: Annotated[
        Path | None, typer.Option(help="Folder that keeps accounts, projects and photos.", show_default=False)
    ] = None,
    page: Annotated[
        bool, typer.Option("--page", help="Only a page for one photo, without Label Studio; on --port.")
    ] = False,
) -> None:
    """Start a Label Studio with this backend, a project and boxed shelf photos.

    Prints the address and the login, and runs until Ctrl-C. A second run finds everything as it was left. With --page,
    there is no Label Studio and no account: drop a photo, click on its objects, take cut-outs and boxes away.

    \b
    Examples:
      facings demo
      facings demo --photos shelves
      facings demo --port 9191 --label-studio-port 8181 --data /srv/demo
      facings demo --page
    """
    if page:
        for option, value in (("--photos", photos), ("--data", data)):
            if value is not None:
                raise OptionError(f"{option}: expected no folder next to --page, got {str(value)!r}")
        from scripts.demo import page as page_command

        page_command.page(read_settings(port=port))
        return
    from scripts.demo import demo as command

    command.demo(photos, port, label_studio_port, **({} if data is None else {"data": data}))


for command in (
    preannotate,
    watch,
    worker,
    redis_predict,
    redis_send,
    redis_recv,
    sagemaker,
    evaluate,
    train,
    pretrain,
    export,
    benchmark,
):
    app.command()(command)
app.add_typer(project_app, name="project")


def _is_expected(error: Exception) -> bool:
    """True for failures whose message is all that a user needs."""
    if isinstance(error, CommandError | FacingsError) or (isinstance(error, OSError) and error.filename is not None):
        return True
    types = sys.modules.get("model.types")  # whatever raised an EngineError has imported it; importing torch is slow
    return types is not None and isinstance(error, types.EngineError)


def main() -> None:
    """Runs the command line and ends the process with its exit status."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(Interrupted.exit_status)
    except Exception as error:
        if not _is_expected(error):
            raise
        reason = f"{error.strerror}: {str(error.filename)!r}" if isinstance(error, OSError) else str(error)
        print(f"facings: {reason}", file=sys.stderr)
        sys.exit(error.exit_status if isinstance(error, CommandError) else 1)


if __name__ == "__main__":
    main()
