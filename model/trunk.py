"""The convolutional trunk of `facings-nano`, in the shape that sam2's ImageEncoder expects.

Knows torch only. A plain residual network (He et al. 2016, basic blocks): on rendered shelves it learned several times
faster than a Hiera trunk from scratch, and small convolutions are what CPUs with bf16 do best.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def convolution(in_channels: int, out_channels: int, *, stride: int = 1) -> nn.Sequential:
    """3×3 convolution and batch norm, without activation."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions, and a connection around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = convolution(channels, channels)
        self.second = convolution(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.relu_(self.first(x))
        return torch.relu_(self.second(inner).add_(x))  # in place: fresh memory costs more than the arithmetic


class ConvTrunk(nn.Module):
    """RGB `[B, 3, S, S]` to four maps at strides 4, 8, 16 and 32, finest first.

    The maps are divided by four: SAM 2's neck does not normalise, and features much larger than its decoder's first
    weights drown the prompts, so that the decoder never learns to use them.

    channels: width of each stage, finest first.
    depths: residual blocks of each stage.
    """

    def __init__(self, channels: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        if len(channels) != 4 or len(depths) != 4:
            raise ValueError(f"trunk: expected 4 channels and 4 depths, got {list(channels)} and {list(depths)}")
        self.channel_list = list(channels)[::-1]  # ImageEncoder compares it with the neck's, coarsest first
        self.stem = nn.Sequential(convolution(3, channels[0] // 2 + 4, stride=2), nn.ReLU(inplace=True))
        widths = [channels[0] // 2 + 4, *channels]
        self.stages = nn.ModuleList(
            nn.Sequential(
                convolution(before, width, stride=2),
                nn.ReLU(inplace=True),
                *(ResidualBlock(width) for _ in range(depth)),
            )
            for before, width, depth in zip(widths[:-1], channels, depths, strict=True)
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x / 4)
        return maps


class NoPositionEncoding(nn.Module):
    """Stands where SAM 2's neck makes position encodings for its video memory, which Facings does not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` to zeros `[B, 1, H, W]`."""
        return x.new_zeros(()).expand(x.shape[0], 1, *x.shape[2:])
