"""`facings preannotate` and `facings project …`: boxes for many photos.

Knows the options of these subcommands; the work is done by backend.bulk, what it did is printed by scripts.preannotate.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from backend.errors import OptionError
from scripts.console import progress, signals_as_interrupt
from scripts.options import (
    CheckpointOption,
    DeviceOption,
    FormatOption,
    ProjectOptions,
    ReportOption,
    ThresholdOption,
    one_of,
    open_bulk_service,
    open_project,
    read_settings,
    with_project_options,
)

ProjectArgument = Annotated[
    int, typer.Argument(metavar="ID", help="ID of the project: the number in its address.", show_default=False)
]
UnlabeledOption = Annotated[bool, typer.Option("--only-unlabeled", help="Only tasks without annotations.")]

project_app = typer.Typer(
    help="Box the tasks of a Label Studio project, tighten its rectangles, or export boxes to a file.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)


def preannotate(
    photos: Annotated[
        list[Path], typer.Argument(metavar="PHOTOS", help="Photos, and folders of photos.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="File to write, for yolo a folder; required.", show_default=False)
    ] = None,
    kind: FormatOption = "coco",
    draw: Annotated[
        Path | None, typer.Option(help="Folder for copies of the photos with their boxes drawn.", show_default=False)
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="For label-studio: what stands before each photo's name in its task, such as s3://bucket/; "
            "by default that of Label Studio's local files.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first photos.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be done.")] = False,
    report: ReportOption = None,
    score_threshold: ThresholdOption = None,
    checkpoint: CheckpointOption = None,
    device: DeviceOption = None,
) -> None:
    """Box every facing on photos, without a Label Studio.

    The boxes go into one file: a COCO data set, tasks with predictions for Label Studio's import, or a folder of YOLO
    labels. The exit status is 0 when all photos have their boxes, 3 when some failed, which are listed then, and 130
    after Ctrl-C; the file then holds the boxes of the photos that were done.

    \b
    Examples:
      facings preannotate shelf.jpg --out boxes.json
      facings preannotate shelves --out boxes.json --draw drawn
      facings preannotate shelves --out tasks.json --format label-studio --address s3://bucket/
      facings preannotate store1 store2 --out dataset --format yolo --limit 100
      facings preannotate shelves --out boxes.json --dry-run
    """
    from backend.bulk.formats import Format, open_writer
    from backend.bulk.outputs import check_outputs
    from backend.photos.files import find_photos
    from scripts import preannotate as printing

    if out is None:
        raise OptionError("--out: expected a file for the boxes, got none")
    chosen = one_of(Format, "--format", kind)
    settings = read_settings(checkpoint=checkpoint, device=device, score_threshold=score_threshold)
    check_outputs(out=out, out_is_folder=chosen.is_folder, report=report, draw=draw, photos=photos)
    found = find_photos(photos)
    found = replace(found, photos=found.photos[:limit])
    if dry_run:
        printing.print_dry_run_of_files(found, out)
        return
    from backend.bulk import jobs

    config, prefix = jobs.default_label_config(), jobs.LOCAL_FILES if address is None else address
    with (
        signals_as_interrupt(),
        open_bulk_service(settings) as service,
        open_writer(out, chosen, config=config, model_version=service.engine.version) as writer,
        progress("preannotate") as show,
    ):
        done = jobs.preannotate_files(service, found, writer, config=config, address=prefix, draw=draw, show=show)
    raise typer.Exit(printing.finish(done, printing.Place(name=str(out), kind=chosen, things="photos"), report))


@project_app.command("preannotate")
@with_project_options
def preannotate_project(
    project: ProjectArgument,
    *,
    options: ProjectOptions,
    only_unlabeled: UnlabeledOption = False,
    again: Annotated[
        bool, typer.Option("--again", help="Also tasks with a prediction of this model version; it is replaced.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be done.")] = False,
    score_threshold: ThresholdOption = None,
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
) -> None:
    """Box every facing on the photos of a Label Studio project: its tasks get predictions.

    Stop it, kill it, run it again: it continues where it was, and each task ends with exactly one prediction of this
    model version. The exit status is 0 when all is done, 3 when photos failed, which are listed then, 4 when Label
    Studio was away for too long, and 130 after Ctrl-C; after the last two, run it again.

    \b
    Examples:
      facings project preannotate 3 --url https://labels.example.com --api-key ...
      facings project preannotate 3 --only-unlabeled --report report.json
      facings project preannotate 3 --ids 5,7 --again --score-threshold 0.5
      facings project preannotate 3 --shard $SLURM_ARRAY_TASK_ID/8
      facings project preannotate 3 --ray local --actors 2
    """
    from backend.bulk.choice import Wanted
    from backend.bulk.jobs import dry_run as count_tasks
    from backend.bulk.jobs import preannotate_project as run
    from backend.bulk.jobs import version_for
    from backend.bulk.outputs import check_outputs
    from backend.learning.store import learned_settings
    from scripts import preannotate as printing

    if ray is None and (actors is not None or gpus is not None):
        raise OptionError("--actors and --gpus: expected --ray, too")
    settings = options.settings(score_threshold=score_threshold)
    wanted = Wanted(
        selection=options.selection(),
        shard=options.parsed_shard(),
        again=again,
        only_unlabeled=only_unlabeled,
        limit=options.limit,
    )
    check_outputs(report=options.report)
    with signals_as_interrupt(), open_project(settings, project, options.retry_budget) as source:
        settings = learned_settings(settings, source.key)
        if dry_run:
            from model import version_of

            version = version_for(version_of(settings.engine_options()), source.label_config, score_threshold)
            with progress("dry run") as show:
                tally = count_tasks(source, version, wanted, show=show)
            printing.print_dry_run_of_project(source, version, wanted, tally)
            return
        if ray is not None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray sends usage statistics
            from backend.bulk import on_ray

            cluster = on_ray.Cluster(address=ray, actors=actors, gpus=gpus)
            assignment = on_ray.Assignment(
                project_id=project,
                settings=settings,
                wanted=wanted,
                score_threshold=score_threshold,
                retry_budget_s=options.retry_budget,
            )
            with progress("preannotate") as show:
                done = on_ray.preannotate_on_ray(cluster, source, assignment, show=show)
        else:
            with open_bulk_service(settings) as service, progress("preannotate") as show:
                done = run(service, source, wanted, score_threshold=score_threshold, show=show)
    raise typer.Exit(printing.finish(done, printing.Place(name=f"project {project}"), options.report))


@project_app.command("tighten")
@with_project_options
def tighten_project(
    project: ProjectArgument,
    *,
    options: ProjectOptions,
    source: Annotated[
        str, typer.Option("--from", help="Whose rectangles: predictions or annotations, the newest of each task.")
    ] = "predictions",
    again: Annotated[
        bool, typer.Option("--again", help="Also tasks whose rectangles were redrawn by this model version.")
    ] = False,
) -> None:
    """Redraw a Label Studio project's rectangles tight around their objects.

    Each rectangle is a prompt; the answers become a new prediction with a model version of its own. Annotations and
    other predictions stay as they are. Prints how far boxes moved. Exit statuses are those of project preannotate, and
    after a kill it goes on in the same way.

    \b
    Examples:
      facings project tighten 3
      facings project tighten 3 --from annotations --view 12 --report report.json
    """
    from backend.bulk.choice import Wanted
    from backend.bulk.outputs import check_outputs
    from backend.bulk.tighten import Source, tighten
    from backend.learning.store import learned_settings
    from scripts import preannotate as printing

    chosen = one_of(Source, "--from", source)
    settings = options.settings()
    wanted = Wanted(selection=options.selection(), shard=options.parsed_shard(), again=again, limit=options.limit)
    check_outputs(report=options.report)
    with (
        signals_as_interrupt(),
        open_project(settings, project, options.retry_budget) as opened,
        open_bulk_service(learned_settings(settings, opened.key)) as service,
        progress("tighten") as show,
    ):
        done, moved = tighten(service, opened, wanted, source=chosen, show=show)
    raise typer.Exit(printing.finish(done, printing.Place(name=f"project {project}"), options.report, moved=moved))


@project_app.command("export")
@with_project_options
def export_project(
    project: ProjectArgument,
    *,
    options: ProjectOptions,
    out: Annotated[
        Path | None, typer.Option(help="File to write, for yolo a folder; required.", show_default=False)
    ] = None,
    kind: FormatOption = "coco",
    only_unlabeled: UnlabeledOption = False,
    score_threshold: ThresholdOption = None,
) -> None:
    """Write the boxes of a Label Studio project's photos into a file. The project stays as it is.

    Every photo is boxed anew, whatever predictions its task holds. Exit statuses are those of project preannotate. A
    run that stops early leaves a file with what is done, and the next one begins again.

    \b
    Examples:
      facings project export 3 --out boxes.json
      facings project export 3 --out tasks.json --format label-studio --only-unlabeled
      facings project export 3 --out dataset --format yolo --view 12
    """
    from backend.bulk.choice import Wanted
    from backend.bulk.formats import Format, open_writer
    from backend.bulk.jobs import export_project as run
    from backend.bulk.outputs import check_outputs
    from backend.learning.store import learned_settings
    from scripts import preannotate as printing

    if out is None:
        raise OptionError("--out: expected a file for the boxes, got none")
    chosen = one_of(Format, "--format", kind)
    settings = options.settings(score_threshold=score_threshold)
    wanted = Wanted(
        selection=options.selection(),
        shard=options.parsed_shard(),
        only_unlabeled=only_unlabeled,
        limit=options.limit,
    )
    check_outputs(out=out, out_is_folder=chosen.is_folder, report=options.report)
    with (
        signals_as_interrupt(),
        open_project(settings, project, options.retry_budget) as source,
        open_bulk_service(learned_settings(settings, source.key)) as service,
        open_writer(out, chosen, config=source.label_config, model_version=service.engine.version) as writer,
        progress("export") as show,
    ):
        done = run(service, source, wanted, writer, score_threshold=score_threshold, show=show)
    raise typer.Exit(printing.finish(done, printing.Place(name=str(out), kind=chosen), options.report))
