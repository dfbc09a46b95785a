# SPDX-License-Identifier: Apache-2.0
"""Segment everything in images far larger than the model's input: tile by tile, masks joined across the seams.

Tiles overlap. What two neighbouring tiles found of the same object is alike in the strip that both have seen: such
masks become one, the most alike first. An object and its part can be the same there; then it counts whether they go
on beyond the strip. An object that is whole in one tile can be in pieces in the next, like the legs of a U: masks that
are disjoint and fill a mask of the neighbour become one with it. What is left and was cut off by the edge of its tile,
where a mask of the neighbour holds it and goes on, is no object and is dropped.

Besides the image and what the generator needs for a tile, memory holds the masks as run lengths, and nothing that
grows with the area of a row of tiles.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .models.checks_efficientsam import image_size, is_whole, short
from .models.image_processing_efficientsam import check_picture
from .models.mask_generation_options_efficientsam import SORTS
from .models.rle_efficientsam import compress_counts, rle_counts, rle_size, runs_to_counts, window_to_runs


SMALLEST_TILE = 64
SAME_OBJECT = 0.5  # IoU in the shared strip above which two masks can be of one object
AS_ALIKE = 0.1  # matches whose IoU differs by less are told apart by what lies beyond the strip
INSIDE = 0.8  # part of a mask that lies in another from which on it counts as inside
DISJOINT = 0.1  # part of the smaller of two masks that they may share and still be two pieces
STRIP_PIXELS = 2**16  # of the shared strip that are compared at once
OWN_OPTIONS = ("output_type", "output_rle_mask", "output_bboxes_mask")  # of the generator, which tiles choose


def segment_tiles(
    generator: Callable[..., dict[str, Any]],
    image: Any,
    tile: int = 1024,
    overlap: int | None = None,
    progress: bool = False,
    sort_by: str = "score",
    **options: Any,
) -> dict[str, Any]:
    """Masks of everything in a large image.

    Args:
        generator: an `EfficientSamMaskGenerator`, or what is called and answers like one.
        image: (H, W, 3) uint8; a PIL image of 8 bits a channel, an array, or anything with a shape whose slices are
            arrays (a memory map, zarr, tiff).
        tile: side of the tiles in pixels.
        overlap: pixels that neighbouring tiles share at least; an eighth of the tile when left out. Objects that cross
            a seam are joined by what lies in it.
        progress: whether to show a bar.
        sort_by: "score" or "area" of the whole masks, the highest first.
        options: for the generator.

    Returns:
        `masks`, compressed COCO run lengths of the whole image in the order of `sort_by`, with `scores` (K) float32
        (the mean over the parts by their area), `boxes` (K, 4) int64 of first and last pixels, `areas` (K) int64 in
        pixels, and `tiles` (K) int64, from how many tiles each was joined.

    Raises:
        ValueError: if the image is not (H, W, 3) or has more than 8 bits a channel, tile and overlap do not fit each
            other, or sort_by is something else.
        TypeError: if the image is something else, or options choose another form of output.
    """
    if not callable(generator):
        raise TypeError(f"generator is {short(generator)}, expected an EfficientSamMaskGenerator")
    overlap = tile // 8 if overlap is None and is_whole(tile) else overlap
    check_tiles(tile, overlap)
    _check_options(sort_by, options)
    size = _image_size(image)
    tops, lefts = tile_starts(size[0], tile, overlap), tile_starts(size[1], tile, overlap)
    options = {**options, "output_type": "bool", "output_rle_mask": False, "output_bboxes_mask": False}
    parts = _Parts(size)
    with tqdm(total=len(tops) * len(lefts), disable=not progress, unit="tile") as bar:
        above: list[_Tile | None] = [None] * len(lefts)
        for top in tops:
            before: _Tile | None = None
            for column, left in enumerate(lefts):
                box = (left, top, min(left + tile, size[1]), min(top + tile, size[0]))
                current = parts.add(generator(_pixels_of(image, box), **options), box)
                for other in (before, above[column]):
                    if other is not None:
                        parts.meet(current, other)
                before = above[column] = current
                bar.update()
    return parts.result(sort_by)


def check_tiles(tile: int, overlap: int) -> None:
    """ValueError if tiles are too small or do not leave each other enough room, TypeError for no whole numbers."""
    if not is_whole(tile) or not is_whole(overlap):
        raise TypeError(f"tile and its overlap must be whole numbers, got {short(tile)} and {short(overlap)}")
    if tile < SMALLEST_TILE or not 0 < overlap <= tile // 2:
        raise ValueError(
            f"tile must be at least {SMALLEST_TILE} pixels and its overlap from 1 to half of it, "
            f"got {short(tile)}, {short(overlap)}"
        )


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """First pixels of as few tiles as cover `length` pixels and share at least `overlap`, evenly spread."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(index * (length - tile) / (count - 1)) for index in range(count)]


def label_image(masks: list[dict[str, Any]], size: tuple[int, int]) -> np.ndarray:
    """One number for each pixel: (H, W) int32, 0 for none, i + 1 for mask i; smaller masks lie on larger ones.

    `size` is (height, width) of the image; ValueError if a mask has another, or is none.
    """
    size = image_size(size, "size")
    other = next((found for found in map(rle_size, masks) if found != size), None)
    if other is not None:
        raise ValueError(f"size is {size}, but a mask has {other}")
    labels = np.zeros((size[1], size[0]), np.int32)  # run lengths go down the columns
    flat = labels.reshape(-1)
    runs = [_runs(mask) for mask in masks]
    for index in sorted(range(len(masks)), key=lambda i: -_area(runs[i])):
        for start, end in runs[index]:
            flat[start:end] = index + 1
    return labels.T


def _check_options(sort_by: str, options: dict[str, Any]) -> None:
    if not isinstance(sort_by, str) or sort_by not in SORTS:
        raise ValueError(f"sort_by must be one of {', '.join(SORTS)}, got {short(sort_by)}")
    for name in OWN_OPTIONS:
        if name in options:
            raise TypeError(
                f"{name} ({short(options[name])}) is no option of tiles: their masks are always compressed COCO run "
                "lengths, of which label_image makes a label image"
            )


def _image_size(image: Any) -> tuple[int, int]:
    """Height and width; ValueError or TypeError for what `segment_tiles` does not take."""
    if isinstance(image, Image.Image):
        check_picture(image, "image")
        return image.height, image.width
    if not hasattr(image, "shape"):
        raise TypeError(f"image is a {type(image).__name__}, expected a PIL image or an array (H, W, 3)")
    if len(image.shape) != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image has shape {tuple(image.shape)}, expected (H, W, 3)")
    dtype = str(getattr(image, "dtype", "uint8")).removeprefix("torch.")
    if not dtype.startswith(("uint8", "float", "bfloat")):
        raise ValueError(f"image has dtype {dtype}, expected uint8, or floats in 0..1")
    return int(image.shape[0]), int(image.shape[1])


def _pixels_of(image: Any, box: tuple[int, int, int, int]) -> np.ndarray:
    """A tile (x0, y0, x1, y1) of the image as an array of its own: -> (h, w, 3)."""
    if isinstance(image, Image.Image):  # as an array it would be in memory twice
        return np.array(image.crop(box).convert("RGB"))
    return np.ascontiguousarray(image[box[1] : box[3], box[0] : box[2]])


@dataclass
class _Tile:
    """A tile's box (x0, y0, x1, y1), ends exclusive, and the numbers (K) of its masks among all, the best first."""

    box: tuple[int, int, int, int]
    numbers: np.ndarray


@dataclass
class _Strip:
    """What two tiles found where they overlap, masks without pixels there left out.

    `own` (K) and `others` (L) are numbers of masks, the best first; `own_pixels` (K) and `other_pixels` (L) what each
    has in the strip, `shared` (K, L) what two have in common; `own_beyond` (K) and `others_beyond` (L) say whether a
    mask goes on outside the strip.
    """

    own: np.ndarray
    others: np.ndarray
    own_pixels: np.ndarray
    other_pixels: np.ndarray
    shared: np.ndarray
    own_beyond: np.ndarray
    others_beyond: np.ndarray

    def turned(self) -> "_Strip":
        """The same with the tiles exchanged."""
        return _Strip(
            self.others,
            self.own,
            self.other_pixels,
            self.own_pixels,
            self.shared.T,
            self.others_beyond,
            self.own_beyond,
        )

    def of(self, rows: np.ndarray, columns: np.ndarray) -> "_Strip":
        """The same of some of the masks, (K) and (L) bool."""
        return _Strip(
            self.own[rows],
            self.others[columns],
            self.own_pixels[rows],
            self.other_pixels[columns],
            self.shared[rows][:, columns],
            self.own_beyond[rows],
            self.others_beyond[columns],
        )

    def matches(self, disjoint: Callable[[int, int], bool]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Numbers of masks of both tiles that are of one object: each mask is in one match, the most alike first.

        Among those as alike in the strip, a mask and all its pieces come before a mask and one; then matches where
        both sides go on beyond the strip, or both end in it; then those of higher score.
        """
        candidates = [*self._pairs(), *self._pieces(disjoint)]
        candidates += [(rows, columns) for columns, rows in self.turned()._pieces(disjoint)]
        taken: tuple[set[int], set[int]] = set(), set()
        found = []
        for rows, columns in sorted(candidates, key=lambda match: self._rank(*match)):
            if taken[0].isdisjoint(rows) and taken[1].isdisjoint(columns):
                taken[0].update(rows)
                taken[1].update(columns)
                found.append((self.own[rows], self.others[columns]))
        return found

    def _ious(self) -> np.ndarray:
        return self.shared / (self.own_pixels[:, None] + self.other_pixels - self.shared)

    def _pairs(self) -> Iterator[tuple[list[int], list[int]]]:
        """Rows and columns of single masks that are alike."""
        for row, column in np.argwhere(self._ious() > SAME_OBJECT).tolist():
            yield [row], [column]

    def _pieces(self, disjoint: Callable[[int, int], bool]) -> Iterator[tuple[list[int], list[int]]]:
        """Row of a mask and columns of several that fill it; a column that is rather another mask is none of them."""
        ious, inside = self._ious(), self.shared >= INSIDE * self.other_pixels
        same = inside & (self.shared >= INSIDE * self.own_pixels[:, None])
        best = np.where(same, ious, 0).max(0, initial=0)
        for row, fits in enumerate(inside & (ious > best - AS_ALIKE)):
            columns: list[int] = []
            for column in sorted(np.flatnonzero(fits).tolist(), key=lambda c: -self.other_pixels[c]):
                if all(disjoint(self.others[column], self.others[piece]) for piece in columns):
                    columns.append(column)
            if len(columns) > 1 and self.shared[row, columns].sum() >= INSIDE * self.own_pixels[row]:
                yield [row], columns

    def _rank(self, rows: list[int], columns: list[int]) -> tuple[int, bool, bool, int]:
        """Where a match comes, the lowest first."""
        shared = self.shared[np.ix_(rows, columns)].sum()
        iou = shared / (self.own_pixels[rows].sum() + self.other_pixels[columns].sum() - shared)
        beyond = self.own_beyond[rows].any() == self.others_beyond[columns].any()
        single = len(rows) == len(columns) == 1
        return max(0, math.floor((1 - iou) / AS_ALIKE)), single, not beyond, min(rows) + min(columns)

    def held(self, areas: np.ndarray) -> np.ndarray:
        """Numbers of masks of the first tile that a larger one of the second holds and goes on from.

        `areas` are those of all masks by number.
        """
        own, others = areas[self.own][:, None], areas[self.others]
        return self.own[((self.shared >= INSIDE * own) & self.others_beyond & (others > own)).any(1)]


class _Parts:
    """Masks of all tiles as runs of the whole image, and which of them belong together.

    By number of a mask: `runs` (R, 2) int64 first pixel and end of each run, none over the foot of a column, `scores`,
    `boxes` (x0, y0, x1, y1) with exclusive ends, `areas`, and `parents`, which lead to the one that stands for the
    object. By that one's number `tiles` has the object's masks in each tile.
    """

    def __init__(self, size: tuple[int, int]):
        self.size = size
        self.runs: list[np.ndarray] = []
        self.scores: list[float] = []
        self.boxes: list[tuple[int, int, int, int]] = []
        self.areas: list[int] = []
        self.parents: list[int] = []
        self.tiles: list[dict[tuple[int, int, int, int], list[int]]] = []
        self.pieces: list[tuple[np.ndarray, np.ndarray]] = []  # matches of one mask and several
        self.held_in: dict[int, list[tuple[int, int, int, int]]] = {}  # of a mask that was cut: the tiles that go on

    def add(self, found: dict[str, Any], box: tuple[int, int, int, int]) -> _Tile:
        """Take the masks of a tile, (h, w) bool, empty ones left out."""
        scores, first = np.array(found["scores"].tolist()), len(self.runs)
        for index in np.argsort(-scores, kind="stable").tolist():
            mask = found["masks"][index]
            if mask.any():
                self._add(mask, float(scores[index]), box)
        return _Tile(box, np.arange(first, len(self.runs)))

    def _add(self, mask: np.ndarray, score: float, tile: tuple[int, int, int, int]) -> None:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        x0, y0, x1, y1 = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
        (left, top), number = tile[:2], len(self.runs)
        runs = window_to_runs(mask[y0:y1, x0:x1], (left + x0, top + y0), self.size)
        self.runs.append(_cut_at_columns(runs, self.size[0]))
        self.scores.append(score)
        self.boxes.append((left + x0, top + y0, left + x1, top + y1))
        self.areas.append(_area(runs))
        self.parents.append(number)
        self.tiles.append({tile: [number]})

    def meet(self, tile: _Tile, other: _Tile) -> None:
        """Join what two neighbouring tiles have in common, and note what may be a fragment."""
        strip = self._strip(tile, other)
        for own, others in strip.matches(self._disjoint):
            if len(own) == len(others) == 1:
                self._join(int(own[0]), int(others[0]))
            else:  # once the pairs of all tiles are known: a piece is then all that it is on its side of the seam
                self.pieces.append((own, others))
        for sides, first, second in ((strip, tile, other), (strip.turned(), other, tile)):
            for number in sides.held(np.array(self.areas)).tolist():
                if self._is_cut(number, first, second):
                    self.held_in.setdefault(number, []).append(second.box)

    def _is_cut(self, number: int, tile: _Tile, other: _Tile) -> bool:
        """Whether a mask touches an edge of its tile that lies inside another."""
        x0, y0, x1, y1 = self.boxes[number]
        (left, top, right, bottom), (other_left, other_top, other_right, other_bottom) = tile.box, other.box
        before = (x0 == left > other_left) or (y0 == top > other_top)
        return before or (x1 == right < other_right) or (y1 == bottom < other_bottom)

    def _strip(self, tile: _Tile, other: _Tile) -> _Strip:
        """What the masks of two tiles have where those overlap."""
        corner, end = np.maximum(tile.box[:2], other.box[:2]), np.minimum(tile.box[2:], other.box[2:])
        own, others = (self._within(side.numbers, corner, end) for side in (tile, other))
        shared, own_pixels, other_pixels = np.zeros((len(own), len(others))), np.zeros(len(own)), np.zeros(len(others))
        rows, width = (int(corner[1]), int(end[1])), max(1, STRIP_PIXELS // int(end[1] - corner[1]))
        for x in range(int(corner[0]), int(end[0]), width):
            columns = (x, min(x + width, int(end[0])))
            first, second = (self._pixels(numbers, columns, rows) for numbers in (own, others))
            shared += (first @ second.T).numpy()
            own_pixels += first.sum(1).numpy()
            other_pixels += second.sum(1).numpy()
        areas = np.array(self.areas)
        beyond, others_beyond = areas[own] > own_pixels, areas[others] > other_pixels
        strip = _Strip(own, others, own_pixels, other_pixels, shared, beyond, others_beyond)
        return strip.of(own_pixels > 0, other_pixels > 0)

    def _within(self, numbers: np.ndarray, corner: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Those masks whose boxes reach into a part of the image."""
        boxes = np.array([self.boxes[number] for number in numbers]).reshape(-1, 4)
        return numbers[((boxes[:, :2] < end) & (boxes[:, 2:] > corner)).all(1)]

    def _pixels(self, numbers: np.ndarray, columns: tuple[int, int], rows: tuple[int, int]) -> torch.Tensor:
        """What masks have in a part of the image: (K, pixels) float32."""
        pixels = np.zeros((len(numbers), columns[1] - columns[0], rows[1] - rows[0]), np.float32)
        for index, number in enumerate(numbers):
            pixels[index] = _window(self.runs[number], self.size[0], columns, rows)
        return torch.from_numpy(pixels).flatten(1)

    def _disjoint(self, one: int, other: int) -> bool:
        """Whether two masks share next to nothing."""
        both = self.areas[one] + self.areas[other]
        shared = both - _area(_union([self.runs[one], self.runs[other]]))
        return shared <= DISJOINT * min(self.areas[one], self.areas[other])

    def _join(self, one: int, other: int, pieces: bool = False) -> None:
        """Make two masks one object, unless that would join masks of one tile, which its generator kept apart.

        With `pieces` masks of one tile may join where they are disjoint.
        """
        first, second = self._root(one), self._root(other)
        if first == second:
            return
        common = self.tiles[first].keys() & self.tiles[second].keys()
        pairs = ((a, b) for tile in common for a in self.tiles[first][tile] for b in self.tiles[second][tile])
        if common and not (pieces and all(self._disjoint(a, b) for a, b in pairs)):
            return
        self.parents[first] = second
        for tile, members in self.tiles[first].items():
            self.tiles[second].setdefault(tile, []).extend(members)

    def _root(self, number: int) -> int:
        while self.parents[number] != number:
            self.parents[number] = number = self.parents[self.parents[number]]
        return number

    def result(self, sort_by: str) -> dict[str, Any]:
        """What `segment_tiles` returns."""
        for own, others in self.pieces:
            for one in own.tolist():
                for other in others.tolist():
                    self._join(one, other, pieces=True)
        objects = [self._object(members) for members in self._objects() if not all(map(self._is_fragment, members))]
        objects.sort(key=lambda item: -item[sort_by])
        pixels, whole = self.size[0] * self.size[1], {"dtype": torch.long, "device": "cpu"}
        return {
            "masks": [compress_counts(runs_to_counts(item["runs"], pixels), self.size) for item in objects],
            "scores": torch.tensor([item["score"] for item in objects], dtype=torch.float32, device="cpu"),
            "boxes": torch.tensor([item["box"] for item in objects], **whole).reshape(-1, 4),
            "areas": torch.tensor([item["area"] for item in objects], **whole),
            "tiles": torch.tensor([item["tiles"] for item in objects], **whole),
        }

    def _objects(self) -> list[list[int]]:
        """Numbers of the masks of each object."""
        objects: dict[int, list[int]] = {}
        for number in range(len(self.runs)):
            objects.setdefault(self._root(number), []).append(number)
        return list(objects.values())

    def _is_fragment(self, number: int) -> bool:
        """Whether a tile has a mask that goes on where this one was cut, and its object has none of that tile."""
        return any(tile not in self.tiles[self._root(number)] for tile in self.held_in.get(number, []))

    def _object(self, members: list[int]) -> dict[str, Any]:
        runs, areas = _union([self.runs[n] for n in members]), [self.areas[n] for n in members]
        boxes = np.array([self.boxes[n] for n in members])
        return {
            "runs": runs,
            "area": _area(runs),
            "score": sum(self.scores[n] * area for n, area in zip(members, areas)) / sum(areas),
            "box": [*boxes[:, :2].min(0).tolist(), *(boxes[:, 2:].max(0) - 1).tolist()],
            "tiles": len(self.tiles[self._root(members[0])]),
        }


def _runs(mask: dict[str, Any]) -> np.ndarray:
    """(R, 2) int64 start and end of each run of a mask, down the columns."""
    edges = rle_counts(mask).cumsum()
    return edges[: len(edges) // 2 * 2].reshape(-1, 2)


def _area(runs: np.ndarray) -> int:
    return int((runs[:, 1] - runs[:, 0]).sum())


def _cut_at_columns(runs: np.ndarray, height: int) -> np.ndarray:
    """Runs (R, 2) of an image of a height, those that go on in the next column cut at the foot of each."""
    first, last = runs[:, 0] // height, (runs[:, 1] - 1) // height
    counts = last - first + 1
    columns = np.arange(counts.sum()) + np.repeat(first - counts.cumsum() + counts, counts)
    starts, ends = np.repeat(runs[:, 0], counts), np.repeat(runs[:, 1], counts)
    return np.stack((np.maximum(starts, columns * height), np.minimum(ends, (columns + 1) * height)), 1)


def _window(runs: np.ndarray, height: int, columns: tuple[int, int], rows: tuple[int, int]) -> np.ndarray:
    """Part of a mask of runs that are cut at columns: -> (columns, rows) int8 of 0 and 1."""
    first, last = np.searchsorted(runs[:, 0], (columns[0] * height, columns[1] * height))
    column = runs[first:last, 0] // height
    starts, ends = (runs[first:last] - (column * height + rows[0])[:, None]).clip(0, rows[1] - rows[0]).T
    seen = starts < ends
    steps = np.zeros((columns[1] - columns[0], rows[1] - rows[0] + 1), np.int8)
    steps[column[seen] - columns[0], starts[seen]] += 1
    steps[column[seen] - columns[0], ends[seen]] -= 1
    return steps.cumsum(1, dtype=np.int8)[:, :-1]


def _union(parts: list[np.ndarray]) -> np.ndarray:
    """Runs of what is in any of several masks: (R, 2) each -> (R, 2), in order, none touching the next."""
    runs = np.concatenate(parts)
    runs = runs[runs[:, 0].argsort(kind="stable")]
    ends = np.maximum.accumulate(runs[:, 1])
    first = np.concatenate(([True], runs[1:, 0] > ends[:-1]))
    last = np.concatenate((np.flatnonzero(first)[1:] - 1, [len(runs) - 1]))
    return np.stack((runs[first, 0], ends[last]), 1)
