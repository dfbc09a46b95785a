# SPDX-License-Identifier: Apache-2.0
"""Masks of a picture as run lengths, in the place of an array that would be hundreds of megabytes."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..models.rle_efficientsam import decode_rle, rle_area
from .coco import check_rle_size


class RleMasks:
    """COCO RLE masks of one size (height, width) as what stands for a (N, H, W) bool array.

    Numbers, slices and arrays of numbers expand the masks they name, and no others; `np.asarray` and `torch.as_tensor`
    expand all. Raises ValueError on construction if a mask is damaged or of another size.
    """

    dtype, ndim = np.dtype(bool), 3

    def __init__(self, rles: Sequence[dict[str, Any]], size: tuple[int, int]) -> None:
        for rle in rles:
            check_rle_size(rle, size)
        self._rles, self._areas = list(rles), np.array([rle_area(rle) for rle in rles], np.int64)
        self.shape = (len(self._rles), *size)

    def __len__(self) -> int:
        return len(self._rles)

    def areas(self) -> np.ndarray:
        """Pixels of each mask, without expanding any: -> (N,) int64."""
        return self._areas

    def __getitem__(self, index: Any) -> np.ndarray:
        """The masks that the index names, -> (H, W) bool for a number, else (K, H, W) bool."""
        if isinstance(index, tuple):  # parts of the masks are parts of an array
            return np.asarray(self)[index]
        chosen = np.arange(len(self))[index]
        if chosen.ndim == 0:
            return decode_rle(self._rles[chosen])
        masks = np.empty((len(chosen), *self.shape[1:]), bool)
        for mask, number in zip(masks, chosen, strict=True):
            mask[:] = decode_rle(self._rles[number])
        return masks

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(decode_rle, self._rles)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("copy: RLE masks have no array to share, expected None or True, got False")
        return self[:].astype(dtype or bool, copy=False)

    def __dlpack__(self, **options: Any) -> Any:  # torch would go through the masks pixel by pixel without it
        return self[:].__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return np.empty(0).__dlpack_device__()
