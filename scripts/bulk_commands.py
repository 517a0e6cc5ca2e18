"""`facings preannotate` and `facings tighten`: boxes for many photos.

Knows the options of these subcommands; the work is done by backend.bulk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backend.errors import OptionError
from scripts.options import (
    ApiKeyOption,
    CheckpointOption,
    DeviceOption,
    IdsOption,
    LimitOption,
    PatienceOption,
    ProjectOption,
    ReportOption,
    ThresholdOption,
    UrlOption,
    ViewOption,
    engine_options,
    open_engine,
    open_project,
    refuse,
    selection,
    settings_of_project,
)


def preannotate(
    photos: Annotated[
        Path | None, typer.Option(help="Folder of photos, instead of a project.", show_default=False)
    ] = None,
    project: ProjectOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write, for yolo a folder; a project then stays as it is.", show_default=False),
    ] = None,
    kind: Annotated[
        str, typer.Option("--format", help="Of --out: coco (detections), label-studio (import JSON) or yolo.")
    ] = "coco",
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
    view: ViewOption = None,
    ids: IdsOption = None,
    limit: LimitOption = None,
    only_unlabeled: Annotated[bool, typer.Option("--only-unlabeled", help="Only tasks without annotations.")] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Also tasks with a prediction of this model version; it is replaced.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    patience: PatienceOption = 300.0,
    report: ReportOption = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Address of a Ray cluster that does the work, or local.", show_default=False),
    ] = None,
    actors: Annotated[
        int | None, typer.Option(min=1, help="With --ray: engines at once; by default one for each GPU, else one.")
    ] = None,
    gpus: Annotated[
        float | None, typer.Option(min=0, help="With --ray: GPUs of each engine; by default one where there are any.")
    ] = None,
    draw: Annotated[
        Path | None,
        typer.Option(help="Folder for copies of a folder's photos with their boxes drawn.", show_default=False),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="With --photos and label-studio: what stands before each file name; by default that of local files.",
            show_default=False,
        ),
    ] = None,
    score_threshold: ThresholdOption = None,
    checkpoint: CheckpointOption = None,
    device: DeviceOption = None,
) -> None:
    """Box every facing in a Label Studio project, or in a folder of photos.

    A project's tasks get predictions. Stop it, kill it, run it again: it goes on where it was, and each task ends with
    exactly one prediction of this model version. The exit status is 0 when all is done, 3 when photos are broken, which
    are listed then, 4 when Label Studio was away for too long, and 130 after Ctrl-C; after the last two, run it again.

    \b
    Examples:
      facings preannotate --project 3 --url https://labels.example.com --api-key ...
      facings preannotate --project 3 --only-unlabeled --report report.json
      facings preannotate --project 3 --ids 5,7 --again --score-threshold 0.5
      facings preannotate --project 3 --out tasks.json --format label-studio
      facings preannotate --project 3 --ray local --actors 2
      facings preannotate --photos shelves --out boxes.json --draw drawn
    """
    from backend.bulk import jobs as command
    from backend.bulk.formats import Format, open_writer, require_place

    if (photos is None) == (project is None):
        raise OptionError("expected either --photos or --project")
    if kind not in {*Format}:
        raise OptionError(f"--format: expected {', '.join(Format)}, got {kind!r}")
    if report is not None:
        require_place(report, "--report")
    if photos is not None:
        if out is None:
            raise OptionError("--photos: expected a file for the boxes in --out")
        given = {"url": url, "view": view, "ids": ids, "limit": limit, "again": again, "dry-run": dry_run}
        refuse("--photos", {**given, "only-unlabeled": only_unlabeled, "ray": ray})
        paths = command.photos_to_do(photos, out)
        config = command.default_label_config()
        with (
            open_engine(engine_options(checkpoint, device, score_threshold)) as engine,
            open_writer(out, Format(kind), config=config, model_version=engine.version) as writer,
        ):
            done = command.preannotate_folder(
                engine, paths, writer, photos_dir=photos, config=config, address=address, draw=draw
            )
        raise typer.Exit(command.tell(done, out, report))
    refuse("--project", {"draw": draw, "address": address})
    settings = settings_of_project(url, api_key, checkpoint=checkpoint, device=device, score_threshold=score_threshold)
    wanted = command.Wanted(
        selection=selection(ids, view), again=again or out is not None, only_unlabeled=only_unlabeled, limit=limit
    )
    if ray is None:
        refuse("a single machine, give --ray", {"actors": actors, "gpus": gpus})
    else:
        from backend.bulk.on_ray import Cluster, preannotate_on_ray

        refuse("--ray", {"out": out, "dry-run": dry_run})
        cluster = Cluster(address=ray, actors=actors, gpus=gpus)
        with open_project(settings, project, patience) as source:
            done = preannotate_on_ray(
                cluster, source, wanted, settings, patience_s=patience, score_threshold=score_threshold
            )
        raise typer.Exit(command.tell(done, project, report))
    if out is not None:
        require_place(out, "--out")
    with open_project(settings, project, patience) as source, open_engine(settings.engine_options()) as engine:
        if dry_run:
            print(command.dry_run(source, engine.version, wanted))
            return
        if out is None:
            done = command.preannotate_project(engine, source, wanted, settings, score_threshold=score_threshold)
        else:
            with open_writer(out, Format(kind), config=source.label_config, model_version=engine.version) as writer:
                done = command.export_project(engine, source, wanted, writer, settings, score_threshold=score_threshold)
    raise typer.Exit(command.tell(done, project if out is None else out, report))


def tighten(
    project: Annotated[int, typer.Option(help="Number of a Label Studio project.", show_default=False)],
    source: Annotated[
        str, typer.Option("--from", help="Whose rectangles: predictions or annotations, the newest of each task.")
    ] = "predictions",
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
    view: ViewOption = None,
    ids: IdsOption = None,
    limit: LimitOption = None,
    again: Annotated[
        bool, typer.Option("--again", help="Also tasks whose rectangles were redrawn by this model version.")
    ] = False,
    patience: PatienceOption = 300.0,
    report: ReportOption = None,
    checkpoint: CheckpointOption = None,
    device: DeviceOption = None,
) -> None:
    """Redraw a Label Studio project's rectangles tight around their objects.

    Each rectangle is a prompt; the answers become a new prediction with a model version of its own. Annotations and
    other predictions stay as they are. Prints how far boxes moved. Exit statuses are those of preannotate, and killed,
    it goes on like it.

    \b
    Examples:
      facings tighten --project 3
      facings tighten --project 3 --from annotations --view 12 --report report.json
    """
    from backend.bulk import tighten as command
    from backend.bulk.formats import require_place
    from backend.bulk.jobs import Wanted, tell

    if source not in {*command.Source}:
        raise OptionError(f"--from: expected {' or '.join(command.Source)}, got {source!r}")
    if report is not None:
        require_place(report, "--report")
    settings = settings_of_project(url, api_key, checkpoint=checkpoint, device=device)
    wanted = Wanted(selection=selection(ids, view), again=again, limit=limit)
    with open_project(settings, project, patience) as opened, open_engine(settings.engine_options()) as engine:
        done, moved = command.tighten(engine, opened, wanted, settings, source=command.Source(source))
    command.print_moved(moved)
    raise typer.Exit(tell(done, project, report))
