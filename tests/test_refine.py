"""Prompts of several requests share the decoder's calls; each request has its own answer or its own failure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from model.checkpoints import BUNDLED, find_checkpoint
from model.device import Placement
from model.feature_cache import FeatureCache, KnownBoxes, TileFeatures
from model.network import Network
from model.refine import Refiner, RefineRequest
from model.stages import UNOBSERVED
from model.types import Detections, Photo, Prompt

CPU = Placement(device=torch.device("cpu"), autocast=None, encode_batch=1, decode_batch=16, reason="test")
PHOTO = Photo(pixels=np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
CLICK = Prompt(points_xy=np.array([[32, 32]], np.float32), is_foreground=np.array([True]))
BOX = Prompt(box_xyxy=np.array([8, 8, 56, 56], np.float32))


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(find_checkpoint(BUNDLED, config=None, has_gpu=False), CPU)


@pytest.fixture
def refiner(network: Network) -> Refiner:
    features = TileFeatures(network, FeatureCache(1 << 30))
    return Refiner(features=features, known_boxes=KnownBoxes(max_photos=1), observer=UNOBSERVED)


def request(*prompts: Prompt, want_masks: bool = False) -> RefineRequest:
    return RefineRequest(photo=PHOTO, prompts=prompts, want_masks=want_masks)


def boxes(answer: list[Detections] | Exception) -> list[list[float]]:
    assert isinstance(answer, list)
    return [box for found in answer for box in found.boxes_xyxy.tolist()]


def test_no_request_and_no_prompt_have_empty_answers(refiner: Refiner) -> None:
    assert refiner.answer([]) == []
    assert refiner.answer([request()]) == [[]]


def test_prompts_of_one_kind_share_a_call_and_every_answer_reaches_its_prompt(
    refiner: Refiner, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request(CLICK, BOX), request(BOX, want_masks=True), request(CLICK)]
    alone = [boxes(refiner.answer([one])[0]) for one in requests]
    calls: list[int] = []
    decode = network.decode

    def counted(prompts: Sequence[object], *, multimask: bool) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(prompts))
        return decode(prompts, multimask=multimask)  # type: ignore[arg-type]

    monkeypatch.setattr(network, "decode", counted)
    together = refiner.answer(requests)
    assert calls == [2, 2]
    for answer, wanted in zip(together, alone, strict=True):
        assert np.array(boxes(answer)) == pytest.approx(np.array(wanted), abs=0.1)
    masks = [answer[0].masks for answer in together if isinstance(answer, list)]
    assert [found is not None for found in masks] == [False, True, False]


def test_a_call_that_fails_costs_only_the_requests_in_it_their_answers(
    refiner: Refiner, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = network.decode

    def failing_for_boxes(prompts: Sequence[object], *, multimask: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if prompts[0].box_xyxy is not None:  # type: ignore[attr-defined]
            raise RuntimeError("no boxes today")
        return decode(prompts, multimask=multimask)  # type: ignore[arg-type]

    monkeypatch.setattr(network, "decode", failing_for_boxes)
    by_click, by_both, by_box = refiner.answer([request(CLICK), request(CLICK, BOX), request(BOX)])
    assert len(boxes(by_click)) == 1
    assert isinstance(by_both, RuntimeError)
    assert isinstance(by_box, RuntimeError)
