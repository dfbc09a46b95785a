# SPDX-License-Identifier: Apache-2.0
"""Large images in tiles: objects that cross seams come out whole, and once."""

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

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


def test_a_chain_of_pairs_joins_no_masks_of_one_tile() -> None:
    """Both halves of the first tile lead to the second one's mask: one at once, the other over the tiles below."""
    below = [[slice(0, 52), slice(52, 64)], [np.r_[0:23, 28:64]]]
    generate = columns_of_each_tile([[slice(0, 50), slice(50, 64)], [slice(14, 64)], *below])
    result = segment_tiles(generate, np.zeros((100, 100, 3), np.uint8), 64, 28)
    whole = [decode_rle(mask) for mask in result["masks"]]
    assert result["tiles"].tolist() == [3, 3]
    assert all(not (mask[0, 0] and mask[0, 60]) for mask in whole)


def found_in_tiles(generator, image: np.ndarray, overlap: int = 16) -> list[bytes]:
    """Pixels of all masks that tiles of 128 pixels give, sorted; their areas are checked."""
    result = segment_tiles(generator, image, tile=128, overlap=overlap)
    found = [decode_rle(mask) for mask in result["masks"]]
    assert result["areas"].tolist() == [mask.sum() for mask in found]
    return pixels_of(found)


def pixels_of(masks: list[np.ndarray]) -> list[bytes]:
    return sorted(mask.tobytes() for mask in masks)


def letter_u(height: int, width: int, left: int, right: int) -> np.ndarray:
    """A picture of a U with legs of two widths."""
    mask = np.zeros((height, width), bool)
    mask[10:-10, 10 : 10 + left] = mask[10:-10, -10 - right : -10] = mask[-25:-10, 10:-10] = True
    return mask


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize(
    ("size", "legs"), [((200, 100), (15, 15)), ((240, 120), (40, 5)), ((470, 128), (9, 9)), ((330, 330), (20, 30))]
)
def test_a_letter_u_over_seams_comes_out_whole(size: tuple[int, int], legs: tuple[int, int], turns: int) -> None:
    mask = np.rot90(letter_u(*size, *legs), turns)
    assert found_in_tiles(flat_regions, mask[..., None].repeat(3, 2).astype(np.uint8)) == pixels_of([mask])


@pytest.mark.parametrize("size", [(200, 200), (120, 300), (300, 300), (280, 460)])
@pytest.mark.parametrize("shift", [(0, 0), (17, -23)])
def test_rings_over_seams_come_out_whole(size: tuple[int, int], shift: tuple[int, int]) -> None:
    rows, columns = np.mgrid[: size[0], : size[1]]
    distance = np.hypot((rows - size[0] / 2 - shift[0]) / size[0], (columns - size[1] / 2 - shift[1]) / size[1])
    masks = [(distance > inner) & (distance < outer) for inner, outer in ((0.3, 0.38), (0.2, 0.27))]
    image = (masks[0] * 3 + masks[1] * 5)[..., None].repeat(3, 2).astype(np.uint8)
    assert found_in_tiles(flat_regions, image) == pixels_of(masks)


def test_a_whole_and_its_parts_stay_apart_over_seams() -> None:
    """Discs, and beside each as a whole its halves: the halves fill the whole in every strip."""
    image, wholes = scene(300, 420, objects=10)
    columns = np.broadcast_to(np.arange(420), (300, 420))
    halves = []
    for mask in wholes:
        left = mask & (columns < columns[mask].mean())
        halves += [left, mask & ~left]
        image[left, 1], image[mask & ~left, 1] = 2 * len(halves) - 1, 2 * len(halves)

    def generate(image: np.ndarray, **options: Any) -> dict[str, Any]:
        masks = [m for channel in (0, 1) for m in flat_regions(image[..., channel:])["masks"]]
        return {"masks": masks, "scores": torch.linspace(0.9, 0.5, len(masks))}

    assert found_in_tiles(generate, image, overlap=32) == pixels_of([*wholes, *halves])


def test_halves_that_both_tiles_found_do_not_fill_a_whole() -> None:
    left, right = [slice(30, 64), slice(30, 50), slice(50, 64)], [slice(0, 14), slice(14, 40)]
    result = segment_tiles(columns_of_each_tile([left, right]), np.zeros((64, 100, 3), np.uint8), 64, 28)
    assert sorted(box[::2] for box in result["boxes"].tolist()) == [[30, 49], [30, 63], [50, 75]]
    assert sorted(result["tiles"].tolist()) == [1, 2, 2]


def test_pieces_that_overlap_are_not_one_object() -> None:
    left, right = [slice(30, 64)], [slice(2, 14), slice(8, 40)]
    result = segment_tiles(columns_of_each_tile([left, right]), np.zeros((64, 100, 3), np.uint8), 64, 28)
    assert sorted(box[::2] for box in result["boxes"].tolist()) == [[30, 75], [38, 49]]


def test_masks_on_half_of_another_are_not_its_pieces() -> None:
    left, right = [slice(30, 64)], [slice(2, 8), slice(20, 40)]
    result = segment_tiles(columns_of_each_tile([left, right]), np.zeros((64, 100, 3), np.uint8), 64, 28)
    assert sorted(box[::2] for box in result["boxes"].tolist()) == [[30, 63], [38, 43], [56, 75]]


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        (slice(60, 64), slice(19, 54), [[55, 89]]),  # 4 of the 9 columns in the strip
        (slice(20, 43), slice(0, 2), [[20, 42]]),  # cut by the edge of the right tile
        (slice(58, 62), slice(19, 54), [[55, 89], [58, 61]]),  # not cut: an object on another
        (slice(40, 64), slice(19, 54), [[40, 63], [55, 89]]),  # cut, but most of it lies beside the other
        (slice(61, 64), slice(20, 28), [[56, 63], [61, 63]]),  # the other ends at the same edge
    ],
)
def test_what_an_edge_cut_off_is_dropped(left: slice, right: slice, expected: list[list[int]]) -> None:
    """Tiles of 64 begin at 0 and 36; boxes are columns of the whole image."""
    result = segment_tiles(columns_of_each_tile([[left], [right]]), np.zeros((64, 100, 3), np.uint8), 64, 28)
    assert sorted(box[::2] for box in result["boxes"].tolist()) == expected


def test_pixels_of_a_tile_do_not_outlive_it() -> None:
    """Between tiles there are run lengths alone."""
    alive: list[weakref.ref] = []

    def generate(image: np.ndarray, **options: Any) -> dict[str, Any]:
        assert all(reference() is None for reference in alive)
        found = flat_regions(image, **options)
        alive.extend(weakref.ref(mask) for mask in found["masks"])
        return found

    segment_tiles(generate, scene(300, 420, objects=10)[0], tile=128, overlap=16)
    assert len(alive) > 10


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


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_pictures_are_read_as_rgb(mode: str) -> None:
    picture = Image.fromarray(scene(300, 420, objects=9)[0][..., 0]).convert("RGB").convert(mode)
    expected = segment_tiles(flat_regions, np.asarray(picture.convert("RGB")), 128)
    assert segment_tiles(flat_regions, picture, 128)["masks"] == expected["masks"] != []


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pictures_of_more_than_8_bits_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"image has mode {mode}, expected 8 bits a channel"):
        segment_tiles(flat_regions, Image.new(mode, (20, 10)))


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(TypeError, match="image is a str, expected a PIL image or an array"):
        segment_tiles(flat_regions, "scan.tif")


@pytest.mark.parametrize("sort_by", ["score", "area"])
def test_sorting_is_of_the_result_alone(sort_by: str) -> None:
    """The left tile's second mask has the higher score, and so the right one as its partner."""

    def generate(image: np.ndarray, **options: Any) -> dict[str, Any]:
        assert "sort_by" not in options
        left = [slice(0, 39), slice(0, 34)], [0.5, 0.9]
        right = [slice(0, 36), slice(40, 64)], [0.6, 0.95]
        rows, scores = left if image[0, 0, 0] else right
        masks = [np.zeros(image.shape[:2], bool) for _ in rows]
        for mask, place in zip(masks, rows):
            mask[place] = True
        return {"masks": masks, "scores": torch.tensor(scores)}

    image = np.zeros((64, 100, 3), np.uint8)
    image[:, :30] = 1
    result = segment_tiles(generate, image, 64, 28, sort_by=sort_by)
    joined, alone, right = [0, 0, 99, 35], [0, 0, 63, 38], [36, 40, 99, 63]
    assert result["boxes"].tolist() == ([right, joined, alone] if sort_by == "score" else [joined, alone, right])
    assert result[{"score": "scores", "area": "areas"}[sort_by]].diff().le(0).all()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sort_by": "size"}, ValueError, "sort_by must be one of score, area, got 'size'"),
        ({"output_type": "rle"}, TypeError, "output_type .'rle'. is no option of tiles.*COCO.*label_image"),
        ({"output_rle_mask": True}, TypeError, "output_rle_mask .True. is no option of tiles"),
        ({"output_bboxes_mask": True}, TypeError, "output_bboxes_mask .True. is no option of tiles"),
    ],
)
def test_options_that_tiles_choose(options: dict[str, Any], error: type[Exception], words: str) -> None:
    def generate(image: np.ndarray, **options: Any) -> dict[str, Any]:
        raise AssertionError("refused before any work")

    with pytest.raises(error, match=words):
        segment_tiles(generate, np.zeros((64, 64, 3), np.uint8), 64, **options)


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


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"generator": None}, TypeError, "generator is None, expected an EfficientSamMaskGenerator"),
        ({"tile": True}, TypeError, "tile and its overlap must be whole numbers, got True"),
        ({"tile": "64"}, TypeError, "tile and its overlap must be whole numbers, got '64'"),
        ({"tile": 10**5000, "overlap": 10**5000}, ValueError, "tile must be at least 64 pixels.{0,300}$"),
        ({"image": np.zeros((70, 90, 3), np.int16)}, ValueError, "image has dtype int16, expected uint8, or floats"),
        ({"image": np.full((70, 90, 3), "a")}, ValueError, "image has dtype <U1"),
        ({"sort_by": ["score"]}, ValueError, "sort_by must be one of score, area"),
    ],
)
def test_what_cannot_be_tiled_is_named(arguments, error, words: str) -> None:
    given = {"generator": flat_regions, "image": np.zeros((70, 90, 3), np.uint8), "tile": 64, **arguments}
    with pytest.raises(error, match=words):
        segment_tiles(**given)


def test_label_images_are_of_masks_of_one_size() -> None:
    mask = encode_rle(np.ones((4, 5), bool))
    for size, words in (((4, 6), r"size is \(4, 6\), but a mask has \(4, 5\)"), ("45", "size is '45'")):
        with pytest.raises(ValueError, match=words):
            label_image([mask], size)
    with pytest.raises(ValueError, match="an RLE mask must be a dict"):
        label_image([np.ones((4, 5), bool)], (4, 5))


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
