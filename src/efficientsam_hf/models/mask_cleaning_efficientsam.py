# SPDX-License-Identifier: Apache-2.0
"""Whole masks: one connected part, without holes, within its box. Parts join at corners, holes do not."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .checks_efficientsam import check_finite, check_tensor, cut, is_number, short


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
                raise ValueError(f"{name} must be True or False, got {short(getattr(self, name))}")
        if not is_number(self.fill_holes) or not 0 <= self.fill_holes < math.inf:
            raise ValueError(f"fill_holes must be a fraction of at least 0, got {short(self.fill_holes)}")

    def with_changes(self, changes: dict[str, Any]) -> "MaskCleaning":
        """These options with others in their place; TypeError if one is unknown, ValueError if a value is wrong."""
        return changed_options(self, changes, "mask cleaning")

    def __bool__(self) -> bool:
        return self.largest_part or bool(self.fill_holes > 0) or self.within_box


def changed_options(options: Any, changes: dict[str, Any], shown: str) -> Any:
    """A dataclass of options, which messages call `shown`, with other values; TypeError if one is unknown."""
    names = [field.name for field in dataclasses.fields(options)]
    unknown = sorted(map(str, set(changes) - set(names)))
    if unknown:
        raise TypeError(f"unknown option {cut(repr(unknown[0]))} of {shown}, expected {', '.join(names)}")
    return dataclasses.replace(options, **changes)


def clean_masks(
    masks: torch.Tensor,
    cleaning: MaskCleaning,
    clicks: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    boxes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Masks made whole, (Q, M, H, W) bool -> (Q, M, H, W) bool, on the CPU whatever device they are on.

    `clicks` (Q, P, 2) xy and `boxes` (Q, 4) xyxy are in pixels of the masks, where pixel 0 reaches from 0 to 1;
    `labels` (Q, P) are 1 on the object, 0 beside it and -1 for padding; a box of -1 is none. Raises TypeError or
    ValueError for other shapes, and for clicks or boxes that are not finite.
    """
    _check_shapes(masks, clicks, labels, boxes)
    clicks, labels, boxes = (None if given is None else given.cpu() for given in (clicks, labels, boxes))
    if clicks is not None:
        check_finite("clicks", clicks, ("object",), labels == -1)
    if boxes is not None:
        check_finite("boxes", boxes, ("object",))
    result = masks.cpu().numpy().copy()
    empty = np.zeros((0, 2), np.int64)
    for index, of_object in enumerate(result):
        box = None if boxes is None else boxes[index].tolist()
        on, beside = empty, empty
        if clicks is not None:
            points, kinds = clicks[index].float().numpy(), labels[index].numpy()
            on, beside = (_pixels_at(points[kinds == value], masks.shape[-2:]) for value in (1, 0))
        for mask in of_object:
            _clean(mask, cleaning, on, beside, box)
    return torch.from_numpy(result).to(masks.device)


def _check_shapes(masks, clicks, labels, boxes) -> None:
    shape = "(Q, M, H, W)"
    check_tensor("masks", masks, shape)
    if masks.ndim != 4 or masks.dtype != torch.bool:
        raise ValueError(f"masks is {short(masks)}, expected {shape} bool")
    if (clicks is None) != (labels is None):
        raise ValueError(
            f"{'labels' if clicks is None else 'clicks'} is given alone, expected clicks with their labels"
        )
    count = len(masks)
    for name, value, expected in (("clicks", clicks, (count, "P", 2)), ("boxes", boxes, (count, 4))):
        if value is None:
            continue
        check_tensor(name, value, str(expected))
        if value.ndim != len(expected) or value.shape[0] != count or value.shape[-1] != expected[-1]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {expected}")
    if labels is not None:
        check_tensor("labels", labels, "(Q, P)")
        if labels.shape != clicks.shape[:2]:
            raise ValueError(f"labels has shape {tuple(labels.shape)}, expected {tuple(clicks.shape[:2])}")


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


def _clean(mask: np.ndarray, cleaning: MaskCleaning, on: np.ndarray, beside: np.ndarray, box: list | None) -> None:
    """Make a mask (H, W) bool whole in place; clicked pixels (P, 2) xy on the object and beside it."""
    if cleaning.within_box and box is not None and box != [-1] * 4:
        left, top = (max(0, math.ceil(value - 0.5)) for value in box[:2])  # pixels whose centres lie in the box
        right, bottom = (max(0, math.floor(value - 0.5) + 1) for value in box[2:])
        for outside in (mask[:top], mask[bottom:], mask[:, :left], mask[:, right:]):
            outside[:] = False
    if cleaning.largest_part:
        parts = Parts.of(mask, corners=True)
        parts.paint(mask, ~parts.holding(on) if len(parts.at(on)) else ~parts.largest(), False)
    if cleaning.fill_holes:
        holes = Parts.of(~mask, corners=False)
        filled = (holes.areas <= cleaning.fill_holes * np.count_nonzero(mask)) & ~holes.at_border()
        holes.paint(mask, filled & ~holes.holding(beside), True)


@dataclass(frozen=True)
class Parts:
    """The connected parts of a mask of `size` (height, width), as runs of its rows.

    Run i reaches from pixel `starts[i]` to before `ends[i]` of row `rows[i]`, and belongs to part `numbers[i]`;
    `areas` (R) are those of the part that a run belongs to. Runs are few, so that a mask of millions of pixels takes
    no more than looking at each pixel once.
    """

    size: tuple[int, int]
    rows: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    numbers: np.ndarray

    @classmethod
    def of(cls, mask: np.ndarray, corners: bool) -> "Parts":
        """Those of a mask (H, W) bool; with `corners` pixels that touch there are connected."""
        height, width = mask.shape
        padded = np.zeros((height, width + 2), bool)
        padded[:, 1:-1] = mask
        changes = np.flatnonzero(padded[:, 1:] != padded[:, :-1])
        rows, starts = np.divmod(changes[::2], width + 1)
        ends = changes[1::2] % (width + 1)
        return cls(mask.shape, rows, starts, ends, _connect(*_touching(rows, starts, ends, width, corners), len(rows)))

    @property
    def areas(self) -> np.ndarray:
        return np.bincount(self.numbers, self.ends - self.starts)[self.numbers] if len(self.rows) else self.rows

    def at(self, pixels: np.ndarray) -> np.ndarray:
        """Numbers of the parts that hold some of the pixels (P, 2) xy."""
        columns, rows = pixels.T
        order = self.size[1] + 2
        index = np.searchsorted(self.rows * order + self.starts, rows * order + columns, side="right") - 1
        index, columns, rows = (values[index >= 0] for values in (index, columns, rows))
        return self.numbers[index[(self.rows[index] == rows) & (columns < self.ends[index])]]

    def holding(self, pixels: np.ndarray) -> np.ndarray:
        """Which runs belong to a part that holds one of the pixels (P, 2) xy: -> (R) bool."""
        return np.isin(self.numbers, self.at(pixels))

    def largest(self) -> np.ndarray:
        """Which runs belong to the largest part, of equal ones to the first: -> (R) bool."""
        return self.numbers == self.numbers[self.areas.argmax()] if len(self.rows) else np.zeros(0, bool)

    def at_border(self) -> np.ndarray:
        """Which runs belong to a part that reaches the border: -> (R) bool."""
        height, width = self.size
        there = (self.rows == 0) | (self.rows == height - 1) | (self.starts == 0) | (self.ends == width)
        return np.isin(self.numbers, self.numbers[there])

    def paint(self, mask: np.ndarray, runs: np.ndarray, value: bool) -> None:
        """Give the pixels of some runs, (R) bool, this value in a mask (H, W)."""
        for row, start, end in zip(self.rows[runs], self.starts[runs], self.ends[runs]):
            mask[row, start:end] = value


def _touching(
    rows: np.ndarray, starts: np.ndarray, ends: np.ndarray, width: int, corners: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of runs in rows that follow each other and touch, (E), (E): the runs of a row lie on a line in order."""
    order, reach = width + 2, int(corners)
    below = (rows + 1) * order
    first = np.searchsorted(rows * order + ends, below + starts - reach, side="right")
    count = np.maximum(np.searchsorted(rows * order + starts, below + ends + reach, side="left") - first, 0)
    above = np.repeat(np.arange(len(rows)), count)
    return above, np.arange(len(above)) - np.repeat(count.cumsum() - count, count) + np.repeat(first, count)


def _connect(first: np.ndarray, second: np.ndarray, count: int) -> np.ndarray:
    """Number `count` things so that those of a pair, and of pairs of them, have one: (E), (E) -> (count) int64.

    Each takes the largest number of those that it is paired with, and what that one has taken, until nothing changes.
    """
    numbers = np.arange(count)
    while True:
        taken = numbers.copy()
        np.maximum.at(taken, first, numbers[second])
        np.maximum.at(taken, second, taken[first])
        taken = taken[taken]
        if (taken == numbers).all():
            return numbers
        numbers = taken


def _pixels_at(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels that hold points (P, 2) xy, the last ones for those on the border: -> (P, 2) int64 xy."""
    return np.clip(np.floor(points).astype(np.int64), 0, [size[1] - 1, size[0] - 1])


__all__ = ["MaskCleaning", "Parts", "changed_options", "clean_logits", "clean_masks"]
