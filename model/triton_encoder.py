"""The encoder on a Triton server: its model repository, and a client of it. The only importer of tritonclient.

Knows Triton's model configuration and KServe's protocol (version 2, gRPC), and what may go wrong on the way. Knows
nothing of tiles or prompts; model.export makes the file that is served. No Triton server was run where this was
written: the repository was validated against the schema that tritonclient publishes, and the client was run against a
gRPC server of the same protocol that runs the exported ONNX file.

A model's configuration carries its ExportCard and the hash of its file as parameters. They are compared when the engine
loads, and again after everything that went wrong: what answers then may be another model. The name of a model has the
hash of the weights, so that other weights are another model, with another address.
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import torch

from model.checkpoints import Checkpoint
from model.encoder import ENCODER_INPUT, Encoded, ExportCard, encoded, output_shapes
from model.sam2_module import has_proposal_head
from model.types import CheckpointError, EncoderError, ExportError, NotReady

SCHEMES = ("triton", "tritons")  # the second with TLS
TIMEOUT_S = 30.0  # of each call: the most that an annotator waits for a server that is stuck
MOST_BYTES = 1 << 28  # of the tensors of one message
MESSAGE_OVERHEAD = 1 << 20  # names and shapes around them
PARAMETER_PREFIX = "facings_"  # Triton's backends have parameters of their own
FILE_HASH = "file_sha256"

# An encoder's file by its suffix: Triton's platform, and the name under which that platform looks for it.
PLATFORMS = {".onnx": ("onnxruntime_onnx", "model.onnx"), ".engine": ("tensorrt_plan", "model.plan")}
AWAY = {f"StatusCode.{name}" for name in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "NOT_FOUND")}


def model_name(card: ExportCard) -> str:
    """Of the model in Triton: `<checkpoint>-<hash of its weights>-encoder`."""
    return re.sub(r"[^\w.-]", "_", f"{card.checkpoint}-encoder", flags=re.ASCII)


def write_model(
    folder: Path, encoder: Path, card: ExportCard, shapes: Mapping[str, tuple[int, ...]], *, most_tiles: int
) -> list[Path]:
    """Writes a model into the model repository `folder`, which is there, whole or not at all; replaces its namesake.

    encoder: an `.onnx` or `.engine` file. shapes: of its outputs for one image, see model.encoder.output_shapes.
    most_tiles: the largest batch that Triton makes. Returns the configuration's path and that of the copied file.
    Raises ExportError.
    """
    from google.protobuf import text_format

    name, (_, file_name) = model_name(card), PLATFORMS[encoder.suffix]
    target = folder / name
    try:
        with TemporaryDirectory(prefix=".", dir=folder) as staging:
            made = Path(staging, name)
            (made / "1").mkdir(parents=True)
            shutil.copyfile(encoder, made / "1" / file_name)
            config = _config(made / "1" / file_name, card, shapes, encoder.suffix, most_tiles)
            (made / "config.pbtxt").write_text(text_format.MessageToString(config))
            if target.exists():
                target.rename(Path(staging, "replaced"))
            made.rename(target)
    except OSError as error:
        raise ExportError(f"{str(target)!r}: cannot be written: {error.strerror or error}") from error
    return [target / "config.pbtxt", target / "1" / file_name]


def _config(file: Path, card: ExportCard, shapes: Mapping[str, tuple[int, ...]], suffix: str, most_tiles: int) -> Any:
    from tritonclient.grpc import model_config_pb2 as schema

    size = int(card.input_size)
    config = schema.ModelConfig(
        name=model_name(card),
        platform=PLATFORMS[suffix][0],
        max_batch_size=most_tiles,
        input=[schema.ModelInput(name=ENCODER_INPUT, data_type=schema.TYPE_FP32, dims=(3, size, size))],
        output=[
            schema.ModelOutput(name=name, data_type=schema.TYPE_FP32, dims=shape) for name, shape in shapes.items()
        ],
        dynamic_batching=schema.ModelDynamicBatching(),  # of the requests that wait; none waits for others to come
    )
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    for name, value in (card.strings() | {FILE_HASH: digest}).items():
        config.parameters[PARAMETER_PREFIX + name].string_value = value
    return config


@dataclass(frozen=True, kw_only=True)
class TritonModel:
    """A model as its server describes it.

    address: `triton://host:port/model`. digest: changes with the served file; that of the same file on this machine is
    another, because another machine rounds differently. most_tiles: the largest batch that it takes.
    tensors: data type and shape of each input and output by name; a dimension of any size is -1.
    """

    address: str
    card: ExportCard
    digest: str
    most_tiles: int
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]

    def __str__(self) -> str:
        return self.address

    def check(self, checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
        """The shapes of the outputs for one image. Raises CheckpointError unless this is the checkpoint's encoder."""
        self.card.check(self.address, checkpoint)
        size = int(self.card.input_size)
        _, embedding = self.tensors.get("image_embed", ("", ()))
        width = embedding[1] if len(embedding) > 1 else -1
        outputs = output_shapes(size, width, has_head=has_proposal_head(checkpoint.config))
        for name, shape in ({ENCODER_INPUT: (3, size, size)} | outputs).items():
            wanted, got = ("FP32", (-1, *shape)), self.tensors.get(name)
            if got != wanted:
                described = "none" if got is None else f"{got[0]} {list(got[1])}"
                raise CheckpointError(
                    f"encoder {self.address!r}: expected {name} as FP32 {list(wanted[1])}, got {described}"
                )
        if self.most_tiles < 1:
            raise CheckpointError(
                f"encoder {self.address!r}: expected a max_batch_size of at least 1, got {self.most_tiles}"
            )
        return outputs


def find_model(address: str) -> TritonModel:
    """The model at `triton://host:port/model`, or `tritons://` for TLS.

    Raises CheckpointError when the address is none, the extra `triton` is missing or `facings export` did not write the
    model; NotReady when the server is away or does not have the model ready; EncoderError for its other errors.
    """
    with _Connection(address, timeout_s=TIMEOUT_S) as connection:
        return connection.describe()


class TritonEncoder:
    """An exported encoder on a Triton server. Not locked: one thread uses it (see model.scheduler).

    When a call fails, the next one connects again and sees that the model is still the same.
    """

    def __init__(
        self, model: TritonModel, checkpoint: Checkpoint, device: torch.device, *, timeout_s: float = TIMEOUT_S
    ) -> None:
        """timeout_s: of each call. Raises CheckpointError unless the model is the checkpoint's encoder."""
        self._shapes = model.check(checkpoint)
        self._model = model
        self._device = device
        self._timeout_s = timeout_s
        self._connection: _Connection | None = None
        side = int(model.card.input_size)
        tile_bytes = 4 * max(3 * side * side, sum(math.prod(shape) for shape in self._shapes.values()))
        self._most_tiles = max(1, min(model.most_tiles, MOST_BYTES // tile_bytes))

    def __call__(self, images: torch.Tensor, /) -> Encoded:
        """Raises NotReady when the server is away, EncoderError when it answers with anything but features."""
        parts = [self._run(part) for part in torch.split(images, self._most_tiles)]
        return encoded({name: torch.cat([part[name] for part in parts]) for name in self._shapes})

    def _run(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        connection, self._connection = self._connection or self._connect(), None
        try:
            features = connection.features(images, self._shapes)
        except BaseException:
            connection.close()  # not to be trusted: it may be stuck, and wait ever longer before it tries again
            raise
        self._connection = connection
        return {name: feature.to(self._device) for name, feature in features.items()}

    def _connect(self) -> _Connection:
        connection = _Connection(self._model.address, timeout_s=self._timeout_s)
        try:
            if connection.describe() != self._model:
                raise EncoderError(
                    f"encoder {self._model.address!r}: expected the model that it was at the start, got another under"
                    " its name; start Facings again"
                )
        except BaseException:
            connection.close()
            raise
        return connection


class _Connection:
    """A gRPC channel to one model. Every method raises NotReady when the server is away, and EncoderError."""

    def __init__(self, address: str, *, timeout_s: float) -> None:
        """Connects with the first call. Raises CheckpointError when the address is none or the extra is missing."""
        self._address = address
        self._timeout_s = timeout_s
        target, self._name, has_tls = _parsed(address)
        try:
            import tritonclient.grpc as library
        except ImportError as error:
            raise CheckpointError(
                f"encoder {address!r}: expected the extra triton, got none: install facings[triton] ({error})"
            ) from error
        self._library = library
        self._client = library.InferenceServerClient(
            target,
            ssl=has_tls,
            channel_args=[
                ("grpc.max_send_message_length", MOST_BYTES + MESSAGE_OVERHEAD),
                ("grpc.max_receive_message_length", MOST_BYTES + MESSAGE_OVERHEAD),
                ("grpc.use_local_subchannel_pool", 1),  # a new channel is a new connection, also after a failure
                ("grpc.enable_http_proxy", 0),
            ],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def describe(self) -> TritonModel:
        """Raises CheckpointError when `facings export` did not write the model."""
        with self._errors():
            is_ready = self._client.is_server_ready(client_timeout=self._timeout_s)
            if not is_ready:
                raise NotReady(f"encoder {self._address!r}: the server is not ready")
            config = self._client.get_model_config(self._name, client_timeout=self._timeout_s).config
            if not self._client.is_model_ready(self._name, client_timeout=self._timeout_s):
                raise NotReady(f"encoder {self._address!r}: the server does not have the model ready")
            metadata = self._client.get_model_metadata(self._name, client_timeout=self._timeout_s)
        strings = {name.removeprefix(PARAMETER_PREFIX): value.string_value for name, value in config.parameters.items()}
        card, digest = ExportCard.read(strings, self._address), strings.get(FILE_HASH)
        if not digest:
            raise CheckpointError(
                f"encoder {self._address!r}: expected one that facings export wrote, got one without {FILE_HASH!r}"
            )
        return TritonModel(
            address=self._address,
            card=card,
            digest=f"triton:{digest}",
            most_tiles=config.max_batch_size,
            tensors={
                tensor.name: (tensor.datatype, tuple(tensor.shape)) for tensor in (*metadata.inputs, *metadata.outputs)
            },
        )

    def features(self, images: torch.Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """The outputs of the images `[B, 3, S, S]` by name, `[B, *shape]`, on the CPU."""
        tensor = self._library.InferInput(ENCODER_INPUT, list(images.shape), "FP32")
        tensor.set_data_from_numpy(images.float().cpu().contiguous().numpy())
        outputs = [self._library.InferRequestedOutput(name) for name in shapes]
        with self._errors():
            result = self._client.infer(self._name, [tensor], outputs=outputs, client_timeout=self._timeout_s)
        return {name: self._feature(result, name, (len(images), *shape)) for name, shape in shapes.items()}

    def _feature(self, result: Any, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        try:
            array = result.as_numpy(name)
        except ValueError as error:
            raise EncoderError(f"encoder {self._address!r}: {name}: its bytes do not fit its shape: {error}") from error
        if array is None or array.dtype != "float32" or array.shape != shape:
            got = "none" if array is None else f"{array.dtype} {list(array.shape)}"
            raise EncoderError(f"encoder {self._address!r}: expected {name} as float32 {list(shape)}, got {got}")
        return torch.from_numpy(array.copy())  # torch warns of an array that is read-only

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns the client's errors into the engine's."""
        try:
            yield
        except self._library.InferenceServerException as error:
            status, reason = str(error.status()), " ".join(str(error.message()).split())
            if status.endswith("DEADLINE_EXCEEDED"):
                reason = f"no answer within {self._timeout_s:g} s"
            if status in AWAY:
                raise NotReady(f"encoder {self._address!r} is away: {reason}") from error
            raise EncoderError(f"encoder {self._address!r} failed: {status}: {reason}") from error


def _parsed(address: str) -> tuple[str, str, bool]:
    """gRPC's target, the model's name, and whether to use TLS. Raises CheckpointError."""
    actual = "something else" if "@" in address else repr(address)  # it may be a password
    expected = CheckpointError(f"encoder: expected triton://host:port/model, got {actual}")
    try:
        parts = urlsplit(address)
        host, port, name = parts.hostname, parts.port, parts.path.removeprefix("/")
    except ValueError:
        raise expected from None
    if parts.scheme not in SCHEMES or not host or not port or "@" in parts.netloc or parts.query or parts.fragment:
        raise expected
    if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
        raise expected
    return parts.netloc, name, parts.scheme == "tritons"
