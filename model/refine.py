"""One tight box for each prompt: prompt → tile → decoder → box. The twin of model.detect, which finds all facings.

Knows prompts, tiles, networks and masks; nothing of queues or threads. Prompts of several requests share the decoder's
calls, and each request has its own answer or its own failure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model import boxes as geometry
from model import tiling
from model.feature_cache import KnownBoxes, TileFeatures
from model.features import MASK_STRIDE, Features, TilePrompt
from model.masks import FoundObject, choose_masks, read_object
from model.memory import batches
from model.proposer import prior_box
from model.stages import Observer, timed
from model.tiling import Tile
from model.types import Detections, Photo, Prompt


@dataclass(frozen=True, kw_only=True, eq=False)
class RefineRequest:
    """Prompts on one photo. want_masks: whether the objects' masks are wanted, too."""

    photo: Photo
    prompts: Sequence[Prompt]
    want_masks: bool


@dataclass(kw_only=True, eq=False)
class _Question:
    """One prompt of a request, on its tile, and its answer once there is one."""

    request: RefineRequest
    prompt: TilePrompt
    answer: FoundObject | Exception | None = None


class Refiner:
    """Answers prompts on photos with one network.

    features: of that network. known_boxes: of photos that were pre-annotated; better priors than one tile's proposals.
    """

    def __init__(self, *, features: TileFeatures, known_boxes: KnownBoxes, observer: Observer) -> None:
        self._features = features
        self._network = features.network
        self._known_boxes = known_boxes
        self._observer = observer

    def answer(self, requests: Sequence[RefineRequest]) -> list[Detections | Exception]:
        """The answer of each request, or what it failed with: that costs no other request its answer.

        Until all are answered the features of every tile that they need are held, some MB each, whatever is cached.
        """
        asked = [self._questions(request) for request in requests]
        questions = [question for one in asked if not isinstance(one, Exception) for question in one]
        for alike in _by_kind(questions):
            for batch in batches(alike, self._network.decode_batch):
                self._answer_batch(batch)
        return [
            one if isinstance(one, Exception) else _detections(one, request)
            for one, request in zip(asked, requests, strict=True)
        ]

    def _questions(self, request: RefineRequest) -> list[_Question] | Exception:
        """The prompts of a request on the tiles that suit them. Each tile is encoded once, also where the cache holds
        fewer tiles than they need."""
        try:
            tiles = [self._tile_of(prompt, request.photo) for prompt in request.prompts]
            features_of = {
                features.tile: features
                for batch in self._features.of(request.photo, list(dict.fromkeys(tiles)))
                for features in batch
            }
            return [
                _Question(request=request, prompt=self._on_tile(request.photo, prompt, features_of[tile]))
                for prompt, tile in zip(request.prompts, tiles, strict=True)
            ]
        except Exception as error:
            return error

    def _tile_of(self, prompt: Prompt, photo: Photo) -> Tile:
        if prompt.box_xyxy is None:
            return tiling.tile_for_points(prompt.points_xy, photo.size_wh, self._network.size)
        return tiling.tile_for_box(prompt.box_xyxy, photo.size_wh, self._network.size)

    def _on_tile(self, photo: Photo, prompt: Prompt, features: Features) -> TilePrompt:
        """The prompt in pixels of the features' tile, with the boxes that are known there: those of the whole photo
        where it was pre-annotated here, else those of this tile."""
        tile, prior = features.tile, None
        box = None if prompt.box_xyxy is None else tile.to_tile(prompt.box_xyxy.reshape(2, 2)).reshape(4)
        points = tile.to_tile(prompt.points_xy)
        known = self._known_boxes.get(photo)
        proposals = known.on(tile) if known else features.proposals
        if proposals is not None:
            prior = prior_box(proposals.boxes_xyxy, proposals.scores, points, prompt.is_foreground, box)
        return TilePrompt(
            features=features,
            points_xy=points,
            is_foreground=prompt.is_foreground,
            box_xyxy=box,
            proposals=proposals,
            prior_xyxy=prior,
        )

    def _answer_batch(self, batch: Sequence[_Question]) -> None:
        """Decodes prompts of one kind, and reads each one's object from the mask that suits a facing."""
        try:
            with timed(self._observer, "decode"):
                for question, answer in zip(batch, self._found_objects(batch), strict=True):
                    question.answer = answer
        except Exception as error:
            for question in batch:
                question.answer = question.answer or error

    def _found_objects(self, batch: Sequence[_Question]) -> Iterator[FoundObject]:
        prompts = [question.prompt for question in batch]
        logits, iou = self._network.decode(prompts, multimask=prompts[0].is_ambiguous)
        boxes = geometry.mask_boxes(logits.flatten(0, 1), MASK_STRIDE).view(*iou.shape, 4)
        chosen = choose_masks(boxes, iou, self._network.size)
        rows = torch.arange(len(prompts), device=iou.device)
        planes, scores = logits[rows, chosen].cpu().numpy(), iou[rows, chosen].clamp(0, 1).cpu().numpy()
        for question, plane, score in zip(batch, planes, scores, strict=True):
            request = question.request
            yield read_object(question.prompt, plane, float(score), request.photo.size_wh, want_mask=request.want_masks)


def _by_kind(questions: Iterable[_Question]) -> list[list[_Question]]:
    """Prompts with equally many tokens, ambiguous ones apart: only those can share a call of the decoder without
    changing each other's answer."""
    kinds: dict[tuple[int, bool], list[_Question]] = {}
    for question in questions:
        _, labels = question.prompt.tokens()
        kinds.setdefault((len(labels), question.prompt.is_ambiguous), []).append(question)
    return list(kinds.values())


def _detections(questions: Sequence[_Question], request: RefineRequest) -> Detections | Exception:
    answers: list[FoundObject] = []
    for question in questions:
        if not isinstance(question.answer, FoundObject):
            return question.answer or RuntimeError("a prompt was not answered")
        answers.append(question.answer)
    return Detections(
        boxes_xyxy=np.array([answer.box_xyxy for answer in answers], np.float32).reshape(-1, 4),
        scores=np.array([answer.score for answer in answers], np.float32),
        masks=[answer.mask for answer in answers if answer.mask is not None] if request.want_masks else None,
    )
