"""The training loop of `facings-nano`: rendered shelves in, a checkpoint out.

Knows torch, the renderer and the network's modules. Detection and promptable segmentation are trained together. A run
is a folder: `last.pt` holds all that is needed to go on after a kill, `log.jsonl` one line a report.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset

from model.checkpoints import BUNDLED_CONFIG
from model.network import PIXEL_DEVIATION, PIXEL_MEAN, FacingsModule, build_module
from model.proposer import boxes_of_cells
from model.training.losses import box_loss, centre_loss, mask_losses, window_weights
from model.training.shelves import Shelf, Textures, load_textures, render_shelf
from model.training.targets import MASK_STRIDE, dense_targets, prompt_targets
from model.types import PixelArray

Batch = dict[str, torch.Tensor]

#: Typical widths of facings in the rendered pictures, in pixels: what the tiles of shelf photos show.
FACING_PX = (18.0, 120.0)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a run goes.

    minutes: length of the run; the learning rate follows it (cosine), so a resumed run keeps its own.
    picture_px: side of the rendered pictures, a multiple of 32.
    textures: folder of product photos to use for a part of the faces, or None.
    workers: processes that render.
    """

    out: Path
    minutes: float = 60.0
    textures: Path | None = None
    seed: int = 0
    device: str = "cpu"
    batch_size: int = 8
    prompts_per_picture: int = 3
    picture_px: int = 512
    learning_rate: float = 2e-3
    workers: int = 2
    resume: bool = False
    report_every: int = 50
    save_every_s: float = 120.0


class RenderedShelves(IterableDataset[dict[str, npt.NDArray[Any]]]):
    """Endless rendered pictures with their targets; picture i of a seed is always the same."""

    def __init__(self, options: TrainOptions, first: int) -> None:
        self.options = options
        self.first = first
        self.textures: Textures | None = None

    def __iter__(self) -> Iterator[dict[str, npt.NDArray[Any]]]:
        self.textures = load_textures(self.options.textures) if self.options.textures else None
        worker = torch.utils.data.get_worker_info()
        index = self.first + (worker.id if worker else 0)
        step = worker.num_workers if worker else 1
        while True:
            yield from self.samples(index)
            index += step

    def samples(self, index: int) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Picture `index` as it is and mirrored in other light; none when it shows too few facings to prompt."""
        options, side = self.options, self.options.picture_px
        rng = np.random.default_rng((options.seed << 32) + index)
        facing_px = float(np.exp(rng.uniform(*np.log(FACING_PX))))
        shelf = render_shelf((options.seed << 32) + index, (side, side), textures=self.textures, facing_px=facing_px)
        if len(shelf.boxes_xyxy) < options.prompts_per_picture:
            return
        for variant in (shelf, mirrored(shelf)):
            yield self._sample(relit(variant.photo_rgb, rng), variant, rng)

    def _sample(self, pixels: PixelArray, shelf: Shelf, rng: np.random.Generator) -> dict[str, npt.NDArray[Any]]:
        side = self.options.picture_px
        dense = dense_targets(shelf.boxes_xyxy, side, side)
        prompts = prompt_targets(shelf.boxes_xyxy, shelf.instance_ids, self.options.prompts_per_picture, rng)
        return {
            "pixels": pixels,
            **{f"dense_{name}": value for name, value in vars(dense).items()},
            **{f"prompt_{name}": value for name, value in vars(prompts).items()},
        }


def mirrored(shelf: Shelf) -> Shelf:
    """The same shelf seen in a mirror."""
    width = shelf.photo_rgb.shape[1]
    boxes = shelf.boxes_xyxy.copy()
    boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    return Shelf(
        photo_rgb=np.ascontiguousarray(shelf.photo_rgb[:, ::-1]),
        boxes_xyxy=boxes,
        instance_ids=np.ascontiguousarray(shelf.instance_ids[:, ::-1]),
    )


def relit(pixels: PixelArray, rng: np.random.Generator) -> PixelArray:
    """The picture with another exposure, colour cast and, now and then, other colours (channels exchanged)."""
    wanted = rng.uniform(60, 165) / 255
    mean = np.clip(pixels.mean() / 255, 0.02, 0.98)
    gamma = np.clip(np.log(wanted) / np.log(mean), 0.45, 1.8)
    ramp = (np.arange(256) / 255) ** gamma
    table = np.clip(ramp[:, None] * rng.uniform(0.88, 1.12, 3) * 255, 0, 255).astype(np.uint8)
    order = rng.permutation(3) if rng.random() < 0.3 else np.arange(3)
    return np.stack([table[pixels[..., order[i]], i] for i in range(3)], axis=-1)


def losses_of(module: FacingsModule, batch: Batch, *, canvas_offset: tuple[int, int]) -> dict[str, torch.Tensor]:
    """All losses of one batch.

    The pictures are smaller than the network's tile. For SAM 2's position encoding they stand at `canvas_offset`
    (x, y, in feature cells) of a whole tile, so that prompts mean the same at any place of a tile.
    """
    maps = module.features(to_input(batch["pixels"], module.device))
    centre_logits, distances = module.proposal_head(maps.finest)
    result = {
        "centre": centre_loss(centre_logits, batch["dense_centre"]),
        "box": box_loss(boxes_of_cells(distances), batch["dense_boxes_xyxy"], batch["dense_weight"]),
    }
    pictures, per_picture = batch["prompt_coords"].shape[:2]
    rows = torch.arange(pictures, device=module.device).repeat_interleave(per_picture)
    shift = 16 * torch.tensor(canvas_offset, device=module.device)
    logits, predicted_iou = module.all_masks(
        maps,
        rows,
        batch["prompt_coords"].flatten(0, 1) + shift,
        batch["prompt_labels"].flatten(0, 1),
        shifted(batch["prompt_prior_xyxy"].flatten(0, 1), shift),
        canvas_offset=canvas_offset,
    )
    logits, predicted_iou = logits.float(), predicted_iou.float()
    target = batch["prompt_masks"].flatten(0, 1)
    weight = window_weights(batch["prompt_boxes_xyxy"].flatten(0, 1), target, MASK_STRIDE)
    fit, guess = mask_losses(logits, predicted_iou, target, weight)
    is_click = batch["prompt_is_click"].flatten()
    # SAM: the first mask answers what is unambiguous; of the other three only the best is taught, so that they differ.
    best = fit[:, 1:].min(1).values
    single, several = fit[:, 0], torch.where(is_click, best, best.new_zeros(()))
    result["mask"] = single.mean() + several.sum() / is_click.sum().clamp(min=1)
    result["iou"] = guess.mean()
    return result


def to_input(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 `[B, H, W, 3]` to the network's normalised input `[B, 3, H, W]`, channels last."""
    batch = pixels.to(device).permute(0, 3, 1, 2).float() / 255
    mean, deviation = (torch.tensor(values, device=device).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_DEVIATION))
    return ((batch - mean) / deviation).contiguous(memory_format=torch.channels_last)


def shifted(prior_xyxy: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Boxes `[P, 4]` moved by `shift` (x, y); those without area, which stand for none, stay."""
    moved = prior_xyxy + shift.repeat(2)
    return torch.where(prior_xyxy[:, 2:3] > prior_xyxy[:, 0:1], moved, prior_xyxy)


def initialise_decoder(module: FacingsModule) -> None:
    """Two starting values of SAM's decoder that suit small objects and a short training.

    Position encoding: frequencies from 1 to 16 instead of 1 alone. A facing takes up about 4 % of a tile's side; with
    sam2's own scale, made for objects of any size, a click's position hardly differs from its neighbours'.
    High-resolution features: a tenth of sam2's starting weights, so that at first the prompt decides.
    """
    matrix = module.sam.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    matrix.mul_(torch.logspace(0, 4, matrix.shape[1], base=2.0, device=matrix.device))
    with torch.no_grad():
        for convolution in (module.sam.sam_mask_decoder.conv_s0, module.sam.sam_mask_decoder.conv_s1):
            convolution.weight.mul_(0.1)


WEIGHTS_OF_LOSSES = {"centre": 1.0, "box": 2.0, "mask": 1.0, "iou": 0.5}


def train(options: TrainOptions, report: Callable[[dict[str, float]], None]) -> Path:
    """Trains for `options.minutes` and returns the path of the exported checkpoint (fp16 safetensors).

    report: called every `report_every` steps with losses, rate and minutes left.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    module = build_module(BUNDLED_CONFIG).to(options.device).to(memory_format=torch.channels_last)
    initialise_decoder(module)
    moving_average = get_ema_multi_avg_fn(0.998)  # type: ignore[no-untyped-call]
    average = AveragedModel(module, multi_avg_fn=moving_average, use_buffers=True)
    groups = [
        {"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": 0.02},
        {"params": [p for p in module.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate)
    step, elapsed_s = 0, 0.0
    last = options.out / "last.pt"
    if options.resume and last.exists():
        state = torch.load(last, map_location=options.device, weights_only=True)
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed_s = state["step"], state["elapsed_s"]

    def save() -> None:
        partial = last.with_suffix(".partial")
        state = {
            "module": module.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "elapsed_s": elapsed_s,
        }
        torch.save(state, partial)
        partial.replace(last)

    shelves = RenderedShelves(options, first=step * options.batch_size * 2)
    loader: Any = DataLoader(
        shelves,
        batch_size=options.batch_size,
        num_workers=options.workers,
        multiprocessing_context="spawn" if options.workers else None,  # OpenCV's threads do not survive a fork
        prefetch_factor=4 if options.workers else None,
        worker_init_fn=_one_thread,
    )
    rng = np.random.default_rng([options.seed, step])
    room = (module.sam.image_size - options.picture_px) // 16
    limit_s = options.minutes * 60
    sums: dict[str, float] = {}
    reported_s, reported_step, saved_s = elapsed_s, step, elapsed_s
    module.train()
    clock = time.monotonic()
    for raw in loader:
        batch = {name: value if name == "pixels" else value.to(options.device) for name, value in raw.items()}
        progress = min(elapsed_s / limit_s, 1.0)
        cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))
        rate = options.learning_rate * min(1.0, (step + 1) / 200) * cosine
        for group in optimizer.param_groups:
            group["lr"] = rate
        offset = (int(rng.integers(room + 1)), int(rng.integers(room + 1)))
        with torch.autocast(torch.device(options.device).type, torch.bfloat16):
            losses = losses_of(module, batch, canvas_offset=offset)
        total: torch.Tensor = sum((WEIGHTS_OF_LOSSES[name] * loss for name, loss in losses.items()), torch.zeros(()))
        optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 5.0)
        if torch.isfinite(norm):
            optimizer.step()
            average.update_parameters(module)
        step += 1
        elapsed_s += time.monotonic() - clock
        clock = time.monotonic()
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + float(loss.detach())
        done = elapsed_s >= limit_s
        if step % options.report_every == 0 or done:
            steps = step - reported_step
            line = {name: value / steps for name, value in sums.items()}
            line |= {
                "step": step,
                "pictures_per_s": steps * options.batch_size / (elapsed_s - reported_s),
                "minutes_left": max(limit_s - elapsed_s, 0) / 60,
                "learning_rate": rate,
            }
            with (options.out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            report(line)
            sums, reported_s, reported_step = {}, elapsed_s, step
        if done or elapsed_s - saved_s > options.save_every_s:
            save()
            saved_s = elapsed_s
        if done:
            break
    return export(cast(FacingsModule, average.module), options, steps=step)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
    import cv2

    cv2.setNumThreads(1)


def export(module: FacingsModule, options: TrainOptions, *, steps: int) -> Path:
    """Writes the averaged weights as fp16 safetensors, with how they came about in the file's metadata."""
    path = options.out / "facings-nano.safetensors"
    tensors = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in module.state_dict().items()
    }
    facts = {name: str(value) for name, value in asdict(options).items() if name not in ("out", "textures", "resume")}
    facts |= {"network": BUNDLED_CONFIG, "steps": str(steps), "textures": str(options.textures is not None)}
    save_file(tensors, path, metadata=facts)
    return path
