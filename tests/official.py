"""Meta's networks with random weights: their own would have to be downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model.checkpoints import OFFICIAL, Checkpoint, find_checkpoint
from model.sam2_module import build_module

TINY = "sam2.1_hiera_tiny"
#: Parameters of a fixture. The larger ones take minutes, and are asked for by `make test-slow`.
NETWORKS: list[Any] = [TINY, *(pytest.param(name, marks=pytest.mark.slow) for name in OFFICIAL if name != TINY)]


def with_random_weights(name: str, folder: Path) -> Checkpoint:
    """One of the NETWORKS; its file is named as it is."""
    torch.manual_seed(1)
    config, path = OFFICIAL[name].config, folder / f"{name}.safetensors"
    save_file(build_module(config).sam.state_dict(), path)
    return find_checkpoint(str(path), config=config, has_gpu=False)
