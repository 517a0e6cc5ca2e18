"""`facings watch` and other ways in: photos that do not come from Label Studio.

Knows the options of these subcommands; the work is done by backend.transports.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from backend.errors import CommandError, OptionError
from scripts.options import CheckpointOption, DeviceOption, ThresholdOption, one_of, read_settings

if TYPE_CHECKING:
    from backend.service import Service
    from backend.settings import Settings

MetricsPortOption = Annotated[
    int | None, typer.Option(min=1, max=65_535, help="Show Prometheus metrics on this port.", show_default=False)
]


def watch(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Folder to watch for photos.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for boxes and photos.", show_default=False)],
    kind: Annotated[str, typer.Option("--format", help="Of the boxes: json, coco or yolo.")] = "json",
    masks: Annotated[bool, typer.Option("--masks", help="Also write masks, as PNG and OPEX.")] = False,
    prompts: Annotated[
        bool, typer.Option("--prompts", help="Take a photo only together with its file of prompts.")
    ] = False,
    settle: Annotated[
        float, typer.Option(min=0, help="Seconds for which a photo must not change before it is taken.")
    ] = 2.0,
    polling: Annotated[
        bool, typer.Option("--polling", help="Look every second; for network drives, which report no changes.")
    ] = False,
    score_threshold: ThresholdOption = None,
    metrics_port: MetricsPortOption = None,
    checkpoint: CheckpointOption = None,
    device: DeviceOption = None,
) -> None:
    """Box every photo that is put into a folder.

    A photo's boxes go into OUT, and the photo then to OUT/done, or to OUT/failed with the reason. Several watchers may
    share both folders. A file of prompts (shelf.prompt beside shelf.jpg) asks for single objects instead of all. Runs
    until Ctrl-C or SIGTERM, and finishes what it has begun.

    \b
    Examples:
      facings watch inbox boxes
      facings watch inbox boxes --format yolo --polling
      facings watch inbox boxes --masks --prompts
    """
    settings = read_settings(checkpoint=checkpoint, device=device)
    if not source.is_dir():
        raise CommandError(f"{str(source)!r}: expected an existing folder of photos")
    from backend.transports.folder import BoxFormat, WatchOptions
    from backend.transports.folder import watch as watch_folder

    options = WatchOptions(
        source=source,
        target=target,
        kind=one_of(BoxFormat, "--format", kind),
        want_masks=masks,
        needs_prompt=prompts,
        score_threshold=score_threshold,
        settle_s=settle,
        polling=polling,
    )
    with _stopping() as stop, _open_service(settings, metrics_port) as service:
        counts = watch_folder(service, options, stop)
    print(f"{counts.done} photos boxed, {counts.failed} failed")


RedisArgument = Annotated[
    str, typer.Argument(metavar="URL", help="Redis, such as redis://localhost:6379/0.", envvar="REDIS_URL")
]
RequestsOption = Annotated[str, typer.Option("--in", help="Channel of requests.")]
AnswersOption = Annotated[str, typer.Option("--out", help="Channel of answers.")]
ErrorsOption = Annotated[str, typer.Option("--errors", help="Channel of errors.")]


def redis_predict(
    url: RedisArgument = "redis://localhost:6379/0",
    requests: RequestsOption = "images",
    answers: AnswersOption = "predictions",
    errors: ErrorsOption = "errors",
    metrics_port: MetricsPortOption = None,
    checkpoint: CheckpointOption = None,
    device: DeviceOption = None,
) -> None:
    """Answer prompts in the Redis wire format of the SAM command-line tools.

    Takes {"image", "prompt"} from one channel and gives {"mask", "contours", "meta"} on another. Runs until Ctrl-C or
    SIGTERM. Redis keeps nothing for a channel: for photos that must not be lost, see facings worker.

    \b
    Examples:
      facings redis-predict redis://localhost:6379/0
      facings redis-predict redis://:password@redis.example.com/2 --in shelves --out masks
    """
    settings = read_settings(checkpoint=checkpoint, device=device)
    from backend.settings import MIB
    from backend.transports import redis_sam

    client = redis_sam.connect(url)
    with redis_sam.redis_errors(url):
        client.ping()  # before the weights are loaded
    channels = redis_sam.Channels(requests=requests, answers=answers, errors=errors)
    with _stopping() as stop, _open_service(settings, metrics_port) as service:
        count = redis_sam.serve(service, url, channels, stop, max_bytes=settings.max_request_mb * MIB)
    print(f"{count} requests answered")


def redis_send(
    photo: Annotated[Path, typer.Argument(metavar="PHOTO", help="Photo to send.", show_default=False)],
    url: RedisArgument = "redis://localhost:6379/0",
    prompt: Annotated[
        str | None, typer.Option(help="The prompt, as JSON or as a file with it.", show_default=False)
    ] = None,
    point: Annotated[
        list[str] | None, typer.Option(help="A point X,Y on the object; repeatable.", show_default=False)
    ] = None,
    background: Annotated[
        list[str] | None, typer.Option(help="A point X,Y beside the object; repeatable.", show_default=False)
    ] = None,
    box: Annotated[str | None, typer.Option(help="A box X0,Y0,X1,Y1.", show_default=False)] = None,
    requests: RequestsOption = "images",
) -> None:
    """Send a photo and a prompt to whoever answers the Redis wire format, to try it.

    \b
    Examples:
      facings redis-send shelf.jpg --point 310,120
      facings redis-send shelf.jpg --box 400,80,460,210 --background 452,90
      facings redis-send shelf.jpg --prompt shelf.prompt
    """
    from backend.photos.files import SUFFIXES
    from backend.transports import redis_sam
    from backend.transports.fields import read_object
    from backend.transports.messages import read_prompt

    if photo.suffix.lower() not in SUFFIXES:
        raise OptionError(f"{str(photo)!r}: expected a photo")
    if prompt is not None:
        chosen = read_object(prompt if prompt.lstrip().startswith("{") else Path(prompt).read_bytes(), where="--prompt")
    else:
        points = [
            {"x": x, "y": y, "label": label}
            for label, texts in ((1, point or ()), (0, background or ()))
            for x, y in (_numbers(text, 2) for text in texts)
        ]
        chosen = {"points": points} if points else {}
        if box is not None:
            chosen["box"] = dict(zip(("x0", "y0", "x1", "y1"), _numbers(box, 4), strict=True))
    read_prompt(chosen)
    with redis_sam.redis_errors(url):
        heard = redis_sam.connect(url).publish(requests, redis_sam.sam_request(photo.read_bytes(), chosen))
    print(f"sent to channel {requests!r}, on which {heard} listen")


def redis_recv(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for masks and contours.", show_default=False)],
    url: RedisArgument = "redis://localhost:6379/0",
    answers: AnswersOption = "predictions",
    errors: ErrorsOption = "errors",
    count: Annotated[int | None, typer.Option(min=1, help="Stop after so many answers.", show_default=False)] = None,
) -> None:
    """Receive answers in the Redis wire format into a folder, to try it.

    \b
    Examples:
      facings redis-recv masks
      facings redis-recv masks --count 1
    """
    from backend.transports import redis_sam

    with _stopping() as stop:
        for place, path in enumerate(redis_sam.receive(url, out, answers, errors, stop), 1):
            print(path, flush=True)
            if place == count:
                break


def worker(
    url: Annotated[
        str,
        typer.Argument(metavar="URL", help="Broker: kafka://, redis://, nats:// or amqp://.", show_default=False),
    ],
    requests: Annotated[
        str, typer.Option("--in", help="Topic, stream, subject or queue of requests.")
    ] = "facings.requests",
    answers: Annotated[str, typer.Option("--out", help="Likewise for answers.")] = "facings.answers",
    errors: Annotated[str, typer.Option("--errors", help="Likewise for requests that failed.")] = "facings.errors",
    group: Annotated[str, typer.Option(help="Workers of one group share the requests.")] = "facings",
    redeliver_after: Annotated[
        float, typer.Option(min=1, help="Redis and NATS: seconds after which a request of a dead worker is given on.")
    ] = 400.0,
    kafka_config: Annotated[
        Path | None, typer.Option(help="JSON file with more of librdkafka's settings.", show_default=False)
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="Also store answers in mongodb://host/database.", show_default=False)
    ] = None,
    metrics_port: MetricsPortOption = None,
    checkpoint: CheckpointOption = None,
    device: DeviceOption = None,
) -> None:
    """Box photos that come through a message broker.

    Takes JSON with a photo's address, or its bytes in base64, and perhaps prompts; gives boxes on one topic and errors
    on another. Each request is answered at least once: it is done, for the broker, when its answer is out. Runs until
    Ctrl-C or SIGTERM, and finishes the request that it has begun.

    \b
    Examples:
      facings worker redis://localhost:6379/0
      facings worker kafka://kafka1:9092,kafka2:9092 --group shelves --in photos --out boxes --errors failed
      facings worker nats://localhost:4222 --metrics-port 9100
      facings worker amqp://user:password@localhost:5672/ --store mongodb://localhost/shelves
    """
    settings = read_settings(checkpoint=checkpoint, device=device)
    from backend.settings import MIB
    from backend.transports.brokers import Topics, connector
    from backend.transports.fields import read_object

    topics = Topics(requests=requests, answers=answers, errors=errors, group=group)
    connect = connector(
        url,
        topics,
        redeliver_after_s=redeliver_after,
        max_bytes=settings.max_request_mb * MIB,
        kafka_config=read_object(kafka_config.read_bytes(), where=repr(kafka_config.name)) if kafka_config else None,
    )
    with _stopping() as stop, _open_service(settings, metrics_port) as service:
        from backend.transports.mongodb import MongoStore
        from backend.transports.worker import work

        kept = MongoStore(store) if store else None
        counts = work(service, connect, topics, stop, deadline_s=settings.deadline_s, store=kept)
    print(f"{counts.answered} requests answered, {counts.failed} failed")


def sagemaker(checkpoint: CheckpointOption = None, device: DeviceOption = None) -> None:
    """Serve as a container of Amazon SageMaker: /ping and /invocations on port 8080.

    Takes an image, or JSON with a list of addresses or of images in base64; answers with boxes. With TEXT_DETECTOR,
    also finds objects by their names, and lays pictures of a CATALOGUE over them. Weights in the model folder
    (SM_MODEL_DIR) are taken unless CHECKPOINT names others.

    \b
    Examples:
      facings sagemaker
      curl -H "Content-Type: image/jpeg" --data-binary @shelf.jpg http://localhost:8080/invocations
    """
    from backend.transports import gunicorn
    from backend.transports.sagemaker import check_overlays, create_app, sagemaker_settings

    settings = sagemaker_settings(read_settings(checkpoint=checkpoint, device=device), os.environ)
    check_overlays(settings)
    gunicorn.serve(settings, create_app)


def _numbers(text: str, count: int) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != count:
        raise OptionError(f"expected {count} numbers with commas between them, got {text!r}")
    return values


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set. A second Ctrl-C interrupts at once."""
    stop = threading.Event()

    def handle(number: int, _: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _open_service(settings: Settings, metrics_port: int | None = None) -> Iterator[Service]:
    """A service whose engine is ready, with its log and its metrics."""
    from backend.reporting import configure_logging
    from backend.service import Service

    configure_logging(settings.log_level)
    with Service.open(settings) as service:
        if metrics_port is not None:
            try:
                service.metrics.serve(metrics_port)
            except OSError as error:
                raise CommandError(f"--metrics-port {metrics_port}: unavailable ({error.strerror})") from error
        service.engine.wait_ready()
        yield service
