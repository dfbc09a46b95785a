# SPDX-License-Identifier: Apache-2.0
"""Random changes of a picture and its masks together; the paper trains without any (section 4)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageStat

from .light import change_light


@dataclass(frozen=True)
class Augmentation:
    """Mirroring left to right, large-scale jitter (Ghiasi et al. 2021, Simple Copy-Paste), and other light.

    `flip` is a probability. A scale is drawn from [`min_scale`, `max_scale`], log-uniformly: above 1 a random part of
    the picture that is smaller by the scale stays; below 1 the picture shrinks and lies at a random place on its mean
    colour. `light` is the strength of random changes of exposure, contrast, saturation and white balance.

    Raises ValueError for values out of range.
    """

    flip: float = 0.0
    min_scale: float = 1.0
    max_scale: float = 1.0
    light: float = 0.0

    def __post_init__(self):
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is a probability, got {self.flip}")
        if not 0.05 <= self.min_scale <= self.max_scale <= 20:
            raise ValueError(
                f"min_scale and max_scale must be in order and from 0.05 to 20, got {self.min_scale}, {self.max_scale}"
            )
        if not 0 <= self.light <= 5:
            raise ValueError(f"light must be a strength from 0 to 5, got {self.light}")

    def __call__(self, sample: dict[str, Any], generator: np.random.Generator, zoom: float = 1.0) -> dict[str, Any]:
        """{"image": RGB PIL image, "masks": (N, H, W) bool, ...} -> the same with both changed alike.

        The scale drawn is multiplied by `zoom`. Masks that leave the picture become empty and stay in the list. Where
        nothing is changed, masks stay what they are, `RleMasks` too, which are expanded otherwise.
        """
        flip, scale, x, y = generator.random(4)
        image, masks = sample["image"], sample["masks"]
        if flip < self.flip:
            image, masks = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), np.asarray(masks)[:, :, ::-1]
        factor = zoom * self.min_scale * (self.max_scale / self.min_scale) ** scale
        if factor != 1:
            image, masks = _view(image, np.asarray(masks), factor, x, y)
        if self.light:
            image = change_light(image, generator, self.light)
        return {**sample, "image": image, "masks": masks}


def _view(image: Image.Image, masks: np.ndarray, scale: float, x: float, y: float) -> tuple[Image.Image, np.ndarray]:
    """A part of the picture (scale above 1), or the whole of it smaller on a canvas of the same size.

    (x, y) in [0, 1] is the place of the part in the picture, or of the picture on the canvas.
    """
    ratio = min(scale, 1 / scale)
    width, height = (max(1, round(side * ratio)) for side in image.size)
    left, top = round(x * (image.width - width)), round(y * (image.height - height))
    if scale > 1:
        return image.crop((left, top, left + width, top + height)), masks[:, top : top + height, left : left + width]
    canvas = Image.new("RGB", image.size, tuple(round(value) for value in ImageStat.Stat(image).mean))
    canvas.paste(image.resize((width, height), Image.Resampling.BOX), (left, top))
    small = np.zeros_like(masks)
    for mask, target in zip(masks, small):
        shares = Image.fromarray(mask.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BOX)
        target[top : top + height, left : left + width] = np.asarray(shares) >= 128
    return canvas, small
