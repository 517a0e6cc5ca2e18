"""The command `facings`: parses, calls, prints.

Knows the options of each subcommand and how an expected failure is told: one line on standard error and a non-zero exit
status. Everything heavy is imported by the subcommand that needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backend.errors import CommandError, OptionError

if TYPE_CHECKING:
    from backend.label_studio.project import Project, Selection
    from backend.settings import Settings
    from model import Engine, EngineOptions

app = typer.Typer(
    name="facings",
    help="Boxes every facing of a retail shelf, in Label Studio or without it.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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


def _settings(**given: str | float | None) -> Settings:
    """What the environment asks for, with what the command line asks for over it."""
    from backend.settings import Settings

    options = {name.upper(): str(value) for name, value in given.items() if value is not None}
    return Settings.from_env({**os.environ, **options})


def _engine_options(checkpoint: str | None, device: str | None, score_threshold: float | None = None) -> EngineOptions:
    return _settings(checkpoint=checkpoint, device=device, score_threshold=score_threshold).engine_options()


def _settings_of_project(url: str | None, api_key: str | None, **given: str | int | float | None) -> Settings:
    """Those with Label Studio's address and a token for it, from the options or the environment."""
    known = os.environ.get("LABEL_STUDIO_URL", "").strip().rstrip("/")
    if url is not None and api_key is None and known not in ("", url.strip().rstrip("/")):
        raise OptionError(f"--api-key: expected the token for {url!r}; LABEL_STUDIO_API_KEY belongs to {known!r}")
    settings = _settings(label_studio_url=url, label_studio_api_key=api_key, **given)
    for option, value in (("url", settings.label_studio_url), ("api-key", settings.label_studio_api_key)):
        if value is None:
            variable = {"url": "LABEL_STUDIO_URL", "api-key": "LABEL_STUDIO_API_KEY"}[option]
            raise OptionError(f"--project: expected --{option} or {variable}, got neither")
    return settings


def _selection(ids: str | None, view: int | None) -> Selection:
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


def _refuse(beside: str, given: Mapping[str, object]) -> None:
    """Raises OptionError for the first option that was given beside one that it does not go with."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise OptionError(f"--{name}: does not go with {beside}")


@contextmanager
def _open_project(settings: Settings, number: int | None, patience_s: float) -> Iterator[Project]:
    """The project. A request to terminate ends the block as Ctrl-C does."""
    from backend.label_studio.project import Project
    from scripts.demo.processes import signals_as_interrupt

    url, api_key = settings.label_studio_url, settings.label_studio_api_key
    if url is None or api_key is None or number is None:
        raise OptionError("--project: expected a number, and Label Studio's address and token")
    with signals_as_interrupt(), Project(url, api_key, number, patience_s=patience_s) as project:
        yield project


def _show_warnings() -> None:
    """Lets the engine's warnings through to standard error; its errors arrive as exceptions."""
    import logging

    handler = logging.StreamHandler()
    handler.addFilter(lambda record: record.levelno < logging.ERROR)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, format="facings: %(message)s")


@contextmanager
def _open_engine(options: EngineOptions) -> Iterator[Engine]:
    from model import Sam2Engine

    _show_warnings()
    engine = Sam2Engine(options)
    try:
        engine.wait_ready()
        yield engine
    finally:
        engine.close()


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default=False)] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 9090 by default.", show_default=False)] = None,
    threads: Annotated[int | None, typer.Option(help="Requests answered at once.", show_default=False)] = None,
    checkpoint: CheckpointOption = None,
    device: DeviceOption = None,
) -> None:
    """Run the backend for a Label Studio.

    Everything can also be set through the environment (HOST, PORT, CHECKPOINT, ...); an option given here comes first.

    \b
    Examples:
      facings serve
      facings serve --port 9191 --checkpoint sam2.1_hiera_small
      LABEL_STUDIO_URL=https://labels.example.com LABEL_STUDIO_API_KEY=... facings serve
    """
    from backend.transports import gunicorn as command

    command.serve(_settings(host=host, port=port, threads=threads, checkpoint=checkpoint, device=device))


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
) -> None:
    """Start a Label Studio with this backend, a project and boxed shelf photos.

    Prints the address and the login, and runs until Ctrl-C. A second run finds everything as it was left.

    \b
    Examples:
      facings demo
      facings demo --photos shelves
      facings demo --port 9191 --label-studio-port 8181 --data /srv/demo
    """
    from scripts.demo import demo as command

    command.demo(photos, port, label_studio_port, **({} if data is None else {"data": data}))


@app.command()
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
        _refuse("--photos", {**given, "only-unlabeled": only_unlabeled, "ray": ray})
        paths = command.photos_to_do(photos, out)
        config = command.default_label_config()
        with (
            _open_engine(_engine_options(checkpoint, device, score_threshold)) as engine,
            open_writer(out, Format(kind), config=config, model_version=engine.version) as writer,
        ):
            done = command.preannotate_folder(
                engine, paths, writer, photos_dir=photos, config=config, address=address, draw=draw
            )
        raise typer.Exit(command.tell(done, out, report))
    _refuse("--project", {"draw": draw, "address": address})
    settings = _settings_of_project(url, api_key, checkpoint=checkpoint, device=device, score_threshold=score_threshold)
    wanted = command.Wanted(
        selection=_selection(ids, view), again=again or out is not None, only_unlabeled=only_unlabeled, limit=limit
    )
    if ray is None:
        _refuse("a single machine, give --ray", {"actors": actors, "gpus": gpus})
    else:
        from backend.bulk.on_ray import Cluster, preannotate_on_ray

        _refuse("--ray", {"out": out, "dry-run": dry_run})
        cluster = Cluster(address=ray, actors=actors, gpus=gpus)
        with _open_project(settings, project, patience) as source:
            done = preannotate_on_ray(
                cluster, source, wanted, settings, patience_s=patience, score_threshold=score_threshold
            )
        raise typer.Exit(command.tell(done, project, report))
    if out is not None:
        require_place(out, "--out")
    with _open_project(settings, project, patience) as source, _open_engine(settings.engine_options()) as engine:
        if dry_run:
            print(command.dry_run(source, engine.version, wanted))
            return
        if out is None:
            done = command.preannotate_project(engine, source, wanted, settings, score_threshold=score_threshold)
        else:
            with open_writer(out, Format(kind), config=source.label_config, model_version=engine.version) as writer:
                done = command.export_project(engine, source, wanted, writer, settings, score_threshold=score_threshold)
    raise typer.Exit(command.tell(done, project if out is None else out, report))


@app.command()
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
    settings = _settings_of_project(url, api_key, checkpoint=checkpoint, device=device)
    wanted = Wanted(selection=_selection(ids, view), again=again, limit=limit)
    with _open_project(settings, project, patience) as opened, _open_engine(settings.engine_options()) as engine:
        done, moved = command.tighten(engine, opened, wanted, settings, source=command.Source(source))
    command.print_moved(moved)
    raise typer.Exit(tell(done, project, report))


@app.command()
def evaluate(
    photos: PhotosOption,
    coco: Annotated[
        Path, typer.Option(help="Their known boxes: a COCO file or a Label Studio JSON export.", show_default=False)
    ],
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first photos of the file.", show_default=False)
    ] = None,
    prompts: Annotated[bool, typer.Option("--prompts", help="Also measure clicks and rough boxes.")] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="Also count corrections at many score thresholds.")] = False,
    pruning: Annotated[
        bool,
        typer.Option(
            "--pruning",
            help="Instead, measure what the grid's points in sure objects are worth, which PROPOSALS=grid leaves out; "
            "a minute a photo on a CPU.",
        ),
    ] = False,
    score_threshold: ThresholdOption = None,
    checkpoint: CheckpointOption = None,
    device: DeviceOption = None,
) -> None:
    """Measure a checkpoint on photos with known boxes.

    Prints AP, AP50, AP75 and AR300 (COCO, 300 detections), the corrections an annotator would make for each 100
    facings, and the seconds for each photo; with --pruning points, boxes and recall of the grid. The last line is JSON.

    \b
    Examples:
      facings evaluate --photos shelves/images --coco shelves/coco.json
      facings evaluate --photos shelves/images --coco shelves/coco.json --limit 10 --prompts
      facings evaluate --photos shelves/images --coco coco.json --sweep --checkpoint runs/a/facings-nano.safetensors
      facings evaluate --photos shelves/images --coco shelves/coco.json --limit 5 --pruning
    """
    from scripts.labels import read_truth
    from scripts.measure import evaluate as command

    if pruning:
        _refuse("--pruning", {"prompts": prompts, "sweep": sweep, "score-threshold": score_threshold})
    truths = read_truth(coco, photos, limit=limit)
    if pruning:
        from scripts.measure.pruning import measure_pruning, print_pruning

        _show_warnings()
        print_pruning(measure_pruning(_engine_options(checkpoint, device), photos, truths))
        return
    with _open_engine(_engine_options(checkpoint, device)) as engine:
        evaluation = command.evaluate(
            engine, photos, truths, score_threshold=score_threshold, prompts=prompts, sweep=sweep
        )
    command.print_report(evaluation)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/nano"),
    minutes: Annotated[float, typer.Option(min=0.01, help="Length of the run; the learning rate follows it.")] = 60.0,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Also learn from photos with known boxes: a COCO file or a Label Studio JSON export.",
            show_default=False,
        ),
    ] = None,
    photos: Annotated[Path | None, typer.Option(help="Folder of the photos of --labels.", show_default=False)] = None,
    start_from: Annotated[
        Path | None,
        typer.Option("--from", help="Weights to begin with; by default the bundled ones with --labels, else none."),
    ] = None,
    dev: Annotated[
        Path | None,
        typer.Option(help="Measure on these known boxes meanwhile, and calibrate the threshold.", show_default=False),
    ] = None,
    dev_photos: Annotated[Path | None, typer.Option(help="Folder of the photos of --dev.", show_default=False)] = None,
    textures: Annotated[
        Path | None, typer.Option(help="Folder of product photos to put on some of the faces.", show_default=False)
    ] = None,
    preview: Annotated[
        Path | None,
        typer.Option(help="Only draw rendered shelves with their boxes into this picture.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Highest one; 2e-3 for new weights, 5e-4 for weights to begin with.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the rendered shelves and the first weights.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that render; a GPU wants as many as there are cores.")
    ] = 2,
) -> None:
    """Train facings-nano on rendered shelves, or fine-tune it on your own labels.

    The run's folder gets its log, all that is needed to go on after an interruption, and at the end the checkpoint,
    which CHECKPOINT takes.

    \b
    Examples:
      facings train --out runs/first --minutes 60
      facings train --out runs/first --minutes 60 --resume
      facings train --out runs/gpu --minutes 60 --device cuda --workers 16
      facings train --out runs/own --minutes 30 --labels export.json --photos shelves
      facings train --out runs/own --labels a.json --photos shelves --dev b.json --dev-photos shelves
      facings train --preview shelves.png
    """
    if preview is not None:
        from model.renderer.shelves import load_textures
        from model.renderer.shelves import preview as draw_preview

        draw_preview(preview, textures=load_textures(textures) if textures else None, seed=seed)
        print(f"rendered shelves in {preview}")
        return
    for labelled, folder, name in ((labels, photos, "photos"), (dev, dev_photos, "dev-photos")):
        if labelled is not None and folder is None:
            raise OptionError(f"{str(labelled)!r}: expected the folder of its photos in --{name}")
    from model.checkpoints import BUNDLED_WEIGHTS
    from model.training.loop import TrainOptions
    from scripts import train as command
    from scripts.labels import read_truth

    if labels is not None and start_from is None:
        start_from = BUNDLED_WEIGHTS
    options = TrainOptions(
        out=out,
        minutes=minutes,
        start_from=start_from,
        textures=textures,
        labelled=command.labelled_photos(read_truth(labels, photos), photos) if labels and photos else None,
        seed=seed,
        device=device,
        learning_rate=learning_rate or (2e-3 if start_from is None else 5e-4),
        workers=workers,
        resume=resume,
    )
    score = command.scorer(read_truth(dev, dev_photos), dev_photos, device) if dev and dev_photos else None
    print(f"checkpoint in {command.train(options, score)}")


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="Folder for the files.", show_default=False)],
    checkpoint: CheckpointOption = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Of the encoder's products: fp32 or fp16; by default fp16 where a TensorRT engine is built.",
            show_default=False,
        ),
    ] = None,
    most_tiles: Annotated[int, typer.Option(min=1, help="Largest batch of a TensorRT engine.")] = 16,
) -> None:
    """Write the encoder and the decoder as ONNX files, and a TensorRT engine where TensorRT is installed.

    The files are compared with torch on ONNX Runtime where that is installed. The last line is JSON. ENCODER makes the
    engine use the encoder; the README says what goes into the files and what comes out.

    \b
    Examples:
      facings export --out exported
      facings export --out exported --checkpoint sam2.1_hiera_large --precision fp16
      ENCODER=exported facings serve
    """
    if precision not in (None, "fp32", "fp16"):
        raise OptionError(f"--precision: expected fp32 or fp16, got {precision!r}")
    settings = _settings(checkpoint=checkpoint)
    from scripts import export as command

    _show_warnings()
    exported = command.export(
        settings.checkpoint,
        settings.checkpoint_config,
        out,
        precision=precision,  # type: ignore[arg-type]
        most_tiles=most_tiles,
    )
    command.print_report(exported)


@app.command()
def benchmark(
    section: Annotated[
        list[str] | None,
        typer.Option(
            help="sizes: seconds by size of photo. lanes: clicks while bulk work runs, in the engine. http: the same "
            "through HTTP. memory: resident memory over many requests. upstream: sam2's own predictor on the same "
            "weights. generator: sam2's own mask generator on the same weights, minutes a photo on a CPU. parity: "
            "how alike boxes are, and in each precision. floor: the least time that the arithmetic and the bytes "
            "take here. project: a whole Label Studio project beside the bare engine. Repeatable; sizes, lanes, "
            "http and upstream by default.",
            show_default=False,
        ),
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Measured rounds, after one to warm up.")] = 5,
    requests: Annotated[
        int | None, typer.Option(min=200, help="Measure memory over this many requests.", show_default=False)
    ] = None,
    megapixels: Annotated[
        list[float] | None,
        typer.Option(
            min=0.1,
            help="Of the photos of sizes, upstream, generator and parity; repeatable, 2, 8 and 16 by default. At 16, "
            "upstream's generator takes 13 GB.",
            show_default=False,
        ),
    ] = None,
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="Of a SAM 2.1 checkpoint: its network, for speed, without its weights."),
    ] = False,
    checkpoint: CheckpointOption = None,
    device: DeviceOption = None,
) -> None:
    """Measure speed and memory on this machine.

    Medians and 95th percentiles after a warm-up, and the peak memory. The last line is JSON. Beside upstream stands the
    network that --checkpoint names, with random weights, or SAM 2.1 tiny. Speed does not depend on weights; boxes do.

    \b
    Examples:
      facings benchmark
      facings benchmark --section sizes --section lanes --repeat 10
      facings benchmark --section memory --requests 2000
      facings benchmark --section generator --checkpoint sam2.1_hiera_large --megapixels 2 --repeat 1
      facings benchmark --section sizes --section floor --checkpoint sam2.1_hiera_large --random-weights
    """
    from scripts.measure import benchmark as command

    names = section or ["sizes", "lanes", "http", "upstream"]
    if requests is not None and "memory" not in names:
        names = [*names, "memory"]
    unknown = set(names) - {*command.Section}
    if unknown:
        raise OptionError(f"--section: expected {', '.join(command.Section)}, got {sorted(unknown)[0]!r}")
    sections = [command.Section(name) for name in names]
    _show_warnings()
    options = _engine_options(checkpoint, device)
    with command.without_weights(options) if random_weights else nullcontext(options) as measured:
        command.benchmark(
            measured,
            sections,
            repeat=repeat,
            requests=requests or 2000,
            megapixels=megapixels or command.MEGAPIXELS,
        )


def _is_expected(error: Exception) -> bool:
    """True for failures whose message says all there is to know."""
    if isinstance(error, CommandError) or (isinstance(error, OSError) and error.filename is not None):
        return True
    trees = (("model.types", "EngineError"), ("backend.errors", "FacingsError"))
    # What raised an error of a tree has imported it; importing it here would only cost time.
    return any(isinstance(error, getattr(sys.modules.get(module), tree, ())) for module, tree in trees)


def main() -> None:
    """Runs the command line and ends the process with its exit status."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not _is_expected(error):
            raise
        reason = f"{error.strerror}: {str(error.filename)!r}" if isinstance(error, OSError) else str(error)
        print(f"facings: {reason}", file=sys.stderr)
        sys.exit(error.exit_status if isinstance(error, CommandError) else 1)


if __name__ == "__main__":
    main()
