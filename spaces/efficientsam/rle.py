# SPDX-License-Identifier: Apache-2.0
"""Masks as COCO's compressed run lengths, {"size": [H, W], "counts": str}, by pycocotools."""

from typing import Any

import numpy as np
from pycocotools import mask as coco


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """(H, W) bool -> run lengths."""
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_mask(rle: dict[str, Any]) -> np.ndarray:
    """Run lengths -> (H, W) bool."""
    return coco.decode(rle).astype(bool)


def mask_bounds(rle: dict[str, Any]) -> tuple[int, int, int, int]:
    """Box of a mask, without expanding it: (x0, y0, x1, y1), x1 and y1 beyond the last pixel, zeros if it is empty."""
    x, y, width, height = (int(value) for value in coco.toBbox(rle))
    return x, y, x + width, y + height
