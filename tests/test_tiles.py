# SPDX-License-Identifier: Apache-2.0
"""Large images in tiles: objects that cross seams come out whole, and once."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from efficientsam_hf import tiles
from efficientsam_hf.models.rle_efficientsam import (
    decode_rle,
    encode_rle,
    mask_to_counts,
    runs_to_counts,
    window_to_runs,
)
from efficientsam_hf.tiles import label_image, segment_tiles, tile_starts


def flat_regions(image: np.ndarray, output_type: str = "bool", **options: Any) -> dict[str, Any]:
    """A generator that finds every connected region of one colour, as a perfect model would."""
    assert output_type == "bool"
    masks = []
    for value in set(np.unique(image[..., 0]).tolist()) - {0}:
        labels, count = ndimage.label(image[..., 0] == value)
        masks += [labels == index for index in range(1, count + 1)]
    return {"masks": masks, "scores": torch.full((len(masks),), 0.9)}


def scene(height: int, width: int, objects: int, seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Discs that do not touch, each of a colour of its own on black: (H, W, 3) and the masks."""
    generator = np.random.default_rng(seed)
    image, masks = np.zeros((height, width, 3), np.uint8), []
    rows, columns = np.mgrid[:height, :width]
    while len(masks) < objects:
        y, x, radius = generator.uniform(0, height), generator.uniform(0, width), generator.uniform(4, 60)
        mask = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        around = (rows - y) ** 2 + (columns - x) ** 2 < (radius + 2) ** 2
        if mask.sum() > 20 and not image[around].any():
            masks.append(mask)
            image[mask] = len(masks)
    return image, masks


@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(100, 128, 16), (128, 128, 16), (129, 128, 16), (1000, 128, 40)]
)
def test_tiles_cover_everything_and_overlap(length: int, tile: int, overlap: int) -> None:
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0 and starts[-1] + tile >= length and (length <= tile or starts[-1] + tile == length)
    assert all(0 < b - a <= tile - overlap for a, b in zip(starts, starts[1:]))
    assert len(starts) == 1 or (len(starts) - 2) * (tile - overlap) + tile < length  # one less would not do


@pytest.mark.parametrize("size", [(300, 420), (128, 500), (100, 90)])
def test_objects_come_out_whole_and_once(size: tuple[int, int]) -> None:
    image, masks = scene(*size, objects=14)
    result = segment_tiles(flat_regions, image, tile=128, overlap=32)
    found = [decode_rle(mask) for mask in result["masks"]]
    assert len(found) == len(masks)
    for mask in masks:
        assert sum(np.array_equal(mask, other) for other in found) == 1
    assert result["areas"].tolist() == [mask.sum() for mask in found]
    for mask, box in zip(found, result["boxes"].tolist()):
        rows, columns = np.nonzero(mask)
        assert box == [columns.min(), rows.min(), columns.max(), rows.max()]
    if max(size) > 128:
        assert result["tiles"].max() > 1  # some did cross a seam
    torch.testing.assert_close(result["scores"], torch.full((len(masks),), 0.9))


def test_an_object_over_the_whole_image() -> None:
    image = np.full((200, 300, 3), 7, np.uint8)
    image[0, 0] = 0
    result = segment_tiles(flat_regions, image, tile=128, overlap=16)
    assert result["boxes"].tolist() == [[0, 0, 299, 199]] and result["areas"].tolist() == [200 * 300 - 1]
    assert result["tiles"].tolist() == [len(tile_starts(200, 128, 16)) * len(tile_starts(300, 128, 16))]


def columns_of_each_tile(widths: list[list[slice]]):
    """A generator that answers each tile with the columns given for it, in order."""
    answers = iter(widths)

    def generate(image: np.ndarray, **options: Any) -> dict[str, Any]:
        masks = []
        for columns in next(answers):
            mask = np.zeros(image.shape[:2], bool)
            mask[:, columns] = True
            masks.append(mask)
        return {"masks": masks, "scores": torch.linspace(0.9, 0.5, len(masks))}

    return generate


def test_neighbours_that_differ_in_the_strip_stay_apart() -> None:
    image = np.zeros((64, 100, 3), np.uint8)  # tiles begin at 0 and 36 and share 28 columns
    apart = segment_tiles(columns_of_each_tile([[slice(0, 45)], [slice(20, 64)]]), image, tile=64, overlap=28)
    assert sorted(apart["areas"].tolist()) == [64 * 44, 64 * 45] and apart["tiles"].tolist() == [1, 1]
    joined = segment_tiles(columns_of_each_tile([[slice(0, 64)], [slice(0, 20)]]), image, tile=64, overlap=28)
    assert joined["areas"].tolist() == [64 * 64] and joined["tiles"].tolist() == [2]


def test_masks_of_one_tile_are_never_joined() -> None:
    """Left and right half of the first tile both meet the whole of the second, over the tiles below."""
    image = np.zeros((100, 100, 3), np.uint8)
    halves = [slice(0, 50), slice(50, 64)]
    result = segment_tiles(columns_of_each_tile([halves, [slice(14, 64)], halves, [slice(0, 64)]]), image, 64, 28)
    whole = [decode_rle(mask) for mask in result["masks"]]
    assert all(not (mask[0, 0] and mask[0, 60]) for mask in whole)


@pytest.mark.parametrize("count", [2, 6])
def test_memory_holds_strips_alone(count: int, monkeypatch) -> None:
    """What stays of a row of tiles does not grow with the tiles' area."""
    kept = []
    part = tiles._Tile.part
    monkeypatch.setattr(tiles._Tile, "part", lambda self, **k: kept.append(part(self, **k)) or kept[-1])
    image, _ = scene(300, 128 * count, objects=10)
    segment_tiles(flat_regions, image, tile=128, overlap=16)
    assert kept and all(mask.size <= 128 * 64 and mask.base is None for tile in kept for mask in tile.masks)


@pytest.mark.parametrize("swapped", [False, True])
def test_an_object_and_its_part_are_not_mixed_up(swapped: bool) -> None:
    """Both are the same in the strip, columns 36 to 63; only the whole goes on beyond it."""
    whole, part = ([slice(0, 64), slice(0, 64)], [slice(36, 64), slice(0, 28)])
    left, right = ([whole[0], part[0]], [whole[1], part[1]])
    generate = columns_of_each_tile([left, right[::-1] if swapped else right])
    result = segment_tiles(generate, np.zeros((64, 100, 3), np.uint8), tile=64, overlap=28)
    assert sorted(result["boxes"].tolist()) == [[0, 0, 99, 63], [36, 0, 63, 63]]
    assert result["tiles"].tolist() == [2, 2]


def test_nothing_on_the_image() -> None:
    result = segment_tiles(flat_regions, np.zeros((200, 300, 3), np.uint8), tile=128)
    assert result["masks"] == [] and result["boxes"].shape == (0, 4)


def test_slices_are_all_that_is_read(tmp_path) -> None:
    image, _ = scene(300, 420, objects=9)
    stored = np.memmap(tmp_path / "image.raw", np.uint8, "w+", shape=image.shape)
    stored[:] = image
    assert segment_tiles(flat_regions, stored, 128)["masks"] == segment_tiles(flat_regions, image, 128)["masks"]


@pytest.mark.parametrize(
    ("shape", "tile", "overlap", "words"),
    [
        ((10, 10), 128, 16, "expected .H, W, 3."),
        ((10, 10, 4), 128, 16, "expected .H, W, 3."),
        ((10, 10, 3), 32, 8, "at least 64"),
        ((10, 10, 3), 128, 100, "to half of it, got 128, 100"),
        ((10, 10, 3), 128, 0, "to half of it"),
    ],
)
def test_wrong_arguments(shape, tile: int, overlap: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        segment_tiles(flat_regions, np.zeros(shape, np.uint8), tile, overlap)


def test_label_image_puts_small_on_large() -> None:
    large, small = np.zeros((9, 12), bool), np.zeros((9, 12), bool)
    large[1:8, 1:10], small[3:5, 3:6] = True, True
    labels = label_image([encode_rle(small), encode_rle(large)], (9, 12))
    expected = np.zeros((9, 12), int)
    expected[large], expected[small] = 2, 1
    np.testing.assert_array_equal(labels, expected)
    assert label_image([], (3, 4)).shape == (3, 4)


def test_runs_of_windows_are_those_of_the_whole_mask() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        height, width = generator.integers(1, 9, 2)
        size = (int(height + generator.integers(0, 4)), int(width + generator.integers(0, 4)))
        x, y = int(generator.integers(0, size[1] - width + 1)), int(generator.integers(0, size[0] - height + 1))
        window, whole = generator.random((height, width)) < 0.6, np.zeros(size, bool)
        whole[y : y + height, x : x + width] = window
        runs = window_to_runs(window, (x, y), size)
        assert (runs[:, 0] < runs[:, 1]).all() and (runs[1:, 0] > runs[:-1, 1]).all()
        assert runs_to_counts(runs, size[0] * size[1]).tolist() == mask_to_counts(whole).tolist()
