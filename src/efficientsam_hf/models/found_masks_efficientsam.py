# SPDX-License-Identifier: Apache-2.0
"""Masks that segment everything found: without small regions, and without those that better ones suppress."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .mask_geometry_efficientsam import masks_to_boxes, non_maximum_suppression
from .rle_efficientsam import runs_iou, window_to_runs


@dataclass
class FoundMask:
    """A mask at the size of the image: `window` (h, w) bool is what its box holds of it.

    `box` is in pixels of the image. When nothing more is to be done to a mask, `runs` (see `window_to_runs`) stand in
    the place of the window, which can be as large as the image.
    """

    box: list[int]
    area: int
    score: float
    stability: float
    point: list[float]
    crop_area: int
    window: np.ndarray | None = None
    runs: np.ndarray | None = None
    changed: bool = False

    def packed(self, image_size: tuple[int, int]) -> "FoundMask":
        """The same as runs of the whole image."""
        if self.window is None:
            return self
        runs = window_to_runs(self.window, (self.box[0], self.box[1]), image_size)
        return dataclasses.replace(self, window=None, runs=runs)


def label_regions() -> Callable[[np.ndarray], tuple[np.ndarray, int]]:
    """A function that numbers the regions of a mask, corners joined: (H, W) bool -> (H, W) int, their number."""
    try:
        from scipy import ndimage
    except ImportError:
        raise ImportError(
            "max_hole_area and max_sprinkle_area need scipy: pip install 'efficientsam-hf[regions]' or scipy"
        ) from None
    return lambda mask: ndimage.label(mask, np.ones((3, 3), bool))


def without_small_regions(mask: FoundMask, image_size: tuple[int, int], max_hole: int, max_speck: int) -> FoundMask:
    """The mask with holes filled and specks removed; of a mask that is nothing but specks the largest stays."""
    label = label_regions()
    x0, y0, x1, y1 = mask.box
    # Beyond the window is background, unless the image ends there.
    sides = ((int(y0 > 0), int(y1 + 1 < image_size[0])), (int(x0 > 0), int(x1 + 1 < image_size[1])))
    cleaned = np.pad(mask.window, sides)
    if max_hole:
        labels, count = label(~cleaned)
        small = np.bincount(labels.reshape(-1), minlength=count + 1) <= max_hole
        small[0] = False
        small[np.unique(labels[np.pad(np.zeros_like(mask.window), sides, constant_values=True)])] = False
        cleaned |= small[labels]
    if max_speck:
        labels, count = label(cleaned)
        areas = np.bincount(labels.reshape(-1), minlength=count + 1)
        areas[0] = 0
        small = areas <= max_speck
        small[areas.argmax()] = False
        cleaned &= ~small[labels]
    (top, _), (left, _) = sides
    cleaned = cleaned[top : top + mask.window.shape[0], left : left + mask.window.shape[1]]
    if (cleaned == mask.window).all():
        return mask
    own = masks_to_boxes(torch.from_numpy(cleaned)[None])[0].tolist()
    window = cleaned[own[1] : own[3] + 1, own[0] : own[2] + 1]
    box = [own[0] + x0, own[1] + y0, own[2] + x0, own[3] + y0]
    return dataclasses.replace(mask, window=window, box=box, area=int(np.count_nonzero(window)), changed=True)


def suppress(masks: list[FoundMask], threshold: float, rank: Callable[[FoundMask], Any]) -> list[FoundMask]:
    """Non-maximum suppression where masks of the lowest rank come first."""
    ranked = sorted(masks, key=rank)
    kept = non_maximum_suppression(_boxes(ranked), -torch.arange(len(ranked), device="cpu").double(), threshold)
    return [ranked[index] for index in kept.tolist()]


def suppress_alike(masks: list[FoundMask], threshold: float, rank: Callable[[FoundMask], Any]) -> list[FoundMask]:
    """Masks (with runs) without those whose IoU with one of a lower rank is above the threshold, pixel by pixel."""
    kept: list[FoundMask] = []
    for mask in sorted(masks, key=rank):
        areas = torch.tensor([other.area for other in kept], dtype=torch.long, device="cpu")
        # No more than the boxes share, nor than the smaller mask, can be common to two masks.
        most = torch.minimum(_shared_pixels(_boxes([mask])[0], _boxes(kept)), areas.clamp(max=mask.area))
        near = (most > threshold * (mask.area + areas - most).float()).nonzero()[:, 0].tolist()
        if not any(runs_iou(mask.runs, kept[index].runs) > threshold for index in near):
            kept.append(mask)
    return kept


def _boxes(masks: list[FoundMask]) -> torch.Tensor:
    """Boxes of masks: -> (K, 4) int64."""
    return torch.tensor([mask.box for mask in masks], dtype=torch.long, device="cpu").reshape(-1, 4)


def _shared_pixels(box: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Pixels that boxes of first and last pixels share with one, (4), (K, 4) -> (K) int64."""
    corner0, corner1 = torch.maximum(box[:2], boxes[:, :2]), torch.minimum(box[2:], boxes[:, 2:])
    return (corner1 - corner0 + 1).clamp(min=0).prod(1)


__all__ = ["FoundMask", "label_regions", "suppress", "suppress_alike", "without_small_regions"]
