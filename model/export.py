"""Writes a checkpoint's encoder and mask decoder as ONNX files, for an engine elsewhere and for other programs.

Knows torch's exporter, ONNX and the names of inputs and outputs; model.exported_encoders loads the files again, and
model.tensorrt_encoder knows TensorRT. Names and shapes are those of the usual ONNX files of SAM 2.

encoder.onnx, S the side of the input (1024), C the width of the embedding (256; `facings-nano` 96), B any number:
    image             float32 [B, 3, S, S], RGB in [0, 1] minus mean by deviation; what lies beyond the photo is zero
    image_embed       float32 [B, C, S/16, S/16]
    high_res_feats_0  float32 [B, C/8, S/4, S/4]
    high_res_feats_1  float32 [B, C/4, S/8, S/8]
    centre_logits     float32 [B, S/4, S/4], with a proposal head only: confidence that a facing is centred in a cell
    edge_distances    float32 [B, 4, S/4, S/4], likewise: pixels from the cell's centre to left, top, right, bottom

decoder.onnx, P prompts of T points each on one image, any numbers:
    image_embed, high_res_feats_0, high_res_feats_1: as above, with B = 1
    point_coords      float32 [P, T, 2], x and y in pixels of the input
    point_labels      float32 [P, T]: 1 foreground, 0 background, 2 and 3 a box's upper left and lower right corner
                      (corners come first), -1 none, to fill up
    mask_input        float32 [P, 1, S/4, S/4]: logits of a mask that the object probably has
    has_mask_input    float32 [P]: 1 where mask_input counts, 0 where there is none
    masks             float32 [P, 4, S/4, S/4]: logits; the first for a prompt that means one object, the other three
                      for one that is ambiguous, such as a single click
    iou_predictions   float32 [P, 4]: predicted IoU of each mask

With precision fp16 the encoder's matrix multiplications and convolutions take and give float16; their results are cast
back at once, so that layer norms, softmax, sums along the trunk and the head's last step stay in float32, as under
torch's autocast. Inputs and outputs are always float32.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from model.checkpoints import Checkpoint
from model.decoder import MaskDecoder, tile_cells
from model.encoder import ENCODER_INPUT, FEATURE_OUTPUTS, ExportCard, output_shapes
from model.exported_encoders import onnx_session
from model.network import PIXEL_DEVIATION, PIXEL_MEAN
from model.sam2_module import FacingsModule
from model.types import ExportError

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 18  # the lowest of torch's exporter: the most runtimes read it
PROMPT_INPUTS = ("point_coords", "point_labels", "mask_input", "has_mask_input")
DECODER_OUTPUTS = ("masks", "iou_predictions")
MATMUL_OPS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
EXACT_WEIGHTS = ("proposal_head.centre", "proposal_head.edges")  # see model.proposer

Precision = Literal["fp32", "fp16"]


class EncoderGraph(nn.Module):
    """The encoder as it is exported."""

    def __init__(self, module: FacingsModule) -> None:
        super().__init__()
        self.module = module
        self.eval()

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = self.module.encoded(image)
        return (made.embedding, *made.high_res, *(made.head or ()))


class DecoderGraph(nn.Module):
    """The decoder as it is exported."""

    def __init__(self, module: FacingsModule) -> None:
        super().__init__()
        self.module = module
        self.decoder = MaskDecoder(module.sam.sam_mask_decoder, module.position_encoding(), torch.float32)
        self.eval()

    def forward(
        self,
        image_embed: torch.Tensor,
        high_res_feats_0: torch.Tensor,
        high_res_feats_1: torch.Tensor,
        point_coords: torch.Tensor,
        point_labels: torch.Tensor,
        mask_input: torch.Tensor,
        has_mask_input: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tile = tile_cells(image_embed[0], (high_res_feats_0[0], high_res_feats_1[0]), torch.float32)
        prompts = self.module.embed_prompts(point_coords, point_labels, mask_input, has_mask_input > 0.5)
        return self.decoder.both(tile, *prompts)


def write_encoder(module: FacingsModule, checkpoint: Checkpoint, path: Path, precision: Precision) -> ExportCard:
    """Writes encoder.onnx of the loaded checkpoint, and returns its card. Raises ExportError."""
    size = int(module.sam.image_size)
    tiles = torch.export.Dim("tiles", min=2)  # 1 would become a constant; the file takes one tile all the same
    example, outputs = torch.zeros(2, 3, size, size), list(encoder_shapes(module))
    model = _traced(EncoderGraph(module), (example,), [ENCODER_INPUT], outputs, ({0: tiles},))
    if precision == "fp16":
        matmuls_to_float16(model)
    card = _card("encoder", module, checkpoint, precision)
    write_model(model, card, path)
    return card


def write_decoder(module: FacingsModule, checkpoint: Checkpoint, path: Path) -> ExportCard:
    """Writes decoder.onnx, as `write_encoder`; always in float32."""
    prompts, points = torch.export.Dim("prompts", min=2), torch.export.Dim("points", min=2)
    shapes: tuple[Any, ...] = ({}, {}, {}, {0: prompts, 1: points}, {0: prompts, 1: points}, {0: prompts}, {0: prompts})
    features = _no_features(module)
    model = _traced(
        DecoderGraph(module),
        (*features, *example_prompts(features[1].shape[-1], prompts=3, points=2)),
        [*FEATURE_OUTPUTS, *PROMPT_INPUTS],
        DECODER_OUTPUTS,
        shapes,
    )
    card = _card("decoder", module, checkpoint, "fp32")
    write_model(model, card, path)
    return card


def write_model(model: ir.Model, card: ExportCard, path: Path) -> None:
    """Writes a model with its card, whole or not at all. Raises ExportError."""
    import onnx_ir as ir

    model.metadata_props.update(card.strings())
    partial = path.with_name(f".{path.name}")
    try:
        ir.save(model, partial, format="protobuf")
        partial.replace(path)
    except OSError as error:
        raise ExportError(f"{str(path)!r}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def matmuls_to_float16(model: ir.Model) -> None:
    """Makes matrix multiplications and convolutions of a float32 model float16, in place, with casts around them."""
    import numpy as np
    import onnx_ir as ir

    in_float16: dict[ir.Value, ir.Value] = {}

    def to_float16(value: ir.Value, before: ir.Node) -> ir.Value:
        if value not in in_float16:
            if value.is_initializer() and value.const_value is not None:
                tensor = ir.tensor(value.const_value.numpy().astype(np.float16), name=f"{value.name}_half")
                in_float16[value] = made = ir.Value(name=tensor.name, shape=value.shape, const_value=tensor)
                made.type = ir.TensorType(ir.DataType.FLOAT16)
                model.graph.register_initializer(made)
            else:
                cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT16})
                model.graph.insert_before(before, cast)
                in_float16[value] = cast.outputs[0]
        return in_float16[value]

    for node in list(model.graph):
        if node.op_type not in MATMUL_OPS or any(
            name in (value.name or "") for value in node.inputs[1:] if value is not None for name in EXACT_WEIGHTS
        ):
            continue
        for index, value in enumerate(node.inputs):
            if value is not None:
                node.replace_input_with(index, to_float16(value, node))
        result = node.outputs[0]
        in_float32 = ir.Value(name=result.name, shape=result.shape, type=result.type)
        result.name = f"{result.name}_half"
        result.type = ir.TensorType(ir.DataType.FLOAT16)
        ir.convenience.replace_all_uses_with(result, in_float32, replace_graph_outputs=True)
        model.graph.insert_after(node, ir.node("Cast", [result], {"to": ir.DataType.FLOAT}, outputs=[in_float32]))
    for value in in_float16:
        if value.is_initializer() and not value.uses():
            del model.graph.initializers[value.name]  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far one output is from torch's: the largest difference of all cells, and torch's own largest value."""

    output: str
    largest: float
    of: float


def encoder_differences(module: FacingsModule, path: Path, images: torch.Tensor) -> list[Difference]:
    """ONNX Runtime on an exported encoder compared with torch in float32, on normalised images `[B, 3, S, S]`.

    Raises CheckpointError when ONNX Runtime is not installed.
    """
    return _differences(EncoderGraph(module), path, [images])


def decoder_differences(module: FacingsModule, path: Path, inputs: Sequence[torch.Tensor]) -> list[Difference]:
    """Likewise of an exported decoder, on its seven inputs."""
    return _differences(DecoderGraph(module), path, inputs)


def encoder_shapes(module: FacingsModule) -> dict[str, tuple[int, ...]]:
    """The shape of each of the encoder's outputs for one image, by name and in order."""
    width = int(module.sam.sam_mask_decoder.transformer_dim)
    return output_shapes(int(module.sam.image_size), width, has_head=module.proposal_head is not None)


def example_prompts(cells: int, *, prompts: int, points: int) -> tuple[torch.Tensor, ...]:
    """Prompts as the decoder takes them, always the same ones: foreground and background, every other one with a mask.
    cells: of a mask's side."""
    random = torch.Generator().manual_seed(0)
    return (
        torch.rand(prompts, points, 2, generator=random) * cells * 4,
        (torch.rand(prompts, points, generator=random) > 0.3).float(),
        torch.randn(prompts, 1, cells, cells, generator=random) * 8,
        (torch.arange(prompts) % 2).float(),
    )


def _differences(graph: nn.Module, path: Path, inputs: Sequence[torch.Tensor]) -> list[Difference]:
    session = onnx_session(path)
    with torch.inference_mode():
        expected = graph(*inputs)
    names = [value.name for value in session.get_inputs()]
    answers = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
    return [
        Difference(
            output=value.name,
            largest=float((torch.from_numpy(answer) - wanted).abs().max()),
            of=float(wanted.abs().max()),
        )
        for value, answer, wanted in zip(session.get_outputs(), answers, expected, strict=True)
    ]


def _no_features(module: FacingsModule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of one image, of the right shapes and all zero."""
    shapes = encoder_shapes(module)
    embedding, finest, middle = (torch.zeros(1, *shapes[name]) for name in FEATURE_OUTPUTS)
    return embedding, finest, middle


def _traced(
    graph: nn.Module,
    example: tuple[torch.Tensor, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_shapes: tuple[Any, ...],
) -> ir.Model:
    try:
        import onnx_ir.passes.common
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as missing:
        raise ExportError(
            f"ONNX export needs {missing.name}, which is not installed: pip install onnx onnxscript"
        ) from None
    with torch.no_grad(), _quiet():
        program: Any = torch.onnx.export(
            graph,
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic_shapes,
            verbose=False,
        )
    model: ir.Model = program.model
    # The exporter notes the lines of source that each node came from, with the paths of this machine.
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(model)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch's exporter warns of its own deprecations and of names of dimensions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _card(part: str, module: FacingsModule, checkpoint: Checkpoint, precision: Precision) -> ExportCard:
    return ExportCard(
        part=part,
        checkpoint=checkpoint.version,
        weights_sha256=checkpoint.digest,
        input_size=str(module.sam.image_size),
        mean=" ".join(map(str, PIXEL_MEAN)),
        deviation=" ".join(map(str, PIXEL_DEVIATION)),
        precision=precision,
        opset=str(OPSET),
    )
