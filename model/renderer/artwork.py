"""What is printed on packages: brands with their palettes, logos, text, pictures of the content.

Draws flat rectangles. Does not know what shape of package they are wrapped around.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np

from model.renderer.paint import (
    FONTS,
    Pixels,
    Rgb,
    Rng,
    floats,
    from_hsv,
    luma,
    package_hue,
    smooth_noise,
    tint,
    write,
)
from model.renderer.textures import Textures

TEXTURED_SHARE = 0.33  # of the products, when textures are given


@dataclass(kw_only=True)
class Brand:
    """What variants of one brand share: the palette, the layout and the kind of package."""

    seed: int
    palette: tuple[Rgb, Rgb, Rgb, Rgb]  # ground, second, accent, ink
    kind: str
    aspect: float
    width: float
    variants: int = 0
    word: str = ""
    sub: tuple[str, ...] = ()


def new_palette(rng: Rng) -> tuple[Rgb, Rgb, Rgb, Rgb]:
    hue = package_hue(rng)
    ground_kind = rng.weighted({"vivid": 0.4, "white": 0.3, "dark": 0.12, "pastel": 0.12, "metal": 0.06})
    if ground_kind == "vivid":
        ground = from_hsv(hue, rng.between(0.5, 0.95), rng.between(0.35, 0.88))
    elif ground_kind == "white":
        ground = from_hsv(hue, rng.between(0, 0.08), rng.between(0.85, 1))
    elif ground_kind == "dark":
        ground = from_hsv(hue, rng.between(0, 0.8), rng.between(0.05, 0.25))
    elif ground_kind == "pastel":
        ground = from_hsv(hue, rng.between(0.12, 0.45), rng.between(0.75, 0.98))
    else:
        ground = from_hsv(rng.pick((0.12, 0.6, 0.1)), rng.between(0.03, 0.35), rng.between(0.55, 0.8))
    second = from_hsv(hue + rng.pick((0, 0, 0.05, 0.5, 0.33, 0.15)), rng.between(0.25, 0.9), rng.between(0.3, 0.92))
    if rng.chance(0.4):
        second = rng.pick(((250, 250, 250), (20, 20, 22), (235, 225, 200)))
    accent = from_hsv(package_hue(rng), rng.between(0.5, 0.95), rng.between(0.45, 0.95))
    ink: Rgb = (245, 245, 240) if luma(ground) < 140 else from_hsv(hue, rng.between(0, 1), rng.between(0, 0.4))
    return ground, second, accent, ink


def printed_photo(rng: Rng, height: int, width: int, colours: Sequence[Rgb]) -> Pixels:
    """Something like a photo printed on a package: smooth blobs between some colours, with texture."""
    a, b, c = (floats(colour) for colour in (rng.pick(colours), rng.pick(colours), tint(rng.pick(colours), 0.5)))
    coarse = smooth_noise(rng, height, width, rng.between(0.2, 0.8))[:, :, None]
    fine = smooth_noise(rng, height, width, rng.between(0.06, 0.2))[:, :, None]
    mix = np.clip(0.5 + coarse * 0.6, 0, 1)
    out = (a * mix + b * (1 - mix)) * (1 + 0.12 * fine) + (c - b) * np.clip(fine * 0.5 - 0.3, 0, 0.6)
    return cast(Pixels, np.clip(out, 0, 255).astype(np.uint8))


def artwork(brand: Brand, variant: int, width: int, height: int, textures: Textures | None) -> Pixels:
    """The printed face of a product. The layout comes from the brand, some colours and pictures from the variant."""
    layout = Rng((brand.seed, 1))
    own = Rng((brand.seed, 2, variant))
    ground, second, accent, ink = brand.palette
    if variant and own.chance(0.8):
        accent = from_hsv(package_hue(own), own.between(0.5, 0.95), own.between(0.4, 0.95))
    if variant and own.chance(0.35):
        second = accent
    if variant and brand.seed % 4 == 0:  # brands whose variants differ by the ground
        ground = from_hsv(package_hue(own), own.between(0.4, 0.9), own.between(0.4, 0.9))
        ink = (245, 245, 240) if luma(ground) < 140 else (30, 28, 34)
    if textures is not None and textures.faces and layout.chance(TEXTURED_SHARE):
        return _photo_face(own, width, height, textures)
    image = _ground(layout, own, width, height, (ground, second, accent))
    if layout.chance(0.3):
        image = _tinted_noise(layout, image)
    if layout.chance(0.6):
        _content_picture(layout, own, image, (accent, second))
    font = layout.pick(FONTS)
    image, top = _logo(layout, image, brand.word, font, (second, accent, ink))
    for line in brand.sub:
        h = height * layout.between(0.03, 0.08)
        w = width * layout.between(0.3, 0.8)
        if top + h > height * 0.97:
            break
        colour = accent if layout.chance(0.4) else ink
        write(image, line, font, ((width - w) / 2, top, w, h), colour, 0.1)
        top += h * layout.between(1.3, 2.2)
    if layout.chance(0.35):
        y0 = int(height * layout.between(0.8, 0.95))
        image[y0 : y0 + max(1, int(height * layout.between(0.03, 0.15)))] = accent
    if layout.chance(0.3):
        centre = (int(width * layout.pick((0.22, 0.78))), int(height * layout.between(0.15, 0.85)))
        cv2.circle(image, centre, max(1, int(width * layout.between(0.1, 0.2))), accent, -1, cv2.LINE_AA)
        cv2.circle(image, centre, max(1, int(width * 0.07)), (250, 250, 250), -1)
    if layout.chance(0.1):
        _small_print(layout, image)
    return image


def _ground(layout: Rng, own: Rng, width: int, height: int, colours: tuple[Rgb, Rgb, Rgb]) -> Pixels:
    """What everything else on a face is printed over. colours: ground, second, accent."""
    ground, second, accent = colours
    image: Pixels = np.empty((height, width, 3), np.uint8)
    image[:] = ground
    form = layout.weighted(
        {"plain": 3, "gradient": 2, "split": 2.5, "diagonal": 1, "stripes": 1, "disc": 1.2, "photo": 1.6, "arc": 1.2}
    )
    if form == "gradient":
        ramp = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
        image[:] = (floats(ground) * (1 - ramp) + floats(second) * ramp).astype(np.uint8)
    elif form == "split":
        cut = int(height * layout.between(0.25, 0.75))
        if layout.chance(0.5):
            image[cut:] = second
        else:
            image[:cut] = second
    elif form == "diagonal":
        a, b = int(height * layout.between(0.1, 0.9)), int(height * layout.between(0.1, 0.9))
        cv2.fillPoly(image, [np.array([(0, a), (width, b), (width, height), (0, height)], np.int32)], second)
    elif form == "stripes":
        step = max(2, int(width * layout.between(0.08, 0.35)))
        if layout.chance(0.6):
            for start in range(0, width, 2 * step):
                image[:, start : start + step] = second
        else:
            for start in range(0, height, 2 * step):
                image[start : start + step] = second
    elif form == "disc":
        centre = (int(width * layout.between(0.1, 0.9)), int(height * layout.between(0.2, 0.9)))
        cv2.circle(image, centre, int(width * layout.between(0.35, 0.8)), second, -1)
    elif form == "arc":
        centre = (int(width * layout.between(0.2, 0.8)), int(height * layout.between(0.9, 1.3)))
        cv2.ellipse(image, centre, (int(width * 0.9), int(height * layout.between(0.3, 0.7))), 0, 0, 360, second, -1)
        cv2.ellipse(image, centre, (int(width * 0.9), int(height * layout.between(0.25, 0.6))), 0, 0, 360, accent, -1)
    elif form == "photo":
        image[:] = printed_photo(own, height, width, (ground, second, accent))
    return image


def _logo(layout: Rng, image: Pixels, word: str, font: int, colours: tuple[Rgb, Rgb, Rgb]) -> tuple[Pixels, float]:
    """Write the brand's name, often on a plate. Returns the face and the y below which smaller text may begin.

    colours: second, accent, ink.
    """
    second, accent, ink = colours
    height, width = image.shape[:2]
    w = width * layout.between(0.55, 0.94)
    h = height * layout.between(0.08, 0.24)
    x = (width - w) * layout.between(0.3, 0.7)
    y = height * layout.pick((layout.between(0.04, 0.2), layout.between(0.04, 0.2), layout.between(0.25, 0.55)))
    plate = layout.whole(0, 4)
    logo_ink = ink
    if plate <= 2:
        fill = layout.pick((second, accent, (250, 250, 250), (200, 20, 30)))
        logo_ink = (250, 250, 250) if luma(fill) < 150 else layout.pick(((20, 20, 30), (180, 10, 20), (10, 40, 120)))
        if plate == 0:
            cv2.rectangle(image, (int(x), int(y)), (int(x + w), int(y + h)), fill, -1)
        elif plate == 1:
            cv2.ellipse(image, (int(x + w / 2), int(y + h / 2)), (int(w / 2), int(h * 0.7)), 0, 0, 360, fill, -1)
        else:
            cv2.rectangle(image, (0, int(y)), (width, int(y + h)), fill, -1)
    if height > 2.4 * width and layout.chance(0.25):
        turned = np.ascontiguousarray(np.rot90(image))
        write(turned, word, font, (height * 0.25, width * 0.2, height * 0.55, width * 0.6), logo_ink, 0.16)
        image = np.ascontiguousarray(np.rot90(turned, -1))
    else:
        write(
            image,
            word,
            font,
            (x + w * 0.06, y + h * 0.15, w * 0.88, h * 0.7),
            logo_ink,
            layout.between(0.08, 0.25),
        )
    return image, y + h * layout.between(1.1, 1.5)


def _content_picture(layout: Rng, own: Rng, image: Pixels, colours: Sequence[Rgb]) -> None:
    """The picture of what is inside, in the lower part of a face."""
    height, width = image.shape[:2]
    w, h = int(width * layout.between(0.3, 0.85)), int(height * layout.between(0.18, 0.45))
    x, y = int((width - w) * layout.unit()), int((height - h) * layout.between(0.45, 1))
    if w > 3 and h > 3:
        palette = (*colours, from_hsv(own.unit(), 0.7, 0.8), (250, 245, 235))
        picture = printed_photo(own, h, w, palette)
        mask = np.zeros((h, w), np.uint8)
        form = layout.whole(0, 3)
        if form == 0:
            cv2.ellipse(mask, (w // 2, h // 2), (w // 2, h // 2), 0, 0, 360, 255, -1)
        elif form == 1:
            mask[:] = 255
        elif form == 2:
            for _ in range(own.whole(2, 5)):
                centre = (int(w * own.between(0.15, 0.85)), int(h * own.between(0.2, 0.8)))
                cv2.circle(mask, centre, max(1, int(min(w, h) * own.between(0.15, 0.35))), 255, -1)
        else:
            points = np.array([(own.unit() * w, own.unit() * h) for _ in range(6)], np.int32)
            cv2.fillConvexPoly(mask, cv2.convexHull(points), 255)
        cv2.copyTo(picture, mask, image[y : y + h, x : x + w])


def _tinted_noise(rng: Rng, image: Pixels) -> Pixels:
    height, width = image.shape[:2]
    noise = 1 + 0.1 * smooth_noise(rng, height, width, rng.between(0.1, 0.8))
    return cast(Pixels, np.clip(image * noise[:, :, None], 0, 255).astype(np.uint8))


def _small_print(rng: Rng, image: Pixels) -> None:
    """A barcode or a table of nutrition facts, dark on white."""
    height, width = image.shape[:2]
    w, h = int(width * rng.between(0.3, 0.5)), int(height * rng.between(0.12, 0.3))
    x, y = rng.whole(0, max(0, width - w)), rng.whole(height // 3, max(height // 3, height - h))
    image[y : y + h, x : x + w] = 245
    if rng.chance(0.5):
        for i in range(x + 2, x + w - 2, 2):
            if rng.chance(0.6):
                image[y + 1 : y + int(h * 0.8), i : i + 1] = 20
    else:
        for i in range(y + 2, y + h - 1, 3):
            image[i : i + 1, x + 1 : x + int(w * rng.between(0.5, 0.95))] = 70


def recolour(rng: Rng, rgb: Pixels, strength: float) -> Pixels:
    """Turn the hue, change saturation and brightness: one photo gives several products."""
    hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)
    if rng.chance(strength):
        ramp = np.arange(256)
        hue = ((ramp + (rng.whole(0, 179) if rng.chance(0.2) else rng.whole(-12, 12))) % 180).astype(np.uint8)
        saturation = np.clip(ramp * rng.between(0.7, 1.3), 0, 255).astype(np.uint8)
        value = np.clip(ramp * rng.between(0.75, 1.15), 0, 255).astype(np.uint8)
        hsv = cv2.LUT(hsv, np.dstack([hue[None], saturation[None], value[None]]).reshape(256, 1, 3))
    return cast(Pixels, cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


def _photo_face(rng: Rng, width: int, height: int, textures: Textures) -> Pixels:
    """The middle of a product photo, stretched over a face."""
    photo: Pixels = rng.pick(textures.faces)
    rows, columns = photo.shape[:2]
    w, h = int(columns * rng.between(0.28, 0.5)), int(rows * rng.between(0.35, 0.65))
    w, h = max(4, w), max(4, h)
    x = int(np.clip(columns * rng.between(0.45, 0.55) - w / 2, 0, max(0, columns - w)))
    y = int(np.clip(rows * rng.between(0.45, 0.6) - h / 2, 0, max(0, rows - h)))
    crop = recolour(rng, np.ascontiguousarray(photo[y : y + h, x : x + w]), 0.5)
    if rng.chance(0.3):
        crop = np.ascontiguousarray(crop[:, ::-1])
    return cast(Pixels, cv2.resize(crop, (width, height), interpolation=cv2.INTER_LINEAR))
