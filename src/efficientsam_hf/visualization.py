# SPDX-License-Identifier: Apache-2.0
"""Masks, contours, prompts and scores drawn on a picture, and sheets of pictures; pillow and numpy only.

All coordinates are pixels of the picture that is passed. Every function returns a new RGB picture and leaves its
input as it was. Line widths, discs and letters scale with the picture.
"""

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont


Color = tuple[int, int, int]

# Okabe and Ito, "Color Universal Design": told apart with every common kind of colour blindness.
PALETTE: tuple[Color, ...] = (
    (86, 180, 233),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (213, 94, 0),
    (0, 114, 178),
)
FOREGROUND: Color = (0, 158, 115)
BACKGROUND: Color = (213, 60, 40)
WHITE: Color = (255, 255, 255)
DARK: Color = (24, 24, 28)
SUPERSAMPLING = 4
FARTHEST = 2**30  # pixels from the picture's corner, which pillow can count


def object_color(index: int) -> Color:
    """Colour of object `index`; the palette repeats."""
    return PALETTE[index % len(PALETTE)]


def line_width(image: Image.Image) -> float:
    """Width in pixels that a contour has on this picture: 0.5 % of its shorter side, at least 1.5."""
    return max(1.5, 0.005 * min(image.size))


def draw_masks(
    image: Image.Image,
    masks: Any,
    colors: Sequence[Color] | None = None,
    opacity: float = 0.45,
    contour: bool = True,
) -> Image.Image:
    """Tint each mask and outline it, masks (N, H, W) or (H, W) bool of the picture's size.

    Colours are the palette's in order unless given, one per mask; later masks lie on top. Raises `ValueError` if
    sizes or the number of colours do not match, or opacity is outside 0 to 1.
    """
    masks = _mask_stack(masks, image)
    if colors is not None and len(colors) != len(masks):
        raise ValueError(f"colors must be one per mask, got {len(colors)} for {len(masks)} masks")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must be between 0 and 1, got {opacity}")
    canvas = image.convert("RGB")
    width = line_width(image)
    for index, mask in enumerate(masks):
        color = object_color(index) if colors is None else colors[index]
        draw_mask(canvas, mask, color, opacity, width if contour else 0.0)
    return canvas


def draw_points(image: Image.Image, points: Any, labels: Any = None) -> Image.Image:
    """Draw clicks, points (P, 2) xy: green discs with a plus (label 1), red discs with a minus (0), ringed in white.

    Labels left out mean 1; label -1 is padding and not drawn. Raises `ValueError` if the shapes do not match.
    """
    points = _rows("points", points, 2)
    labels = np.ones(len(points), int) if labels is None else np.asarray(labels).reshape(-1)
    if len(labels) != len(points):
        raise ValueError(f"labels must be one per point, got {len(labels)} for {len(points)} points")
    canvas = image.convert("RGB")
    radius = max(4.0, 0.014 * min(image.size))
    for point, label in zip(points, labels, strict=True):
        if label >= 0:
            _draw_disc(canvas, point, radius, positive=label > 0)
    return canvas


def draw_boxes(image: Image.Image, boxes: Any, colors: Sequence[Color] | None = None) -> Image.Image:
    """Draw boxes (N, 4) xyxy as coloured frames between thin white ones; colours as in `draw_masks`."""
    boxes = _rows("boxes", boxes, 4)
    if colors is not None and len(colors) != len(boxes):
        raise ValueError(f"colors must be one per box, got {len(colors)} for {len(boxes)} boxes")
    canvas = image.convert("RGB")
    draw = ImageDraw.Draw(canvas)
    inner = max(2, round(line_width(image)))
    halo = max(1, inner // 3)
    for index, box in enumerate(boxes):
        color = object_color(index) if colors is None else colors[index]
        outline = _pixel_frame(box, image.size)
        draw.rectangle(_grow(outline, halo), outline=WHITE, width=inner + 2 * halo)
        draw.rectangle(outline, outline=color, width=inner)
    return canvas


def draw_prompts(
    image: Image.Image,
    points: Any = None,
    labels: Any = None,
    boxes: Any = None,
    colors: Sequence[Color] | None = None,
) -> Image.Image:
    """Draw boxes (N, 4) xyxy, then clicks (P, 2) xy over them; see `draw_boxes` and `draw_points`."""
    canvas = image.convert("RGB")
    if boxes is not None:
        canvas = draw_boxes(canvas, boxes, colors)
    return canvas if points is None else draw_points(canvas, points, labels)


def draw_labels(
    image: Image.Image, texts: Sequence[str], anchors: Any, colors: Sequence[Color] | None = None
) -> Image.Image:
    """Write a text on a coloured tag above each anchor (N, 2) xy, kept inside the picture and off each other."""
    anchors = _rows("anchors", anchors, 2)
    if len(anchors) != len(texts):
        raise ValueError(f"anchors must be one per text, got {len(anchors)} for {len(texts)} texts")
    canvas = image.convert("RGB")
    draw = ImageDraw.Draw(canvas)
    font = _font(max(11.0, 0.028 * min(image.size)))
    taken: list[tuple[float, float, float, float]] = []
    for index, (text, anchor) in enumerate(zip(texts, anchors, strict=True)):
        color = object_color(index) if colors is None else colors[index]
        _draw_tag(draw, canvas.size, text, anchor, color, font, taken)
    return canvas


def label_anchors(masks: Any) -> np.ndarray:
    """Middle of each mask's topmost row, (N, H, W) bool -> (N, 2) xy float: where its label goes; (0, 0) if empty."""
    anchors = np.zeros((len(masks), 2))
    for index, mask in enumerate(np.asarray(masks, dtype=bool)):
        if mask.any():
            top = mask.any(axis=1).argmax()
            anchors[index] = np.flatnonzero(mask[top]).mean(), top
    return anchors


def contact_sheet(
    images: Sequence[Image.Image],
    columns: int,
    cell: int | None = None,
    gap: int = 6,
    background: Color = WHITE,
) -> Image.Image:
    """Lay pictures out in rows of `columns`, each fitted into a square of `cell` pixels and centred.

    `cell` is the longest side of any picture unless given. Raises `ValueError` without pictures or columns.
    """
    if not images or columns < 1:
        raise ValueError(f"a sheet needs pictures and at least one column, got {len(images)} and {columns}")
    cell = max(max(image.size) for image in images) if cell is None else cell
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    step = cell + gap
    sheet = Image.new("RGB", (columns * step + gap, rows * step + gap), background)
    for index, image in enumerate(images):
        scale = cell / max(image.size)
        size = tuple(max(1, round(side * scale)) for side in image.size)
        tile = image.convert("RGB").resize(size, Image.Resampling.LANCZOS) if size != image.size else image
        row, column = divmod(index, columns)
        corner = (gap + column * step + (cell - size[0]) // 2, gap + row * step + (cell - size[1]) // 2)
        sheet.paste(tile, corner)
    return sheet


def _rows(name: str, values: Any, columns: int) -> np.ndarray:
    """Places in a picture as (N, columns) float; `ValueError` for what is none, or far from every picture."""
    try:
        rows = np.asarray(values, dtype=float).reshape(-1, columns)
    except (TypeError, ValueError, OverflowError):
        rows = np.full((1, columns), np.nan)
    if not (np.abs(rows) < FARTHEST).all():
        raise ValueError(f"{name} must be (N, {columns}) finite numbers in pixels of the picture")
    return rows


def _mask_stack(masks: Any, image: Image.Image) -> np.ndarray:
    """Masks as (N, H, W) bool; `ValueError` unless they have the picture's size."""
    masks = np.asarray(masks)
    masks = masks[None] if masks.ndim == 2 else masks
    if masks.size == 0 and masks.shape[:1] == (0,):
        return np.zeros((0, image.height, image.width), bool)
    if masks.ndim != 3 or masks.shape[1:] != (image.height, image.width):
        raise ValueError(
            f"masks must have shape (N, {image.height}, {image.width}) like the picture, got {masks.shape}"
        )
    return masks.astype(bool)


def draw_mask(canvas: Image.Image, mask: np.ndarray, color: Color, opacity: float, width: float) -> None:
    """Tint one mask and draw its contour, working only in the mask's surroundings."""
    if not mask.any():
        return
    left, top, right, bottom = _surroundings(mask, margin=int(4 * width) + 4)
    shape = Image.fromarray(mask[top:bottom, left:right].astype(np.uint8) * 255)
    fill = shape.filter(ImageFilter.GaussianBlur(0.6)).point(lambda value: round(value * opacity))
    canvas.paste(color, (left, top), fill)
    if width > 0:
        halo, line = _contour(shape, 1.7 * width), _contour(shape, width)
        canvas.paste(WHITE, (left, top), halo.point(lambda value: round(value * 0.8)))
        canvas.paste(color, (left, top), line)


def _surroundings(mask: np.ndarray, margin: int) -> tuple[int, int, int, int]:
    """Tight box of a mask grown by a margin and cut at the picture, (H, W) bool -> left, top, right, bottom."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (
        max(0, int(columns[0]) - margin),
        max(0, int(rows[0]) - margin),
        min(mask.shape[1], int(columns[-1]) + 1 + margin),
        min(mask.shape[0], int(rows[-1]) + 1 + margin),
    )


def _contour(shape: Image.Image, width: float) -> Image.Image:
    """Opacity of a smooth line along a mask's edge, both 0 to 255.

    A blurred straight edge is the normal distribution of the distance to it, so that its quantile gives the distance
    back in fractions of a pixel; a table of 256 entries turns the blurred mask into an anti-aliased line.
    """
    sigma = 0.75 * width + 0.5
    distances = [abs(NormalDist(0, sigma).inv_cdf((value + 0.5) / 256)) for value in range(256)]
    table = [round(255 * min(1.0, max(0.0, width / 2 + 0.5 - distance))) for distance in distances]
    padded = Image.new("L", (shape.width + 2, shape.height + 2))
    padded.paste(shape, (1, 1))  # a mask that runs off the picture is outlined there as well
    line = padded.filter(ImageFilter.GaussianBlur(sigma)).point(table)
    return line.crop((1, 1, shape.width + 1, shape.height + 1))


def _draw_disc(canvas: Image.Image, point: np.ndarray, radius: float, positive: bool) -> None:
    """Paste one click, drawn large and reduced so that its edges are smooth; pixel centres are whole numbers."""
    side = int(2 * radius) + 6
    corner = [int(np.floor(value)) - side // 2 for value in point]
    middle = [(value + 0.5 - start) * SUPERSAMPLING for value, start in zip(point, corner, strict=True)]
    radius *= SUPERSAMPLING
    disc, ring, sign = (Image.new("L", (side * SUPERSAMPLING,) * 2) for _ in range(3))
    _circle(ring, middle, radius)
    _circle(disc, middle, 0.78 * radius)
    _bar(sign, middle, 0.42 * radius, 0.12 * radius)
    if positive:
        _bar(sign, middle, 0.12 * radius, 0.42 * radius)
    shadow = ring.filter(ImageFilter.GaussianBlur(0.2 * radius)).point(lambda value: value // 3)
    layers = ((DARK, shadow), (WHITE, ring), (FOREGROUND if positive else BACKGROUND, disc), (WHITE, sign))
    for color, layer in layers:
        canvas.paste(color, tuple(corner), layer.resize((side, side), Image.Resampling.BOX))


def _circle(layer: Image.Image, middle: Sequence[float], radius: float) -> None:
    """Fill a circle of a single-channel layer."""
    box = (middle[0] - radius, middle[1] - radius, middle[0] + radius, middle[1] + radius)
    ImageDraw.Draw(layer).ellipse(box, fill=255)


def _bar(layer: Image.Image, middle: Sequence[float], half_width: float, half_height: float) -> None:
    """Fill a bar of a single-channel layer."""
    box = (middle[0] - half_width, middle[1] - half_height, middle[0] + half_width, middle[1] + half_height)
    ImageDraw.Draw(layer).rectangle(box, fill=255)


def _pixel_frame(box: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """First and last pixel column and row that a box xyxy covers, cut at the picture of size (W, H)."""
    columns = np.clip([np.floor(box[0]), np.ceil(box[2]) - 1], 0, size[0] - 1)
    rows = np.clip([np.floor(box[1]), np.ceil(box[3]) - 1], 0, size[1] - 1)
    return int(columns[0]), int(rows[0]), int(max(columns)), int(max(rows))


def _grow(frame: tuple[int, int, int, int], margin: int) -> tuple[int, int, int, int]:
    """A frame moved outwards on every side."""
    return frame[0] - margin, frame[1] - margin, frame[2] + margin, frame[3] + margin


def _font(size: float) -> Any:
    """Pillow's own font at a size; builds of pillow without FreeType have only its small bitmap font."""
    try:
        return ImageFont.load_default(size)
    except (ImportError, TypeError):
        return ImageFont.load_default()


def _draw_tag(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    text: str,
    anchor: np.ndarray,
    color: Color,
    font: Any,
    taken: list[tuple[float, float, float, float]],
) -> None:
    """Write one text on a rounded tag just above its anchor, inside the picture of size (W, H), below tags in its way.

    `taken` are the frames of the tags so far; the new one is added.
    """
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    pad = max(2, round(0.3 * (bottom - top)))
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    lowest = max(0, size[1] - height - 1)
    x = min(max(0, anchor[0] - width / 2), max(0, size[0] - width - 1))
    y = min(max(0, anchor[1] - height - pad), lowest)
    for x0, y0, x1, y1 in sorted(taken, key=lambda frame: frame[1]):
        if x < x1 and x0 < x + width and y < y1 and y0 < y + height:
            y = min(y1 + 1, lowest)
    taken.append((x, y, x + width, y + height))
    draw.rounded_rectangle(taken[-1], radius=pad, fill=color)
    brightness = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    draw.text((x + pad - left, y + pad - top), text, font=font, fill=DARK if brightness > 120 else WHITE)
