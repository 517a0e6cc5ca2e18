"""The command `facings`: parses, calls, prints.

Knows the options of each subcommand and how an expected failure is told: one line on standard error and a non-zero exit
status. Everything heavy is imported by the subcommand that needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scripts.console import CommandError

if TYPE_CHECKING:
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

BROKEN_PHOTOS_STATUS = 3

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


def _settings(**given: str | int | None) -> Settings:
    """What the environment asks for, with what the command line asks for over it."""
    from backend.settings import Settings

    options = {name.upper(): str(value) for name, value in given.items() if value is not None}
    return Settings.from_env({**os.environ, **options})


def _engine_options(checkpoint: str | None, device: str | None) -> EngineOptions:
    return _settings(checkpoint=checkpoint, device=device).engine_options()


def _show_warnings() -> None:
    """Lets the engine's warnings through to standard error; its errors arrive as exceptions."""
    import logging

    handler = logging.StreamHandler()
    handler.addFilter(lambda record: record.levelno < logging.ERROR)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, format="facings: %(message)s")


@contextmanager
def _open_engine(options: EngineOptions) -> Iterator[Engine]:
    from model import Engine

    _show_warnings()
    engine = Engine(options)
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
    from scripts import serve as command

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
    from scripts import demo as command

    command.demo(photos, port, label_studio_port, **({} if data is None else {"data": data}))


@app.command()
def preannotate(
    photos: PhotosOption,
    out: Annotated[Path, typer.Option(help="COCO file to write.", show_default=False)],
    draw: Annotated[
        Path | None, typer.Option(help="Folder for copies of the photos with their boxes drawn.", show_default=False)
    ] = None,
    score_threshold: ThresholdOption = None,
    checkpoint: CheckpointOption = None,
    device: DeviceOption = None,
) -> None:
    """Box every facing in a folder of photos, without Label Studio.

    Writes COCO detections with the photos' file names. Photos that cannot be read are listed at the end; the others are
    done, and the exit status is 3.

    \b
    Examples:
      facings preannotate --photos shelves --out boxes.json
      facings preannotate --photos shelves --out boxes.json --draw drawn --score-threshold 0.5
    """
    from scripts import preannotate as command

    paths = command.photos_to_do(photos, out)
    with _open_engine(_engine_options(checkpoint, device)) as engine:
        result = command.preannotate(engine, paths, out, photos_dir=photos, score_threshold=score_threshold, draw=draw)
    command.print_report(result, out)
    if result.broken:
        raise typer.Exit(BROKEN_PHOTOS_STATUS)


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
    score_threshold: ThresholdOption = None,
    checkpoint: CheckpointOption = None,
    device: DeviceOption = None,
) -> None:
    """Measure a checkpoint on photos with known boxes.

    Prints AP, AP50, AP75 and AR300 (COCO, 300 detections), the corrections an annotator would make for each 100
    facings, and the seconds for each photo. The last line is JSON.

    \b
    Examples:
      facings evaluate --photos shelves/images --coco shelves/coco.json
      facings evaluate --photos shelves/images --coco shelves/coco.json --limit 10 --prompts
      facings evaluate --photos shelves/images --coco coco.json --sweep --checkpoint runs/a/facings-nano.safetensors
    """
    from scripts import evaluate as command
    from scripts.labels import read_truth

    truths = read_truth(coco, photos, limit=limit)
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
        from model.training.shelves import load_textures
        from model.training.shelves import preview as draw_preview

        draw_preview(preview, textures=load_textures(textures) if textures else None, seed=seed)
        print(f"rendered shelves in {preview}")
        return
    for labelled, folder, name in ((labels, photos, "photos"), (dev, dev_photos, "dev-photos")):
        if labelled is not None and folder is None:
            raise CommandError(f"{str(labelled)!r}: expected the folder of its photos in --{name}")
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
        raise CommandError(f"--precision: expected fp32 or fp16, got {precision!r}")
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
            "weights. generator: sam2's own mask generator on the same weights, minutes on a CPU. parity: how alike "
            "boxes are, and in each precision. floor: the least time that the arithmetic and the bytes take here. "
            "Repeatable; sizes, lanes, http and upstream by default.",
            show_default=False,
        ),
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Measured rounds, after one to warm up.")] = 5,
    requests: Annotated[
        int | None, typer.Option(min=200, help="Measure memory over this many requests.", show_default=False)
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
      facings benchmark --section generator --checkpoint sam2.1_hiera_large
      facings benchmark --section sizes --section floor --checkpoint sam2.1_hiera_large --random-weights
    """
    from scripts import benchmark as command

    names = section or ["sizes", "lanes", "http", "upstream"]
    if requests is not None and "memory" not in names:
        names = [*names, "memory"]
    unknown = set(names) - {*command.Section}
    if unknown:
        raise CommandError(f"--section: expected {', '.join(command.Section)}, got {sorted(unknown)[0]!r}")
    sections = [command.Section(name) for name in names]
    _show_warnings()
    options = _engine_options(checkpoint, device)
    with command.without_weights(options) if random_weights else nullcontext(options) as measured:
        command.benchmark(measured, sections, repeat=repeat, requests=requests or 2000)


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
        sys.exit(1)


if __name__ == "__main__":
    main()
