"""Where a tile's features come from: the interface of an encoder, and encoders that `facings export` wrote to files.

Knows such files, what they say of themselves, and ONNX Runtime; TensorRT is model.tensorrt_encoder's. Knows nothing of
tiles, prompts or how the files are made (model.export). An exported encoder belongs to one checkpoint: the decoder
stays in torch and takes only what its own encoder makes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch

from model.checkpoints import Checkpoint
from model.device import Placement
from model.types import CheckpointError

ENCODER_INPUT = "image"
FEATURE_OUTPUTS = ("image_embed", "high_res_feats_0", "high_res_feats_1")
HEAD_OUTPUTS = ("centre_logits", "edge_distances")


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """What an encoder makes of `B` images of `S` pixels.

    embedding `[B, C, S/16, S/16]` and high_res `[B, C/8, S/4, S/4]`, `[B, C/4, S/8, S/8]`: for the mask decoder.
    head: the proposal head's centre logits `[B, S/4, S/4]` and distances `[B, 4, S/4, S/4]`, where there is a head.
    """

    embedding: torch.Tensor
    high_res: tuple[torch.Tensor, torch.Tensor]
    head: tuple[torch.Tensor, torch.Tensor] | None


class Encoder(Protocol):
    """Normalised images `[B, 3, S, S]`, float32 and on the network's device, to what is made of them, there too."""

    def __call__(self, images: torch.Tensor, /) -> Encoded: ...


@dataclass(frozen=True, kw_only=True)
class ExportCard:
    """What an exported file says of itself, as strings, for whoever opens it.

    part: `encoder` or `decoder`. checkpoint: its version, name and hash. weights_sha256: of the file of weights.
    input_size: side of the square input in pixels. mean, deviation: of the red, green and blue of pixels in [0, 1].
    precision: of the products of matrices and the convolutions, `fp32` or `fp16`; all else is float32.
    """

    part: str
    checkpoint: str
    weights_sha256: str
    input_size: str
    mean: str
    deviation: str
    precision: str
    opset: str

    def strings(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def read(cls, strings: Mapping[str, str], path: Path) -> ExportCard:
        """Raises CheckpointError when this is no file of `facings export`."""
        try:
            return cls(**{field.name: strings[field.name] for field in fields(cls)})
        except KeyError as missing:
            raise CheckpointError(
                f"encoder {str(path)!r}: expected a file that facings export wrote, got one without {missing.args[0]!r}"
            ) from None

    def check(self, path: Path, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError unless this is an encoder of exactly this checkpoint."""
        if self.part != "encoder":
            raise CheckpointError(f"encoder {str(path)!r}: expected an encoder, got a {self.part}")
        if self.weights_sha256 != checkpoint.digest:
            raise CheckpointError(
                f"encoder {str(path)!r}: it was exported from {self.checkpoint}, the checkpoint is"
                f" {checkpoint.version}; export it again, or set CHECKPOINT to that one"
            )


@dataclass(frozen=True, kw_only=True)
class EncoderFile:
    """path: an `.onnx` or an `.engine`. digest: sha256 of the file, hex."""

    path: Path
    digest: str


def find_encoder(requested: str, placement: Placement) -> EncoderFile:
    """A file, or of a folder that `facings export` wrote the one that suits the device. Raises CheckpointError."""
    path = Path(requested)
    suffix = ".onnx" if placement.device.type == "cpu" else ".engine"
    if path.is_dir():
        path = path / f"encoder{suffix}"
    if path.suffix not in (".onnx", ".engine"):
        raise CheckpointError(f"encoder: expected a folder, an .onnx or an .engine file, got {requested!r}")
    if not path.is_file():
        raise CheckpointError(f"encoder: no file at {str(path)!r}")
    if path.suffix != suffix:
        raise CheckpointError(
            f"encoder {str(path)!r}: expected an {suffix} file on {placement.device}: ONNX Runtime computes on the CPU"
            " here, and TensorRT on a GPU"
        )
    try:
        with path.open("rb") as file:
            return EncoderFile(path=path, digest=hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        raise CheckpointError(f"encoder {str(path)!r}: cannot be read: {error.strerror}") from error


def open_encoder(file: EncoderFile, checkpoint: Checkpoint, placement: Placement) -> Encoder:
    """The encoder of the file, loaded. Raises CheckpointError when it cannot be, or belongs to another checkpoint."""
    if file.path.suffix == ".onnx":
        return OnnxEncoder(file.path, checkpoint)
    from model.tensorrt_encoder import TensorRTEncoder

    return TensorRTEncoder(file.path, checkpoint, placement.device)


class OnnxEncoder:
    """An exported encoder on ONNX Runtime, on the CPU, with as many threads as torch has."""

    def __init__(self, path: Path, checkpoint: Checkpoint) -> None:
        self._session = onnx_session(path)
        ExportCard.read(self._session.get_modelmeta().custom_metadata_map, path).check(path, checkpoint)
        self._outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, images: torch.Tensor, /) -> Encoded:
        arrays = self._session.run(self._outputs, {ENCODER_INPUT: images.contiguous().numpy()})
        return encoded({name: torch.from_numpy(array) for name, array in zip(self._outputs, arrays, strict=True)})


def onnx_session(path: Path) -> Any:
    """Raises CheckpointError when ONNX Runtime is not installed or does not take the file."""
    try:
        import onnxruntime
    except ImportError:
        raise CheckpointError(
            f"encoder {str(path)!r}: ONNX Runtime is not installed: pip install onnxruntime"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; they are raised as well
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common base
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"encoder {str(path)!r}: ONNX Runtime does not take it: {first_line}") from error


def encoded(outputs: Mapping[str, torch.Tensor]) -> Encoded:
    """The outputs of an exported encoder by their names."""
    embedding, finest, middle = (outputs[name] for name in FEATURE_OUTPUTS)
    has_head = HEAD_OUTPUTS[0] in outputs
    return Encoded(
        embedding=embedding,
        high_res=(finest, middle),
        head=(outputs[HEAD_OUTPUTS[0]], outputs[HEAD_OUTPUTS[1]]) if has_head else None,
    )
