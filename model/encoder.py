"""Where a tile's features come from: the interface of an encoder, and the contract of those exported to files.

Knows tensors, the names of inputs and outputs, and the metadata of an exported file. Knows nothing of tiles or prompts,
of how such files are made (model.export), found and opened (model.exported_encoders) or served elsewhere
(model.triton_encoder). An exported encoder belongs to one checkpoint: the decoder stays in torch and takes only what
its own encoder makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Protocol

import torch

from model.checkpoints import Checkpoint
from model.types import CheckpointError

ENCODER_INPUT = "image"
FEATURE_OUTPUTS = ("image_embed", "high_res_feats_0", "high_res_feats_1")
HEAD_OUTPUTS = ("centre_logits", "edge_distances")


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """What an encoder makes of `B` images of `S` pixels.

    embedding `[B, C, S/16, S/16]` and high_res `[B, C/8, S/4, S/4]`, `[B, C/4, S/8, S/8]`: for the mask decoder.
    head: the proposal head's centre logits `[B, S/4, S/4]` and distances `[B, 4, S/4, S/4]`, where there is a head.
    """

    embedding: torch.Tensor
    high_res: tuple[torch.Tensor, torch.Tensor]
    head: tuple[torch.Tensor, torch.Tensor] | None


class Encoder(Protocol):
    """Makes Encoded of normalised images `[B, 3, S, S]`, float32; both are on the network's device."""

    def __call__(self, images: torch.Tensor, /) -> Encoded: ...


@dataclass(frozen=True, kw_only=True)
class ExportCard:
    """The metadata of an exported file, as strings.

    part: `encoder` or `decoder`. checkpoint: its version, name and hash. weights_sha256: of the file of weights.
    input_size: side of the square input in pixels. mean, deviation: of the red, green and blue of pixels in [0, 1].
    precision: of matrix multiplications and convolutions, `fp32` or `fp16`; all else is float32.
    """

    part: str
    checkpoint: str
    weights_sha256: str
    input_size: str
    mean: str
    deviation: str
    precision: str
    opset: str

    def strings(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def read(cls, strings: Mapping[str, str], source: Path | str) -> ExportCard:
        """Raises CheckpointError when `facings export` did not write what is at `source`, a path or an address."""
        try:
            return cls(**{field.name: strings[field.name] for field in fields(cls)})
        except KeyError as missing:
            raise CheckpointError(
                f"encoder {str(source)!r}: expected one that facings export wrote, got one without {missing.args[0]!r}"
            ) from None

    def check(self, source: Path | str, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError unless this is an encoder of exactly this checkpoint."""
        if self.part != "encoder":
            raise CheckpointError(f"encoder {str(source)!r}: expected an encoder, got a {self.part}")
        if self.weights_sha256 != checkpoint.digest:
            raise CheckpointError(
                f"encoder {str(source)!r}: it was exported from {self.checkpoint}, the checkpoint is"
                f" {checkpoint.version}; export it again, or choose that checkpoint"
            )


def output_shapes(size: int, width: int, *, has_head: bool) -> dict[str, tuple[int, ...]]:
    """The shape of each output for one image, by name and in order. size: of the input, S. width: of the embedding, C.
    has_head: whether the checkpoint has a proposal head."""
    sides = [size // stride for stride in (16, 4, 8)]
    shapes: dict[str, tuple[int, ...]] = {
        name: (width // part, side, side) for name, part, side in zip(FEATURE_OUTPUTS, (1, 8, 4), sides, strict=True)
    }
    if has_head:
        shapes |= dict(zip(HEAD_OUTPUTS, ((sides[1], sides[1]), (4, sides[1], sides[1])), strict=True))
    return shapes


def encoded(outputs: Mapping[str, torch.Tensor]) -> Encoded:
    """From the outputs of an exported encoder by their names."""
    embedding, finest, middle = (outputs[name] for name in FEATURE_OUTPUTS)
    has_head = HEAD_OUTPUTS[0] in outputs
    return Encoded(
        embedding=embedding,
        high_res=(finest, middle),
        head=(outputs[HEAD_OUTPUTS[0]], outputs[HEAD_OUTPUTS[1]]) if has_head else None,
    )
