"""What the engine remembers of photos: the features of their tiles, and the boxes of whole photos.

Knows networks, tiles and how much to keep. Both are caches: what is missing is computed again, or done without. Neither
is locked, since both belong to the device thread; `stats` may be called from anywhere.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from cachetools import LRUCache

from model.features import Features, Proposals
from model.memory import batches
from model.network import Network
from model.tiling import Tile
from model.types import Detections, Photo


@dataclass(frozen=True, kw_only=True)
class CacheStats:
    """Tiles that were found and missed since the start; tiles kept now, and their bytes."""

    hits: int = 0
    misses: int = 0
    entries: int = 0
    nbytes: int = 0


class FeatureCache:
    """Features of tiles, of several networks: the least recently used are dropped first.

    max_bytes: how much is kept at most; features of one tile that are larger are not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._kept: LRUCache[Hashable, Features] = LRUCache(max_bytes, getsizeof=lambda tile: tile.nbytes)
        self._hits = self._misses = 0

    def get(self, key: Hashable) -> Features | None:
        """What is kept under this key; counted as found or missed."""
        found = self._kept.get(key)
        self._hits += found is not None
        self._misses += found is None
        return found

    def put(self, key: Hashable, features: Features) -> None:
        if features.nbytes <= self._kept.maxsize:
            self._kept[key] = features

    def stats(self) -> CacheStats:
        return CacheStats(
            hits=self._hits, misses=self._misses, entries=len(self._kept), nbytes=int(self._kept.currsize)
        )


class TileFeatures:
    """The features that one network makes of tiles. cache: where they are kept, maybe beside those of others."""

    def __init__(self, network: Network, cache: FeatureCache) -> None:
        self.network = network
        self._cache = cache

    def of(self, photo: Photo, tiles: Sequence[Tile]) -> Iterator[list[Features]]:
        """The features of the tiles, in order and in lists as long as one call of the network takes. Each list is made
        when it is asked for: known tiles come from the cache, the others are encoded together."""
        for batch in batches(tiles, self.network.encode_batch):
            known = {
                tile: found for tile in batch if (found := self._cache.get((self, photo.digest, tile))) is not None
            }
            missing = [tile for tile in batch if tile not in known]
            if missing:
                for made in self.network.encode(photo.pixels, missing):
                    known[made.tile] = made
                    self._cache.put((self, photo.digest, made.tile), made)
            yield [known[tile] for tile in batch]


class KnownBoxes:
    """The boxes of photos that were pre-annotated here, for clicks on the same photos.

    With them a click on a seam of tiles, or on a doubtful object, is answered better. They are a cache in this process:
    it forgets all but the last `max_photos`, and another process does not have them, so that two replicas may answer
    the same click differently, with the same version.
    """

    def __init__(self, *, max_photos: int) -> None:
        self._kept: LRUCache[str, Proposals] = LRUCache(max_photos)

    def get(self, photo: Photo) -> Proposals | None:
        """The boxes of the photo, in its pixels; None where it was not pre-annotated here, or is forgotten."""
        return self._kept.get(photo.digest)

    def put(self, photo: Photo, found: Detections) -> None:
        if self._kept.maxsize:
            self._kept[photo.digest] = Proposals(boxes_xyxy=found.boxes_xyxy, scores=found.scores)
