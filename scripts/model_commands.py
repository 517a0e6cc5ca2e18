"""`facings evaluate`, `train`, `export` and `benchmark`: checkpoints made and measured.

Knows the options of these subcommands; the work is done by scripts.measure, scripts.train and scripts.export.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backend.errors import OptionError
from scripts.options import (
    CheckpointOption,
    DeviceOption,
    PhotosOption,
    ThresholdOption,
    engine_options,
    open_bulk_service,
    read_settings,
    show_warnings,
)

if TYPE_CHECKING:
    from scripts.labels import KnownPhotos


TruthOption = Annotated[
    Path,
    typer.Option(
        help="Their known boxes: a COCO file, a Label Studio export (JSON), or a folder of Pascal VOC or Supervisely "
        "files.",
        show_default=False,
    ),
]
LabelOption = Annotated[
    list[str] | None,
    typer.Option(
        "--label",
        help="Label of the boxes that are facings, in a folder of label files; repeatable. By default, all.",
        show_default=False,
    ),
]
ControlOption = Annotated[
    list[str] | None,
    typer.Option(
        "--control",
        help="Name of a Label Studio control whose rectangles are facings; repeatable. By default, of several, those "
        "that Facings wrote to.",
        show_default=False,
    ),
]
LearningPhotosOption = Annotated[Path | None, typer.Option(help="Folder of photos to learn from.", show_default=False)]
LearningTruthOption = Annotated[
    Path | None,
    typer.Option(help="Known boxes of --photos: a file or folder, as for facings evaluate.", show_default=False),
]
TexturesOption = Annotated[
    Path | None, typer.Option(help="Folder of product photos to put on some of the faces.", show_default=False)
]


def evaluate(
    photos: PhotosOption,
    truth: TruthOption,
    control: ControlOption = None,
    label: LabelOption = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first photos of the file.", show_default=False)
    ] = None,
    prompts: Annotated[bool, typer.Option("--prompts", help="Also measure clicks, Alt-clicks and rectangles.")] = False,
    annotate: Annotated[
        bool, typer.Option("--annotate", help="Also play an annotator, and count actions until all boxes are right.")
    ] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="Also count corrections at many score thresholds.")] = False,
    learning_curve: Annotated[
        bool,
        typer.Option(
            "--learning-curve",
            help="Instead, let the bundled detector learn from a few photos, and measure it on others.",
        ),
    ] = False,
    submitted: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            help="Of --learning-curve: photos to submit; repeatable, 0, 5, 10 and 20 by default.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Of --learning-curve: ways to cut the photos in two.")] = 3,
    score_threshold: ThresholdOption = None,
    checkpoint: CheckpointOption = None,
    device: DeviceOption = None,
) -> None:
    """Measure a checkpoint on photos with known boxes.

    Prints AP, AP50, AP75 and AR300 (COCO, 300 detections), the corrections an annotator would make for each 100
    facings, and the seconds for each photo. With --annotate the number that Facings lives for: actions per 100 facings
    (clicks and keys count 1, drags 2), beside drawing everything by hand. Photos that cannot be measured are named on
    standard error and counted. The last line is JSON.

    \b
    Examples:
      facings evaluate --photos shelves/images --truth shelves/coco.json
      facings evaluate --photos shelves --truth export.json --limit 10 --prompts --annotate
      facings evaluate --photos shelves --truth coco.json --sweep --checkpoint runs/a/facings-nano.safetensors
      LEARN_MINUTES=12 facings evaluate --photos shelves --truth coco.json --learning-curve --seeds 1 --submitted 20
    """
    from scripts.measure import evaluate as command

    _check_label(label, truth)
    known = _known(truth, photos, control, label, limit)
    if learning_curve:
        from model.training.heap import keep_freed_memory
        from scripts.measure import learning_curve as curve

        most = len(known.photos) // 2
        if submitted and max(submitted) > most:
            raise OptionError(f"--submitted: expected at most {most}, half of the photos, got {max(submitted)}")
        keep_freed_memory()
        curve.print_curve(
            curve.learning_curve(
                read_settings(device=device), known.photos, seeds=seeds, counts=submitted or curve.PHOTOS
            )
        )
        return
    with open_bulk_service(read_settings(checkpoint=checkpoint, device=device)) as service:
        evaluation = command.evaluate(
            service, known, score_threshold=score_threshold, prompts=prompts, annotate=annotate, sweep=sweep
        )
    command.print_report(evaluation)


def train(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/nano"),
    minutes: Annotated[float, typer.Option(min=0.01, help="Length of the run; the learning rate follows it.")] = 60.0,
    photos: LearningPhotosOption = None,
    truth: LearningTruthOption = None,
    dev_photos: Annotated[
        Path | None, typer.Option(help="Folder of photos to measure on, kept out of training.", show_default=False)
    ] = None,
    dev_truth: Annotated[
        Path | None,
        typer.Option(help="Known boxes of --dev-photos. They also calibrate the score threshold.", show_default=False),
    ] = None,
    control: ControlOption = None,
    label: LabelOption = None,
    few_photos: Annotated[
        bool,
        typer.Option(
            "--few-photos",
            help="For a few dozen photos: only the detector learns, and half of it is kept, as in a project.",
        ),
    ] = False,
    start_from: Annotated[
        Path | None,
        typer.Option("--from", help="Weights to begin with; by default the bundled ones with --truth, else none."),
    ] = None,
    textures: TexturesOption = None,
    preview: Annotated[
        Path | None,
        typer.Option(help="Only draw rendered shelves with their boxes into this picture.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Highest one; 2e-3 for new weights and with --few-photos, else 5e-4.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the rendered shelves and the first weights.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that render; a GPU wants as many as there are cores.")
    ] = 2,
) -> None:
    """Train facings-nano on rendered shelves, or fine-tune it on your own photos.

    Prints step, loss and the time left; with --dev-truth also how good the weights are that the run begins with, those
    of every 20 minutes and those of the end. The run's folder gets its log, all that is needed to go on after an
    interruption, and at the end the checkpoint, which CHECKPOINT takes.

    \b
    Examples:
      facings train --out runs/first --minutes 60
      facings train --out runs/first --minutes 60 --resume
      facings train --out runs/gpu --minutes 60 --device cuda --workers 16
      facings train --out runs/own --minutes 10 --photos shelves --truth export.json --few-photos
      facings train --out runs/own --photos a --truth a.json --dev-photos b --dev-truth b.json
      facings train --preview shelves.png
    """
    if preview is not None:
        _draw_preview(preview, textures, seed)
        return
    _check_photos(photos, truth)
    _check_photos(dev_photos, dev_truth, prefix="dev-")
    if few_photos and truth is None:
        raise OptionError("--few-photos: expected --photos and --truth with it, got none")
    _check_label(label, truth, dev_truth)
    from model.checkpoints import BUNDLED_WEIGHTS
    from model.training.heap import keep_freed_memory
    from model.training.options import TrainOptions, for_few_photos
    from scripts import train as command

    keep_freed_memory()
    if truth is not None and start_from is None:
        start_from = BUNDLED_WEIGHTS
    options = TrainOptions(
        out=out,
        minutes=minutes,
        start_from=start_from,
        textures=textures,
        labelled=command.labelled_photos(_known(truth, photos, control, label)) if truth and photos else None,
        seed=seed,
        device=device,
        learning_rate=2e-3 if start_from is None else 5e-4,
        workers=workers,
        resume=resume,
    )
    if few_photos:
        options = for_few_photos(options)
    if learning_rate is not None:
        options = replace(options, learning_rate=learning_rate)
    score = command.scorer(_known(dev_truth, dev_photos, control, label), device) if dev_truth and dev_photos else None
    print(f"checkpoint in {command.train(options, score)}")


def pretrain(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/pretrain"),
    minutes: Annotated[float, typer.Option(min=0.01, help="Length of the run; the learning rate follows it.")] = 60.0,
    photos: LearningPhotosOption = None,
    truth: LearningTruthOption = None,
    control: ControlOption = None,
    label: LabelOption = None,
    unlabelled: Annotated[
        Path | None,
        typer.Option(help="Folder of shelf photos without known boxes, to learn from as well.", show_default=False),
    ] = None,
    start_from: Annotated[
        Path | None,
        typer.Option("--from", help="Weights to begin with; by default the bundled ones. They label the photos, too."),
    ] = None,
    trunk_weights: Annotated[
        Path | None,
        typer.Option(
            help="Published weights of EfficientNet-Lite1, a .pth file, to begin with instead.",
            show_default=False,
        ),
    ] = None,
    textures: TexturesOption = None,
    learning_rate: Annotated[float, typer.Option(help="Highest one.")] = 1.2e-3,
    seed: Annotated[int, typer.Option(help="Of the rendered shelves and the first weights.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; on a CPU a step takes a minute.")] = "cuda",
    workers: Annotated[int, typer.Option(min=1, help="Processes that render: as many as there are cores.")] = 15,
) -> None:
    """Train facings-nano on rendered shelves and real photos, on a GPU; the bundled one was made so.

    With photos, a quarter of the pictures are pieces of them, whether their boxes are known or not.

    Prints the losses, and at the end the checkpoint. What is there is written every minute; a run cannot be resumed,
    but another can begin with its weights.

    \b
    Examples:
      facings pretrain --trunk-weights efficientnet-lite1.pth --out runs/a --minutes 30
      facings pretrain --from runs/a/facings-nano.safetensors --out runs/b --minutes 30 --unlabelled shelves
      facings pretrain --out runs/c --minutes 30 --photos shelves --truth export.json
    """
    _check_photos(photos, truth)
    _check_label(label, truth)
    from model.checkpoints import BUNDLED_WEIGHTS
    from model.device import choose_placement
    from model.training.pretraining import PretrainOptions
    from scripts import train as command

    command.pretrain(
        PretrainOptions(
            out=out,
            encoder_weights=trunk_weights,
            minutes=minutes,
            start_from=start_from or BUNDLED_WEIGHTS,
            textures=textures,
            teacher=start_from or BUNDLED_WEIGHTS,
            photos=command.pretraining_photos(
                unlabelled, _known(truth, photos, control, label) if truth and photos else None
            ),
            device=str(choose_placement(device).device),
            seed=seed,
            processes=workers,
            learning_rate=learning_rate,
        )
    )


def _known(
    truth: Path, photos: Path, control: list[str] | None, label: list[str] | None, limit: int | None = None
) -> KnownPhotos:
    """A truth file, with a line for everything that was not taken from it."""
    from scripts.labels import print_remarks, read_truth

    known = read_truth(truth, photos, limit=limit, controls=control or (), labels=label or ())
    print_remarks(known)
    return known


def _check_photos(photos: Path | None, truth: Path | None, *, prefix: str = "") -> None:
    """Photos to learn from or to measure on come with their boxes, and boxes with their photos."""
    if (photos is None) != (truth is None):
        given, missing = ("truth", "photos") if photos is None else ("photos", "truth")
        raise OptionError(f"--{prefix}{given}: expected --{prefix}{missing} with it, got none")


def _check_label(label: list[str] | None, *truths: Path | None) -> None:
    if label and not any(truth is not None and truth.is_dir() for truth in truths):
        raise OptionError(
            "--label: expected a folder of label files (Pascal VOC, Supervisely) as known boxes, got none"
        )


def _draw_preview(path: Path, textures: Path | None, seed: int) -> None:
    from model.renderer.shelves import load_textures
    from model.renderer.shelves import preview as draw_preview

    draw_preview(path, textures=load_textures(textures) if textures else None, seed=seed)
    print(f"rendered shelves in {path}")


def export(
    out: Annotated[Path, typer.Option(help="Folder for the files.", show_default=False)],
    checkpoint: CheckpointOption = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Of the encoder's matrix multiplications: fp32 or fp16; by default fp16 where a TensorRT engine is "
            "built.",
            show_default=False,
        ),
    ] = None,
    most_tiles: Annotated[
        int, typer.Option(min=1, help="Largest batch of a TensorRT engine, and of a model for Triton.")
    ] = 16,
    triton: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a Triton server's model repository, to write the encoder into it too.", show_default=False
        ),
    ] = None,
) -> None:
    """Write the encoder and the decoder as ONNX files, and a TensorRT engine where TensorRT is installed.

    The files are compared with torch on ONNX Runtime where that is installed. The last line is JSON. ENCODER makes the
    engine use the encoder; docs/export.md describes their inputs and outputs, and docs/triton.md a Triton server.

    \b
    Examples:
      facings export --out exported
      facings export --out exported --checkpoint sam2.1_hiera_large --precision fp16
      facings export --out exported --triton models
      ENCODER=exported facings serve
    """
    if precision not in (None, "fp32", "fp16"):
        raise OptionError(f"--precision: expected fp32 or fp16, got {precision!r}")
    settings = read_settings(checkpoint=checkpoint)
    from scripts import export as command

    show_warnings()
    exported = command.export(
        settings.checkpoint,
        settings.checkpoint_config,
        out,
        precision=precision,  # type: ignore[arg-type]
        most_tiles=most_tiles,
        triton=triton,
    )
    command.print_report(exported)


def benchmark(
    section: Annotated[
        list[str] | None,
        typer.Option(
            help="sizes: seconds by size of photo. lanes: clicks while bulk work runs, in the engine. training: clicks "
            "while a project's detector learns on the same machine. http: lanes through HTTP. memory: resident memory "
            "over many requests. upstream: sam2's own predictor on the same weights. generator: sam2's own mask "
            "generator on the same weights, minutes a photo on a CPU. parity: how alike boxes are, and in each "
            "precision. floor: the least time that the arithmetic and the bytes take here. project: a whole Label "
            "Studio project compared with the bare engine. transports: HTTP and gRPC beside each other. Repeatable; "
            "sizes, lanes, http and upstream by default.",
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

    Medians and 95th percentiles after a warm-up, and the peak memory. The last line is JSON. Upstream is compared with
    the network that --checkpoint names, with random weights, or with SAM 2.1 tiny. Speed does not depend on weights;
    boxes do.

    \b
    Examples:
      facings benchmark
      facings benchmark --section sizes --section lanes --repeat 10
      facings benchmark --section memory --requests 2000
      facings benchmark --section generator --checkpoint sam2.1_hiera_large --megapixels 2 --repeat 1
      facings benchmark --section sizes --section floor --checkpoint sam2.1_hiera_large --random-weights
    """
    from scripts.measure import benchmark as command
    from scripts.measure.timing import without_weights

    names = section or ["sizes", "lanes", "http", "upstream"]
    if requests is not None and "memory" not in names:
        names = [*names, "memory"]
    unknown = set(names) - {*command.Section}
    if unknown:
        raise OptionError(f"--section: expected {', '.join(command.Section)}, got {sorted(unknown)[0]!r}")
    sections = [command.Section(name) for name in names]
    show_warnings()
    options = engine_options(checkpoint, device)
    with without_weights(options) if random_weights else nullcontext(options) as measured:
        command.benchmark(
            measured,
            sections,
            repeat=repeat,
            requests=requests or 2000,
            megapixels=megapixels or command.MEGAPIXELS,
        )
