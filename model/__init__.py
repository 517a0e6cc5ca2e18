"""Pixels in, boxes out: SAM 2 for facings on shelf photos. Knows nothing of Label Studio, HTTP or the environment."""

from model.checkpoints import BUNDLED, OFFICIAL
from model.engine import Sam2Engine
from model.loading import EngineOptions, version_of
from model.stages import Observer, Stage
from model.types import (
    CheckpointError,
    DeadlineExceeded,
    Detections,
    DeviceError,
    DeviceMemoryError,
    EncoderError,
    Engine,
    EngineError,
    EngineStats,
    Lane,
    Mask,
    NotReady,
    Photo,
    Prompt,
)

__all__ = [
    "BUNDLED",
    "OFFICIAL",
    "CheckpointError",
    "DeadlineExceeded",
    "Detections",
    "DeviceError",
    "DeviceMemoryError",
    "EncoderError",
    "Engine",
    "EngineError",
    "EngineOptions",
    "EngineStats",
    "Lane",
    "Mask",
    "NotReady",
    "Observer",
    "Photo",
    "Prompt",
    "Sam2Engine",
    "Stage",
    "version_of",
]
