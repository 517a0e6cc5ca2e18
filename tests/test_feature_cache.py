"""The cache holds what was used last, within its bytes."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from model.feature_cache import CacheStats, FeatureCache


@dataclass(frozen=True)
class Value:
    nbytes: int


def test_an_empty_cache_misses() -> None:
    cache: FeatureCache[Value] = FeatureCache(10)
    assert cache.get("a") is None
    assert cache.stats() == CacheStats(hits=0, misses=1, entries=0, nbytes=0)


def test_the_least_recently_used_goes_first() -> None:
    cache: FeatureCache[Value] = FeatureCache(10)
    cache.put("a", Value(5))
    cache.put("b", Value(5))
    assert cache.get("a")
    cache.put("c", Value(5))
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (Value(5), None, Value(5))


def test_what_is_larger_than_the_cache_is_not_kept_and_drops_nothing() -> None:
    cache: FeatureCache[Value] = FeatureCache(10)
    cache.put("a", Value(5))
    cache.put("b", Value(11))
    assert (cache.get("a"), cache.get("b")) == (Value(5), None)


@given(puts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40))))
def test_the_bytes_held_are_counted_and_bounded(puts: list[tuple[int, int]]) -> None:
    cache: FeatureCache[Value] = FeatureCache(100)
    for key, nbytes in puts:
        cache.put(key, Value(nbytes))
        held = [value.nbytes for key in range(10) if (value := cache.get(key))]
        assert cache.stats().nbytes == sum(held) <= 100
        assert cache.stats().entries == len(held)
