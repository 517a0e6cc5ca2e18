"""SAM 2 as a torch module, built from a config and filled from a file of weights. The only importer of sam2 in `model`.

Knows sam2's parts, YAML configs and tensors. Knows nothing of photos, tiles or devices (model.network does). Maps and
prompt embeddings are those of sam2's SAM2ImagePredictor (facebookresearch/sam2 at 2b90b9f).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

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
from model.encoder import Encoded
from model.features import MASK_STRIDE
from model.types import CheckpointError

PRIOR_LOGIT = 8.0  # of a mask prompt's inside; outside its negative


@dataclass(frozen=True, kw_only=True)
class FeatureMaps:
    """What the encoder makes of images: `finest` `[B, C, h/4, w/4]` for the proposal head, `embedding`
    `[B, C, h/16, w/16]` and `high_res` (strides 4 and 8) for the mask decoder."""

    finest: torch.Tensor
    embedding: torch.Tensor
    high_res: tuple[torch.Tensor, torch.Tensor]


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
        """Boxes `[P, 4]` that objects probably fill, as mask prompts `[P, 1, S/4, S/4]`, and which of them have an area
        `[P]`: a box without one means that there is no mask prompt."""
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

    Meta's files hold SAM 2 alone; those of `facings train` hold it under `sam.`, and the proposal head too.
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
    """The checkpoint's network on the CPU, for inference only. Raises CheckpointError."""
    module = build_module(checkpoint.config)
    load_weights(module, read_weights(checkpoint.weights), checkpoint.weights.name)
    module.eval().requires_grad_(False)
    _fold_batch_norm(module)
    return module


def _fold_batch_norm(module: nn.Module) -> None:
    """Folds batch norms into the convolutions before them, in place; the answers stay the same."""
    for part in module.modules():
        if isinstance(part, nn.Sequential):
            for index in range(len(part) - 1):
                convolution, norm = part[index], part[index + 1]
                if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    part[index], part[index + 1] = fuse_conv_bn_eval(convolution, norm), nn.Identity()
