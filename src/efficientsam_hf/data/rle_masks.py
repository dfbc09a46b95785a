# SPDX-License-Identifier: Apache-2.0
"""Masks of a picture as run lengths, in the place of an array that would be hundreds of megabytes."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ..models.rle_efficientsam import decode_rle, rle_area, rle_size


class RleMasks:
    """COCO RLE masks of one size (height, width) as what stands for a (N, H, W) bool array.

    Numbers, slices and arrays of numbers expand the masks they name, and no others; `np.asarray` and `torch.as_tensor`
    expand all. Raises ValueError on construction if a mask is damaged or of another size, before it is expanded.
    """

    dtype, ndim = np.dtype(bool), 3

    def __init__(self, rles: Iterable[dict[str, Any]], size: tuple[int, int]) -> None:
        self.rles: list[dict[str, Any]] = []
        areas = []
        for rle in rles:
            areas.append(_checked_area(rle, size))
            self.rles.append(rle)
        self._areas = np.array(areas, np.int64)
        self.shape = (len(self.rles), *size)

    def __len__(self) -> int:
        return len(self.rles)

    def areas(self) -> np.ndarray:
        """Pixels of each mask, without expanding any: -> (N,) int64."""
        return self._areas

    def without_empty(self) -> "RleMasks":
        """Those that cover a pixel."""
        if self._areas.all():
            return self
        return RleMasks((rle for rle, area in zip(self.rles, self._areas) if area), self.shape[1:])

    def __getitem__(self, index: Any) -> np.ndarray:
        """The masks that the index names, -> (H, W) bool for a number, else (K, H, W) bool."""
        if isinstance(index, tuple):  # parts of the masks are parts of an array
            return np.asarray(self)[index]
        chosen = np.arange(len(self))[index]
        if chosen.ndim == 0:
            return decode_rle(self.rles[chosen])
        masks = np.empty((len(chosen), *self.shape[1:]), bool)
        for mask, number in zip(masks, chosen, strict=True):
            mask[:] = decode_rle(self.rles[number])
        return masks

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(decode_rle, self.rles)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("copy: RLE masks have no array to share, expected None or True, got False")
        return self[:].astype(dtype or bool, copy=False)

    def __dlpack__(self, **options: Any) -> Any:  # torch would go through the masks pixel by pixel without it
        return self[:].__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return np.empty(0).__dlpack_device__()


def _checked_area(rle: Any, size: tuple[int, int]) -> int:
    """Pixels of a mask; `ValueError` if it is damaged or not of its picture's size (height, width)."""
    if rle_size(rle) != size:
        raise ValueError(f"mask of {rle_size(rle)} in a picture of {size} (height, width)")
    return rle_area(rle)
