"""The trunk of `facings-nano`, in the shape that sam2's ImageEncoder expects: an EfficientNet-Lite with adapters.

Knows torch only; which file the first weights come from is known to model.training. The encoder is that of
EfficientNet-Lite (Tan and Le 2019; Lite variants 2020): inverted residual blocks without squeeze-and-excitation, with
ReLU6. Its maps are narrow, so adapters widen them, and pass down what the coarser ones know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

NORM_EPSILON = 1e-3  # of the published weights


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """Blocks of one width: the first has the stride, the others none."""

    width: int
    kernel: int
    stride: int


#: The stages of EfficientNet-Lite after the stem, at width 1.
STAGES = (
    _Stage(width=16, kernel=3, stride=1),
    _Stage(width=24, kernel=3, stride=2),
    _Stage(width=40, kernel=5, stride=2),
    _Stage(width=80, kernel=3, stride=2),
    _Stage(width=112, kernel=5, stride=1),
    _Stage(width=192, kernel=5, stride=2),
    _Stage(width=320, kernel=3, stride=1),
)
STEM_WIDTH = 32
EXPANSION = 6
LEVELS_AFTER = (1, 2, 4, 6)  # stages whose outputs are handed out: strides 4, 8, 16 and 32


def _unit(
    in_channels: int, out_channels: int, *, kernel: int = 1, stride: int = 1, groups: int = 1, active: bool = True
) -> nn.Sequential:
    """Convolution, batch norm and, when `active`, ReLU6."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels, eps=NORM_EPSILON),
        *([nn.ReLU6(inplace=True)] if active else []),
    )


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


class InvertedResidual(nn.Module):
    """Widen by 1×1, filter each channel, narrow by 1×1 (Sandler et al. 2018); added to the input where shapes allow."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.has_identity = stride == 1 and in_channels == out_channels
        self.units = nn.Sequential(
            *([_unit(in_channels, inner)] if expansion > 1 else []),
            _unit(inner, inner, kernel=kernel, stride=stride, groups=inner),
            _unit(inner, out_channels, active=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner: torch.Tensor = self.units(x)
        return inner.add_(x) if self.has_identity else inner


class EfficientNetLite(nn.Module):
    """RGB `[B, 3, S, S]`, normalised as everywhere in `model`, to maps at strides 4, 8, 16 and 32, finest first.

    depths: blocks of each of the seven stages. widths: their channels.
    """

    def __init__(self, depths: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        if len(depths) != len(STAGES) or len(widths) != len(STAGES):
            raise ValueError(
                f"encoder: expected {len(STAGES)} depths and widths, got {list(depths)} and {list(widths)}"
            )
        self.channels = [widths[stage] for stage in LEVELS_AFTER]
        self.stem = _unit(3, STEM_WIDTH, kernel=3, stride=2)
        self.stages = nn.ModuleList()
        before = STEM_WIDTH
        for number, (stage, depth, width) in enumerate(zip(STAGES, depths, widths, strict=True)):
            blocks = []
            for block in range(depth):
                blocks.append(
                    InvertedResidual(
                        before,
                        width,
                        kernel=stage.kernel,
                        stride=stage.stride if block == 0 else 1,
                        expansion=EXPANSION if number else 1,
                    )
                )
                before = width
            self.stages.append(nn.Sequential(*blocks))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.stem(x)
        maps = []
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number in LEVELS_AFTER:
                maps.append(x)
        return maps


class AdaptedTrunk(nn.Module):
    """RGB `[B, 3, S, S]` to four maps at strides 4, 8, 16 and 32, finest first, in the shape that sam2 expects.

    Each map of the encoder is widened by a 3×3 convolution, the next coarser answer is added, and residual blocks see
    both. The maps are divided by four: SAM 2's neck does not normalise, and features much larger than its decoder's
    first weights drown the prompts, so that the decoder never learns to use them.

    depths, widths: see EfficientNetLite. channels: width of each answer, finest first. blocks: residual blocks of each.
    """

    def __init__(
        self, *, depths: Sequence[int], widths: Sequence[int], channels: Sequence[int], blocks: Sequence[int]
    ) -> None:
        super().__init__()
        if len(channels) != 4 or len(blocks) != 4:
            raise ValueError(f"trunk: expected 4 channels and 4 blocks, got {list(channels)} and {list(blocks)}")
        self.channel_list = list(channels)[::-1]  # ImageEncoder compares it with the neck's, coarsest first
        self.encoder = EfficientNetLite(depths, widths)
        self.adapters = nn.ModuleList(
            convolution(before, width) for before, width in zip(self.encoder.channels, channels, strict=True)
        )
        self.from_above = nn.ModuleList(
            nn.Sequential(nn.Conv2d(above, width, kernel_size=1, bias=False), nn.BatchNorm2d(width))
            for above, width in zip(channels[1:], channels[:-1], strict=True)
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(width) for _ in range(count)))
            for width, count in zip(channels, blocks, strict=True)
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        levels = self.encoder(x)
        answers: list[torch.Tensor] = []
        for level in reversed(range(len(levels))):
            own = self.adapters[level](levels[level])
            if answers:
                own = own.add_(functional.interpolate(self.from_above[level](answers[-1]), scale_factor=2.0))
            answers.append(self.blocks[level](torch.relu_(own)))
        return [answer / 4 for answer in answers[::-1]]

    def train(self, mode: bool = True) -> AdaptedTrunk:
        """As for any module, but for the batch norms of the encoder, which keep the statistics of real photos."""
        super().train(mode)
        self.encoder.eval()
        return self


class NoPositionEncoding(nn.Module):
    """Stands where SAM 2's neck makes position encodings for its video memory, which Facings does not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` to zeros `[B, 1, H, W]`."""
        return x.new_zeros(()).expand(x.shape[0], 1, *x.shape[2:])
