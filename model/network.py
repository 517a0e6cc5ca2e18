"""The only importer of sam2: builds a network once, encodes tiles into Features, decodes prompts into masks and scores.

Knows tensors and tiles; nothing of photos' whereabouts, merging or queues. State travels as a value: `encode` returns
frozen Features, `decode` takes them, and nothing is remembered in between. Preprocessing, prompt tokens and the choice
between one and three masks are those of sam2's SAM2ImagePredictor (facebookresearch/sam2 at 2b90b9f).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import sam2
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model.boxes import cells_inside
from model.checkpoints import OWN_CONFIGS, Checkpoint, read_weights
from model.decoder import MaskDecoder, TileCells, tile_cells
from model.device import Placement
from model.encoder import Encoded, Encoder
from model.memory import BatchSize
from model.proposer import peaks
from model.stages import Timed, untimed
from model.tiling import Tile
from model.types import BoolArray, CheckpointError, FloatArray, PixelArray

MASK_STRIDE = 4  # tile pixels for each cell of the decoder's logits
MAX_PROPOSALS = 600  # of one tile, before anything is merged
PROPOSAL_FLOOR = 0.02  # weaker proposals are never asked for
PRIOR_LOGIT = 8.0  # of a mask prompt's inside; outside its negative

PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_DEVIATION = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class FeatureMaps:
    """What the encoder makes of images: `finest` `[B, C, h/4, w/4]` for the proposal head, `embedding`
    `[B, C, h/16, w/16]` and `high_res` (strides 4 and 8) for the mask decoder."""

    finest: torch.Tensor
    embedding: torch.Tensor
    high_res: tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Proposals:
    """What a learned head found: float32 `[N, 4]` with scores `[N]`, strongest first."""

    boxes_xyxy: FloatArray
    scores: FloatArray

    @property
    def nbytes(self) -> int:
        return self.boxes_xyxy.nbytes + self.scores.nbytes

    def on(self, tile: Tile) -> Proposals:
        """Those of a photo, in pixels of one of its tiles."""
        boxes = tile.to_tile(self.boxes_xyxy.reshape(-1, 2)).reshape(-1, 4)
        return Proposals(boxes_xyxy=boxes, scores=self.scores)


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """What `encode` made of one tile: all that prompts need, on the device, and the proposals, in pixels of the tile,
    when the checkpoint has a head."""

    tile: Tile
    cells: TileCells
    proposals: Proposals | None

    @property
    def nbytes(self) -> int:
        return self.cells.nbytes + (self.proposals.nbytes if self.proposals else 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class TilePrompt:
    """A prompt in pixels of the tile of `features`: points `[N, 2]`, foreground or not `[N]`, box `[4]` or None.

    proposals: what is thought to be there. prior_xyxy `[4]`: the box that the object is thought to fill.
    """

    features: Features
    points_xy: FloatArray
    is_foreground: BoolArray
    box_xyxy: FloatArray | None
    proposals: Proposals | None = None
    prior_xyxy: FloatArray | None = None

    @property
    def is_ambiguous(self) -> bool:
        """One foreground point and nothing else: it may mean a part, a unit or a group, so all three masks count."""
        return self.box_xyxy is None and self.prior_xyxy is None and len(self.points_xy) == 1

    def tokens(self) -> tuple[FloatArray, npt.NDArray[np.int32]]:
        """SAM's points `[T, 2]` and labels `[T]`: box corners first (2 and 3), then points (1 or 0)."""
        corners = np.zeros((0, 2), np.float32) if self.box_xyxy is None else self.box_xyxy.reshape(2, 2)
        labels = np.concatenate([np.array([2, 3][: len(corners)], np.int32), self.is_foreground.astype(np.int32)])
        return np.concatenate([corners, self.points_xy]).astype(np.float32), labels


class FacingsModule(nn.Module):
    """SAM 2 as sam2 builds it, and the proposal head where the checkpoint has one."""

    def __init__(self, sam: nn.Module, proposal_head: nn.Module | None) -> None:
        super().__init__()
        self.sam: Any = sam
        self.proposal_head: Any = proposal_head

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def features(self, images: torch.Tensor) -> FeatureMaps:
        """Normalised images `[B, 3, H, W]` to feature maps, as SAM2ImagePredictor.set_image makes them."""
        sam = self.sam
        finest, middle, embedding = self._pyramid(images)
        high_res = sam.sam_mask_decoder.conv_s0(finest), sam.sam_mask_decoder.conv_s1(middle)
        if sam.directly_add_no_mem_embed:
            embedding = embedding + sam.no_mem_embed.view(1, -1, 1, 1)
        return FeatureMaps(finest=finest, embedding=embedding, high_res=high_res)

    def encoded(self, images: torch.Tensor) -> Encoded:
        """What the decoder needs, and the proposal head's answer where there is one; see model.encoder.Encoder."""
        maps = self.features(images)
        head = None if self.proposal_head is None else self.proposal_head(maps.finest)
        return Encoded(embedding=maps.embedding, high_res=maps.high_res, head=head)

    def _pyramid(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The `backbone_fpn` of sam2's image encoder, finest first, without what only videos need, and summed in the
        precision of the rest: upstream enlarges and adds each level in float32, a quarter of the whole encoder's time.
        """
        encoder, neck = self.sam.image_encoder, self.sam.image_encoder.neck
        levels = encoder.trunk(images)
        answers: list[torch.Tensor] = []
        for level in reversed(range(len(levels))):
            lateral = neck.convs[len(levels) - 1 - level](levels[level])
            if answers and level in neck.fpn_top_down_levels:
                above = answers[-1].to(lateral.dtype)
                lateral = lateral.add_(functional.interpolate(above, scale_factor=2.0, mode=neck.fpn_interp_model))
                lateral = lateral / 2 if neck.fuse_type == "avg" else lateral
            answers.append(lateral)
        return answers[::-1][: len(answers) - encoder.scalp]

    def embed_prompts(
        self,
        coords: torch.Tensor,
        labels: torch.Tensor,
        mask_logits: torch.Tensor | None,
        has_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """SAM's sparse and dense embeddings of prompts.

        coords `[P, T, 2]` in tile pixels with labels `[P, T]`: boxes stand as corner points, as SAM2ImagePredictor
        passes them, which adds one padding token to every prompt.
        mask_logits `[P, 1, S/4, S/4]`: SAM's mask prompts, or None for none at all; has_mask `[P]`: which prompts have
        one (None: all).
        """
        encoder = self.sam.sam_prompt_encoder
        with torch.autocast(coords.device.type, enabled=False):  # bf16 would move points by whole pixels
            sparse, dense = encoder(points=(coords, labels), boxes=None, masks=None)
        if mask_logits is not None:
            _, with_mask = encoder(points=None, boxes=None, masks=mask_logits)
            dense = with_mask if has_mask is None else torch.where(has_mask.view(-1, 1, 1, 1), with_mask, dense)
        return sparse, dense

    def prior_masks(self, prior_xyxy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes `[P, 4]` that objects are thought to fill, as mask prompts `[P, 1, S/4, S/4]`, and which of them have
        an area `[P]`: one without stands for none."""
        inside = cells_inside(prior_xyxy, self.sam.sam_prompt_encoder.mask_input_size[0], MASK_STRIDE)
        return torch.where(inside[:, None], PRIOR_LOGIT, -PRIOR_LOGIT), prior_xyxy[:, 2] > prior_xyxy[:, 0]

    def position_encoding(self) -> torch.Tensor:
        """Of the cells of a tile's embedding, `[1, C, S/16, S/16]`, float32."""
        with torch.autocast(self.device.type, enabled=False):
            return cast(torch.Tensor, self.sam.sam_prompt_encoder.get_dense_pe())

    def all_masks(
        self,
        maps: FeatureMaps,
        rows: torch.Tensor,
        coords: torch.Tensor,
        labels: torch.Tensor,
        mask_logits: torch.Tensor,
        has_mask: torch.Tensor | None,
        *,
        canvas_offset: tuple[int, int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All four masks of each prompt (the single one first) and their predicted IoU, for training.

        rows `[P]`: the picture of each prompt. coords `[P, T, 2]` in pixels of the tile; labels `[P, T]`.
        mask_logits, has_mask: see `embed_prompts`.
        canvas_offset: cell (x, y) of the tile where the features begin; they may be smaller than a tile.
        Returns logits `[P, 4, h/4, w/4]` and `[P, 4]`.
        """
        sparse, dense = self.embed_prompts(coords, labels, mask_logits, has_mask)
        height, width = maps.embedding.shape[-2:]
        x, y = canvas_offset
        here = (..., slice(y, y + height), slice(x, x + width))
        logits, iou, _, _ = self.sam.sam_mask_decoder.predict_masks(
            image_embeddings=maps.embedding[rows],
            image_pe=self.position_encoding()[here],
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense[here],
            repeat_image=False,
            high_res_features=[level[rows] for level in maps.high_res],
        )
        return logits, iou


def build_module(config: str) -> FacingsModule:
    """An untrained network: one of OWN_CONFIGS, a config of the sam2 package by its name there, or a YAML file's path.

    sam2's own post-processing switches (dynamic fall-back to the three masks) are on, as build_sam2 sets them.
    Raises CheckpointError when there is no such config.
    """
    tree = _read_config(config)
    try:
        if config not in OWN_CONFIGS:
            extra = {"dynamic_multimask_via_stability": True, "dynamic_multimask_stability_delta": 0.05}
            OmegaConf.update(tree, "model.sam_mask_decoder_extra_args", extra, force_add=True)
        head = tree.get("proposal_head")
        return FacingsModule(instantiate(tree.model), instantiate(head) if head is not None else None)
    except (OmegaConfBaseException, TypeError) as error:
        raise CheckpointError(f"network config {config!r}: {str(error).splitlines()[0]}") from error


def has_proposal_head(config: str) -> bool:
    """Whether networks of this config have a learned proposal head. Raises CheckpointError as `build_module` does."""
    return _read_config(config).get("proposal_head") is not None


def _read_config(config: str) -> DictConfig:
    if config in OWN_CONFIGS:
        path = Path(__file__).with_name(OWN_CONFIGS[config])
    else:
        packaged = Path(sam2.__file__).parent / config
        path = packaged if packaged.is_file() else Path(config)
    try:
        tree = OmegaConf.load(path)
    except FileNotFoundError:
        known = ", ".join(map(repr, OWN_CONFIGS))
        raise CheckpointError(
            f"network config {config!r}: expected one of {known}, a config of sam2 or a YAML file; no such file"
        ) from None
    except OmegaConfBaseException as error:
        raise CheckpointError(f"network config {config!r}: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, DictConfig) or "model" not in tree:
        raise CheckpointError(f"network config {config!r}: expected a YAML file with a key 'model'")
    return tree


def load_weights(module: FacingsModule, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Strictly: every tensor of the network from the file and none left over. Raises CheckpointError naming the first.

    Meta's files hold SAM 2 alone; those of `facings train` hold it under `sam.`, with the proposal head beside it.
    """
    target: nn.Module = module if any(name.startswith("sam.") for name in tensors) else module.sam
    wanted = target.state_dict()
    missing, surplus = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    misfits = [name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape]
    if missing or surplus or misfits:
        example = next(iter(misfits or missing or surplus))
        raise CheckpointError(
            f"checkpoint {source!r} does not fit its network: {len(missing)} tensors missing, {len(surplus)} not in the"
            f" network, {len(misfits)} of another shape (for example {example!r}); is the config the right one?"
        )
    target.load_state_dict(tensors)


def load_module(checkpoint: Checkpoint) -> FacingsModule:
    """The checkpoint's network on the CPU, to be asked and not trained. Raises CheckpointError."""
    module = build_module(checkpoint.config)
    load_weights(module, read_weights(checkpoint.weights), checkpoint.weights.name)
    module.eval().requires_grad_(False)
    _fold_batch_norm(module)
    return module


class Network:
    """A loaded network on its device. Not locked: one thread uses it (see model.scheduler).

    encoder: what encodes instead of the checkpoint's own encoder, whose weights are then not kept.
    timed: see model.stages; for what `encode` and `propose` do.
    """

    def __init__(
        self, checkpoint: Checkpoint, placement: Placement, encoder: Encoder | None = None, *, timed: Timed = untimed
    ) -> None:
        module = load_module(checkpoint)
        if encoder is not None:
            module.sam.image_encoder = None
        elif placement.autocast is not None:
            _round_products(module.sam.image_encoder, placement.autocast)
        self._module = module.to(placement.device).to(memory_format=torch.channels_last)
        self._encoder = encoder or module.encoded
        self._placement = placement
        self._timed = timed
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

        in_float: resizes tiles to fractions of grey levels, as upstream does, also on a CPU, where whole ones take a
        fifth of the time and are hardly different. Raises DeviceMemoryError when memory does not hold one tile.
        """
        parts = self._encode_batch.run(lambda part: self._encode(pixels, part, in_float=in_float), tiles)
        return [features for part in parts for features in part]

    def _encode(self, pixels: PixelArray, tiles: Sequence[Tile], *, in_float: bool) -> list[Features]:
        with torch.inference_mode(), self._autocast():
            images = self._images(pixels, tiles, in_float=in_float)
            with self._timed("encode"):
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

    def propose(self, pixels: PixelArray, tiles: Sequence[Tile]) -> list[Proposals]:
        """The proposals alone, by a network that has a head, for another one to redraw. Raises as `encode` does."""
        parts = self._encode_batch.run(lambda part: self._propose(pixels, part), tiles)
        return [proposals for part in parts for proposals in part]

    def _propose(self, pixels: PixelArray, tiles: Sequence[Tile]) -> list[Proposals]:
        with torch.inference_mode(), self._autocast():
            images = self._images(pixels, tiles, in_float=False)
            with self._timed("encode"):
                head = self._encoder(images).head
            if head is None:
                raise TypeError("propose: expected a network with a proposal head")
            return self._proposals(head)

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
            rows = [np.zeros(4, np.float32) if prompt.prior_xyxy is None else prompt.prior_xyxy for prompt in prompts]
            priors = self._module.prior_masks(torch.from_numpy(np.stack(rows)).to(device))
        members: dict[int, list[int]] = {}  # of each tile
        for number, prompt in enumerate(prompts):
            members.setdefault(id(prompt.features), []).append(number)
        answers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        with torch.inference_mode():
            with self._autocast():
                sparse, dense = self._module.embed_prompts(coords, labels, *priors)
            for together in members.values():
                own = dense[:1] if priors[0] is None else dense[together]
                cells = prompts[together[0]].features.cells
                logits, iou = self._decoder(cells, sparse[together], own, multimask=multimask)
                answers |= zip(together, zip(logits, iou, strict=True), strict=True)
            all_logits, all_iou = zip(*(answers[number] for number in range(len(prompts))), strict=True)
            return torch.stack(all_logits), torch.stack(all_iou)

    def warm_up(self, *, reserved_bytes: int) -> None:
        """Encodes and decodes as much at a time as it ever will: the first calls are slow, and tell what memory holds.

        reserved_bytes: of a GPU's memory, left free for the features that callers keep.
        Raises DeviceMemoryError when not even one tile or prompt fits beside them.
        """
        device, kept = self._placement.device, []
        if device.type == "cuda":
            kept = BatchSize("feature caches", 1).run(
                lambda sizes: torch.empty(sizes[0], dtype=torch.uint8, device=device), [reserved_bytes]
            )
        grey = np.full((64, 64, 3), 128, np.uint8)
        tile = Tile(left=0, top=0, side=64, size=self.size, level=0)
        features = self.encode(grey, [tile] * self.encode_batch)[0]
        point, yes = np.full((1, 2), self.size / 2, np.float32), np.ones(1, np.bool_)
        prompt = TilePrompt(features=features, points_xy=point, is_foreground=yes, box_xyxy=None)
        self.decode([prompt] * self.decode_batch, multimask=True)
        del kept  # until here it was in the way

    def _autocast(self) -> torch.autocast:
        dtype = self._placement.autocast
        return torch.autocast(self._placement.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def _images(self, pixels: PixelArray, tiles: Sequence[Tile], *, in_float: bool) -> torch.Tensor:
        """The tiles as normalised floats `[B, 3, S, S]`; beyond the photo they are zero, the mean colour."""
        with self._timed("tile"):
            photo = _shared_tensor(pixels)
            images = torch.empty(
                len(tiles), 3, self.size, self.size, device=self._mean.device, memory_format=torch.channels_last
            )
            for image, tile in zip(images, tiles, strict=True):
                self._draw(photo, tile, image, in_float=in_float)
            return images

    def _proposals(self, head: tuple[torch.Tensor, torch.Tensor]) -> list[Proposals]:
        with self._timed("propose"):
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


def _round_products(module: nn.Module, dtype: torch.dtype) -> None:
    """Rounds the weights of matrix products and convolutions, in place, as autocast does at every call: half the bytes
    to keep, and none to convert again and again."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            part.to(dtype)


def _fold_batch_norm(module: nn.Module) -> None:
    """Folds batch norms into the convolutions before them, in place; the answers stay the same."""
    for part in module.modules():
        if isinstance(part, nn.Sequential):
            for index in range(len(part) - 1):
                convolution, norm = part[index], part[index + 1]
                if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    part[index], part[index + 1] = fuse_conv_bn_eval(convolution, norm), nn.Identity()
