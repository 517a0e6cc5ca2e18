"""Features of tiles are kept within their bytes, those used last longest; boxes of the last photos are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.decoder import TileCells
from model.feature_cache import CacheStats, FeatureCache, KnownBoxes, TileFeatures
from model.features import Features
from model.network import Network
from model.tiling import Tile
from model.types import Detections, Photo

PHOTO = Photo(pixels=np.zeros((8, 8, 3), np.uint8))
OTHER = Photo(pixels=np.ones((8, 8, 3), np.uint8))


def tile(number: int) -> Tile:
    return Tile(left=number, top=0, side=8, size=8, level=0)


class Encoder:
    """A network whose features of tile N take `nbytes[N]` bytes, and which encodes two tiles at a time."""

    encode_batch = 2

    def __init__(self, nbytes: Sequence[int]) -> None:
        self.nbytes = nbytes
        self.encoded: list[list[int]] = []

    def encode(self, pixels: np.ndarray, tiles: Sequence[Tile]) -> list[Features]:
        self.encoded.append([one.left for one in tiles])
        return [self._features(one) for one in tiles]

    def _features(self, one: Tile) -> Features:
        empty = torch.zeros(0, dtype=torch.uint8)
        cells = TileCells(embedding=torch.zeros(self.nbytes[one.left], dtype=torch.uint8), middle=empty, finest=empty)
        return Features(tile=one, cells=cells, proposals=None)


def features_of(encoder: Encoder, cache: int | FeatureCache) -> TileFeatures:
    return TileFeatures(cast(Network, encoder), FeatureCache(cache) if isinstance(cache, int) else cache)


def asked(features: TileFeatures, *numbers: int, photo: Photo = PHOTO) -> list[list[int]]:
    return [[one.tile.left for one in batch] for batch in features.of(photo, [tile(number) for number in numbers])]


def test_nothing_is_encoded_for_no_tile() -> None:
    encoder = Encoder([])
    cache = FeatureCache(10)
    assert asked(features_of(encoder, cache)) == encoder.encoded == []
    assert cache.stats() == CacheStats(hits=0, misses=0, entries=0, nbytes=0)


def test_tiles_come_in_their_order_and_in_the_batches_of_the_network() -> None:
    encoder = Encoder([1] * 5)
    cache = FeatureCache(100)
    features = features_of(encoder, cache)
    assert asked(features, 3) == [[3]]
    assert asked(features, 4, 3, 2, 1, 0) == [[4, 3], [2, 1], [0]]
    assert encoder.encoded == [[3], [4], [2, 1], [0]]
    assert cache.stats() == CacheStats(hits=1, misses=5, entries=5, nbytes=5)


def test_a_batch_is_not_encoded_before_it_is_asked_for() -> None:
    encoder = Encoder([1] * 4)
    batches = features_of(encoder, 100).of(PHOTO, [tile(number) for number in range(4)])
    next(batches)
    assert encoder.encoded == [[0, 1]]


def test_the_least_recently_used_goes_first() -> None:
    encoder = Encoder([5, 5, 5])
    features = features_of(encoder, 10)
    for number in (0, 1, 0, 2):
        asked(features, number)
    encoder.encoded.clear()
    asked(features, 0)
    asked(features, 2)
    assert encoder.encoded == []
    asked(features, 1)
    assert encoder.encoded == [[1]]


def test_features_larger_than_the_cache_are_given_but_not_kept_and_drop_nothing() -> None:
    encoder = Encoder([5, 11])
    features = features_of(encoder, 10)
    assert asked(features, 0, 1) == [[0, 1]]
    encoder.encoded.clear()
    assert asked(features, 0, 1) == [[0, 1]]
    assert encoder.encoded == [[1]]


def test_the_same_tile_of_another_photo_is_another_one() -> None:
    encoder = Encoder([5])
    features = features_of(encoder, 100)
    asked(features, 0)
    asked(features, 0, photo=OTHER)
    assert encoder.encoded == [[0], [0]]


@given(nbytes=st.lists(st.integers(0, 40), min_size=8, max_size=8), numbers=st.lists(st.integers(0, 7)))
def test_the_bytes_kept_are_counted_and_bounded(nbytes: list[int], numbers: list[int]) -> None:
    cache = FeatureCache(100)
    features = features_of(Encoder(nbytes), cache)
    for number in numbers:
        assert asked(features, number) == [[number]]
        kept: dict[Any, Features] = dict(cache._kept)
        assert cache.stats().nbytes == sum(one.nbytes for one in kept.values()) <= 100
        assert cache.stats().entries == len(kept)


def test_two_networks_share_a_cache_and_never_their_features() -> None:
    cache, encoders = FeatureCache(12), (Encoder([5]), Encoder([5]))
    both = [features_of(encoder, cache) for encoder in encoders]
    for _ in range(2):
        for features in both:
            assert asked(features, 0) == [[0]]
    assert [encoder.encoded for encoder in encoders] == [[[0]], [[0]]]
    assert cache.stats() == CacheStats(hits=2, misses=2, entries=2, nbytes=10)


def boxes(count: int) -> Detections:
    return Detections(boxes_xyxy=np.tile(np.array([0, 0, 4, 4], np.float32), (count, 1)), scores=np.ones(count))


@pytest.mark.parametrize("count", [0, 3])
def test_the_boxes_of_a_photo_are_known_until_others_took_its_place(count: int) -> None:
    known = KnownBoxes(max_photos=1)
    assert known.get(PHOTO) is None
    known.put(PHOTO, boxes(count))
    found = known.get(PHOTO)
    assert found is not None
    assert len(found.boxes_xyxy) == count
    known.put(OTHER, boxes(1))
    assert known.get(PHOTO) is None


def test_a_memory_of_no_photo_keeps_nothing() -> None:
    known = KnownBoxes(max_photos=0)
    known.put(PHOTO, boxes(1))
    assert known.get(PHOTO) is None
