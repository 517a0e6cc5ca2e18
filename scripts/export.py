"""`facings export`: writes the files, compares them with torch, builds a TensorRT engine where there is TensorRT.

Knows model.export, model.tensorrt_encoder and model.triton_encoder, and the shelf renderer for something to compare on.
Writing returns values; printing is apart.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from backend.errors import extra_needed
from model import tensorrt_encoder, triton_encoder
from model.checkpoints import find_checkpoint
from model.device import has_gpu
from model.export import (
    Difference,
    EncoderGraph,
    Precision,
    decoder_differences,
    encoder_differences,
    encoder_shapes,
    example_prompts,
    write_decoder,
    write_encoder,
)
from model.network import PIXEL_DEVIATION, PIXEL_MEAN
from model.renderer.shelves import render_shelf
from model.sam2_module import FacingsModule, load_module

COMPARED_PROMPTS = (1, 5)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and how far ONNX Runtime is from torch in float32: None where it is not installed.

    no_engine: why there is no TensorRT engine, or None when there is one. triton: the name of the model that was
    written for a Triton server, or None.
    """

    checkpoint: str
    precision: Precision
    files: list[Path]
    encoder: list[Difference] | None
    decoder: list[Difference] | None
    no_engine: str | None
    triton: str | None


def export(
    checkpoint: str,
    config: str | None,
    out: Path,
    *,
    precision: Precision | None,
    most_tiles: int,
    triton: Path | None = None,
) -> Exported:
    """Writes encoder.onnx, decoder.onnx and, with TensorRT and a GPU, encoder.engine into the folder `out`.

    precision: of the encoder; None is fp16 where an engine is built and fp32 elsewhere. most_tiles: of the engine, and
    of a batch in Triton. triton: folder of a model repository that gets the encoder too, as the engine where there is
    one. Raises CommandError, EngineError or OSError.
    """
    if triton is not None:
        with extra_needed("triton", "--triton"):
            import tritonclient.grpc  # noqa: F401
    no_engine = _why_no_engine()
    precision = precision or ("fp32" if no_engine else "fp16")
    found = find_checkpoint(checkpoint, config=config, has_gpu=has_gpu())
    for folder in filter(None, (out, triton)):
        folder.mkdir(exist_ok=True)
    encoder, decoder, engine = out / "encoder.onnx", out / "decoder.onnx", out / "encoder.engine"
    module = load_module(found)
    card = write_encoder(module, found, encoder, precision)
    write_decoder(module, found, decoder)
    files = [encoder, decoder]
    of_encoder, of_decoder = _compared(module, encoder, decoder) if find_spec("onnxruntime") else (None, None)
    shapes = encoder_shapes(module)
    del module
    if no_engine is None:
        tensorrt_encoder.build_engine(encoder, engine, card, most_tiles=most_tiles)
        files.append(engine)
    if triton is not None:
        served = encoder if no_engine else engine
        files += triton_encoder.write_model(triton, served, card, shapes, most_tiles=most_tiles)
    return Exported(
        checkpoint=found.version,
        precision=precision,
        files=files,
        encoder=of_encoder,
        decoder=of_decoder,
        no_engine=no_engine,
        triton=triton_encoder.model_name(card) if triton is not None else None,
    )


def _why_no_engine() -> str | None:
    if not tensorrt_encoder.is_installed():
        return "TensorRT is not installed"
    return None if has_gpu() else "there is no GPU"


def _compared(module: FacingsModule, encoder: Path, decoder: Path) -> tuple[list[Difference], list[Difference]]:
    """On a rendered shelf and its mirror image, and on prompts of two numbers; the largest of each output."""
    size = int(module.sam.image_size)
    pixels = torch.from_numpy(render_shelf(3, (size, size), facing_px=60).photo_rgb).permute(2, 0, 1) / 255
    image = (pixels - torch.tensor(PIXEL_MEAN).view(3, 1, 1)) / torch.tensor(PIXEL_DEVIATION).view(3, 1, 1)
    of_encoder = encoder_differences(module, encoder, torch.stack([image, image.flip(2)]))
    with torch.inference_mode():
        features = EncoderGraph(module)(image[None])[:3]
    of_decoder = [
        decoder_differences(module, decoder, (*features, *example_prompts(size // 4, prompts=count, points=count + 1)))
        for count in COMPARED_PROMPTS
    ]
    return of_encoder, [max(same, key=lambda one: one.largest) for same in zip(*of_decoder, strict=True)]


def print_report(exported: Exported) -> None:
    """Files, differences, and the same as JSON in the last line."""
    print(f"{exported.checkpoint}, the encoder's matrix multiplications in {exported.precision}")
    for path in exported.files:
        print(f"  {path}  {path.stat().st_size / 1e6:.1f} MB")
    for part, differences in (("encoder", exported.encoder), ("decoder", exported.decoder)):
        if differences is not None:
            print(f"{part}: largest difference of ONNX Runtime from torch in float32, and torch's largest value")
            _print_differences(differences)
    if exported.encoder is None:
        print("not compared with torch: ONNX Runtime is not installed")
    if exported.no_engine:
        print(f"no TensorRT engine: {exported.no_engine}")
    if exported.triton:
        print(f"with this model on a Triton server: ENCODER=triton://host:8001/{exported.triton}")
    print(json.dumps(summary(exported)))


def _print_differences(differences: Sequence[Difference]) -> None:
    for difference in differences:
        print(f"  {difference.output:<18} {difference.largest:.1e} of {difference.of:.3g}")


def summary(exported: Exported) -> dict[str, object]:
    """The report as JSON."""
    return asdict(exported) | {"files": {str(path): path.stat().st_size for path in exported.files}}
