"""The network answers as sam2 itself does, on the same weights."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from official import NETWORKS, with_random_weights

from model import DeviceError
from model.boxes import iou_matrix, mask_boxes
from model.checkpoints import BUNDLED, find_checkpoint, read_weights
from model.device import Placement, choose_placement
from model.features import Features, TilePrompt
from model.network import Network
from model.proposer import peaks, point_grid
from model.renderer.shelves import render_shelf
from model.sam2_module import build_module, load_weights
from model.tiling import Tile

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # in sam2

CPU = Placement(device=torch.device("cpu"), autocast=None, encode_batch=1, decode_batch=16, reason="test")
WHOLE = Tile(left=0, top=0, side=1024, size=1024, level=0)
CLICK = (np.array([[400.0, 300.0]], np.float32), np.array([True]), None)
POINTS = (np.array([[400.0, 300.0], [520.0, 310.0]], np.float32), np.array([True, False]), None)
BOX = (np.zeros((0, 2), np.float32), np.zeros(0, np.bool_), np.array([350.0, 200.0, 460.0, 420.0], np.float32))
BOX_AND_CLICK = (CLICK[0], CLICK[1], BOX[2])


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return render_shelf(3, (1024, 1024)).photo_rgb


@pytest.fixture(scope="module", params=[BUNDLED, *NETWORKS])
def compared(request: pytest.FixtureRequest, photo: np.ndarray, tmp_path_factory: pytest.TempPathFactory):
    """Our network with the features of a photo, and sam2's own predictor that has seen it, on the same weights (random
    ones where the hub would be needed)."""
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    if request.param == BUNDLED:
        checkpoint = find_checkpoint(BUNDLED, config=None, has_gpu=False)
    else:
        checkpoint = with_random_weights(request.param, tmp_path_factory.mktemp("weights"))
    upstream = build_module(checkpoint.config)
    load_weights(upstream, read_weights(checkpoint.weights), checkpoint.name)
    predictor = SAM2ImagePredictor(upstream.sam.eval())
    predictor.set_image(photo)
    network = Network(checkpoint, CPU)
    return network, network.encode(photo, [WHOLE])[0], predictor


@pytest.mark.parametrize("multimask", [True, False], ids=["three masks", "one mask"])
@pytest.mark.parametrize("prompt", [CLICK, POINTS, BOX, BOX_AND_CLICK], ids=["click", "points", "box", "box and click"])
def test_masks_and_scores_are_those_of_sam2s_own_predictor(compared, prompt, multimask: bool) -> None:
    network, features, predictor = compared
    points, is_foreground, box = prompt
    tile_prompt = TilePrompt(features=features, points_xy=points, is_foreground=is_foreground, box_xyxy=box)
    logits, iou = network.decode([tile_prompt], multimask=multimask)
    _, wanted_iou, wanted = predictor.predict(
        point_coords=points if len(points) else None,
        point_labels=is_foreground.astype(np.int32) if len(points) else None,
        box=box,
        multimask_output=multimask,
    )
    assert iou[0].numpy() == pytest.approx(wanted_iou, abs=1e-3)
    got, scale = logits[0].clamp(-32, 32).numpy(), max(1.0, float(np.abs(wanted).max()))
    assert np.abs(got - wanted).max() <= 1e-3 * scale


def test_prompts_on_different_tiles_share_a_call_without_changing_each_other(photo: np.ndarray) -> None:
    network = Network(find_checkpoint(BUNDLED, config=None, has_gpu=False), CPU)
    tiles = [Tile(left=left, top=100, side=512, size=1024, level=1) for left in (0, 512)]
    prompts = [
        TilePrompt(features=features, points_xy=CLICK[0], is_foreground=CLICK[1], box_xyxy=None)
        for features in network.encode(photo, tiles)
    ]
    together, _ = network.decode(prompts, multimask=True)
    for index, prompt in enumerate(prompts):
        alone, _ = network.decode([prompt], multimask=True)
        assert torch.allclose(alone[0], together[index], atol=1e-3)
    assert not torch.allclose(together[0], together[1], atol=1e-1)


def test_a_tile_beyond_the_photos_edge_sees_what_the_photo_has(photo: np.ndarray) -> None:
    """Grey is added, nothing is stretched: the proposals of a cropped photo's tile lie in the crop."""
    network = Network(find_checkpoint(BUNDLED, config=None, has_gpu=False), CPU)
    (features,) = network.encode(np.ascontiguousarray(photo[:400]), [WHOLE])
    assert features.proposals is not None
    sure = features.proposals.boxes_xyxy[features.proposals.scores > 0.3]
    assert len(sure)
    assert sure[:, 3].max() <= 416


def test_peaks_are_the_strongest_local_maxima() -> None:
    logits = torch.full((1, 8, 8), -6.0)
    logits[0, 2, 3], logits[0, 2, 4], logits[0, 6, 6] = 3.0, 2.0, 1.0
    distances = torch.full((1, 4, 8, 8), 5.0)
    boxes, scores = peaks(logits, distances, limit=2)
    assert boxes[0].tolist() == [[9, 5, 19, 15], [21, 21, 31, 31]]
    assert scores[0].tolist() == pytest.approx(torch.tensor([3.0, 1.0]).sigmoid().tolist())


def test_the_point_grid_is_that_of_sams_mask_generator() -> None:
    from sam2.utils.amg import build_point_grid

    assert point_grid(32, 1024).numpy() == pytest.approx(build_point_grid(32) * 1024)


@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:99", "mps"])
def test_a_device_that_is_not_there_is_named(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(DeviceError, match=f"'{device}'"):
        choose_placement(device)


@pytest.mark.parametrize(
    ("name", "has_bf16", "capability", "dtype"),
    [
        ("NVIDIA H200", True, (9, 0), torch.bfloat16),
        ("Tesla T4", False, (7, 5), torch.float16),
        ("Tesla V100-SXM2-16GB", False, (7, 0), torch.float16),
        ("NVIDIA GeForce RTX 2080", False, (7, 5), torch.float16),
        ("NVIDIA GeForce GTX 1660 Ti", False, (7, 5), None),
        ("NVIDIA T400", False, (7, 5), None),
        ("Quadro T2000", False, (7, 5), None),
        ("Tesla P100-PCIE-16GB", False, (6, 0), None),
    ],
)
def test_a_gpu_computes_in_the_precision_it_has_units_for(
    monkeypatch: pytest.MonkeyPatch, name: str, has_bf16: bool, capability: tuple[int, int], dtype: torch.dtype | None
) -> None:
    """By what torch says of them; none of these GPUs was at hand."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    placement = choose_placement("cuda:1")
    assert set(asked) == {placement.device} == {torch.device("cuda:1")}
    assert placement.autocast == dtype
    assert placement.dtype == (dtype or torch.float32)


@pytest.fixture(scope="module")
def boxes_in_float32(photo: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Some proposals, and what the decoder makes of them."""
    network = Network(find_checkpoint(BUNDLED, config=None, has_gpu=False), CPU)
    (features,) = network.encode(photo, [WHOLE])
    assert features.proposals is not None
    asked = features.proposals.boxes_xyxy[:8]
    return asked, redrawn(network, features, asked)


def redrawn(network: Network, features: Features, boxes_xyxy: np.ndarray) -> np.ndarray:
    prompts = [
        TilePrompt(features=features, points_xy=BOX[0], is_foreground=BOX[1], box_xyxy=box, prior_xyxy=box)
        for box in boxes_xyxy
    ]
    logits, _ = network.decode(prompts, multimask=False)
    return mask_boxes(logits[:, 0], 4).numpy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_keeps_boxes(
    photo: np.ndarray, boxes_in_float32: tuple[np.ndarray, np.ndarray], dtype: torch.dtype
) -> None:
    asked, wanted = boxes_in_float32
    network = Network(find_checkpoint(BUNDLED, config=None, has_gpu=False), replace(CPU, autocast=dtype))
    (features,) = network.encode(photo, [WHOLE])
    overlap = iou_matrix(redrawn(network, features, asked), wanted).diagonal()
    assert overlap.min() >= 0.95
    assert np.median(overlap) >= 0.99


def test_weights_that_are_rounded_once_give_what_autocast_gives(
    photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, placement = find_checkpoint(BUNDLED, config=None, has_gpu=False), replace(CPU, autocast=torch.bfloat16)
    rounded = Network(checkpoint, placement)
    monkeypatch.setattr("model.network._round_matmul_weights", lambda *_: None)
    (own,), (wanted,) = rounded.encode(photo, [WHOLE]), Network(checkpoint, placement).encode(photo, [WHOLE])
    for name in ("embedding", "middle", "finest"):
        assert torch.equal(getattr(own.cells, name), getattr(wanted.cells, name))
    assert own.proposals is not None
    assert wanted.proposals is not None
    assert np.array_equal(own.proposals.boxes_xyxy, wanted.proposals.boxes_xyxy)


def test_the_placement_says_its_reason() -> None:
    placement = choose_placement("cpu")
    assert placement.reason
    assert (placement.autocast is torch.bfloat16) == ("fp32" not in placement.reason)
