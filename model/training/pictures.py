"""Pictures kept on the training device, and random pieces of them with targets: crops, scales, mirrors and light.

Knows tensors only. Rendering a picture costs a core a tenth of a second, cutting a piece out of it on a GPU nothing, so
each picture is used several times, never twice alike. What CPUs do for one picture in model.training.samples and
model.training.targets is done here for a whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from model.proposer import STRIDE
from model.renderer.shelves import MIN_SIDE_PX, MIN_VISIBLE_SHARE
from model.training.targets import CENTRE_SPREAD, MASK_STRIDE, MAX_PROMPT_TOKENS, UNKNOWN

MAX_BOXES = 1024  # of one picture; those with more are not kept
SCALES = (0.72, 1.4)  # of a piece against its picture
STRETCH = 0.1  # by which the two axes may differ, as a logarithm
CHUNK = 64  # boxes whose bells are in memory at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class Pieces:
    """A batch of square pieces.

    images: float `[B, 3, S, S]` in [0, 1]. ids: float `[B, S, S]`. boxes_xyxy: `[B, K, 4]`, the largest first; those
    beyond a piece's own are zero, see `is_box` `[B, K]`. numbers: `[B, K]`, the id of each box's pixels.
    """

    images: torch.Tensor
    ids: torch.Tensor
    boxes_xyxy: torch.Tensor
    is_box: torch.Tensor
    numbers: torch.Tensor


class Pictures:
    """At most `capacity` pictures of `side_px` on `device`; a new one takes the place of the oldest."""

    def __init__(self, capacity: int, side_px: int, device: torch.device) -> None:
        self.side_px = side_px
        self.added = 0
        self._pixels = torch.empty(capacity, 3, side_px, side_px, dtype=torch.uint8, device=device)
        self._ids = torch.empty(capacity, side_px, side_px, dtype=torch.int16, device=device)
        self._boxes = torch.zeros(capacity, MAX_BOXES, 4, device=device)
        self._counts = torch.zeros(capacity, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return min(self.added, len(self._pixels))

    @property
    def pixels(self) -> torch.Tensor:
        """uint8 `[N, 3, S, S]`."""
        return self._pixels[: len(self)]

    def add(self, pixels: torch.Tensor, ids: torch.Tensor, boxes_xyxy: torch.Tensor) -> bool:
        """pixels uint8 `[S, S, 3]`, ids int16 `[S, S]`, boxes `[N, 4]`; False when it has none, or too many."""
        if not 0 < len(boxes_xyxy) <= MAX_BOXES:
            return False
        place = self.added % len(self._pixels)
        self._pixels[place] = pixels.to(self._pixels.device).permute(2, 0, 1)
        self.relabel(place, ids, boxes_xyxy)
        self.added += 1
        return True

    def relabel(self, place: int, ids: torch.Tensor, boxes_xyxy: torch.Tensor) -> None:
        """Other labels for a picture that is kept."""
        self._ids[place] = ids.to(self._ids.device)
        self._boxes[place, : len(boxes_xyxy)] = boxes_xyxy.to(self._boxes.device)
        self._counts[place] = len(boxes_xyxy)

    def pieces(self, count: int, piece_px: int, generator: torch.Generator | None = None) -> Pieces:
        """Random pieces, each around one of its picture's facings."""
        device = self._pixels.device

        def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
            return low + (high - low) * torch.rand(*shape, device=device, generator=generator)

        usable = self._counts[: len(self)].nonzero()[:, 0]
        place = usable[(uniform(count) * len(usable)).long().clamp(max=len(usable) - 1)]
        low, high = (torch.tensor(limit).log().item() for limit in SCALES)
        scale = uniform(count, 1, low=low, high=high) + uniform(count, 2, low=-STRETCH / 2, high=STRETCH / 2)
        scale = scale.exp().clamp(min=piece_px / self.side_px)
        side = piece_px / scale
        counts = self._counts[place]
        chosen = self._boxes[place, (uniform(count) * counts).long().clamp(max=MAX_BOXES - 1)]
        corner = (chosen[:, :2] + chosen[:, 2:]) / 2 + uniform(count, 2, low=-0.4, high=0.4) * side - side / 2
        corner = corner.clamp(min=0).minimum(self.side_px - side)
        flipped = uniform(count, 1) < 0.5

        steps = (torch.arange(piece_px, device=device) + 0.5) / piece_px
        across, down = (corner[:, axis, None] + steps * side[:, axis, None] for axis in (0, 1))
        across = torch.where(flipped, across.flip(1), across)
        square = (count, piece_px, piece_px)
        grid = torch.stack([across[:, None].expand(square), down[:, :, None].expand(square)], -1)
        grid = grid / self.side_px * 2 - 1
        images = functional.grid_sample(
            self._pixels[place].float() / 255, grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        ids = functional.grid_sample(
            self._ids[place].float()[:, None], grid, mode="nearest", padding_mode="border", align_corners=False
        )[:, 0]
        boxes, kept = self._boxes_of(place, corner, scale, flipped, piece_px)
        area = (boxes[..., 2:] - boxes[..., :2]).prod(-1) * kept
        limit = int(kept.sum(1).max().clamp(min=1))
        order = area.argsort(1, descending=True)[:, :limit]
        return Pieces(
            images=images,
            ids=ids,
            boxes_xyxy=(boxes * kept[..., None]).gather(1, order[..., None].expand(-1, -1, 4)),
            is_box=kept.gather(1, order),
            numbers=order + 1,
        )

    def _boxes_of(
        self, place: torch.Tensor, corner: torch.Tensor, scale: torch.Tensor, flipped: torch.Tensor, piece_px: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes `[B, MAX_BOXES, 4]` in pixels of the piece, and which are seen well enough to be labelled."""
        whole = (self._boxes[place] - corner.repeat(1, 2)[:, None]) * scale.repeat(1, 2)[:, None]
        mirrored = torch.stack([piece_px - whole[..., 2], whole[..., 1], piece_px - whole[..., 0], whole[..., 3]], -1)
        whole = torch.where(flipped[..., None], mirrored, whole)
        seen = whole.clamp(0, piece_px)
        sides, whole_sides = seen[..., 2:] - seen[..., :2], whole[..., 2:] - whole[..., :2]
        kept = (sides.prod(-1) >= MIN_VISIBLE_SHARE * whole_sides.prod(-1)) & (sides >= MIN_SIDE_PX).all(-1)
        kept &= torch.arange(MAX_BOXES, device=place.device) < self._counts[place][:, None]
        return seen, kept


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseBatch:
    """DenseTargets of a batch: centre and weight `[B, h, w]`, boxes `[B, h, w, 4]`; is_known `[B, h, w]`: where the
    absence of a centre is sure."""

    centre: torch.Tensor
    boxes_xyxy: torch.Tensor
    weight: torch.Tensor
    is_known: torch.Tensor


def dense_batch(pieces: Pieces) -> DenseBatch:
    """As model.training.targets.dense_targets, but a bell is 1 at its centre's cell and scaled alike around it."""
    batch, side = len(pieces.ids), pieces.ids.shape[1] // STRIDE
    device = pieces.ids.device
    cells = torch.arange(side, device=device) + 0.0
    centre = torch.zeros(batch, side, side, device=device)
    boxes = torch.zeros(batch, side, side, 4, device=device)
    weight = torch.zeros(batch, side, side, device=device)
    for first in range(0, pieces.boxes_xyxy.shape[1], CHUNK):
        part, real = pieces.boxes_xyxy[:, first : first + CHUNK], pieces.is_box[:, first : first + CHUNK]
        middle = (part[..., :2] + part[..., 2:]) / 2 / STRIDE - 0.5 + 1e-3
        spread = ((part[..., 2:] - part[..., :2]) / STRIDE * CENTRE_SPREAD).clamp(min=0.4)
        lines = (-0.5 * ((cells - middle[..., None]) / spread[..., None]) ** 2).exp()
        lines = torch.where(lines < 0.01, 0, lines) / lines.amax(-1, keepdim=True)  # [B, K, 2, side]
        bell = lines[:, :, 1, :, None] * lines[:, :, 0, None, :] * real[..., None, None]
        centre = torch.maximum(centre, bell.amax(1))
        core = bell >= 0.3
        total = (bell * core).sum((2, 3))
        last = (core * torch.arange(1, core.shape[1] + 1, device=device)[:, None, None]).amax(1)  # smallest box wins
        owner = (last - 1).clamp(min=0).flatten(1)
        own_bell = bell.gather(1, owner.view(batch, 1, side, side))[:, 0]
        share = own_bell / total.gather(1, owner).view(batch, side, side).clamp(min=1e-6)
        own_box = part.gather(1, owner[..., None].expand(-1, -1, 4)).view(batch, side, side, 4)
        weight = torch.where(last > 0, share, weight)
        boxes = torch.where((last > 0)[..., None], own_box, boxes)
    unknown = functional.max_pool2d((pieces.ids == UNKNOWN).float()[:, None], STRIDE)[:, 0] > 0
    return DenseBatch(centre=centre, boxes_xyxy=boxes, weight=weight, is_known=~unknown | (centre > 0.3))


def prompt_batch(
    pieces: Pieces, per_piece: int, has_masks: torch.Tensor, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Prompts such as model.training.targets.prompt_targets makes, on a whole batch.

    has_masks `[B]`: whether a piece's ids are exact. Returns the piece of each prompt `[P]`, and what
    model.training.loop.prompt_losses takes.
    """
    device = pieces.ids.device
    batch, limit = pieces.is_box.shape

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, device=device, generator=generator)

    chosen = (uniform(batch, limit) * pieces.is_box).topk(min(per_piece, limit), dim=1)
    rows, columns = (chosen.values > 0).nonzero(as_tuple=True)
    index = chosen.indices[rows, columns]
    boxes = pieces.boxes_xyxy[rows, index]
    visible = pieces.ids[rows] == pieces.numbers[rows, index][:, None, None]
    masks = functional.avg_pool2d(visible.float()[:, None], MASK_STRIDE)[:, 0]
    seen = masks.amax((1, 2)) > 0
    rows, boxes, masks = rows[seen], boxes[seen], masks[seen]
    count, side = len(rows), masks.shape[-1]
    sides = boxes[:, 2:] - boxes[:, :2]

    def cell_of(points: torch.Tensor) -> torch.Tensor:
        column, row = (points / MASK_STRIDE).long().clamp(0, side - 1).unbind(-1)
        return row * side + column

    def share_at(points: torch.Tensor) -> torch.Tensor:
        """How much of the cell below each point `[P, N, 2]` belongs to the object."""
        return masks.flatten(1).gather(1, cell_of(points))

    def inside(number: int) -> torch.Tensor:
        """Points `[P, N, 2]` that the object covers."""
        likelihood = (masks.flatten(1) >= masks.flatten(1).amax(1, keepdim=True) * 0.75).float()
        cells = torch.multinomial(likelihood, number, replacement=True, generator=generator)
        corner = torch.stack([cells % side, cells // side], -1)
        return (corner + uniform(count, number, 2)) * MASK_STRIDE

    anywhere = inside(4)
    normal = torch.randn(count, 2, device=device, generator=generator)
    central = (boxes[:, :2] + boxes[:, 2:]) / 2 + 0.12 * normal * sides
    is_central = (uniform(count) < 0.7) & (share_at(central[:, None])[:, 0] > 0.5)
    first = torch.where(is_central[:, None], central, anywhere[:, 0])
    tries = boxes[:, None, :2] - sides[:, None] / 2 + uniform(count, 24, 2) * 2 * sides[:, None]
    tries = tries.clamp(0, pieces.ids.shape[1] - 1)
    free = (share_at(tries) == 0).float() + 1e-6
    away = tries.gather(1, torch.multinomial(free, 3, generator=generator)[..., None].expand(-1, -1, 2))
    is_away = share_at(away) == 0
    kind = uniform(count)  # click, box, box and click, points
    is_box, has_click = (kind >= 0.45) & (kind < 0.85), (kind < 0.45) | (kind >= 0.75)
    is_points = kind >= 0.85
    rough = boxes + (uniform(count, 4) - 0.5) * 0.4 * sides.repeat(1, 2) * (0.2 + 0.8 * uniform(count, 1))
    coords = torch.zeros(count, MAX_PROMPT_TOKENS, 2, device=device)
    labels = torch.full((count, MAX_PROMPT_TOKENS), -1, dtype=torch.int32, device=device)
    coords[is_box, 0], coords[is_box, 1] = rough[is_box, :2], rough[is_box, 2:]
    labels[is_box, 0], labels[is_box, 1] = 2, 3
    for wanted, column in ((has_click & is_box, 2), (has_click & ~is_box, 0)):
        coords[wanted, column] = first[wanted]
        labels[wanted, column] = 1
    more = (uniform(count) * 3).long() + 1
    for number in range(3):
        wanted = is_points & (more > number)
        positive = (uniform(count) < 0.4) | ~is_away[:, number]
        coords[wanted, number + 1] = torch.where(positive[:, None], anywhere[:, number + 1], away[:, number])[wanted]
        labels[wanted, number + 1] = positive[wanted].to(torch.int32)
    has_prior = is_box | (uniform(count) < 0.7)
    return rows, {
        "coords": coords,
        "labels": labels,
        "prior_xyxy": rough * has_prior[:, None],
        "masks": masks,
        "boxes_xyxy": boxes,
        "is_click": (labels[:, 0] == 1) & (labels[:, 1] == -1),
        "has_mask": has_masks[rows],
    }


def relit_batch(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """The images `[B, 3, S, S]` in [0, 1] as other cameras in other light would take them."""
    batch, _, side, _ = images.shape
    device = images.device

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, 1, 1, 1, device=device, generator=generator)

    def sometimes(share: float) -> torch.Tensor:
        return uniform(batch) < share

    def grey(x: torch.Tensor) -> torch.Tensor:
        return (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)

    order = torch.rand(batch, 3, device=device, generator=generator).argsort(1)
    exchanged = images.gather(1, order[..., None, None].expand_as(images))
    images = torch.where(sometimes(0.2), exchanged, images)
    mean = images.mean((1, 2, 3), keepdim=True).clamp(0.02, 0.98)
    gamma = (uniform(batch, low=0.22, high=0.66).log() / mean.log()).clamp(0.45, 2.0)
    images = images.clamp(1e-4, 1) ** gamma
    images = images * uniform(batch, 3, low=0.85, high=1.15)[:, :, 0]
    images = torch.lerp(grey(images), images, torch.where(sometimes(0.5), uniform(batch, low=0.3, high=1.5), 1.0))
    level = images.mean((1, 2, 3), keepdim=True)
    images = torch.lerp(level, images, torch.where(sometimes(0.5), uniform(batch, low=0.6, high=1.35), 1.0))
    ramp = torch.linspace(-1, 1, side, device=device)
    slopes = uniform(batch, 2, low=-0.3, high=0.3)[:, :, 0]  # light falls off to a side
    shade = 1 + slopes[:, :1] * ramp + slopes[:, 1:] * ramp[:, None]
    images = images * torch.where(sometimes(0.5), shade, 1.0)
    spots = uniform(batch, 4)[:, :, 0]  # a lamp's reflection in glass
    distance = (ramp - spots[:, :1] * 2 + 1) ** 2 + (ramp[:, None] - spots[:, 1:2] * 2 + 1) ** 2
    glare = spots[:, 2:3] * 0.6 * (-distance / (0.01 + 0.3 * spots[:, 3:])).exp()
    images = torch.where(sometimes(0.12), images + (1 - images) * glare, images)
    images = torch.where(sometimes(0.4), _blurred(images, uniform(batch, low=0.4, high=1.8).view(batch)), images)
    coarse = functional.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)
    coarse = functional.interpolate(coarse, size=images.shape[-2:], mode="bilinear")
    images = torch.where(sometimes(0.1), coarse, images)
    noise = torch.randn(images.shape, device=device, generator=generator)
    noise = torch.where(sometimes(0.5), noise, noise[:, :1])
    images = images + noise * torch.where(sometimes(0.5), uniform(batch, high=0.06), 0.0)
    return images.clamp(0, 1)


def _blurred(images: torch.Tensor, spread_px: torch.Tensor) -> torch.Tensor:
    """Gaussian blur of each image `[B, C, S, S]` by its own standard deviation `[B]`, up to 2 px."""
    batch, channels = images.shape[:2]
    taps = torch.arange(-4, 5, device=images.device)
    kernel = (-0.5 * (taps / spread_px[:, None]) ** 2).exp()
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None]
    stacked = functional.pad(images.reshape(1, batch * channels, *images.shape[2:]), (4, 4, 4, 4), mode="reflect")
    stacked = functional.conv2d(stacked, kernel[..., None], groups=batch * channels)
    return functional.conv2d(stacked, kernel[:, :, None], groups=batch * channels).view_as(images)
