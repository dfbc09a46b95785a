# SPDX-License-Identifier: Apache-2.0
"""Run-length encoding of masks as COCO has it: runs down the columns, background first, packed into a string.

From the fourth run on each run is stored as its difference to the run two before, in little-endian groups of five
bits, one printable character each (bit 5: more follow; bit 4 of the last: the number is negative).
"""

from typing import Any

import numpy as np


FIRST_CHARACTER = 48


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """(H, W) bool -> {"size": [H, W], "counts": str}."""
    pixels = np.asarray(mask, dtype=bool).T.reshape(-1)
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    counts = np.diff(np.concatenate(([0], changes, [pixels.size]))).tolist()
    counts = [0, *counts] if pixels[0] else counts
    return {"size": [int(side) for side in mask.shape], "counts": _pack(counts)}


def decode_mask(rle: dict[str, Any]) -> np.ndarray:
    """{"size": [H, W], "counts": str} -> (H, W) bool."""
    height, width = rle["size"]
    counts = unpack_counts(rle["counts"])
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def mask_bounds(rle: dict[str, Any]) -> tuple[int, int, int, int]:
    """Box of a mask, without expanding it: (x0, y0, x1, y1), x1 and y1 beyond the last pixel, zeros if it is empty."""
    height = rle["size"][0]
    ends = np.cumsum(unpack_counts(rle["counts"]))
    first, last = ends[0:-1:2], ends[1::2] - 1
    used = first <= last
    first, last = first[used], last[used]
    if not len(first):
        return 0, 0, 0, 0
    x0, x1 = int(first.min() // height), int(last.max() // height) + 1
    if (first // height != last // height).any():  # a run that goes on in the next column touches both edges
        return x0, 0, x1, height
    return x0, int((first % height).min()), x1, int((last % height).max()) + 1


def unpack_counts(text: str) -> np.ndarray:
    """Run lengths in a COCO string, -> (R,) int64."""
    counts: list[int] = []
    number = shift = 0
    for character in text.encode("ascii"):
        group = character - FIRST_CHARACTER
        number |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            number -= 1 << shift
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
        number = shift = 0
    return np.array(counts, dtype=np.int64)


def _pack(counts: list[int]) -> str:
    """Run lengths as a COCO string."""
    characters = bytearray()
    for index, count in enumerate(counts):
        number = count - counts[index - 2] if index > 2 else count
        more = True
        while more:
            group = number & 31
            number >>= 5
            more = number != (-1 if group & 16 else 0)
            characters.append(group + 32 * more + FIRST_CHARACTER)
    return characters.decode("ascii")
