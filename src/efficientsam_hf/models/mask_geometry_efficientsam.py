# SPDX-License-Identifier: Apache-2.0
"""The geometry of segment everything: crops, grids of points, stability and boxes of masks, and their suppression.

Boxes are (x0, y0, x1, y1) of first and last pixels, of a crop or of the whole image as each docstring says.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from .checks_efficientsam import short


SMALLEST_CROP = 16  # pixels


def crop_boxes_of_layers(height: int, width: int, num_layers: int, overlap_ratio: float) -> list[list[int]]:
    """Boxes (x0, y0, x1, y1) of the whole image and, in layer i, of 2**i x 2**i overlapping crops.

    `overlap_ratio` is the overlap of the first layer as a part of the shorter side; later layers scale it down.
    Raises ValueError if the image is too small for so many layers.
    """
    if num_layers and min(height, width) >> num_layers < SMALLEST_CROP:
        raise ValueError(
            f"crops_n_layers {short(num_layers)} cuts each side of an image of {width} x {height} pixels into "
            f"2**{short(num_layers)} parts, which must be {SMALLEST_CROP} pixels or more"
        )
    boxes = [[0, 0, width, height]]
    for layer in range(1, num_layers + 1):
        count = 2**layer
        overlap = int(overlap_ratio * min(height, width) * 2 / count)
        crop_height = math.ceil((overlap * (count - 1) + height) / count)
        crop_width = math.ceil((overlap * (count - 1) + width) / count)
        for row in range(count):
            for column in range(count):
                x0 = min(column * (crop_width - overlap), width - crop_width)
                y0 = min(row * (crop_height - overlap), height - crop_height)
                boxes.append([x0, y0, min(x0 + crop_width, width), min(y0 + crop_height, height)])
    return boxes


def layer_of_crop(index: int) -> int:
    """Layer that the crop at `index` of `crop_boxes_of_layers` belongs to: crop 0 is the whole image."""
    layer, first_of_next = 0, 1
    while index >= first_of_next:
        layer += 1
        first_of_next += 4**layer
    return layer


def grid_side(crop: int, points_per_crop: int, downscale_factor: float) -> int:
    """Points per side of the grid of the crop at an index of `crop_boxes_of_layers`."""
    return max(1, int(points_per_crop / downscale_factor ** layer_of_crop(crop)))


def point_grid(points_per_side: int) -> torch.Tensor:
    """Centres of a grid's cells in the unit square, row by row: -> (points_per_side ** 2, 2), float32."""
    steps = (torch.arange(points_per_side, dtype=torch.float32, device="cpu") + 0.5) / points_per_side
    return torch.cartesian_prod(steps, steps).flip(-1)


def count_pixels(masks: torch.Tensor) -> torch.Tensor:
    """Pixels of every mask: (M, H, W) bool -> (M) int64.

    torch widens every pixel to eight bytes before it adds them up; numpy's count reads them as they are, many times as
    fast.
    """
    if masks.device.type != "cpu":
        return masks.flatten(1).sum(1)
    return torch.tensor([np.count_nonzero(mask) for mask in masks.numpy()], dtype=torch.long, device="cpu")


def stability_scores(logits: torch.Tensor, mask_threshold: float, offset: float) -> torch.Tensor:
    """IoU of the masks cut at `mask_threshold` + and - `offset`: (M, H, W) -> (M), float32."""
    smaller = count_pixels(logits > mask_threshold + offset)
    larger = count_pixels(logits > mask_threshold - offset)
    return smaller.float() / larger.clamp(min=1)


def masks_to_boxes(masks: torch.Tensor) -> torch.Tensor:
    """First and last column and row of every mask: (M, H, W) bool -> (M, 4) int64 (x0, y0, x1, y1), empty ones 0."""
    height, width = masks.shape[1:]
    if not masks.numel():
        return masks.new_zeros(len(masks), 4, dtype=torch.long)
    pixels = masks.view(torch.uint8)  # the largest of bytes is found many times as fast as any of bool
    columns, rows = pixels.amax(1).bool(), pixels.amax(2).bool()
    x, y = torch.arange(width, device=masks.device), torch.arange(height, device=masks.device)
    boxes = torch.stack(
        [
            x.where(columns, width).amin(1),
            y.where(rows, height).amin(1),
            x.where(columns, -1).amax(1),
            y.where(rows, -1).amax(1),
        ],
        dim=1,
    )
    return boxes * columns.any(1, keepdim=True)


def column_changes(masks: torch.Tensor) -> torch.Tensor:
    """Where the columns of masks change: (M, H, W) bool -> (N, 3) int64, mask, column and row, in this order.

    From the first row to the last and one row further, so that each column has as many ends as beginnings.
    """
    columns = F.pad(masks.transpose(1, 2), (1, 1))
    return (columns[..., 1:] != columns[..., :-1]).nonzero()


def boxes_of_changes(changes: np.ndarray, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes as of `masks_to_boxes` and areas of so many masks: `column_changes` (N, 3) -> (M, 4), (M) int64."""
    boxes, areas = np.zeros((count, 4), np.int64), np.zeros(count, np.int64)
    columns, starts, ends = changes[::2, 1], changes[::2, 2], changes[1::2, 2]
    index, first = np.unique(changes[::2, 0], return_index=True)
    if len(index):
        last = np.append(first[1:], len(columns)) - 1
        top, bottom = np.minimum.reduceat(starts, first), np.maximum.reduceat(ends, first) - 1
        boxes[index] = np.stack([columns[first], top, columns[last], bottom], axis=1)
        areas[index] = np.add.reduceat(ends - starts, first)
    return torch.from_numpy(boxes), torch.from_numpy(areas)


def near_crop_edge(boxes: torch.Tensor, crop_box: list[int], size: tuple[int, int], margin: float = 20.0):
    """Boxes (M, 4) in a crop's pixels that touch an edge of the crop which is not one of the image: -> (M) bool.

    `size` is (height, width) of the image, `crop_box` the crop in it. Sides that are `margin` pixels apart still touch
    (SAM's value and rule).
    """
    x0, y0, x1, y1 = (int(value) for value in crop_box)
    boxes = boxes.float() + torch.tensor([x0, y0, x0, y0], device=boxes.device)
    crop = torch.tensor([x0, y0, x1, y1], device=boxes.device, dtype=torch.float32)
    image = torch.tensor([0, 0, size[1], size[0]], device=boxes.device, dtype=torch.float32)
    return (((boxes - crop).abs() <= margin) & ((boxes - image).abs() > margin)).any(1)


def box_iou(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """IoU of every pair: (M, 4), (K, 4) as (x0, y0, x1, y1) of first and last pixels -> (M, K), float32.

    Sides are differences, as in the stock pipeline. Where one of a pair is a single pixel thick, and would have no
    area, pixels are counted along that side of both.
    """
    boxes, others = boxes.float(), others.float()
    corner0 = torch.maximum(boxes[:, None, :2], others[:, :2])
    corner1 = torch.minimum(boxes[:, None, 2:], others[:, 2:])
    sides, other_sides = (corners[:, 2:] - corners[:, :2] for corners in (boxes, others))
    thin = ((sides == 0)[:, None] | (other_sides == 0)).float()
    shared = (corner1 - corner0 + thin).clamp(min=0).prod(-1)
    both = (sides[:, None] + thin).prod(-1) + (other_sides + thin).prod(-1)
    return shared / (both - shared).clamp(min=1e-6)


def non_maximum_suppression(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Greedily keep boxes that overlap no better one by more than the threshold: (M, 4), (M) -> (K) indices.

    The result is ordered by falling score. (torchvision has this too, but does not import beside a CPU build of
    torch, and the core must not need it.)
    """
    order = scores.float().argsort(descending=True, stable=True)
    ranked = boxes[order].cpu()
    alive = torch.ones(len(order), dtype=torch.bool, device="cpu")
    for index in range(len(order)):
        if alive[index]:
            alive[index + 1 :] &= box_iou(ranked[index : index + 1], ranked[index + 1 :])[0] <= iou_threshold
    return order[alive.to(order.device)]


def cells_near(window: list[int]) -> tuple[slice, slice]:
    """Rows and columns of low-resolution logits that resizing looks at for the first to last cells of a window.

    Pixels up to two cells around the window are resized, and bicubic interpolation reaches two cells further.
    """
    x0, y0, x1, y1 = window
    return slice(max(0, y0 - 4), y1 + 5), slice(max(0, x0 - 4), x1 + 5)


__all__ = [
    "box_iou",
    "boxes_of_changes",
    "cells_near",
    "column_changes",
    "count_pixels",
    "crop_boxes_of_layers",
    "grid_side",
    "layer_of_crop",
    "masks_to_boxes",
    "near_crop_edge",
    "non_maximum_suppression",
    "point_grid",
    "stability_scores",
]
