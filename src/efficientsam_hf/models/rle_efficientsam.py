# SPDX-License-Identifier: Apache-2.0
"""COCO run-length encoding of masks, compressed and uncompressed, in numpy alone.

Runs go down the columns and start with background. The compressed string is the one of the COCO API: from the third
run on each run is stored as its difference to the run two before, in little-endian groups of five bits, one printable
character each (bit 5: more follow; bit 4 of the last: the number is negative).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .checks_efficientsam import is_whole, short


FIRST_CHARACTER = 48
MAX_GROUPS = 8  # 40 bits, more than any picture's pixel count needs
MOST_PIXELS = 2**32  # of a mask that is expanded, a byte each


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """Compress one mask, (H, W) bool -> {"size": [H, W], "counts": str}; `ValueError` if it is no mask."""
    return compress_counts(mask_to_counts(mask), np.shape(mask))


def compress_counts(counts: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """Compress run lengths of a mask of `size` (height, width): (R,) int64 -> {"size": [H, W], "counts": str}."""
    return {"size": [int(side) for side in size], "counts": _counts_to_string(counts)}


def decode_rle(rle: dict[str, Any]) -> np.ndarray:
    """Expand {"size": [H, W], "counts": str, bytes or list of runs} -> (H, W) bool; `ValueError` if malformed."""
    height, width = rle_size(rle)
    if height * width > MOST_PIXELS:
        raise ValueError(f"RLE size {height} x {width} is more than {MOST_PIXELS:,} pixels, too many to expand")
    counts = rle_counts(rle)
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def rle_pixels(rle: dict[str, Any], rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Some rows (R) and columns (C) of a mask, without expanding it: -> (R, C) bool; `ValueError` if malformed."""
    ends = rle_counts(rle).cumsum()
    places = np.asarray(columns)[None, :] * rle_size(rle)[0] + np.asarray(rows)[:, None]
    return np.searchsorted(ends, places, side="right") % 2 == 1


def rle_area(rle: dict[str, Any]) -> int:
    """Number of pixels in the mask, without expanding it; `ValueError` if malformed."""
    return int(rle_counts(rle)[1::2].sum())


def rle_box(rle: dict[str, Any]) -> list[int]:
    """Tight box [x, y, width, height] of the mask, without expanding it; zeros if empty, `ValueError` if malformed."""
    height, _ = rle_size(rle)
    ends = rle_counts(rle).cumsum()
    first, last = ends[:-1:2], ends[1::2] - 1
    first, last = first[last >= first], last[last >= first]
    if not len(first):
        return [0, 0, 0, 0]
    left, right = int(first[0]) // height, int(last[-1]) // height
    top, bottom = int((first % height).min()), int((last % height).max())
    if (first // height != last // height).any():  # a run that goes on in the next column
        top, bottom = 0, height - 1
    return [left, top, right + 1 - left, bottom + 1 - top]


def rle_size(rle: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the mask; `ValueError` unless they are two positive whole numbers."""
    if not isinstance(rle, dict) or "size" not in rle or "counts" not in rle:
        raise ValueError(f"an RLE mask must be a dict with 'size' and 'counts', got {short(rle)}")
    size = rle["size"]
    whole = isinstance(size, (list, tuple)) and all(is_whole(n) and n > 0 for n in size)
    if not whole or len(size) != 2 or int(size[0]) * int(size[1]) >= 2 ** (5 * MAX_GROUPS):
        raise ValueError(
            f"RLE size must be [height, width], two positive whole numbers of less than 2**{5 * MAX_GROUPS} pixels, "
            f"got {short(size)}"
        )
    return int(size[0]), int(size[1])


def rle_counts(rle: dict[str, Any]) -> np.ndarray:
    """Run lengths of an RLE mask, -> (R,) int64, background first; `ValueError` unless they fill the mask exactly."""
    height, width = rle_size(rle)
    counts = rle["counts"]
    if isinstance(counts, (str, bytes)):
        runs = _string_to_counts(counts)
    else:
        runs = _list_to_counts(counts)
    if (runs < 0).any() or (runs > height * width).any() or runs.sum() != height * width:
        raise ValueError(
            f"RLE counts must be runs that add up to {height} x {width} = {height * width} pixels,"
            f" got {short(runs.tolist())}"
        )
    return runs


def mask_to_counts(mask: np.ndarray) -> np.ndarray:
    """Run lengths down the columns, (H, W) bool -> (R,) int64, background first; `ValueError` if it is no mask."""
    try:
        mask = np.asarray(mask)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists; tensors on a GPU or with gradients
        raise ValueError(f"mask must be an array (height, width), got {short(mask)}: {error}") from error
    if mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"mask must have shape (height, width) with at least one pixel, got shape {mask.shape}")
    if mask.dtype.kind not in "biuf":
        raise ValueError(f"mask must hold only 0 and 1, got {mask.dtype}")
    if mask.dtype != bool:
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"mask must hold only 0 and 1, got {mask.dtype} from {mask.min()} to {mask.max()}")
        mask = mask.astype(bool)
    pixels = mask.T.reshape(-1)
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    counts = np.diff(np.concatenate(([0], changes, [pixels.size])))
    return np.concatenate(([0], counts)) if pixels[0] else counts


def window_to_runs(window: np.ndarray, corner: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Runs of a mask that is background outside a window: (h, w) bool -> (R, 2) int64, first pixel and end of each.

    Pixels count down the columns of the mask of `size` (height, width); `corner` (x, y) is the place of the window's
    first pixel in it. Only the window is looked at, however large the mask.
    """
    columns = np.pad(window.T, ((0, 0), (1, 1)))
    return changes_to_runs(*np.nonzero(columns[:, 1:] != columns[:, :-1]), corner, size)


def changes_to_runs(
    columns: np.ndarray, rows: np.ndarray, corner: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """Runs as of `window_to_runs` from where columns of a window begin and end to be mask, (N), (N) -> (R, 2).

    In order, a beginning and an end by turns, as `column_changes` gives them for a mask.
    """
    changes = (columns + corner[0]) * size[0] + rows + corner[1]
    # A run that reaches the foot of a column may go on at the head of the next one.
    joined = np.flatnonzero(changes[1:-1:2] == changes[2::2]) * 2 + 1
    return np.delete(changes, np.concatenate((joined, joined + 1))).reshape(-1, 2)


def runs_iou(runs: np.ndarray, others: np.ndarray) -> float:
    """IoU of two masks of one size given as runs, (R, 2) and (S, 2); 0 if both are empty."""
    lengths = others[:, 1] - others[:, 0]
    before = np.concatenate(([0], lengths.cumsum()))

    def covered(places: np.ndarray) -> np.ndarray:
        """Pixels of the other mask before each place."""
        index = np.searchsorted(others[:, 0], places)
        beyond = np.where(index > 0, others[index - 1, 1] - places, 0) if len(others) else 0
        return before[index] - np.maximum(beyond, 0)

    shared = int((covered(runs[:, 1]) - covered(runs[:, 0])).sum())
    union = int((runs[:, 1] - runs[:, 0]).sum() + lengths.sum()) - shared
    return shared / max(union, 1)


def runs_to_counts(runs: np.ndarray, pixels: int) -> np.ndarray:
    """Runs (R, 2) of a mask of so many pixels as run lengths, background first: -> (C,) int64."""
    counts = np.diff(np.concatenate(([0], runs.reshape(-1), [pixels])))
    return counts if counts[-1] or len(counts) == 1 else counts[:-1]


def _counts_to_string(counts: np.ndarray) -> str:
    """Pack run lengths into the COCO string, (R,) -> str."""
    numbers = counts.copy()
    numbers[3:] -= counts[1:-2]
    shifts = 5 * np.arange(int(np.abs(numbers).max()).bit_length() // 5 + 1)  # one bit more is for the sign
    groups = (numbers[:, None] >> shifts) & 31
    rest = numbers[:, None] >> (shifts + 5)
    more = np.where(groups & 16, rest != -1, rest != 0)
    used = np.concatenate((np.ones((len(numbers), 1), bool), np.logical_and.accumulate(more, axis=1)[:, :-1]), axis=1)
    characters = groups + 32 * more + FIRST_CHARACTER
    return characters[used].astype(np.uint8).tobytes().decode("ascii")


def _string_to_counts(text: str | bytes) -> np.ndarray:
    """Unpack the COCO string, str -> (R,) int64; `ValueError` at a character or length that the format excludes."""
    try:
        data = text.encode("ascii") if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        raise ValueError(f"RLE counts must be ASCII text, got {short(text)}") from error
    groups = np.frombuffer(data, np.uint8).astype(np.int64) - FIRST_CHARACTER
    last = np.flatnonzero((groups & 32) == 0)
    if groups.size == 0 or groups.min() < 0 or groups.max() > 63 or last.size == 0 or last[-1] != groups.size - 1:
        raise ValueError(f"RLE counts are not a complete COCO string: {short(text)}")
    first = np.concatenate(([0], last[:-1] + 1))
    lengths = last - first + 1
    if lengths.max() > MAX_GROUPS:
        raise ValueError(f"RLE counts hold a number of more than {5 * MAX_GROUPS} bits: {short(text)}")
    position = np.arange(groups.size) - np.repeat(first, lengths)
    numbers = np.add.reduceat((groups & 31) << (5 * position), first)
    numbers -= np.where(groups[last] & 16, 1 << (5 * lengths), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def _list_to_counts(counts: Sequence[int]) -> np.ndarray:
    """Check uncompressed runs, list of int -> (R,) int64; `ValueError` if they are not whole numbers."""
    try:
        runs = np.asarray(counts)
    except ValueError as error:
        raise ValueError(f"RLE counts must be a flat list of whole numbers, got {short(counts)}") from error
    if runs.ndim != 1 or runs.size == 0 or runs.dtype.kind not in "iu":
        raise ValueError(f"RLE counts must be a string or a flat list of whole numbers, got {short(counts)}")
    return runs.astype(np.int64)
