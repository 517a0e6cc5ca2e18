"""Exported files answer as torch does, an engine encodes with them, and what does not belong together is refused."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from fakes import first_boxes
from official import NETWORKS, TINY, with_random_weights

import model
from model import Engine, EngineOptions, NotReady, Photo, Prompt, Sam2Engine, tensorrt_encoder
from model.boxes import iou_matrix
from model.checkpoints import BUNDLED, Checkpoint, find_checkpoint
from model.device import Placement
from model.encoder import ExportCard
from model.export import (
    MATMUL_OPS,
    DecoderGraph,
    EncoderGraph,
    decoder_differences,
    example_prompts,
    matmuls_to_float16,
    write_decoder,
    write_encoder,
    write_model,
)
from model.exported_encoders import find_encoder, open_encoder
from model.network import PIXEL_DEVIATION, PIXEL_MEAN
from model.renderer.shelves import render_shelf
from model.sam2_module import FacingsModule, load_module
from model.types import CheckpointError, ExportError
from scripts.export import Exported, export, summary

CPU = Placement(device=torch.device("cpu"), autocast=None, encode_batch=1, decode_batch=16, reason="test")
ROUNDING = 1e-4  # of the largest value: float32 summed in another order, through about 80 layers
GPU = dataclasses.replace(CPU, device=torch.device("cuda", 0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint with its exported files, the encoder in both precisions."""

    checkpoint: Checkpoint
    module: FacingsModule
    folder: Path

    @property
    def encoder(self) -> Path:
        return self.folder / "encoder.onnx"

    @property
    def fp16(self) -> Path:
        return self.folder / "encoder-fp16.onnx"

    @property
    def decoder(self) -> Path:
        return self.folder / "decoder.onnx"


def with_fp16(case: Case) -> Case:
    """The case, with its encoder in float16: as `write_encoder` makes it, without tracing once more."""
    graph = onnx_ir.load(case.encoder)
    card = ExportCard.read(graph.metadata_props, case.encoder)
    matmuls_to_float16(graph)
    write_model(graph, dataclasses.replace(card, precision="fp16"), case.fp16)
    return case


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """What `facings export` has done with the bundled checkpoint."""
    return export(BUNDLED, None, tmp_path_factory.mktemp("runs") / "nano", precision="fp32", most_tiles=4)


@pytest.fixture(scope="module")
def nano(report: Exported) -> Case:
    checkpoint = find_checkpoint(BUNDLED, config=None, has_gpu=False)
    return with_fp16(Case(checkpoint=checkpoint, module=load_module(checkpoint), folder=report.files[0].parent))


def exported(name: str, folder: Path) -> Case:
    """One of Meta's networks."""
    checkpoint = with_random_weights(name, folder)
    case = Case(checkpoint=checkpoint, module=load_module(checkpoint), folder=folder)
    write_encoder(case.module, checkpoint, case.encoder, "fp32")
    write_decoder(case.module, checkpoint, case.decoder)
    return with_fp16(case)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return exported(TINY, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=[BUNDLED, *NETWORKS])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    shared = {BUNDLED: "nano", TINY: "tiny"}.get(request.param)
    if shared is None:
        return exported(request.param, tmp_path_factory.mktemp("official"))
    found: Case = request.getfixturevalue(shared)
    return found


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Two tiles of a rendered shelf, normalised."""
    shelf = render_shelf(3, (2048, 1024), facing_px=90).photo_rgb
    tiles = np.stack([shelf[:, :1024], shelf[:, 1024:]])
    pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(PIXEL_MEAN).view(3, 1, 1)) / torch.tensor(PIXEL_DEVIATION).view(3, 1, 1)


@pytest.fixture(scope="module")
def exact(case: Case, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What torch makes of the two tiles, in float32."""
    with torch.inference_mode():
        made: tuple[torch.Tensor, ...] = EncoderGraph(case.module)(images)
    return made


def answers(path: Path, images: torch.Tensor) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(array) for array in session.run(None, {"image": images.numpy()})]


def test_facings_export_tells_the_files_and_how_far_they_are_from_torch(report: Exported) -> None:
    printed = summary(report)
    files: dict[str, int] = printed["files"]  # type: ignore[assignment]
    assert [Path(name).name for name in files][:2] == ["encoder.onnx", "decoder.onnx"]
    assert all(size > 1e6 for size in files.values())
    assert report.encoder is not None
    assert report.decoder is not None
    differences = [*report.encoder, *report.decoder]
    assert [difference.output for difference in differences] == [
        "image_embed",
        "high_res_feats_0",
        "high_res_feats_1",
        "centre_logits",
        "edge_distances",
        "masks",
        "iou_predictions",
    ]
    assert max(difference.largest / difference.of for difference in differences) < ROUNDING
    assert report.no_engine is not None or "encoder.engine" in str(report.files)


@pytest.mark.parametrize("tiles", [[1], [0, 1, 0]], ids=["one tile", "three tiles"])
def test_the_encoder_answers_as_torch_does_for_any_number_of_tiles(
    case: Case, images: torch.Tensor, exact: tuple[torch.Tensor, ...], tiles: list[int]
) -> None:
    got = answers(case.encoder, images[tiles])
    assert len(got) == (3 if case.module.proposal_head is None else 5)
    for array, wanted in zip(got, exact, strict=True):
        assert (array - wanted[tiles]).abs().max() < ROUNDING * wanted.abs().max()


def random_features(case: Case, random: torch.Generator) -> list[torch.Tensor]:
    width = case.module.sam.sam_mask_decoder.transformer_dim
    return [torch.randn(1, width // part, side, side, generator=random) for part, side in ((1, 64), (8, 256), (4, 128))]


@pytest.mark.parametrize(("prompts", "points"), [(1, 1), (1, 3), (2, 2), (7, 1)])
def test_the_decoder_answers_as_torch_does_for_any_number_of_prompts(case: Case, prompts: int, points: int) -> None:
    random = torch.Generator().manual_seed(prompts)
    inputs = (*random_features(case, random), *example_prompts(256, prompts=prompts, points=points))
    masks, iou = decoder_differences(case.module, case.decoder, inputs)
    assert (masks.output, iou.output) == ("masks", "iou_predictions")
    assert masks.largest < 1e-4 * masks.of
    assert iou.largest < 1e-5


def test_the_decoders_first_mask_is_the_single_answer_and_the_others_are_the_three(tiny: Case) -> None:
    """As sam2 gives them one at a time, its choice by stability among them."""
    graph = DecoderGraph(tiny.module)
    random = torch.Generator().manual_seed(0)
    features = [
        torch.randn(1, 256 // part, side, side, generator=random) for part, side in ((1, 64), (8, 256), (4, 128))
    ]
    coords, labels, masks, has_mask = example_prompts(256, prompts=4, points=2)
    with torch.inference_mode():
        logits, iou = graph(*features, coords, labels, masks, has_mask)
        sparse, dense = tiny.module.embed_prompts(coords, labels, masks, has_mask > 0.5)
        for multimask, rows in ((False, slice(0, 1)), (True, slice(1, 4))):
            wanted, wanted_iou, _, _ = tiny.module.sam.sam_mask_decoder(
                image_embeddings=features[0],
                image_pe=tiny.module.position_encoding(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=multimask,
                repeat_image=True,
                high_res_features=features[1:],
            )
            assert torch.allclose(logits[:, rows], wanted, atol=1e-4)
            assert torch.allclose(iou[:, rows], wanted_iou, atol=1e-5)


def test_in_fp16_only_matrix_multiplications_and_convolutions_are_float16(case: Case) -> None:
    """TensorRT keeps to the types of the graph."""
    proto = onnx.shape_inference.infer_shapes(onnx.load(case.fp16), strict_mode=True)
    onnx.checker.check_model(proto)
    types = {value.name: value.type.tensor_type.elem_type for value in [*proto.graph.value_info, *proto.graph.output]}
    types |= {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    types |= {value.name: value.type.tensor_type.elem_type for value in proto.graph.input}
    float16 = onnx.TensorProto.FLOAT16
    in_float16 = {
        node.op_type for node in proto.graph.node if any(types[name] == float16 for name in node.input if name)
    }
    assert in_float16 <= {*MATMUL_OPS, "Cast"}
    assert {"Conv"} <= in_float16
    assert all(types[value.name] == onnx.TensorProto.FLOAT for value in [*proto.graph.input, *proto.graph.output])
    matmuls = [node for node in proto.graph.node if node.op_type in MATMUL_OPS]
    exact = [node for node in matmuls if types[node.input[0]] != float16]
    # The last step of the proposal head is done in float32, in torch under autocast as well.
    assert len(exact) == (0 if case.module.proposal_head is None else 2)
    assert case.fp16.stat().st_size < 0.6 * case.encoder.stat().st_size


def test_in_fp16_features_are_nearer_to_float32_than_in_bf16(
    case: Case, images: torch.Tensor, exact: tuple[torch.Tensor, ...]
) -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        rounded = EncoderGraph(case.module)(images[:1])
    for got, in_bf16, wanted in zip(answers(case.fp16, images[:1]), rounded, exact, strict=True):
        assert 0 < (got - wanted[:1]).abs().max() < (in_bf16 - wanted[:1]).abs().max()


def test_files_say_what_they_were_made_from_and_what_they_expect(case: Case) -> None:
    for path, part, precision in (
        (case.encoder, "encoder", "fp32"),
        (case.fp16, "encoder", "fp16"),
        (case.decoder, "decoder", "fp32"),
    ):
        proto = onnx_ir.load(path)
        card = ExportCard.read(proto.metadata_props, path)
        assert (card.part, card.precision, card.checkpoint) == (part, precision, case.checkpoint.version)
        assert (card.weights_sha256, card.input_size) == (case.checkpoint.digest, "1024")
        assert [float(number) for number in (*card.mean.split(), *card.deviation.split())] == [
            *PIXEL_MEAN,
            *PIXEL_DEVIATION,
        ]
        assert proto.opset_imports == {"": int(card.opset)}


def test_files_tell_nothing_of_the_machine_that_made_them(case: Case) -> None:
    for path in (case.encoder, case.fp16, case.decoder):
        assert str(Path(model.__file__).parent).encode() not in path.read_bytes()


def test_other_programs_find_the_names_and_shapes_of_the_readme(nano: Case) -> None:
    encoder, decoder = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in (nano.encoder, nano.decoder)
    )
    assert {value.name: value.shape for value in [*encoder.get_inputs(), *encoder.get_outputs()]} == {
        "image": ["tiles", 3, 1024, 1024],
        "image_embed": ["tiles", 96, 64, 64],
        "high_res_feats_0": ["tiles", 12, 256, 256],
        "high_res_feats_1": ["tiles", 24, 128, 128],
        "centre_logits": ["tiles", 256, 256],
        "edge_distances": ["tiles", 4, 256, 256],
    }
    assert {value.name: value.shape for value in [*decoder.get_inputs(), *decoder.get_outputs()]} == {
        "image_embed": [1, 96, 64, 64],
        "high_res_feats_0": [1, 12, 256, 256],
        "high_res_feats_1": [1, 24, 128, 128],
        "point_coords": ["prompts", "points", 2],
        "point_labels": ["prompts", "points"],
        "mask_input": ["prompts", 1, 256, 256],
        "has_mask_input": ["prompts"],
        "masks": ["prompts", 4, 256, 256],
        "iou_predictions": ["prompts", 4],
    }
    assert {value.type for value in [*encoder.get_inputs(), *decoder.get_inputs()]} == {"tensor(float)"}


@pytest.fixture(scope="module")
def engines(nano: Case) -> Iterator[tuple[Engine, Engine]]:
    """The same checkpoint, encoded by torch and by ONNX Runtime."""
    pair = tuple(
        Sam2Engine(EngineOptions(checkpoint=BUNDLED, device="cpu", encoder=encoder))
        for encoder in (None, str(nano.folder))
    )
    for engine in pair:
        engine.wait_ready(120)
    yield pair  # type: ignore[misc]
    for engine in pair:
        engine.close()


def test_an_engine_with_an_exported_encoder_gives_the_same_boxes(engines: tuple[Engine, Engine]) -> None:
    """Up to what bf16, in which torch encodes on some CPUs, rounds."""
    torchs, onnxs = engines
    shelf = render_shelf(21, (1600, 1200))
    photo = Photo(pixels=shelf.photo_rgb)
    wanted, got = (engine.preannotate(photo, score_threshold=0.5) for engine in engines)
    assert len(wanted) > 50
    overlap = iou_matrix(wanted.boxes_xyxy, got.boxes_xyxy)
    assert (overlap.max(axis=1) > 0.9).mean() > 0.95
    assert abs(len(wanted) - len(got)) <= 0.05 * len(wanted)
    prompts = [
        Prompt(points_xy=box.reshape(2, 2).mean(0)[None], is_foreground=np.array([True]))
        for box in wanted.boxes_xyxy[:10]
    ]
    clicked = [first_boxes(engine.refine(photo, prompts)) for engine in engines]
    assert np.median(iou_matrix(*clicked).diagonal()) > 0.9
    assert torchs.version != onnxs.version
    assert onnxs.version.startswith(torchs.version)


def test_an_exported_encoder_leaves_torchs_out_of_memory(engines: tuple[Engine, Engine]) -> None:
    torchs, onnxs = (
        sum(weight.numel() for weight in engine._ready.features.network._module.parameters())  # type: ignore[attr-defined]
        for engine in engines
    )
    assert onnxs < 0.5 * torchs


def refusal(requested: Path | str, checkpoint: Checkpoint, placement: Placement = CPU) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_encoder(find_encoder(str(requested), placement), checkpoint, placement)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_encoder_of_other_weights_is_refused(nano: Case, tiny: Case) -> None:
    message = refusal(tiny.encoder, nano.checkpoint)
    assert tiny.checkpoint.version in message
    assert nano.checkpoint.version in message
    engine = Sam2Engine(EngineOptions(checkpoint=BUNDLED, device="cpu", encoder=str(tiny.encoder)))
    with pytest.raises(NotReady, match=f"it was exported from {TINY}-"):
        engine.wait_ready(120)
    engine.close()


def test_what_is_no_encoder_is_refused(nano: Case, tmp_path: Path) -> None:
    foreign, broken = tmp_path / "foreign.onnx", tmp_path / "broken.onnx"
    proto = onnx.load(nano.encoder)
    del proto.metadata_props[:]
    onnx.save(proto, foreign)
    broken.write_bytes(nano.encoder.read_bytes()[:1000])
    assert "expected an encoder, got a decoder" in refusal(nano.decoder, nano.checkpoint)
    assert "expected one that facings export wrote" in refusal(foreign, nano.checkpoint)
    assert "ONNX Runtime cannot load it" in refusal(broken, nano.checkpoint)
    assert "no file at" in refusal(tmp_path, nano.checkpoint)
    assert "no file at" in refusal("none.onnx", nano.checkpoint)
    assert "expected a folder, an .onnx or an .engine file" in refusal("none.pt", nano.checkpoint)


def test_each_kind_of_encoder_belongs_to_its_device(nano: Case, tmp_path: Path) -> None:
    engine = tmp_path / "encoder.engine"
    engine.touch()
    assert "expected an .engine file on cuda:0" in refusal(nano.encoder, nano.checkpoint, GPU)
    assert "expected an .onnx file on cpu" in refusal(engine, nano.checkpoint)
    assert find_encoder(str(tmp_path), GPU).path == engine
    assert find_encoder(str(nano.folder), CPU).path == nano.encoder


def test_a_tensorrt_engine_is_refused_by_what_stands_beside_it(nano: Case, tiny: Case, tmp_path: Path) -> None:
    engine = tmp_path / "encoder.engine"
    engine.touch()
    assert "'encoder.engine.json'" in refusal(engine, nano.checkpoint, GPU)
    card = dict(ExportCard.read(onnx_ir.load(nano.fp16).metadata_props, nano.fp16).strings())
    tensorrt_encoder.card_path(engine).write_text(json.dumps(card | {"tensorrt": "10.0.1", "gpu": "NVIDIA A10"}))
    assert "it was exported from facings-nano-" in refusal(engine, tiny.checkpoint, GPU)
    if not tensorrt_encoder.is_installed():
        assert "TensorRT is not installed: pip install tensorrt==10.0.1" in refusal(engine, nano.checkpoint, GPU)


def test_files_are_written_whole_or_not_at_all(nano: Case, tmp_path: Path) -> None:
    graph, path = onnx_ir.load(nano.decoder), tmp_path / "decoder.onnx"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # stands for a full disk
    try:
        with pytest.raises(ExportError, match=r"decoder\.onnx'?: cannot be written: File too large"):
            write_model(graph, ExportCard.read(graph.metadata_props, path), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(nano: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "ONNX Runtime is not installed" in refusal(nano.encoder, nano.checkpoint)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ExportError, match="needs onnxscript, which is not installed"):
        write_decoder(nano.module, nano.checkpoint, tmp_path / "decoder.onnx")
