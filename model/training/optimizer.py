"""How weights change: which of them learn, how fast, one step, and their average over the steps.

Knows torch and the parts of the network; neither losses nor pictures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model.sam2_module import FacingsModule

MAX_GRADIENT_NORM = 5.0
FROZEN_STAGES = 3  # of the trunk's encoder: all up to stride 8
ENCODER_RATE = 0.2  # of the learning rate, for what is not frozen of the encoder
LONGEST_MEMORY = 0.998  # decay of the averaged weights at a step


def optimizer_of(
    module: FacingsModule, learning_rate: float, *, learn_encoder: bool = True, fused: bool = False
) -> torch.optim.AdamW:
    """Of all that learns. What the first stages of the encoder know of real photos stays as it is, the others learn
    slowly, or not at all; see `set_rate`."""
    encoder = module.sam.image_encoder.trunk.encoder
    for part in (encoder.stem, *encoder.stages[: FROZEN_STAGES if learn_encoder else None]):
        part.requires_grad_(False)
    of_encoder = {id(parameter) for parameter in encoder.parameters()}
    groups = [
        {
            "params": [
                p
                for p in module.parameters()
                if p.requires_grad and (id(p) in of_encoder) == is_encoder and (p.ndim > 1) == is_matrix
            ],
            "share": ENCODER_RATE if is_encoder else 1.0,
            "weight_decay": 0.02 if is_matrix else 0.0,
        }
        for is_encoder in (False, True)
        for is_matrix in (False, True)
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Gives each group of `optimizer_of` its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["share"]


def descend(
    loss: torch.Tensor, module: torch.nn.Module, optimizer: torch.optim.Optimizer, average: AveragedModel
) -> None:
    """One step against the gradient of `loss`, with a bounded norm. A gradient that is not finite changes nothing."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), MAX_GRADIENT_NORM)
    if torch.isfinite(norm):
        optimizer.step()
        average.update_parameters(module)


def moving_average(averaged: Any, current: Any, steps: Any) -> None:
    """The exponential moving average of weights: over the last tenth of the steps, of a long run over the last 500.

    With the long run's memory alone, a run of a hundred steps would end with the weights that it began with.
    """
    decay = min(LONGEST_MEMORY, (1 + int(steps)) / (10 + int(steps)))
    get_ema_multi_avg_fn(decay)(averaged, current, steps)  # type: ignore[no-untyped-call]
