# SPDX-License-Identifier: Apache-2.0
"""Polygons of COCO files as masks, drawn by pycocotools, which must not see numbers that it cannot hold."""

from typing import Any

import numpy as np

from ..models.checks_efficientsam import short
from .json_values import finite


NEAR = 1e5  # pixels: coordinates up to here cost pycocotools little, and are drawn as it draws them
LONGEST = 10**6  # pixels of the outlines of a mask, or four times those of its picture if they are more


def polygons_to_rle(polygons: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Fill the union of polygons [x0, y0, x1, y1, ...] in pixels of the image, as the COCO API does: -> its RLE.

    `size` is (height, width). Raises `ValueError` for anything but a list of polygons with three corners or more, all
    of them finite numbers, or if their outlines are longer than any object's; `ImportError` if pycocotools is missing.
    """
    outlines = [_within(_read(polygon), size) for polygon in polygons]
    length = sum(np.abs(np.diff(outline, axis=0, append=outline[:1])).max(1).sum() for outline in outlines)
    if length > max(LONGEST, 4 * size[0] * size[1]):
        raise ValueError(f"polygons with outlines of {length:.2g} pixels in a picture of {size} (height, width)")
    coco_mask = import_pycocotools()
    kept = [outline.ravel().tolist() for outline in outlines if len(outline) >= 3]
    if not kept:
        return {"size": list(size), "counts": [size[0] * size[1]]}
    return coco_mask.merge(coco_mask.frPyObjects(kept, *size))


def _read(polygon: Any) -> np.ndarray:
    """Corners of a polygon, -> (N, 2) float64."""
    flat = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
    if not flat or not all(map(finite, polygon)):
        raise ValueError(
            f"a polygon must be a flat list of at least three x, y pairs of finite numbers, got {short(polygon)}"
        )
    return np.array(polygon, float).reshape(-1, 2)


def _within(corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A polygon as it is, or what of it lies near the picture if a corner is far away: (N, 2) -> (M, 2)."""
    if np.abs(corners).max() <= NEAR:
        return corners
    for axis, side in ((0, size[1]), (1, size[0])):
        corners = _cut(corners, axis, -float(side), above=True)
        corners = _cut(corners, axis, 2.0 * side, above=False)
    return corners


def _cut(corners: np.ndarray, axis: int, limit: float, above: bool) -> np.ndarray:
    """The part of a polygon on one side of a line (Sutherland and Hodgman 1974): (N, 2) -> (M, 2)."""
    if not len(corners):
        return corners
    following = np.roll(corners, -1, axis=0)
    inside = corners[:, axis] >= limit if above else corners[:, axis] <= limit
    crosses = inside != np.roll(inside, -1)
    start, end = corners[:, axis] / 4, following[:, axis] / 4  # the difference of two large numbers must be finite
    share = np.where(crosses, (limit / 4 - start) / np.where(crosses, end - start, 1.0), 0.0)
    crossing = corners * (1 - share[:, None]) + following * share[:, None]
    crossing[:, axis] = limit
    both = np.stack((corners, crossing), 1)
    return both[np.stack((inside, crosses), 1)]


def import_pycocotools() -> Any:
    """`pycocotools.mask`; `ImportError` that names the extra."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError(
            "polygons of COCO files are drawn by pycocotools: pip install 'efficientsam-hf[eval]'"
            " (files with RLE masks work without it)"
        ) from error
    return mask
