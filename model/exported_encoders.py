"""Finds and opens the encoders that `facings export` wrote: as files, or as models of a Triton server.

Knows such files, ONNX Runtime, and which of them suits a device; TensorRT is model.tensorrt_encoder's, and Triton is
model.triton_encoder's.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.checkpoints import Checkpoint
from model.device import Placement
from model.encoder import ENCODER_INPUT, Encoded, Encoder, ExportCard, encoded
from model.tensorrt_encoder import TensorRTEncoder
from model.triton_encoder import SCHEMES, TritonEncoder, TritonModel, find_model
from model.types import CheckpointError


@dataclass(frozen=True, kw_only=True)
class EncoderFile:
    """path: an `.onnx` or an `.engine`. digest: sha256 of the file, hex."""

    path: Path
    digest: str

    def __str__(self) -> str:
        return str(self.path)


def find_encoder(requested: str, placement: Placement) -> EncoderFile | TritonModel:
    """The file at `requested`, or in the folder there the one that suits the device; or the model at an address.

    Raises CheckpointError; of an address also what `find_model` raises.
    """
    if requested.partition("://")[0] in SCHEMES:
        return find_model(requested)
    path = Path(requested)
    suffix = ".onnx" if placement.device.type == "cpu" else ".engine"
    if path.is_dir():
        path = path / f"encoder{suffix}"
    if path.suffix not in (".onnx", ".engine"):
        raise CheckpointError(
            f"encoder: expected a folder, an .onnx or an .engine file, or triton://…, got {requested!r}"
        )
    if not path.is_file():
        raise CheckpointError(f"encoder: no file at {str(path)!r}")
    if path.suffix != suffix:
        raise CheckpointError(
            f"encoder {str(path)!r}: expected an {suffix} file on {placement.device}: on a CPU the encoder runs in"
            " ONNX Runtime, on a GPU in TensorRT"
        )
    try:
        with path.open("rb") as file:
            return EncoderFile(path=path, digest=hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        raise CheckpointError(f"encoder {str(path)!r}: cannot be read: {error.strerror}") from error


def open_encoder(found: EncoderFile | TritonModel, checkpoint: Checkpoint, placement: Placement) -> Encoder:
    """The encoder, loaded. Raises CheckpointError when that fails, or it belongs to another checkpoint."""
    if isinstance(found, TritonModel):
        return TritonEncoder(found, checkpoint, placement.device)
    if found.path.suffix == ".onnx":
        return OnnxEncoder(found.path, checkpoint)
    return TensorRTEncoder(found.path, checkpoint, placement.device)


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
    options.log_severity_level = 3  # errors only
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common base
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"encoder {str(path)!r}: ONNX Runtime cannot load it: {first_line}") from error
