"""The training loop of `facings-nano`: pictures with targets in, a checkpoint out.

Knows torch and the network's modules; not where the pictures come from. Detection and promptable segmentation are
trained together. A run is a folder: `last.pt` holds all that is needed to go on after a kill, `log.jsonl` one line a
report.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from model.checkpoints import (
    BUNDLED_CONFIG,
    blended,
    calibrated_threshold,
    excess_width,
    find_checkpoint,
    read_weights,
    write_weights,
)
from model.network import PIXEL_DEVIATION, PIXEL_MEAN
from model.proposer import boxes_of_cells
from model.sam2_module import PRIOR_LOGIT, FacingsModule, FeatureMaps, build_module, load_weights
from model.training.losses import (
    box_loss,
    centre_loss,
    mask_losses,
    projection_losses,
    quality_loss,
    window_weights,
)
from model.training.optimizer import descend, moving_average, optimizer_of, set_rate
from model.training.options import TrainOptions
from model.training.samples import Samples
from model.training.targets import MASK_STRIDE

Batch = dict[str, torch.Tensor]

SAM_STRIDE = 16  # pixels of the tile for each cell of the embedding that prompts are compared with
SECOND_ROUND_SHARE = 0.25  # of the steps
WARM_UP_SHARE = 0.03  # of the run, in which the learning rate rises to its height
Report = dict[str, float]


def losses_of(
    module: FacingsModule, batch: Batch, *, canvas_offset: tuple[int, int], second_round: bool
) -> dict[str, torch.Tensor]:
    """All losses of one batch.

    The pictures are smaller than the network's tile. For SAM 2's position encoding they stand at `canvas_offset`
    (x, y, in feature cells) of a whole tile, so that prompts mean the same at any place of a tile.
    second_round: whether each prompt is asked again, with its first answer as mask prompt and a click where that was
    wrong, as SAM is trained.
    """
    maps = module.features(to_input(batch["pixels"], module.device))
    centre_logits, distances, quality = module.proposal_head.answers(maps.finest)
    boxes = boxes_of_cells(distances)
    result = {
        "centre": centre_loss(centre_logits, batch["dense_centre"], batch["dense_is_known"]),
        "box": box_loss(boxes, batch["dense_boxes_xyxy"], batch["dense_weight"]),
    }
    if quality is not None:
        result["quality"] = quality_loss(quality, boxes.detach(), batch["dense_boxes_xyxy"], batch["dense_weight"])
    pictures, per_picture = batch["prompt_coords"].shape[:2]
    if not per_picture:
        return result
    rows = torch.arange(pictures, device=module.device).repeat_interleave(per_picture)
    prompts = {name.removeprefix("prompt_"): batch[name].flatten(0, 1) for name in batch if name.startswith("prompt_")}
    prompts["has_mask"] = batch["has_masks"][rows]
    return result | prompt_losses(module, maps, rows, prompts, canvas_offset=canvas_offset, second_round=second_round)


def prompt_losses(
    module: FacingsModule,
    maps: FeatureMaps,
    rows: torch.Tensor,
    prompts: Batch,
    *,
    canvas_offset: tuple[int, int],
    second_round: bool,
) -> dict[str, torch.Tensor]:
    """The losses of prompts `[P]` on the pictures `rows` `[P]` of `maps`; see `losses_of`.

    prompts: the fields of PromptTargets as tensors, and has_mask `[P]`: whether the mask is exact, or a filled box.
    """
    shift = SAM_STRIDE * torch.tensor(canvas_offset, device=module.device)
    coords, labels = prompts["coords"] + shift, prompts["labels"]
    target = prompts["masks"]
    weight = window_weights(prompts["boxes_xyxy"], target, MASK_STRIDE)
    has_mask = prompts["has_mask"][:, None]
    result: dict[str, torch.Tensor] = {}

    def ask(*asked: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, predicted_iou = (
            answer.float() for answer in module.all_masks(maps, rows, *asked, canvas_offset=canvas_offset)
        )
        fit, guess = mask_losses(logits, predicted_iou, target, weight)
        if not bool(has_mask.all()):
            fit = torch.where(has_mask, fit, projection_losses(logits, target, weight))
            guess = guess * has_mask
        return logits, fit, guess

    priors = module.prior_masks(shifted(prompts["prior_xyxy"], shift))
    logits, fit, guess = ask(coords, labels, *priors)
    # SAM: the first mask answers what is unambiguous; of the other three only the best is taught, so that they differ.
    is_click = prompts["is_click"]
    best = fit[:, 1:].min(1).values
    several = torch.where(is_click, best, best.new_zeros(()))
    result["mask"] = fit[:, 0].mean() + several.sum() / is_click.sum().clamp(min=1)
    result["iou"] = guess.mean()
    if second_round:
        first = logits[:, 0].detach()
        points, kinds = corrections(first, target)
        coords = torch.cat([coords, (points + shift)[:, None]], 1)
        labels = torch.cat([labels, kinds[:, None]], 1)
        _, fit, _ = ask(coords, labels, on_canvas(first, module.sam.image_size, canvas_offset), None)
        result["second"] = fit[:, 0].mean()
    return result


def corrections(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A click for each mask `[P, h, w]` on a cell where it is wrong: points `[P, 2]` in pixels, labels `[P]` (1 or 0).

    Where nothing is wrong, the click is inside the object.
    """
    inside = target > 0.5
    wrong = (logits > 0) != inside
    likelihood = wrong.flatten(1).float() + 1e-6 * inside.flatten(1) + 1e-12
    cell = torch.multinomial(likelihood, 1)[:, 0]
    width = target.shape[2]
    points = (torch.stack([cell % width, cell // width], 1) + 0.5) * MASK_STRIDE
    return points, inside.flatten(1).gather(1, cell[:, None])[:, 0].to(torch.int32)


def on_canvas(logits: torch.Tensor, size: int, canvas_offset: tuple[int, int]) -> torch.Tensor:
    """Mask logits `[P, h, w]` of small pictures as mask prompts `[P, 1, S/4, S/4]` of the tiles they stand on."""
    side = size // MASK_STRIDE
    x, y = (offset * SAM_STRIDE // MASK_STRIDE for offset in canvas_offset)
    canvas = logits.new_full((len(logits), 1, side, side), -PRIOR_LOGIT)
    canvas[:, 0, y : y + logits.shape[1], x : x + logits.shape[2]] = logits.clamp(-32, 32)
    return canvas


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


WEIGHTS_OF_LOSSES = {"centre": 1.0, "box": 2.0, "quality": 0.5, "mask": 1.0, "iou": 0.5, "second": 1.0}


class _Run:
    """What changes while a run goes on, and its folder: `last.pt` to resume from, `log.jsonl`, the checkpoint."""

    def __init__(self, options: TrainOptions) -> None:
        options.out.mkdir(parents=True, exist_ok=True)
        self.options = options
        self.module = build_module(BUNDLED_CONFIG).to(options.device).to(memory_format=torch.channels_last)
        self.excess_width = 0.0
        self.score_threshold: float | None = None
        self.start: dict[str, torch.Tensor] = {}
        if options.start_from is None:
            initialise_decoder(self.module)
        else:
            start = find_checkpoint(str(options.start_from), config=BUNDLED_CONFIG, has_gpu=False)
            self.excess_width, self.score_threshold = excess_width(start), calibrated_threshold(start)
            load_weights(self.module, read_weights(options.start_from), options.start_from.name)
        if options.start_share:
            self.start = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}
        self.average = AveragedModel(self.module, multi_avg_fn=moving_average, use_buffers=True)
        self.optimizer = optimizer_of(self.module, options.learning_rate, learn_encoder=options.learn_encoder)
        self.step, self.elapsed_s = 0, 0.0
        if options.resume and self._last.exists():
            state = torch.load(self._last, map_location=options.device, weights_only=True)
            for name in ("module", "average", "optimizer"):
                getattr(self, name).load_state_dict(state[name])
            self.step, self.elapsed_s = state["step"], state["elapsed_s"]

    @property
    def _last(self) -> Path:
        return self.options.out / "last.pt"

    @property
    def limit_s(self) -> float:
        return self.options.minutes * 60

    def save(self) -> None:
        """Writes all that is needed to go on, whole or not at all. Raises OSError."""
        state: dict[str, Any] = {name: getattr(self, name).state_dict() for name in ("module", "average", "optimizer")}
        content = io.BytesIO()  # torch writes to a full disk without saying so: a RuntimeError, and a torn file
        torch.save(state | {"step": self.step, "elapsed_s": self.elapsed_s}, content)
        partial = self._last.with_suffix(".partial")
        try:
            partial.write_bytes(content.getbuffer())
            partial.replace(self._last)
        finally:
            partial.unlink(missing_ok=True)

    def learn(self, batch: Batch, *, canvas_offset: tuple[int, int], second_round: bool) -> dict[str, float]:
        """One step; returns its losses."""
        done = min(self.elapsed_s / self.limit_s, 1.0)
        cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))
        warmth = 0.01 + 0.99 * min(1.0, done / WARM_UP_SHARE)
        set_rate(self.optimizer, self.options.learning_rate * warmth * cosine)
        with torch.autocast(torch.device(self.options.device).type, torch.bfloat16):
            losses = losses_of(self.module, batch, canvas_offset=canvas_offset, second_round=second_round)
        total = torch.stack([WEIGHTS_OF_LOSSES[name] * loss for name, loss in losses.items()]).sum()
        descend(total, self.module, self.optimizer, self.average)
        self.step += 1
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def log(self, line: Report) -> None:
        with (self.options.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def exported_weights(self) -> dict[str, torch.Tensor]:
        """The averaged weights; with a `start_share`, moved towards the weights at the start by so much of the way, so
        that less of what these knew is forgotten (WiSE-FT, Wortsman et al. 2022)."""
        learned: dict[str, torch.Tensor] = self.average.module.state_dict()
        return blended(learned, self.start, self.options.start_share) if self.start else learned

    def export(self, *, score_threshold: float | None = None) -> Path:
        """Writes the averaged weights as fp16 safetensors, with how they came about in the file's metadata.

        score_threshold: as measured; without, that of the weights at the start.
        """
        path = self.options.out / "facings-nano.safetensors"
        names = ("minutes", "seed", "batch_size", "prompts_per_picture", "picture_px", "learning_rate")
        facts = {name: str(getattr(self.options, name)) for name in names}
        facts |= {"network": BUNDLED_CONFIG, "steps": str(self.step), "excess_width": f"{self.excess_width:g}"}
        if score_threshold is None:
            score_threshold = self.score_threshold
        if score_threshold is not None:
            facts["score_threshold"] = f"{score_threshold:g}"
        write_weights(path, self.exported_weights(), facts)
        return path


class Every:
    """Whether it is time for something that is done once in so many seconds."""

    def __init__(self, seconds: float, *, now_s: float) -> None:
        self._seconds = seconds
        self._last_s = now_s

    def is_due(self, now_s: float) -> bool:
        """Whether the seconds have passed since it was due last, or since the start."""
        if now_s - self._last_s <= self._seconds:
            return False
        self._last_s = now_s
        return True


class _Progress:
    """The mean of each loss, and the speed, since the last report."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._begin()

    def _begin(self) -> None:
        self._losses: defaultdict[str, list[float]] = defaultdict(list)
        self._step, self._elapsed_s = self._run.step, self._run.elapsed_s

    def add(self, losses: Report) -> None:
        for name, loss in losses.items():
            self._losses[name].append(loss)

    def report(self) -> Report:
        """Everything since the last report, and begins anew."""
        run = self._run
        steps, seconds = run.step - self._step, run.elapsed_s - self._elapsed_s
        line = {name: sum(values) / len(values) for name, values in self._losses.items()}
        line["loss"] = sum(WEIGHTS_OF_LOSSES[name] * loss for name, loss in line.items())
        line |= {
            "step": run.step,
            "pictures_per_s": steps * run.options.batch_size / seconds if seconds else 0.0,
            "minutes_left": max(run.limit_s - run.elapsed_s, 0) / 60,
            "learning_rate": run.optimizer.param_groups[0]["lr"],
        }
        self._begin()
        return line


def train(
    options: TrainOptions,
    report: Callable[[Report], None],
    *,
    score: Callable[[Path], Report] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Path:
    """Trains for `options.minutes` and returns the path of the exported checkpoint (fp16 safetensors).

    report: called every `report_every` steps with the mean losses, the rate and the minutes left, and with what `score`
    measured. An exception of it ends the run, which can be resumed.
    score: measures a checkpoint on photos that are not trained on: the weights that the run begins with, those of every
    `score_every_s`, and those of the end. A "score_threshold" among its figures becomes the checkpoint's own. Its time
    does not count.
    clock: seconds, as time.monotonic gives them.
    """
    torch.manual_seed(options.seed)
    run = _Run(options)
    rng = np.random.default_rng([options.seed, run.step])
    free_cells = (run.module.sam.image_size - options.picture_px) // SAM_STRIDE
    progress = _Progress(run)
    save_due = Every(options.save_every_s, now_s=run.elapsed_s)
    score_due = Every(options.score_every_s, now_s=run.elapsed_s)
    if score is not None:
        _measure(run, score, report)
    run.module.train()
    began_s = clock()
    for raw in _batches(run):
        batch = {name: value if name == "pixels" else value.to(options.device) for name, value in raw.items()}
        offset = (int(rng.integers(free_cells + 1)), int(rng.integers(free_cells + 1)))
        progress.add(run.learn(batch, canvas_offset=offset, second_round=rng.random() < SECOND_ROUND_SHARE))
        now_s = clock()
        run.elapsed_s += now_s - began_s
        began_s = now_s
        is_done = run.elapsed_s >= run.limit_s
        if run.step % options.report_every == 0 or is_done:
            line = progress.report()
            run.log(line)
            report(line)
        if save_due.is_due(run.elapsed_s) or is_done:
            run.save()
        if is_done:
            break
        if score is not None and score_due.is_due(run.elapsed_s):
            _measure(run, score, report)
            began_s = clock()
    if score is None:
        return run.export()
    return run.export(score_threshold=_measure(run, score, report).get("score_threshold"))


def _batches(run: _Run) -> Iterable[Batch]:
    """Endless batches of samples from where the run is, made by other processes where there are workers."""
    options = run.options
    samples = Samples(
        seed=options.seed,
        picture_px=options.picture_px,
        prompts_per_picture=options.prompts_per_picture,
        textures=options.textures,
        labelled=options.labelled,
        tile_px=run.module.sam.image_size,
        excess_width=run.excess_width,
        first=run.step * options.batch_size * 2,
    )
    loader: Any = DataLoader(
        samples,
        batch_size=options.batch_size,
        num_workers=options.workers,
        multiprocessing_context="spawn" if options.workers else None,  # OpenCV's threads do not survive a fork
        prefetch_factor=4 if options.workers else None,
        worker_init_fn=_one_thread,
    )
    return cast("Iterable[Batch]", loader)


def _measure(run: _Run, score: Callable[[Path], Report], report: Callable[[Report], None]) -> Report:
    figures = score(run.export())
    line = {"step": float(run.step), **figures}
    run.log(line)
    report(line)
    return figures


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
    import cv2

    cv2.setNumThreads(1)
