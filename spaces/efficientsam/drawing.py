# SPDX-License-Identifier: Apache-2.0
"""Masks and prompts drawn on the view of a picture: a copy of fixed size for the screen.

The view is what the browser shows and reports clicks on; it is made from the picture and never goes back into it. All
coordinates here are pixels of the view unless a function says otherwise.
"""

from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from rle import decode_mask, mask_bounds


Color = tuple[int, int, int]
Window = tuple[np.ndarray, tuple[int, int]]  # what a mask covers, (h, w) bool, and (x, y) of its first pixel

VIEW_SIDE = 1200  # of the longer side, whatever the picture has: lines and discs then look the same on every picture
THUMBNAIL_SIDE = 320
OVERLAY_SIDE = 3000  # of the longer side at most: drawing dozens of masks on more takes many seconds
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
CONTOUR = 3.0  # pixels
NUMBERED = 40  # masks of everything that carry their number,
SMALLEST_NUMBERED = 40  # if they are so many pixels wide and high
DISC = 17.0  # pixels of its radius
SUPERSAMPLING = 4


def make_view(picture: Image.Image, side: int = VIEW_SIDE) -> Image.Image:
    """A copy of a picture whose longer side is `side` pixels."""
    scale = side / max(picture.size)
    size = tuple(max(1, round(scale * length)) for length in picture.size)
    return picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)


def overlay_of(picture: Image.Image) -> Image.Image:
    """A copy to draw on and give away: as large as the picture, or of OVERLAY_SIDE pixels."""
    return make_view(picture, min(OVERLAY_SIDE, max(picture.size)))


def view_to_picture(point: Sequence[float], view: tuple[int, int], picture: tuple[int, int]) -> list[float]:
    """The pixel of a picture under a pixel of its view; sizes are (W, H), the result lies inside the picture."""
    scaled = ((value + 0.5) * whole / seen - 0.5 for value, seen, whole in zip(point, view, picture))
    return [round(min(max(value, 0.0), float(whole)), 1) for value, whole in zip(scaled, picture)]


def picture_to_view(point: Sequence[float], view: tuple[int, int], picture: tuple[int, int]) -> tuple[float, ...]:
    """Where a pixel of a picture lies in its view; sizes are (W, H)."""
    return tuple((value + 0.5) * seen / whole - 0.5 for value, seen, whole in zip(point, view, picture))


def object_color(index: int) -> Color:
    """Colour of mask `index`; the palette repeats."""
    return PALETTE[index % len(PALETTE)]


def mask_window(mask: np.ndarray) -> Window:
    """What a mask covers: (H, W) bool -> (h, w) bool and (x, y) of its first pixel."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return np.zeros((0, 0), bool), (0, 0)
    window = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return window, (int(columns[0]), int(rows[0]))


def view_window(rle: dict, view: tuple[int, int]) -> Window:
    """What a mask of the picture covers of a view of size (W, H), the mask as run lengths."""
    height, width = rle["size"]
    x0, y0, x1, y1 = mask_bounds(rle)
    columns = ((np.arange(view[0]) + 0.5) * width / view[0]).astype(int)
    rows = ((np.arange(view[1]) + 0.5) * height / view[1]).astype(int)
    left, right = np.searchsorted(columns, (x0, x1))
    top, bottom = np.searchsorted(rows, (y0, y1))
    mask = decode_mask(rle)[rows[top:bottom, None], columns[None, left:right]]
    return np.ascontiguousarray(mask), (int(left), int(top))


def covers(window: Window, x: int, y: int) -> bool:
    """Whether a mask has the pixel (x, y)."""
    mask, (left, top) = window
    return 0 <= y - top < mask.shape[0] and 0 <= x - left < mask.shape[1] and bool(mask[y - top, x - left])


def draw_mask(canvas: Image.Image, window: Window, color: Color, opacity: float) -> None:
    """Tint a mask and outline it in white and its colour; lines grow with the canvas."""
    mask, (left, top) = window
    if not mask.any():
        return
    line = CONTOUR * max(canvas.size) / VIEW_SIDE
    margin = int(3 * line) + 2
    shape = Image.fromarray(np.pad(mask, margin).astype(np.uint8) * 255)
    place = (left - margin, top - margin)
    canvas.paste(color, place, shape.point([round(value * opacity) for value in range(256)]))
    sigma = 0.7 * line
    blurred = shape.filter(ImageFilter.GaussianBlur(sigma))
    canvas.paste(WHITE, place, blurred.point(_line_table(sigma, 2 * line, 0.75)))
    canvas.paste(color, place, blurred.point(_line_table(sigma, line, 1.0)))


def draw_windows(canvas: Image.Image, windows: Sequence[Window], numbers: Sequence[int], opacity: float) -> None:
    """Masks in the colours of their `numbers` (N), the largest at the bottom, and the ranks of the larger ones."""
    order = sorted(range(len(windows)), key=lambda rank: -int(windows[rank][0].sum()))
    for rank in order:
        draw_mask(canvas, windows[rank], object_color(numbers[rank]), opacity)
    for rank in order[:NUMBERED]:
        mask, _ = windows[rank]
        if min(mask.shape) >= SMALLEST_NUMBERED:
            draw_number(canvas, str(rank + 1), middle_of(windows[rank]), object_color(numbers[rank]))


def middle_of(window: Window) -> tuple[int, int]:
    """A pixel (x, y) of a mask that is not empty, near its middle."""
    mask, (left, top) = window
    counts = mask.sum(axis=1)
    row = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2))
    columns = np.flatnonzero(mask[row])
    return left + int(columns[len(columns) // 2]), top + row


def draw_points(canvas: Image.Image, points: Sequence[Sequence[float]], labels: Sequence[int]) -> None:
    """Clicks: green discs with a plus (label 1), red discs with a minus (0), ringed in white."""
    for point, label in zip(points, labels):
        _draw_disc(canvas, point, label == 1)


def draw_box(canvas: Image.Image, box: Sequence[float]) -> None:
    """A frame (x0, y0, x1, y1) between white lines."""
    x0, y0, x1, y1 = (round(value) for value in box)
    _draw_lines(canvas, [[(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0), (x1, y0)]])


def draw_corner(canvas: Image.Image, point: Sequence[float]) -> None:
    """The first corner of a box, and lines over the whole view where two of its sides will lie."""
    x, y = (round(value) for value in point)
    _draw_lines(canvas, [[(x, 0), (x, canvas.height)], [(0, y), (canvas.width, y)]])
    ImageDraw.Draw(canvas).ellipse([x - 10, y - 10, x + 10, y + 10], fill=FOREGROUND, outline=WHITE, width=3)


def _draw_lines(canvas: Image.Image, lines: Sequence[Sequence[tuple[int, int]]]) -> None:
    """Green lines between white ones."""
    draw = ImageDraw.Draw(canvas)
    for width, color in ((8, WHITE), (4, FOREGROUND)):
        for line in lines:
            draw.line(line, fill=color, width=width, joint="curve")


def draw_number(canvas: Image.Image, text: str, place: tuple[int, int], color: Color) -> None:
    """A short text on a tag of a mask's colour, its middle at `place`."""
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(26)
    left, top, right, bottom = draw.textbbox(place, text, font=font, anchor="mm")
    draw.rounded_rectangle([left - 6, top - 5, right + 6, bottom + 5], radius=7, fill=color, outline=WHITE, width=1)
    brightness = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    draw.text(place, text, font=font, anchor="mm", fill=DARK if brightness > 120 else WHITE)


def fade_around(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """A picture in which everything beside a mask (H, W) is faded."""
    faded = Image.blend(picture, Image.new("RGB", picture.size, (128, 128, 128)), 0.75)
    faded.paste(picture, (0, 0), Image.fromarray(mask.astype(np.uint8) * 255))
    return faded


@lru_cache(maxsize=64)
def _line_table(sigma: float, width: float, opacity: float) -> list[int]:
    """Opacity of a line along the edge of a shape, for each value from 0 to 255 of the blurred shape.

    A blurred straight edge is the normal distribution of the distance to it: its quantile gives the distance back in
    fractions of a pixel, and the line is smooth.
    """
    distances = [abs(NormalDist(0, sigma).inv_cdf((value + 0.5) / 256)) for value in range(256)]
    return [round(255 * opacity * min(1.0, max(0.0, width / 2 + 0.5 - distance))) for distance in distances]


def _draw_disc(canvas: Image.Image, point: Sequence[float], positive: bool) -> None:
    """One click, drawn large and reduced so that its edges are smooth."""
    side = int(2 * DISC) + 4
    corner = [int(np.floor(value)) - side // 2 for value in point]
    x, y = ((value + 0.5 - start) * SUPERSAMPLING for value, start in zip(point, corner))
    layer = Image.new("RGBA", (side * SUPERSAMPLING,) * 2)
    draw = ImageDraw.Draw(layer)
    radius = DISC * SUPERSAMPLING
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=WHITE)
    inner, long, thin = 0.78 * radius, 0.42 * radius, 0.12 * radius
    draw.ellipse([x - inner, y - inner, x + inner, y + inner], fill=FOREGROUND if positive else BACKGROUND)
    draw.rectangle([x - long, y - thin, x + long, y + thin], fill=WHITE)
    if positive:
        draw.rectangle([x - thin, y - long, x + thin, y + long], fill=WHITE)
    layer = layer.resize((side, side), Image.Resampling.BOX)
    canvas.paste(layer, tuple(corner), layer)
