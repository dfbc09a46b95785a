# SPDX-License-Identifier: Apache-2.0
"""From a picture to what a pretraining batch holds of it: a random crop, for the student and for its teacher."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from .normalization import normalize


TRIES = 10  # for a crop of random shape that lies in the picture


@dataclass(frozen=True)
class CropPreparation:
    """A random part of the picture, stretched to a square, perhaps mirrored (MAE; paper, section 4.1).

    The part covers `min_scale` to `max_scale` of the picture's area, its sides are in a ratio of 3:4 to 4:3, and the
    resampling is bicubic with antialiasing. `teacher_size` is the side of a second copy of the same part for a teacher
    that looks at another resolution than the student; None for none. Raises ValueError for values out of range.
    """

    min_scale: float = 0.2
    max_scale: float = 1.0
    flip: float = 0.5
    teacher_size: int | None = None

    def __post_init__(self):
        if not 0 < self.min_scale <= self.max_scale <= 1:
            raise ValueError(
                f"min_scale and max_scale must be shares of the picture in order, got {self.min_scale} and "
                f"{self.max_scale}"
            )
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is a probability, got {self.flip}")

    def __call__(self, sample: dict[str, Any], size: int, generator: np.random.Generator) -> dict[str, torch.Tensor]:
        """pixel_values (3, S, S), ImageNet-normalised; with `teacher_size` R, teacher_images (3, R, R) in [0, 1]."""
        image = sample["image"]
        box, mirrored = self.draw(image.size, generator)
        row = {"pixel_values": normalize(crop(image, box, size, mirrored))}
        if self.teacher_size is not None:
            row["teacher_images"] = crop(image, box, self.teacher_size, mirrored)
        return row

    def padding(self, size: int) -> dict[str, torch.Tensor]:
        """What stands in a batch for a picture that cannot be read: the mean colour."""
        grey = Image.new("RGB", (1, 1), (124, 116, 104))
        return self({"image": grey}, size, np.random.default_rng(0))

    def draw(self, size: tuple[int, int], generator: np.random.Generator) -> tuple[tuple[int, int, int, int], bool]:
        """A part (left, top, right, bottom) of a picture of size (W, H), and whether it is mirrored."""
        width, height = size
        for _ in range(TRIES):
            area = width * height * generator.uniform(self.min_scale, self.max_scale)
            ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = generator.integers(0, (width - w + 1, height - h + 1))
                return (int(left), int(top), int(left) + w, int(top) + h), bool(generator.random() < self.flip)
        side_w, side_h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))  # the largest, centred
        left, top = (width - side_w) // 2, (height - side_h) // 2
        return (left, top, left + side_w, top + side_h), bool(generator.random() < self.flip)


def crop(image: Image.Image, box: tuple[int, int, int, int], size: int, mirrored: bool) -> torch.Tensor:
    """The part (left, top, right, bottom) of an RGB picture as a square, -> (3, S, S) float32 in [0, 1]."""
    part = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if mirrored:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(part)).permute(2, 0, 1).float() / 255
