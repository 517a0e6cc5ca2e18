"""Where the network runs and in which precision, decided in one place. Knows torch; nothing of networks."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from model.types import DeviceError


@dataclass(frozen=True, kw_only=True)
class Placement:
    """device: where tensors live. autocast: the dtype of the network's inner arithmetic, None for plain fp32.
    encode_batch: tiles to encode at a time. decode_batch: prompts to decode at a time; fewer where memory does not hold
    them (see model.memory). reason: why, for the log."""

    device: torch.device
    autocast: torch.dtype | None
    encode_batch: int
    decode_batch: int
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """Of the features that are kept."""
        return self.autocast or torch.float32


def has_gpu() -> bool:
    return torch.cuda.is_available()


def choose_placement(requested: str) -> Placement:
    """`auto`, `cpu`, `cuda` or `cuda:N` to a Placement. Raises DeviceError for a device that is not there.

    A CPU encodes one tile and decodes 16 prompts at a time: larger batches leave its caches and touch fresh memory, and
    were slower when measured (`facings-nano`: 11 ms a prompt with 16, 25 ms with 32).
    """
    name = ("cuda" if has_gpu() else "cpu") if requested == "auto" else requested
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"device: expected auto, cpu, cuda or cuda:N, got {requested!r}") from None
    if device.type == "cuda":
        if not has_gpu() or (device.index or 0) >= torch.cuda.device_count():
            raise DeviceError(f"device: {requested!r} was asked for; torch sees {torch.cuda.device_count()} GPUs")
        dtype, reason = _gpu_precision(device)
        return Placement(device=device, autocast=dtype, encode_batch=16, decode_batch=64, reason=reason)
    if device.type != "cpu":
        raise DeviceError(f"device: expected auto, cpu, cuda or cuda:N, got {requested!r}")
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"):
        return Placement(
            device=device, autocast=torch.bfloat16, encode_batch=1, decode_batch=16, reason="the CPU computes in bf16"
        )
    return Placement(
        device=device, autocast=None, encode_batch=1, decode_batch=16, reason="the CPU has no bf16 instructions: fp32"
    )


def _gpu_precision(device: torch.device) -> tuple[torch.dtype | None, str]:
    """bf16 where the GPU has it, float16 where it has tensor cores for that alone (Volta, and Turing by name).

    GeForce GTX 16, T1000 and similar GPUs report Turing's capability and have no tensor cores; convolutions in float16
    are reported to give NaN on them (pytorch/pytorch#77955).
    """
    with torch.cuda.device(device):  # there may be several
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU computes in bf16"
    capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    if (7, 0) <= capability < (7, 5) or (capability == (7, 5) and re.search(r"RTX|\bT4G?\b", name) is not None):
        return torch.float16, "the GPU has no bf16: fp16"
    return None, "the GPU has neither bf16 nor tensor cores: fp32"
