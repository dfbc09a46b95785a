# SPDX-License-Identifier: Apache-2.0
"""Masks of segment everything while they are low-resolution logits: which may be masks at full size, and where.

Cells are the pixels of low-resolution logits. Boxes are (x0, y0, x1, y1) of first and last cells.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .mask_generation_options_efficientsam import MaskGenerationOptions
from .mask_geometry_efficientsam import cells_near, count_pixels, masks_to_boxes, stability_scores


HELD_CELLS = 2**26  # of candidates' logits that a CPU keeps; what finds no room is decoded again when its turn comes
HELD_CELLS_ELSEWHERE = 2**28  # that another device keeps: 4,096 masks of 256 x 256, a gigabyte in float32
STABILITY_MARGIN = 0.1  # what the stability of low-resolution logits may lack at least, where a mask has at least
STABILITY_CELLS = 64  # so many cells, each no smaller than a pixel; that of smaller ones says too little
LOGIT_MARGIN = 1.0  # how far below the threshold low-resolution logits can lie and rise above it by interpolation


@dataclass
class Candidates:
    """What passed the filters at low resolution in one crop, of the highest predicted IoU first.

    `scores` (K) predicted IoU, `points` (K) and `tokens` (K) say which prompt and mask token gave a mask; `cores`
    (K, 4) and `windows` (K, 4) where it is in cells: those above the threshold in blocks of 2 x 2 (x1 < x0 where there
    is none), and all down to LOGIT_MARGIN below it, or further where stability looks further; `places` (K) where their
    logits are held, -1 for those that are not. All are on the CPU.
    """

    scores: torch.Tensor
    points: torch.Tensor
    tokens: torch.Tensor
    cores: torch.Tensor
    windows: torch.Tensor
    places: torch.Tensor

    def __getitem__(self, index: torch.Tensor) -> "Candidates":
        return Candidates(*(value[index] for value in vars(self).values()))

    @staticmethod
    def joined(parts: list["Candidates"]) -> "Candidates":
        return Candidates(*map(torch.cat, zip(*(vars(part).values() for part in parts))))


class HeldWindows:
    """Low-resolution logits of candidates: in one block of memory what each needs of them, until it is full."""

    def __init__(self):
        self.block = torch.empty(0, device="cpu")
        self.shape: tuple[int, int] = (0, 0)
        self.used = 0

    def add(self, masks: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """Take logits (M, h, w) with the windows (M, 4) of cells that matter: -> (M) places for `get`, -1 for none."""
        if not len(self.block):
            self.block, self.shape = masks.new_empty(HELD_CELLS), masks.shape[1:]
        places = []
        for mask, window in zip(masks, windows.tolist()):
            part = mask[cells_near(window)].reshape(-1)
            fits = self.used + len(part) <= len(self.block)
            places.append(self.used if fits else -1)
            if fits:
                self.block[self.used : self.used + len(part)] = part
                self.used += len(part)
        return torch.tensor(places, dtype=torch.long, device="cpu")

    def get(self, place: int, window: list[int]) -> torch.Tensor:
        """(h, w), with zeros where nothing matters."""
        logits = self.block.new_zeros(self.shape)
        part = logits[cells_near(window)]
        part.copy_(self.block[place : place + part.numel()].view_as(part))
        return logits


class HeldMasks:
    """The same on a device that starts every operation at a price: whole masks, as they come, until there are many."""

    def __init__(self):
        self.masks: list[torch.Tensor] = []

    def add(self, masks: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """Take logits (M, h, w): -> (M) places for `get`, -1 for none."""
        room = max(0, HELD_CELLS_ELSEWHERE // max(1, masks[:1].numel()) - len(self.masks))
        start, count = len(self.masks), min(room, len(masks))
        # A view of some would keep the memory of all.
        self.masks += masks[:count].clone().unbind() if count < len(masks) else masks.unbind()
        places = torch.arange(start, start + len(masks), device="cpu")
        return places.where(places < start + count, -1)

    def get(self, place: int, window: list[int]) -> torch.Tensor:
        """(h, w), all of it."""
        return self.masks[place]


def promising(
    masks: torch.Tensor, options: MaskGenerationOptions, cells_per_pixel: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which logits (M, h, w) may be masks at full size, and where: -> (M) bool, (K, 4) cores, (K, 4) windows.

    A pixel of the image has so many cells, 1 for images that are larger than the logits.
    """
    logits = masks.float()  # CPUs compare these many times as fast as bfloat16
    inside = logits > options.mask_threshold
    around = logits > options.mask_threshold - max(options.stability_score_offset, LOGIT_MARGIN)
    cells = count_pixels(around)
    good = cells > 0
    if options.stability_score_thresh > 0:
        good &= (cells < STABILITY_CELLS * cells_per_pixel) | _may_be_stable(logits, options)
    return good, _block_boxes(inside[good]).cpu(), masks_to_boxes(around[good]).cpu()


def _may_be_stable(logits: torch.Tensor, options: MaskGenerationOptions) -> torch.Tensor:
    """Whether masks can pass the limit of stability at full size: (M, h, w) float32 -> (M) bool."""
    threshold, offset = options.mask_threshold, options.stability_score_offset
    lacking = options.stability_score_thresh - stability_scores(logits, threshold, offset)
    good = lacking < STABILITY_MARGIN
    doubtful = (~good).nonzero()[:, 0]
    good[doubtful] = lacking[doubtful] < _rising_share(logits[doubtful], threshold, offset)
    return good


def _rising_share(logits: torch.Tensor, mask_threshold: float, offset: float) -> torch.Tensor:
    """What the stability of masks at full size hardly gains: (M, h, w) -> (M), a part of their cells.

    Where a mask ends steeply, interpolation rises above its outermost cells, and those may belong to the smaller of
    the two masks too. Of a large mask they are few; of a thin one all are. Cells near the lower cut lie on a gentle
    slope, or too deep to rise so far.
    """
    larger = logits > mask_threshold - offset
    rows = larger[:, :, :-2] & larger[:, :, 1:-1] & larger[:, :, 2:]
    inner = F.pad(rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:], (1, 1, 1, 1))
    rising = (logits > mask_threshold - offset / 2) & (logits <= mask_threshold + offset) & ~inner
    return count_pixels(rising).float() / count_pixels(larger).clamp(min=1)


def _block_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Boxes of what masks have in blocks of 2 x 2: (M, H, W) bool -> (M, 4) int64, x1 < x0 where there is none."""
    blocks = masks[:, 1:, 1:] & masks[:, 1:, :-1] & masks[:, :-1, 1:] & masks[:, :-1, :-1]
    boxes = masks_to_boxes(blocks) + torch.tensor([0, 0, 1, 1], device=masks.device)
    nothing = torch.tensor([0, 0, -1, -1], device=masks.device)
    return torch.where((count_pixels(blocks) > 0)[:, None], boxes, nothing)


__all__ = ["Candidates", "HeldMasks", "HeldWindows", "promising"]
