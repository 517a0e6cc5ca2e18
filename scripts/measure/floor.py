"""How fast a checkpoint could be on this machine at all: what its work takes in arithmetic and in bytes, and what the
machine does of both in a second.

Knows the network and torch's counter of floating-point operations.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import EngineOptions
from model.checkpoints import find_checkpoint
from model.device import Placement, choose_placement
from model.features import TilePrompt
from model.network import Network
from model.renderer.shelves import render_shelf
from model.sam2_module import load_module
from model.tiling import Tile

MATRIX = 4096  # rows and columns of the matrices whose product stands for the machine's best
COPIED_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One call. flops: a multiplication and an addition are two. least_bytes: weights and features, read once.

    floor_s: by arithmetic or by bytes, whichever takes longer. measured_s: median.
    """

    name: str
    flops: float
    least_bytes: int
    floor_s: float
    measured_s: float


@dataclass(frozen=True, kw_only=True)
class FloorResult:
    """flops_per_s, bytes_per_s: the most that this machine did in a large matrix product and in a copy.

    Both in the precision of the checkpoint.
    """

    checkpoint: str
    precision: str
    flops_per_s: float
    bytes_per_s: float
    pieces: list[Piece]


def measure_floor(options: EngineOptions, *, repeat: int) -> FloorResult:
    """Encoding one tile, and decoding one prompt and a batch of them on it."""
    placement = choose_placement(options.device)
    checkpoint = find_checkpoint(
        options.checkpoint, config=options.checkpoint_config, has_gpu=placement.device.type == "cuda"
    )
    network = Network(checkpoint, placement)
    weights = sum(weight.numel() for weight in load_module(checkpoint).sam.image_encoder.parameters())
    flops_per_s, bytes_per_s = _best_of_the_machine(placement)
    photo = render_shelf(1, (1024, 1024)).photo_rgb
    tile = Tile(left=0, top=0, side=1024, size=network.size, level=0)
    (features,) = network.encode(photo, [tile])
    box = np.array([300, 300, 400, 500], np.float32)
    nowhere, none = np.zeros((0, 2), np.float32), np.zeros(0, np.bool_)
    prompt = TilePrompt(features=features, points_xy=nowhere, is_foreground=none, box_xyxy=box)
    batch = network.decode_batch
    calls: list[tuple[str, Callable[[], object], int]] = [
        ("encode a tile", lambda: network.encode(photo, [tile]), weights * placement.dtype.itemsize),
        ("decode a prompt", lambda: network.decode([prompt], multimask=False), features.nbytes),
        (f"decode {batch} prompts", lambda: network.decode([prompt] * batch, multimask=False), features.nbytes),
    ]
    pieces = []
    for name, call, least_bytes in calls:
        with FlopCounterMode(display=False) as counter:
            call()
        flops = float(counter.get_total_flops())
        measured_s = float(np.median([_seconds(call, placement) for _ in range(repeat + 1)][1:]))
        floor_s = max(flops / flops_per_s, least_bytes / bytes_per_s)
        pieces.append(Piece(name=name, flops=flops, least_bytes=least_bytes, floor_s=floor_s, measured_s=measured_s))
    return FloorResult(
        checkpoint=checkpoint.version,
        precision=str(placement.dtype).removeprefix("torch."),
        flops_per_s=flops_per_s,
        bytes_per_s=bytes_per_s,
        pieces=pieces,
    )


def _best_of_the_machine(placement: Placement) -> tuple[float, float]:
    """Operations and bytes (read and written) a second: the best of five large matrix products and of five copies."""
    matrix = torch.randn(MATRIX, MATRIX, device=placement.device, dtype=placement.dtype)
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=placement.device)
    target = torch.empty_like(source)
    product_s = min(_seconds(lambda: matrix @ matrix, placement) for _ in range(5))
    copy_s = min(_seconds(lambda: target.copy_(source), placement) for _ in range(5))
    return 2 * MATRIX**3 / product_s, 2 * COPIED_BYTES / copy_s


def _seconds(call: Callable[[], object], placement: Placement) -> float:
    is_gpu = placement.device.type == "cuda"
    if is_gpu:
        torch.cuda.synchronize(placement.device)
    started = time.perf_counter()
    call()
    if is_gpu:
        torch.cuda.synchronize(placement.device)
    return time.perf_counter() - started


def print_floor(result: FloorResult) -> None:
    """The machine, then a line for each piece of work."""
    print(
        f"{result.checkpoint} in {result.precision}; this machine: {result.flops_per_s / 1e9:.0f} GFLOP/s, "
        f"{result.bytes_per_s / 1e9:.1f} GB/s"
    )
    print(f"  {'':<20} {'GFLOP':>8} {'MB':>8} {'floor':>10} {'measured':>10}")
    for piece in result.pieces:
        floor, measured = f"{1000 * piece.floor_s:.1f} ms", f"{1000 * piece.measured_s:.1f} ms"
        print(
            f"  {piece.name:<20} {piece.flops / 1e9:>8.1f} {piece.least_bytes / 1e6:>8.1f} {floor:>10} {measured:>10}"
            f"   {piece.measured_s / piece.floor_s:.1f} times the floor"
        )
