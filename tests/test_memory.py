"""Work that the device's memory does not hold is done in smaller pieces, and never ends the process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from model import DeviceMemoryError, EngineOptions
from model.memory import BatchSize, is_out_of_memory


class Device:
    """Holds `capacity` items at a time."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.calls: list[int] = []

    def __call__(self, items: list[int]) -> list[int]:
        self.calls.append(len(items))
        if len(items) > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has no more.")
        return [10 * item for item in items]


@pytest.mark.parametrize(
    ("capacity", "count", "calls"),
    [
        (9, 0, []),
        (9, 8, [8]),
        (8, 20, [8, 8, 4]),
        (3, 10, [8, 4, 2, 2, 2, 2, 2]),
        (1, 3, [3, 1, 1, 1]),
    ],
)
def test_a_batch_that_does_not_fit_is_halved_and_none_is_lost(capacity: int, count: int, calls: list[int]) -> None:
    device = Device(capacity)
    answers = BatchSize("tiles", 8).run(device, list(range(count)))
    assert [answer for part in answers for answer in part] == [10 * item for item in range(count)]
    assert device.calls == calls


def test_what_did_not_fit_once_is_not_tried_again() -> None:
    device, size = Device(2), BatchSize("tiles", 8)
    size.run(device, list(range(8)))
    device.calls.clear()
    size.run(device, list(range(4)))
    assert (size.items, device.calls) == (2, [2, 2])


def test_one_item_that_does_not_fit_names_the_options_that_help() -> None:
    with pytest.raises(DeviceMemoryError, match=r"one of the tiles.*max_device_mb.*Tried to allocate") as caught:
        BatchSize("tiles", 8).run(Device(0), [1, 2])
    assert "\n" not in str(caught.value)


def test_an_error_without_words_counts_too() -> None:
    def call(_: object) -> None:
        raise MemoryError

    with pytest.raises(DeviceMemoryError, match="MemoryError"):
        BatchSize("tiles", 8).run(call, [1])


def test_other_errors_stay_what_they_are() -> None:
    def call(_: object) -> None:
        raise ValueError("no tensor")

    with pytest.raises(ValueError, match="no tensor"):
        BatchSize("tiles", 8).run(call, [1, 2])
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


@pytest.mark.parametrize(("max_device_mb", "wanted"), [(0, 1 << 30), (1000, 250 << 20), (100_000, 1 << 30)])
def test_the_feature_cache_gets_a_quarter_of_a_limited_device(max_device_mb: int, wanted: int) -> None:
    assert EngineOptions(max_device_mb=max_device_mb).feature_bytes == wanted


UNDER_A_LIMIT = """
import resource, sys
import numpy as np, torch
from model.checkpoints import find_checkpoint
from model.device import Placement
from model.network import Network
from model.tiling import Tile

torch.set_num_threads(1)
placement = Placement(device=torch.device("cpu"), autocast=None, encode_batch=16, decode_batch=16, reason="test")
network = Network(find_checkpoint("facings-nano", config=None, has_gpu=False), placement)
tiles = [Tile(left=64 * i, top=0, side=512, size=network.size, level=0) for i in range(6)]
photo = np.random.default_rng(0).integers(0, 255, (512, 1024, 3), np.uint8)
network.encode(photo, tiles[:1])
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (400 << 20), resource.RLIM_INFINITY))
found = network.encode(photo, tiles)
print([features.tile.left for features in found], network.encode_batch)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory of a process as Linux does")
def test_a_network_whose_memory_really_runs_out_goes_on_with_fewer_tiles() -> None:
    """The CPU's memory, held to 400 MiB more than one tile took; a GPU says the same in its own words."""
    ended = subprocess.run([sys.executable, "-c", UNDER_A_LIMIT], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]
    lefts, batch = ended.stdout.strip().rsplit(maxsplit=1)
    assert lefts == str([64 * i for i in range(6)])
    assert int(batch) < 6
    assert "out of device memory" in ended.stderr
