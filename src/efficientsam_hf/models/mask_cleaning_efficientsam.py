# SPDX-License-Identifier: Apache-2.0
"""Whole masks: one connected part, without holes, within its box. Parts join at corners, holes do not."""

import dataclasses
import math
import numbers
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .mask_geometry_efficientsam import masks_to_boxes


DEPTH = 2.0  # logits; what is taken away or filled is certain, and stays so where stability is judged


@dataclass(frozen=True)
class MaskCleaning:
    """What is done to masks of clicks and boxes at the size of the image; nothing by default.

    Args:
        largest_part: keep only the connected parts that hold a click on the object, or the largest part where there is
            no such click or the mask does not reach it.
        fill_holes: fill holes of up to this fraction of the mask's area, but for those with a background click.
        within_box: cut masks at the box of their prompt.
    """

    largest_part: bool = False
    fill_holes: float = 0.0
    within_box: bool = False

    def __post_init__(self):
        for name in ("largest_part", "within_box"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        number = isinstance(self.fill_holes, numbers.Real) and not isinstance(self.fill_holes, bool)
        if not number or not 0 <= self.fill_holes < math.inf:
            raise ValueError(f"fill_holes must be a fraction of at least 0, got {self.fill_holes!r}")

    def with_changes(self, changes: dict[str, Any]) -> "MaskCleaning":
        """These options with others in their place; TypeError if one is unknown, ValueError if a value is wrong."""
        names = [field.name for field in dataclasses.fields(self)]
        unknown = sorted(set(changes) - set(names))
        if unknown:
            raise TypeError(f"unknown option {unknown[0]!r} of mask cleaning, expected {', '.join(names)}")
        return dataclasses.replace(self, **changes)

    def __bool__(self) -> bool:
        return self.largest_part or self.fill_holes > 0 or self.within_box


def clean_masks(
    masks: torch.Tensor,
    cleaning: MaskCleaning,
    clicks: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    boxes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Masks made whole, (Q, M, H, W) bool -> (Q, M, H, W) bool.

    `clicks` (Q, P, 2) xy and `boxes` (Q, 4) xyxy are in pixels of the masks, where pixel 0 reaches from 0 to 1;
    `labels` (Q, P) are 1 on the object, 0 beside it and -1 for padding; a box of -1 is none.
    """
    if masks.device.type != "cpu":
        return _clean_together(masks, cleaning, clicks, labels, boxes)
    result = torch.zeros_like(masks)
    for q in range(len(masks)):
        # Each by itself, where it is: what does not belong to any of them costs nothing.
        of_one = [None if value is None else value[q : q + 1] for value in (clicks, labels, boxes)]
        for m, (x0, y0, x1, y1) in enumerate(masks_to_boxes(masks[q]).tolist()):
            part = (slice(q, q + 1), slice(m, m + 1), slice(y0, y1 + 1), slice(x0, x1 + 1))
            corner = torch.tensor([x0, y0], device=masks.device)
            result[part] = _clean_together(masks[part], cleaning, *_moved(corner, masks[part].shape[-2:], *of_one))
    return result


def clean_logits(
    logits: torch.Tensor, cleaning: MaskCleaning, threshold: float = 0.0, **prompts: torch.Tensor
) -> torch.Tensor:
    """Logits whose masks are whole, (Q, M, h, w) -> (Q, M, h, w); prompts as in `clean_masks`.

    Logits of what is taken away become as far below the threshold as they were above it, and the other way round,
    `DEPTH` at least.
    """
    masks = logits >= threshold
    cleaned = clean_masks(masks, cleaning, **prompts)
    depth = (logits - threshold).abs().clamp(min=DEPTH)
    return torch.where(masks == cleaned, logits, threshold + torch.where(cleaned, depth, -depth))


def _clean_together(masks, cleaning: MaskCleaning, clicks, labels, boxes) -> torch.Tensor:
    """`clean_masks` of all at once."""
    size = masks.shape[-2:]
    if cleaning.within_box and boxes is not None:
        masks = masks & _pixels_in(boxes, size)[:, None]
    on, beside = None, None
    if clicks is not None:
        on, beside = (_pixels_at(clicks, labels == value, size)[:, None] for value in (1, 0))
    if cleaning.largest_part:
        masks = _main_parts(masks, on)
    if cleaning.fill_holes:
        masks = masks | _holes(masks, cleaning.fill_holes, beside)
    return masks


def _moved(corner: torch.Tensor, size: tuple[int, int], clicks, labels, boxes) -> tuple:
    """Prompts in the pixels of a window at `corner` (x, y) of `size` (height, width); clicks beyond it are padding."""
    if clicks is not None:
        clicks = clicks - corner
        inside = (clicks.floor() >= 0) & (clicks.floor() < torch.tensor(size[::-1], device=clicks.device))
        labels = labels.where(inside.all(-1), -1)
    if boxes is not None:
        boxes = boxes.where((boxes == -1).all(-1, keepdim=True), (boxes - corner.repeat(2)).clamp(min=-0.25))
    return clicks, labels, boxes


def label_parts(masks: torch.Tensor, corners: bool = True) -> torch.Tensor:
    """Number the connected parts of masks: (N, H, W) bool -> (N, H, W) int64, 0 outside, equal within a part.

    All parts of all masks have different numbers, any but consecutive. With `corners` pixels that touch there are
    connected. What is connected are the runs of the rows, of which there are few: each takes the largest number of
    those beside it, and what that one has taken, until nothing changes.
    """
    starts = masks & ~F.pad(masks, (1, 0))[..., :-1]
    runs = starts.flatten().cumsum(0).view(masks.shape) * masks
    above, below = _neighbours(runs, corners)
    numbers = torch.arange(int(starts.sum()) + 1, device=masks.device)
    while True:
        taken = numbers.scatter_reduce(0, above, numbers[below], "amax")
        taken = taken.scatter_reduce(0, below, taken[above], "amax")
        taken = taken[taken]
        if torch.equal(taken, numbers):
            return numbers[runs]
        numbers = taken


def _neighbours(runs: torch.Tensor, corners: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of runs in rows that follow each other and touch: (N, H, W) -> (E,), (E,)."""
    width, pairs = runs.shape[-1], []
    padded = F.pad(runs, (1, 1))
    for shift in (-1, 0, 1) if corners else (0,):
        above, below = runs[:, :-1], padded[:, 1:, 1 + shift : 1 + shift + width]
        both = (above > 0) & (below > 0)
        # Pixels in a row that belong to the same two runs say the same.
        same = (above[..., 1:] == above[..., :-1]) & (below[..., 1:] == below[..., :-1])
        both[..., 1:] &= ~(same & both[..., :-1])
        pairs.append((above[both], below[both]))
    above, below = zip(*pairs)
    return torch.cat(above), torch.cat(below)


def _main_parts(masks: torch.Tensor, clicked: torch.Tensor | None) -> torch.Tensor:
    """The parts that hold a click, or the largest: (Q, M, h, w) bool, clicked cells (Q, 1, h, w) bool -> masks."""
    parts = label_parts(masks.flatten(0, 1)).flatten(1)
    areas = parts.flatten().bincount()
    areas[0] = 0
    largest = parts.gather(1, areas[parts].argmax(1, keepdim=True))
    if clicked is None:
        return ((parts == largest) & (parts > 0)).view(masks.shape)
    hits = parts.where(clicked.expand(masks.shape).flatten(0, 1).flatten(1), 0)
    kept = torch.zeros(len(areas), dtype=torch.bool, device=masks.device)
    kept[hits.flatten()] = True
    kept[largest.where(hits.amax(1, keepdim=True) == 0, 0).flatten()] = True
    kept[0] = False
    return kept[parts].view(masks.shape)


def _holes(masks: torch.Tensor, share: float, spared: torch.Tensor | None) -> torch.Tensor:
    """Holes of at most `share` of their mask, but for those with a spared cell: (Q, M, h, w) bool -> the same."""
    flat = masks.flatten(0, 1)
    outside = F.pad(~flat, (1, 1, 1, 1), value=True)  # the surroundings are one part, beyond the image too
    parts = label_parts(outside, corners=False)
    areas = parts.flatten().bincount()
    filled = torch.ones(len(areas), dtype=torch.bool, device=masks.device)
    filled[0] = False
    filled[parts[:, 0, 0]] = False
    parts = parts[:, 1:-1, 1:-1].flatten(1)
    if spared is not None:
        filled[parts[spared.expand(masks.shape).flatten(0, 1).flatten(1)]] = False
    limit = share * flat.flatten(1).sum(1, keepdim=True)
    return (filled[parts] & (areas[parts] <= limit)).view(masks.shape)


def _pixels_at(points: torch.Tensor, chosen: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Pixels that hold a chosen point, the last ones for the border: (Q, P, 2), (Q, P) bool -> (Q, H, W) bool."""
    height, width = size
    columns = points[..., 0].floor().long().clamp(0, width - 1)
    rows = points[..., 1].floor().long().clamp(0, height - 1)
    pixels = torch.zeros(len(points), height * width + 1, dtype=torch.bool, device=points.device)
    pixels.scatter_(1, torch.where(chosen, rows * width + columns, height * width), True)
    return pixels[:, :-1].view(-1, height, width)


def _pixels_in(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Pixels whose centres lie in boxes (Q, 4), all for a box of -1: -> (Q, H, W) bool."""
    y, x = (torch.arange(side, device=boxes.device) + 0.5 for side in size)
    left, top, right, bottom = boxes[:, :, None].unbind(1)
    inside = ((y >= top) & (y <= bottom))[:, :, None] & ((x >= left) & (x <= right))[:, None]
    return inside | (boxes == -1).all(1)[:, None, None]


__all__ = ["MaskCleaning", "clean_logits", "clean_masks", "label_parts"]
