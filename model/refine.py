"""What a prompt names: prompt → tile → decoder → box. The twin of model.detect, which finds all facings.

Knows prompts, tiles, networks and masks; nothing of queues or threads. The network is asked with the foreground points
and the rectangle of a prompt; what else the prompt says is for model.answers. Several foreground points are first asked
one by one, and together where they are on one object (see model.objects). Prompts of several requests share the
decoder's calls, and each request has its own answer or its own failure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from model import boxes as geometry
from model import tiling
from model.answers import answer_to, inside_photo
from model.feature_cache import KnownBoxes, TileFeatures
from model.features import MASK_STRIDE, Features, TilePrompt
from model.masks import FoundObject, choose_masks, read_object
from model.memory import batches
from model.objects import objects_of
from model.proposer import prior_box
from model.stages import Observer, timed
from model.tiling import Tile
from model.types import Detections, FloatArray, Mask, Photo, Prompt


def _no_boxes() -> FloatArray:
    return np.zeros((0, 4), np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class RefineRequest:
    """Prompts on one photo. want_masks: whether the objects' masks are wanted, too. accepted_xyxy: boxes `[N, 4]` of
    other objects on it that the annotator has accepted."""

    photo: Photo
    prompts: Sequence[Prompt]
    want_masks: bool
    accepted_xyxy: FloatArray = field(default_factory=_no_boxes)


@dataclass(kw_only=True, eq=False)
class _Question:
    """What the network is asked for one object: the prompt in photo pixels and on its tile, and the answer.

    alone: of several points on one object, the questions of each.
    """

    prompt: Prompt
    on_tile: TilePrompt
    size_wh: tuple[int, int]
    want_mask: bool
    alone: Sequence[_Question] = ()
    found: FoundObject | None = None
    failure: Exception | None = None


@dataclass(kw_only=True, eq=False)
class _Work:
    """A request on its way: the questions of each of its prompts."""

    request: RefineRequest
    prompts: list[Prompt | None] = field(default_factory=list)
    questions: list[list[_Question]] = field(default_factory=list)
    failure: Exception | None = None

    def has_failed(self) -> bool:
        asked = (question for of_prompt in self.questions for question in of_prompt)
        self.failure = self.failure or next((one.failure for one in asked if one.failure is not None), None)
        return self.failure is not None


class Refiner:
    """Answers prompts on photos with one network.

    features: of that network. known_boxes: of photos that were pre-annotated; better priors than one tile's proposals.
    """

    def __init__(self, *, features: TileFeatures, known_boxes: KnownBoxes, observer: Observer) -> None:
        self._features = features
        self._network = features.network
        self._known_boxes = known_boxes
        self._observer = observer

    def answer(self, requests: Sequence[RefineRequest]) -> list[list[Detections] | Exception]:
        """The answer of each request, a value for each prompt, or what it failed with: that costs no other request its
        answer.

        Until all are answered the features of every tile that they need are held, some MB each, whatever is cached.
        """
        works = [self._begin(request) for request in requests]
        self._ask(question for work in works for of_prompt in work.questions for question in of_prompt)
        joined = [question for work in works if not work.has_failed() for question in self._join(work)]
        self._ask(joined)
        return [work.failure if work.has_failed() and work.failure else _answers(work) for work in works]

    def _begin(self, request: RefineRequest) -> _Work:
        """The request with its first questions: a rectangle with all points, and else each foreground point alone."""
        work = _Work(request=request)
        try:
            work.prompts = [inside_photo(prompt, request.photo.size_wh) for prompt in request.prompts]
            asked = [_first_prompts(prompt) for prompt in work.prompts]
            questions = iter(self._questions(request, [prompt for of_prompt in asked for prompt in of_prompt]))
            work.questions = [[next(questions) for _ in of_prompt] for of_prompt in asked]
        except Exception as error:
            work.failure = error
        return work

    def _join(self, work: _Work) -> list[_Question]:
        """Puts one question in the place of those about points on one object; gives the new ones."""
        new: list[_Question] = []
        try:
            for of_prompt in work.questions:
                if len(of_prompt) < 2:
                    continue
                points = np.concatenate([question.prompt.points_xy for question in of_prompt])
                alone = [_found_box(question) for question in of_prompt]
                groups = objects_of(points, alone, *self._candidates(work.request.photo, of_prompt))
                prompts = [_click(points[group]) for group in groups if len(group) > 1]
                asked = iter(self._questions(work.request, prompts))
                alone_of = [[of_prompt[point] for point in group] for group in groups]
                of_prompt[:] = [next(asked) if len(alone) > 1 else alone[0] for alone in alone_of]
                for question, points_alone in zip(of_prompt, alone_of, strict=True):
                    if len(points_alone) > 1:
                        question.alone = points_alone
                        new.append(question)
        except Exception as error:
            work.failure = error
            return []
        return new

    def _candidates(self, photo: Photo, questions: Sequence[_Question]) -> tuple[FloatArray, FloatArray]:
        """Boxes `[N, 4]` in photo pixels, and scores, of what may be under the points: those known of the photo, else
        the proposals of the points' tiles, else what each point alone was answered."""
        known = self._known_boxes.get(photo)
        if known:
            return known.boxes_xyxy, known.scores
        tiles = {question.on_tile.features.tile: question.on_tile.features.proposals for question in questions}
        proposed = [(tile.to_photo(own.boxes_xyxy), own.scores) for tile, own in tiles.items() if own]
        if not proposed:
            proposed = [(one.found.box_xyxy[None], np.array([one.found.score])) for one in questions if one.found]
        boxes, scores = zip(*proposed, strict=True) if proposed else ([_no_boxes()], [np.zeros(0)])
        return np.concatenate(boxes), np.concatenate(scores)

    def _questions(self, request: RefineRequest, prompts: Sequence[Prompt]) -> list[_Question]:
        """The prompts on the tiles that suit them. Each tile is encoded once, also where the cache holds fewer tiles
        than they need."""
        photo = request.photo
        tiles = [self._tile_of(prompt, photo) for prompt in prompts]
        features_of = {
            features.tile: features
            for batch in self._features.of(photo, list(dict.fromkeys(tiles)))
            for features in batch
        }
        return [
            _Question(
                prompt=prompt,
                on_tile=self._on_tile(photo, prompt, features_of[tile]),
                size_wh=photo.size_wh,
                want_mask=request.want_masks,
            )
            for prompt, tile in zip(prompts, tiles, strict=True)
        ]

    def _tile_of(self, prompt: Prompt, photo: Photo) -> Tile:
        if prompt.box_xyxy is None:
            return tiling.tile_for_points(prompt.points_xy, photo.size_wh, self._network.size)
        return tiling.tile_for_box(prompt.box_xyxy, photo.size_wh, self._network.size)

    def _on_tile(self, photo: Photo, prompt: Prompt, features: Features) -> TilePrompt:
        """The prompt in pixels of the features' tile, with the boxes that are known there: those of the whole photo
        where it was pre-annotated here, else those of this tile. A rectangle is its own prior."""
        tile = features.tile
        box: FloatArray | None = None
        if prompt.box_xyxy is not None:
            box = tile.to_tile(prompt.box_xyxy.reshape(2, 2)).reshape(4)
        points = tile.to_tile(prompt.points_xy)
        known = self._known_boxes.get(photo)
        proposals = known.on(tile) if known else features.proposals
        prior = None
        if proposals is not None:
            prior = prior_box(proposals.boxes_xyxy, proposals.scores, points) if box is None else box
        return TilePrompt(
            features=features,
            points_xy=points,
            is_foreground=prompt.is_foreground,
            box_xyxy=box,
            proposals=proposals,
            prior_xyxy=prior,
        )

    def _ask(self, questions: Iterable[_Question]) -> None:
        """Decodes prompts of one kind, and reads each one's object from the mask that suits a facing."""
        for alike in _by_kind(questions):
            for batch in batches(alike, self._network.decode_batch):
                try:
                    with timed(self._observer, "decode"):
                        for question, found in zip(batch, self._found_objects(batch), strict=True):
                            question.found = found
                except Exception as error:
                    for question in batch:
                        question.failure = error

    def _found_objects(self, batch: Sequence[_Question]) -> Iterator[FoundObject | None]:
        prompts = [question.on_tile for question in batch]
        logits, iou = self._network.decode(prompts, multimask=prompts[0].is_ambiguous)
        boxes = geometry.mask_boxes(logits.flatten(0, 1), MASK_STRIDE).view(*iou.shape, 4)
        chosen = choose_masks(boxes, iou, self._network.size)
        rows = torch.arange(len(prompts), device=iou.device)
        planes, scores = logits[rows, chosen].cpu().numpy(), iou[rows, chosen].clamp(0, 1).cpu().numpy()
        for question, plane, score in zip(batch, planes, scores, strict=True):
            yield read_object(question.on_tile, plane, float(score), question.size_wh, want_mask=question.want_mask)


def _first_prompts(prompt: Prompt | None) -> list[Prompt]:
    if prompt is None:
        return []
    foreground = prompt.points_xy[prompt.is_foreground]
    if prompt.box_xyxy is None:
        return [_click(point[None]) for point in foreground]
    return [replace(prompt, points_xy=foreground, is_foreground=np.ones(len(foreground), np.bool_))]


def _click(points_xy: FloatArray) -> Prompt:
    return Prompt(points_xy=points_xy, is_foreground=np.ones(len(points_xy), np.bool_))


def _found_box(question: _Question) -> FloatArray | None:
    return None if question.found is None else question.found.box_xyxy


def _by_kind(questions: Iterable[_Question]) -> list[list[_Question]]:
    """Prompts with equally many tokens, ambiguous ones apart: only those can share a call of the decoder without
    changing each other's answer."""
    kinds: dict[tuple[int, bool], list[_Question]] = {}
    for question in questions:
        _, labels = question.on_tile.tokens()
        kinds.setdefault((len(labels), question.on_tile.is_ambiguous), []).append(question)
    return list(kinds.values())


def _answers(work: _Work) -> list[Detections]:
    """For each prompt the objects that its questions found, without its background points. Points that one object
    cannot hold are answered one by one."""
    answers: list[Detections] = []
    for prompt, questions in zip(work.prompts, work.questions, strict=True):
        found: list[FoundObject] = []
        background = np.zeros((0, 2), np.float32) if prompt is None else prompt.points_xy[~prompt.is_foreground]
        for question in questions:
            answer = _answer(question, background, work.request)
            alone = [_answer(one, background, work.request) for one in question.alone] if answer is None else []
            found += [one for one in (answer, *alone) if one is not None]
        answers.append(
            Detections(
                boxes_xyxy=np.array([one.box_xyxy for one in found], np.float32).reshape(-1, 4),
                scores=np.array([one.score for one in found], np.float32),
                masks=[one.mask or _empty_mask(one.box_xyxy) for one in found] if work.request.want_masks else None,
            )
        )
    return answers


def _answer(question: _Question, background_xy: FloatArray, request: RefineRequest) -> FoundObject | None:
    asked = question.prompt
    prompt = replace(
        asked,
        points_xy=np.concatenate([asked.points_xy, background_xy]),
        is_foreground=np.arange(len(asked.points_xy) + len(background_xy)) < len(asked.points_xy),
    )
    return answer_to(prompt, question.found, request.accepted_xyxy, request.photo.size_wh)


def _empty_mask(box_xyxy: FloatArray) -> Mask:
    return Mask(bitmap=np.zeros((1, 1), np.bool_), left=int(box_xyxy[0]), top=int(box_xyxy[1]))
