"""The encoder as a TensorRT engine: built from encoder.onnx, run on torch's tensors. The only importer of tensorrt.

No engine was ever built or run where this was written: there was neither a GPU nor TensorRT's libraries. It is written
against the API of TensorRT 10 and 11, and its names and signatures were read in NVIDIA's Python bindings, 11.4.

The network is strongly typed, as always in TensorRT 11: the ONNX graph fixes which matrix multiplications are float16,
and that all else, such as layer norms and softmax, is float32 (model.export); the builder keeps to it. An engine fits
only the GPU and the TensorRT that built it; both are named in a file next to it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from model.checkpoints import Checkpoint
from model.encoder import ENCODER_INPUT, Encoded, ExportCard, encoded
from model.types import CheckpointError, ExportError


def is_installed() -> bool:
    try:
        import tensorrt  # noqa: F401
    except (ImportError, OSError):  # OSError: its libraries do not load
        return False
    return True


def card_path(engine: Path) -> Path:
    """The path of an engine's ExportCard."""
    return engine.with_name(f"{engine.name}.json")


def build_engine(onnx: Path, engine: Path, card: ExportCard, *, most_tiles: int) -> None:
    """Builds `engine`, and writes its card next to it, for torch's current GPU; takes minutes.

    most_tiles: the largest batch that it will take. Raises ExportError when TensorRT does not build it.
    """
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        reasons = "; ".join(str(parser.get_error(number)) for number in range(parser.num_errors))
        raise ExportError(f"{str(onnx)!r}: TensorRT cannot parse it: {' '.join(reasons.split())}")
    image = (3, int(card.input_size), int(card.input_size))
    profile = builder.create_optimization_profile()
    profile.set_shape(ENCODER_INPUT, min=(1, *image), opt=(max(1, most_tiles // 2), *image), max=(most_tiles, *image))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"{str(engine)!r}: TensorRT built no engine; see its messages above")
    built_with = card.strings() | {"tensorrt": trt.__version__, "gpu": torch.cuda.get_device_name()}
    try:
        engine.write_bytes(plan)
        card_path(engine).write_text(json.dumps(built_with, indent=2) + "\n")
    except OSError as error:
        raise ExportError(f"{str(engine)!r}: cannot be written: {error.strerror or error}") from error


class TensorRTEncoder:
    """An engine, loaded onto a GPU, with a stream of its own."""

    def __init__(self, path: Path, checkpoint: Checkpoint, device: torch.device) -> None:
        """Raises CheckpointError when the engine is for another checkpoint, GPU or TensorRT, or cannot be loaded."""
        card = _read_card(path)
        ExportCard.read(card, path).check(path, checkpoint)
        try:
            import tensorrt as trt
        except (ImportError, OSError):
            raise CheckpointError(
                f"encoder {str(path)!r}: TensorRT is not installed: pip install tensorrt=={card.get('tensorrt')}"
            ) from None
        here = {"tensorrt": trt.__version__, "gpu": torch.cuda.get_device_name(device)}
        for name, value in here.items():
            if card.get(name) != value:
                raise CheckpointError(
                    f"encoder {str(path)!r}: expected one built for {name} {value!r}, got one for {card.get(name)!r};"
                    " build it again with facings export"
                )
        self._device = device
        with torch.cuda.device(device):
            self._logger = trt.Logger(trt.Logger.WARNING)
            self._runtime = trt.Runtime(self._logger)
            self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            if self._engine is None:
                raise CheckpointError(f"encoder {str(path)!r}: TensorRT cannot load it; see its messages above")
            self._context = self._engine.create_execution_context()
            # On the default stream TensorRT synchronises more than is needed.
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        names = [self._engine.get_tensor_name(number) for number in range(self._engine.num_io_tensors)]
        self._outputs = [name for name in names if name != ENCODER_INPUT]
        self._most_tiles = int(self._engine.get_tensor_profile_shape(ENCODER_INPUT, 0)[2][0])

    def __call__(self, images: torch.Tensor, /) -> Encoded:
        with torch.cuda.device(self._device):
            parts = [self._run(part) for part in torch.split(images, self._most_tiles)]
        return encoded({name: torch.cat([part[name] for part in parts]) for name in self._outputs})

    def _run(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        images = images.float().contiguous()
        self._context.set_input_shape(ENCODER_INPUT, tuple(images.shape))
        outputs = {
            name: torch.empty(tuple(self._context.get_tensor_shape(name)), device=self._device)
            for name in self._outputs
        }
        for name, tensor in (outputs | {ENCODER_INPUT: images}).items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        done = self._context.execute_async_v3(self._stream.cuda_stream)
        current.wait_stream(self._stream)
        if not done:
            raise RuntimeError("TensorRT did not run the encoder; see its messages above")
        return outputs


def _read_card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(card_path(path).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"encoder {str(path)!r}: expected its description in {card_path(path).name!r}, in the same folder: {error}"
        ) from error
    return card if isinstance(card, dict) else {}
