# SPDX-License-Identifier: Apache-2.0
"""Segment everything in images far larger than the model's input: tile by tile, masks joined across the seams.

Tiles overlap. What two neighbouring tiles found of the same object is alike in the strip that both have seen: such
masks become one, the most alike first. An object and its part can be the same there; then it counts whether they go
on beyond the strip. Besides the image, memory holds the masks of one tile, the strips along the seams of a row of
tiles, and run lengths.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .models.rle_efficientsam import compress_counts, rle_counts, runs_to_counts, window_to_runs


SMALLEST_TILE = 64
SAME_OBJECT = 0.5  # IoU in the shared strip above which two masks can be of one object
AS_ALIKE = 0.1  # pairs whose IoU differs by less are told apart by what lies beyond the strip
STRIP_ROWS = 64  # of the shared strip that are compared at once


def segment_tiles(
    generator: Callable[..., dict[str, Any]],
    image: Any,
    tile: int = 1024,
    overlap: int | None = None,
    progress: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Masks of everything in a large image.

    Args:
        generator: an `EfficientSamMaskGenerator`, or what is called and answers like one.
        image: (H, W, 3) uint8; a PIL image, an array, or anything with a shape whose slices are arrays (a memory map,
            zarr, tiff).
        tile: side of the tiles in pixels.
        overlap: pixels that neighbouring tiles share at least; an eighth of the tile when left out. Objects that cross
            a seam are joined by what lies in it.
        progress: whether to show a bar.
        options: for the generator.

    Returns:
        `masks`, compressed COCO run lengths of the whole image, largest score first, with `scores` (K) float32 (the
        mean over the parts by their area), `boxes` (K, 4) int64 of first and last pixels, `areas` (K) int64 in pixels,
        and `tiles` (K) int64, from how many tiles each was joined.

    Raises:
        ValueError: if the image is not (H, W, 3), or tile and overlap do not fit each other.
    """
    overlap = tile // 8 if overlap is None else overlap
    check_tiles(tile, overlap)
    if isinstance(image, Image.Image):  # without a copy where it is RGB already
        image = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    if len(image.shape) != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image has shape {tuple(image.shape)}, expected (H, W, 3)")
    size = (int(image.shape[0]), int(image.shape[1]))
    options = {**options, "output_type": "bool", "output_rle_mask": False, "output_bboxes_mask": False}
    tops, lefts = tile_starts(size[0], tile, overlap), tile_starts(size[1], tile, overlap)
    parts = _Parts(size)
    with tqdm(total=len(tops) * len(lefts), disable=not progress, unit="tile") as bar:
        above: list[_Tile | None] = [None] * len(lefts)
        for row, top in enumerate(tops):
            before: _Tile | None = None
            for column, left in enumerate(lefts):
                pixels = np.ascontiguousarray(image[top : top + tile, left : left + tile])
                found = generator(pixels, **options)
                numbers, areas = parts.add(found, left, top), np.array([np.count_nonzero(m) for m in found["masks"]])
                current = _Tile(left, top, pixels.shape[1], pixels.shape[0], found["masks"], numbers, areas)
                for other in (before, above[column]):
                    if other is not None:
                        parts.join(current.partners(other))
                # Of a tile only what the next ones see stays.
                before = current.part(from_x=lefts[column + 1]) if column + 1 < len(lefts) else None
                above[column] = current.part(from_y=tops[row + 1]) if row + 1 < len(tops) else None
                bar.update()
    return parts.result()


def check_tiles(tile: int, overlap: int) -> None:
    """ValueError if tiles are too small or do not leave each other enough room."""
    if tile < SMALLEST_TILE or not 0 < overlap <= tile // 2:
        raise ValueError(
            f"tile must be at least {SMALLEST_TILE} pixels and its overlap from 1 to half of it, got {tile}, {overlap}"
        )


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """First pixels of as few tiles as cover `length` pixels and share at least `overlap`, evenly spread."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(index * (length - tile) / (count - 1)) for index in range(count)]


def label_image(masks: list[dict[str, Any]], size: tuple[int, int]) -> np.ndarray:
    """One number for each pixel: (H, W) int32, 0 for none, i + 1 for mask i; smaller masks lie on larger ones."""
    labels = np.zeros((size[1], size[0]), np.int32)  # run lengths go down the columns
    flat = labels.reshape(-1)
    runs = [_runs(mask) for mask in masks]
    for index in sorted(range(len(masks)), key=lambda i: -int((runs[i][:, 1] - runs[i][:, 0]).sum())):
        for start, end in runs[index]:
            flat[start:end] = index + 1
    return labels.T


def _runs(mask: dict[str, Any]) -> np.ndarray:
    """(R, 2) int64 start and end of each run of a mask, down the columns."""
    edges = rle_counts(mask).cumsum()
    return edges[: len(edges) // 2 * 2].reshape(-1, 2)


@dataclass
class _Tile:
    """A tile's place in the image, its masks (h, w) bool, and their numbers among all parts.

    `areas` (K) are those of the whole masks, also where a tile is a part of another.
    """

    left: int
    top: int
    width: int
    height: int
    masks: list[np.ndarray]
    numbers: list[int]
    areas: np.ndarray

    def part(self, from_x: int = 0, from_y: int = 0) -> "_Tile":
        """A copy of what lies right of and below a place in the image."""
        left, top = max(self.left, from_x), max(self.top, from_y)
        masks = [mask[top - self.top :, left - self.left :].copy() for mask in self.masks]
        size = (self.left + self.width - left, self.top + self.height - top)
        return _Tile(left, top, *size, masks, self.numbers, self.areas)

    def partners(self, other: "_Tile") -> list[tuple[int, int]]:
        """Numbers of masks of both tiles that are of one object: each has at most one partner, the most alike first.

        Among those as alike in the shared strip, masks that both go on beyond it belong together, and masks that both
        end in it; then those of higher score.
        """
        if not self.masks or not other.masks:
            return []
        shared, own, others = self._overlaps(other)
        ious = shared / np.maximum(own[:, None] + others - shared, 1)
        beyond = (self.areas > own)[:, None] == (other.areas > others)
        rows, columns = np.nonzero(ious > SAME_OBJECT)
        steps = np.floor((1 - ious[rows, columns]) / AS_ALIKE)
        order = np.lexsort((rows + columns, ~beyond[rows, columns], steps))
        pairs: dict[int, int] = {}
        for row, column in zip(rows[order].tolist(), columns[order].tolist()):
            if row not in pairs and column not in pairs.values():
                pairs[row] = column
        return [(self.numbers[row], other.numbers[column]) for row, column in pairs.items()]

    def _overlaps(self, other: "_Tile") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixels in the strip that both have seen: shared by each pair (K, L), and of each mask, (K) and (L)."""
        x0, y0 = max(self.left, other.left), max(self.top, other.top)
        x1 = min(self.left + self.width, other.left + other.width)
        y1 = min(self.top + self.height, other.top + other.height)
        sums = [np.zeros((len(self.masks), len(other.masks))), np.zeros(len(self.masks)), np.zeros(len(other.masks))]
        for y in range(y0, y1, STRIP_ROWS):
            own, others = (tile._strip(x0, y, x1, min(y + STRIP_ROWS, y1)) for tile in (self, other))
            for total, value in zip(sums, (own @ others.T, own.sum(1), others.sum(1))):
                total += value.numpy()
        return tuple(sums)

    def _strip(self, x0: int, y0: int, x1: int, y1: int) -> torch.Tensor:
        """What the masks have in a part of the image: (K, pixels) float32."""
        rows, columns = slice(y0 - self.top, y1 - self.top), slice(x0 - self.left, x1 - self.left)
        return torch.from_numpy(np.stack([mask[rows, columns].reshape(-1) for mask in self.masks])).float()


class _Parts:
    """Masks of all tiles as runs of the whole image, and which of them belong together."""

    def __init__(self, size: tuple[int, int]):
        self.size = size
        self.runs: list[np.ndarray] = []
        self.scores: list[float] = []
        self.parents: list[int] = []
        self.tiles: list[set[tuple[int, int]]] = []  # of a group, at its root: the tiles it has a part in

    def add(self, found: dict[str, Any], left: int, top: int) -> list[int]:
        """Take the masks of a tile; returns their numbers."""
        first = len(self.runs)
        self.runs += [window_to_runs(mask, (left, top), self.size) for mask in found["masks"]]
        self.scores += found["scores"].tolist()
        self.parents += range(first, len(self.runs))
        self.tiles += [{(left, top)} for _ in found["masks"]]
        return list(range(first, len(self.runs)))

    def join(self, pairs: list[tuple[int, int]]) -> None:
        """Make each pair one object, unless that would join two masks of one tile, which its generator kept apart."""
        for one, other in pairs:
            first, second = self._root(one), self._root(other)
            if first != second and self.tiles[first].isdisjoint(self.tiles[second]):
                self.parents[first] = second
                self.tiles[second] |= self.tiles[first]

    def _root(self, number: int) -> int:
        while self.parents[number] != number:
            self.parents[number] = number = self.parents[self.parents[number]]
        return number

    def result(self) -> dict[str, Any]:
        """What `segment_tiles` returns."""
        groups: dict[int, list[int]] = {}
        for number in range(len(self.runs)):
            groups.setdefault(self._root(number), []).append(number)
        objects = [
            (self._score(members), _union([self.runs[n] for n in members]), len(members))
            for members in groups.values()
        ]
        objects.sort(key=lambda item: -item[0])
        pixels = self.size[0] * self.size[1]
        return {
            "masks": [compress_counts(runs_to_counts(runs, pixels), self.size) for _, runs, _ in objects],
            "scores": torch.tensor([score for score, _, _ in objects], dtype=torch.float32),
            "boxes": torch.tensor([_box(runs, self.size[0]) for _, runs, _ in objects]).long().reshape(-1, 4),
            "areas": torch.tensor([int((runs[:, 1] - runs[:, 0]).sum()) for _, runs, _ in objects]).long(),
            "tiles": torch.tensor([count for _, _, count in objects]).long(),
        }

    def _score(self, members: list[int]) -> float:
        areas = [int((self.runs[n][:, 1] - self.runs[n][:, 0]).sum()) for n in members]
        return sum(self.scores[n] * area for n, area in zip(members, areas)) / sum(areas)


def _union(parts: list[np.ndarray]) -> np.ndarray:
    """Runs of what is in any of several masks: (R, 2) each -> (R, 2), in order, none touching the next."""
    if len(parts) == 1:
        return parts[0]
    runs = np.concatenate(parts)
    runs = runs[runs[:, 0].argsort(kind="stable")]
    ends = np.maximum.accumulate(runs[:, 1])
    first = np.concatenate(([True], runs[1:, 0] > ends[:-1]))
    last = np.concatenate((np.flatnonzero(first)[1:] - 1, [len(runs) - 1]))
    return np.stack((runs[first, 0], ends[last]), 1)


def _box(runs: np.ndarray, height: int) -> list[int]:
    """First and last column and row of a mask's runs."""
    starts, ends = runs[:, 0], runs[:, 1] - 1
    wraps = (starts // height != ends // height).any()  # from the foot of a column to the head of the next
    rows = [0, height - 1] if wraps else [int((starts % height).min()), int((ends % height).max())]
    return [int(starts[0] // height), rows[0], int(ends[-1] // height), rows[1]]
