# SPDX-License-Identifier: Apache-2.0
"""Random parts of pictures, as masked pretraining takes them."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


TRIES = 10  # for a part of random shape that lies in the picture
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class RandomCrop:
    """How parts of a picture are drawn (MAE; paper, section 4.1).

    A part covers `min_scale` to `max_scale` of the picture's area, its sides are in a ratio of 3:4 to 4:3, and with
    probability `flip` it is mirrored left to right. Raises ValueError for values out of range.
    """

    min_scale: float = 0.2
    max_scale: float = 1.0
    flip: float = 0.5

    def __post_init__(self):
        if not 0 < self.min_scale <= self.max_scale <= 1:
            raise ValueError(
                f"min_scale and max_scale must be shares of the picture in order, got {self.min_scale} and "
                f"{self.max_scale}"
            )
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is a probability, got {self.flip}")

    def draw(self, size: tuple[int, int], generator: np.random.Generator) -> tuple[Box, bool]:
        """A part (left, top, right, bottom) of a picture of size (W, H), and whether it is mirrored."""
        width, height = size
        for _ in range(TRIES):
            area = width * height * generator.uniform(self.min_scale, self.max_scale)
            ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = generator.integers(0, (width - w + 1, height - h + 1))
                return (int(left), int(top), int(left) + w, int(top) + h), bool(generator.random() < self.flip)
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))  # the largest, in the middle
        left, top = (width - w) // 2, (height - h) // 2
        return (left, top, left + w, top + h), bool(generator.random() < self.flip)


def crop(image: Image.Image, box: Box, size: int, mirrored: bool) -> torch.Tensor:
    """The part (left, top, right, bottom) of an RGB picture as a square, -> (3, S, S) float32 in [0, 1].

    Bicubic with antialiasing, as torchvision resizes PIL pictures.
    """
    part = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if mirrored:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(part)).permute(2, 0, 1).float() / 255


def part_of_map(
    features: torch.Tensor, size: tuple[int, int], box: Box, mirrored: bool, grid: tuple[int, int]
) -> torch.Tensor:
    """What a map of a whole picture has in the cells of a part of it: (C, r, r) -> (h * w, C), row by row.

    The map covers a picture of size (W, H) evenly; values between its cells' centres are interpolated, and at the
    border the last ones stand for what lies beyond. `grid` is (h, w), the cells of the part; one that is larger than
    the map's own gets the mean of as many places as it covers cells of the map.
    """
    (width, height), (left, top, right, bottom) = size, box
    y, rows = _places(top, bottom, height, grid[0], features.shape[1])
    x, columns = _places(left, right, width, grid[1], features.shape[2])
    places = torch.stack(torch.broadcast_tensors(x.flip(0) if mirrored else x, y[:, None]), dim=-1)
    sampled = F.grid_sample(
        features[None].float(), places[None], mode="bilinear", padding_mode="border", align_corners=False
    )
    return F.avg_pool2d(sampled, (rows, columns))[0].flatten(1).transpose(0, 1)


def _places(low: int, high: int, side: int, cells: int, map_cells: int) -> tuple[torch.Tensor, int]:
    """Places in [-1, 1] along a side of the picture at which a part is sampled, and how many of them make a cell."""
    each = max(1, math.ceil((high - low) / side * map_cells / cells))
    fractions = (torch.arange(cells * each) + 0.5) / (cells * each)
    return (low + fractions * (high - low)) / side * 2 - 1, each
