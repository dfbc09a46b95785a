# SPDX-License-Identifier: Apache-2.0
"""COCO run lengths, compared with pycocotools."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efficientsam_hf.models.rle_efficientsam import (
    decode_rle,
    encode_rle,
    rle_area,
    rle_pixels,
    runs_iou,
    window_to_runs,
)


# pycocotools' compiled part still speaks the array protocol of numpy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def example_masks() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:300, :500]
    return {
        "empty": np.zeros((7, 5), bool),
        "full": np.ones((7, 5), bool),
        "one_pixel": np.ones((1, 1), bool),
        "first_pixel": np.eye(1, 12, dtype=bool),
        "last_pixel": np.eye(9, 4, k=-5, dtype=bool),
        "noise": generator.random((41, 67)) < 0.5,
        "sparse": generator.random((400, 300)) < 0.001,
        "disc": (rows - 150) ** 2 + (columns - 250) ** 2 < 120**2,
        "long_runs": np.repeat([[False, True, False]], 3000, axis=0).repeat(1000, axis=1),
    }


@pytest.mark.parametrize("name", example_masks())
def test_agrees_with_pycocotools(name: str) -> None:
    coco_mask = pytest.importorskip("pycocotools.mask")
    mask = example_masks()[name]
    expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    rle = encode_rle(mask)
    assert rle == {"size": list(mask.shape), "counts": expected["counts"].decode()}
    assert json.loads(json.dumps(rle)) == rle
    np.testing.assert_array_equal(decode_rle(rle), mask)
    np.testing.assert_array_equal(decode_rle(expected), mask)
    assert rle_area(rle) == mask.sum()


def test_uncompressed_counts_go_down_the_columns() -> None:
    mask = decode_rle({"size": [2, 3], "counts": [1, 3, 2]})
    np.testing.assert_array_equal(mask, [[False, True, False], [True, True, False]])


def test_zero_runs_are_allowed() -> None:
    assert decode_rle({"size": [2, 1], "counts": [0, 1, 0, 1]}).all()


def test_numbers_count_as_a_mask_when_they_are_zero_and_one() -> None:
    mask = np.array([[0, 1], [1, 1]], np.uint8)
    np.testing.assert_array_equal(decode_rle(encode_rle(mask)), mask.astype(bool))


def test_every_mask_of_a_real_file(shared: Path) -> None:
    coco_mask = pytest.importorskip("pycocotools.mask")
    content = json.loads((shared / "data" / "bsds500" / "instances_val.json").read_text())
    for annotation in content["annotations"][::7]:
        rle = annotation["segmentation"]
        mask = decode_rle(rle)
        np.testing.assert_array_equal(mask, coco_mask.decode(rle).astype(bool))
        assert encode_rle(mask) == rle
        assert rle_area(rle) == annotation["area"]


GOOD = {"size": [2, 3], "counts": [1, 3, 2]}


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ("13j2", "dict with 'size' and 'counts'"),
        ({"counts": [6]}, "dict with 'size' and 'counts'"),
        ({**GOOD, "size": [2]}, "two positive whole numbers"),
        ({**GOOD, "size": [2, 0]}, "two positive whole numbers"),
        ({**GOOD, "size": [2, 3.0]}, "two positive whole numbers"),
        ({**GOOD, "size": "23"}, "two positive whole numbers"),
        ({**GOOD, "counts": [1, 3, 1]}, "add up to 2 x 3 = 6"),
        ({**GOOD, "counts": [1, 4, 2]}, "add up to 2 x 3 = 6"),
        ({**GOOD, "counts": [8, -2]}, "add up to 2 x 3 = 6"),
        ({**GOOD, "counts": [3.0, 3.0]}, "flat list of whole numbers"),
        ({**GOOD, "counts": [[3], [3]]}, "flat list of whole numbers"),
        ({**GOOD, "counts": [[3], 3]}, "flat list of whole numbers"),
        ({**GOOD, "counts": []}, "flat list of whole numbers"),
        ({**GOOD, "counts": None}, "flat list of whole numbers"),
        ({**GOOD, "counts": ""}, "complete COCO string"),
        ({**GOOD, "counts": "1 3"}, "complete COCO string"),
        ({**GOOD, "counts": "13p"}, "complete COCO string"),
        ({**GOOD, "counts": "13Q"}, "complete COCO string"),
        ({**GOOD, "counts": "1é"}, "ASCII"),
        ({**GOOD, "counts": "Q" * 9 + "1"}, "40 bits"),
        ({**GOOD, "counts": "1"}, "add up to 2 x 3 = 6"),
        ({**GOOD, "size": [True, 6]}, "two positive whole numbers"),
        ({"size": [2**20, 2**20], "counts": [2**40]}, r"of less than 2\*\*40 pixels"),
        ({"size": [10**5000, 1], "counts": [1]}, r"of less than 2\*\*40 pixels, got .{0,90}$"),
        ({"size": [2**17, 2**17], "counts": [2**34]}, "more than 4,294,967,296 pixels, too many to expand"),
        ({**GOOD, "counts": [1] * 10**6}, "add up to 2 x 3 = 6 pixels, got .{0,90}$"),
    ],
)
def test_malformed_is_refused(rle: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_rle(rle)


@pytest.mark.parametrize(
    "mask",
    [
        np.zeros((2, 3, 4), bool),
        np.zeros((0, 3), bool),
        np.full((2, 2), 255, np.uint8),
        np.full((2, 2), np.nan),
        np.full((2, 2), "1"),
        np.full((2, 2), None),
        [[1, 0], [1]],
    ],
)
def test_only_masks_are_encoded(mask: np.ndarray) -> None:
    with pytest.raises(ValueError, match="mask must"):
        encode_rle(mask)


def test_pixels_of_a_mask_without_expanding_it() -> None:
    generator = np.random.default_rng(0)
    for share in (0.0, 0.3, 1.0):
        mask = generator.random((30, 41)) < share
        rows, columns = generator.integers(0, 30, 12), generator.integers(0, 41, 7)
        assert (rle_pixels(encode_rle(mask), rows, columns) == mask[np.ix_(rows, columns)]).all()


def test_iou_of_runs_is_that_of_their_masks() -> None:
    generator = np.random.default_rng(0)
    for shares in ((0.0, 0.0), (0.0, 0.5), (0.1, 0.9), (0.5, 0.5), (1.0, 0.3), (1.0, 1.0)):
        first, second = (generator.random((30, 41)) < share for share in shares)
        runs = [window_to_runs(mask, (0, 0), mask.shape) for mask in (first, second)]
        assert runs_iou(*runs) == (first & second).sum() / max(1, (first | second).sum()) == runs_iou(*runs[::-1])
