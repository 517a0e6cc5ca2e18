"""A network on its device: encodes tiles into Features, decodes prompts into masks and scores.

Knows tensors, tiles and the device's memory. Knows nothing of photos' whereabouts, merging or queues. State travels as
a value: `encode` returns frozen Features, `decode` takes them, and nothing is remembered in between. Preprocessing and
the choice between one and three masks are those of sam2's SAM2ImagePredictor (facebookresearch/sam2 at 2b90b9f).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from model.checkpoints import Checkpoint
from model.decoder import MaskDecoder, tile_cells
from model.device import Placement
from model.encoder import Encoder
from model.features import Features, Proposals, TilePrompt
from model.memory import BatchSize, reserved
from model.proposer import peaks
from model.sam2_module import load_module
from model.stages import UNOBSERVED, Observer, timed
from model.tiling import Tile
from model.types import PixelArray

MAX_PROPOSALS = 600  # of one tile, before anything is merged
PROPOSAL_FLOOR = 0.02  # weaker proposals are dropped

PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_DEVIATION = (0.229, 0.224, 0.225)


class Network:
    """A loaded network on its device. Not locked: one thread uses it (see model.scheduler).

    encoder: what encodes instead of the checkpoint's own encoder, whose weights are then not kept.
    observer: of the stages tile, encode and propose.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        placement: Placement,
        encoder: Encoder | None = None,
        *,
        observer: Observer = UNOBSERVED,
    ) -> None:
        module = load_module(checkpoint)
        if encoder is not None:
            module.sam.image_encoder = None
        elif placement.autocast is not None:
            _round_matmul_weights(module.sam.image_encoder, placement.autocast)
        self._module = module.to(placement.device).to(memory_format=torch.channels_last)
        self._encoder = encoder or module.encoded
        self._placement = placement
        self._observer = observer
        self._encode_batch = BatchSize("tiles", placement.encode_batch)
        self._decode_batch = BatchSize("prompts", placement.decode_batch)
        with torch.inference_mode():
            self._decoder = MaskDecoder(module.sam.sam_mask_decoder, module.position_encoding(), placement.dtype)
        self._mean = torch.tensor(PIXEL_MEAN, device=placement.device).view(3, 1, 1) * 255
        self._deviation = torch.tensor(PIXEL_DEVIATION, device=placement.device).view(3, 1, 1) * 255

    @property
    def size(self) -> int:
        """Side of the square input in pixels."""
        return int(self._module.sam.image_size)

    @property
    def has_proposals(self) -> bool:
        """Whether the checkpoint has a learned proposal head."""
        return self._module.proposal_head is not None

    @property
    def encode_batch(self) -> int:
        """Tiles that one call of `encode` should be given; fewer once memory ran out."""
        return self._encode_batch.items

    @property
    def decode_batch(self) -> int:
        """Prompts that one call of `decode` should be given; fewer once memory ran out."""
        return self._decode_batch.items

    def encode(self, pixels: PixelArray, tiles: Sequence[Tile], *, in_float: bool = False) -> list[Features]:
        """Features of each tile of the photo `pixels`, uint8 `[H, W, 3]`, in one batch if memory holds it.

        in_float: resizes tiles to fractions of grey levels, as upstream does, also on a CPU, where whole grey levels
        take a fifth of the time and are hardly different. Raises DeviceMemoryError when memory does not hold one tile.
        """
        parts = self._encode_batch.run(lambda part: self._encode(pixels, part, in_float=in_float), tiles)
        return [features for part in parts for features in part]

    def _encode(self, pixels: PixelArray, tiles: Sequence[Tile], *, in_float: bool) -> list[Features]:
        with torch.inference_mode(), self._autocast():
            images = self._images(pixels, tiles, in_float=in_float)
            with timed(self._observer, "encode"):
                maps, dtype = self._encoder(images), self._placement.dtype
                cells = [
                    tile_cells(maps.embedding[row], (maps.high_res[0][row], maps.high_res[1][row]), dtype)
                    for row in range(len(tiles))
                ]
            proposals = self._proposals(maps.head) if maps.head is not None else [None] * len(tiles)
            return [
                Features(tile=tile, cells=own_cells, proposals=own)
                for tile, own_cells, own in zip(tiles, cells, proposals, strict=True)
            ]

    def decode(self, prompts: Sequence[TilePrompt], *, multimask: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask logits `[P, M, S/4, S/4]` and predicted IoU `[P, M]` of prompts with equally many tokens, float32.

        M is 3 with `multimask`, else 1. The tiles may differ, and some prompts may have a prior and others not.
        Raises DeviceMemoryError when memory does not hold one prompt.
        """
        parts = self._decode_batch.run(lambda part: self._decode(part, multimask=multimask), prompts)
        logits, iou = zip(*parts, strict=True)
        return torch.cat(logits), torch.cat(iou)

    def _decode(self, prompts: Sequence[TilePrompt], *, multimask: bool) -> tuple[torch.Tensor, torch.Tensor]:
        device = self._placement.device
        tokens = [prompt.tokens() for prompt in prompts]
        coords = torch.from_numpy(np.stack([points for points, _ in tokens])).to(device)
        labels = torch.from_numpy(np.stack([kinds for _, kinds in tokens])).to(device)
        priors: tuple[torch.Tensor, torch.Tensor] | tuple[None] = (None,)
        if any(prompt.prior_xyxy is not None for prompt in prompts):
            no_prior = np.zeros(4, np.float32)
            boxes = np.stack([no_prior if prompt.prior_xyxy is None else prompt.prior_xyxy for prompt in prompts])
            priors = self._module.prior_masks(torch.from_numpy(boxes).to(device))
        rows_of_tile: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows_of_tile.setdefault(id(prompt.features), []).append(row)
        answers = []
        with torch.inference_mode():
            with self._autocast():
                sparse, dense = self._module.embed_prompts(coords, labels, *priors)
            for rows in rows_of_tile.values():
                tile_dense = dense[:1] if priors[0] is None else dense[rows]  # without priors it is the same for all
                cells = prompts[rows[0]].features.cells
                answers.append(self._decoder(cells, sparse[rows], tile_dense, multimask=multimask))
            in_order = torch.tensor([row for rows in rows_of_tile.values() for row in rows]).argsort()
            logits, iou = (torch.cat(part)[in_order] for part in zip(*answers, strict=True))
            return logits, iou

    def warm_up(self, *, reserved_bytes: int) -> None:
        """Encodes and decodes as much at a time as it ever will: first calls are slow, and batches find their sizes.

        reserved_bytes: of a GPU's memory, kept free for the features that callers keep.
        Raises DeviceMemoryError when not even one tile or prompt fits into the rest.
        """
        grey = np.full((64, 64, 3), 128, np.uint8)
        tile = Tile(left=0, top=0, side=64, size=self.size, level=0)
        point, yes = np.full((1, 2), self.size / 2, np.float32), np.ones(1, np.bool_)
        with reserved(self._placement.device, reserved_bytes):
            features = self.encode(grey, [tile] * self.encode_batch)[0]
            prompt = TilePrompt(features=features, points_xy=point, is_foreground=yes, box_xyxy=None)
            self.decode([prompt] * self.decode_batch, multimask=True)

    def _autocast(self) -> torch.autocast:
        dtype = self._placement.autocast
        return torch.autocast(self._placement.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def _images(self, pixels: PixelArray, tiles: Sequence[Tile], *, in_float: bool) -> torch.Tensor:
        """The tiles as normalised floats `[B, 3, S, S]`; beyond the photo they are zero, the mean colour."""
        with timed(self._observer, "tile"):
            photo = _shared_tensor(pixels)
            images = torch.empty(
                len(tiles), 3, self.size, self.size, device=self._mean.device, memory_format=torch.channels_last
            )
            for image, tile in zip(images, tiles, strict=True):
                self._draw(photo, tile, image, in_float=in_float)
            return images

    def _proposals(self, head: tuple[torch.Tensor, torch.Tensor]) -> list[Proposals]:
        with timed(self._observer, "propose"):
            boxes, scores = peaks(*head, limit=MAX_PROPOSALS)
            boxes, scores = boxes.clamp(0, self.size).cpu(), scores.cpu()
            strong = scores > PROPOSAL_FLOOR
            return [
                Proposals(boxes_xyxy=boxes[row][strong[row]].numpy(), scores=scores[row][strong[row]].numpy())
                for row in range(len(boxes))
            ]

    def _draw(self, photo: torch.Tensor, tile: Tile, image: torch.Tensor, *, in_float: bool) -> None:
        """Fills `image` `[3, S, S]`, in place: it is 12 MB, and each copy would cost as much as the resizing."""
        window = photo[tile.top : tile.top + tile.side, tile.left : tile.left + tile.side]
        height, width = (max(1, round(extent * tile.scale)) for extent in window.shape[:2])
        window = window.permute(2, 0, 1)[None].to(image.device)
        if in_float or window.device.type != "cpu":  # only the CPU resizes uint8 with antialiasing
            window = window.float()
        resized = functional.interpolate(window, (height, width), mode="bilinear", antialias=True)[0]
        torch.sub(resized, self._mean, out=image[:, :height, :width]).div_(self._deviation)
        image[:, height:] = 0
        image[:, :height, width:] = 0


def _shared_tensor(pixels: PixelArray) -> torch.Tensor:
    """The photo's own memory as a tensor. Torch knows no read-only tensors and warns of them; nothing here writes."""
    memory = (ctypes.c_uint8 * pixels.size).from_address(pixels.ctypes.data)
    return torch.frombuffer(memory, dtype=torch.uint8).view(pixels.shape)


def _round_matmul_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Rounds the weights of matrix multiplications and convolutions, in place, as autocast does at every call: they
    take less memory, and are converted once only."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            part.to(dtype)
