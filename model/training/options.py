"""How a run of model.training.loop goes. Knows photos with boxes, not the network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from model.training.samples import LabelledPhotos


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a run goes.

    minutes: length of the run; the learning rate follows it (cosine), so a resumed run keeps its own.
    picture_px: side of the rendered pictures, a multiple of 32.
    start_from: weights to begin with (safetensors of `facings-nano`), or None for random ones.
    textures: folder of product photos to use for a part of the faces, or None.
    labelled: photos to learn from in addition to the rendered shelves, or None.
    workers: processes that render.
    prompts_per_picture: without any, the answers to prompts are not trained, and a step takes 60 % of the time.
    start_share: how much of the weights at the start there is in those that are exported; see `exported_weights`.
    learn_encoder: whether the trunk's encoder learns too, where it is not frozen anyway; without, a step takes less
        than half of the time.
    report_every: steps between two reports. save_every_s: seconds of training between two states to resume from.
    score_every_s: seconds of training between two measurements of the averaged weights.
    """

    out: Path
    minutes: float = 60.0
    start_from: Path | None = None
    textures: Path | None = None
    labelled: LabelledPhotos | None = None
    seed: int = 0
    device: str = "cpu"
    batch_size: int = 8
    prompts_per_picture: int = 2
    start_share: float = 0.0
    picture_px: int = 512
    learning_rate: float = 2e-3
    workers: int = 2
    learn_encoder: bool = True
    resume: bool = False
    report_every: int = 10
    save_every_s: float = 120.0
    score_every_s: float = 1200.0


def for_few_photos(options: TrainOptions) -> TrainOptions:
    """How a detector learns best from a few dozen photos in minutes: it alone, and half of what it learned is kept.

    As measured; see docs/training-log.md.
    """
    return replace(options, learning_rate=2e-3, start_share=0.5, prompts_per_picture=0, learn_encoder=False)
