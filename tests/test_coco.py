# SPDX-License-Identifier: Apache-2.0
"""COCO instance files: the three kinds of segmentation, what is left out, and what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from efficientsam_hf.data.coco import CocoSamples, rasterize_polygons
from efficientsam_hf.models.rle_efficientsam import encode_rle


# pycocotools' compiled part still speaks the array protocol of numpy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HEIGHT, WIDTH = 30, 40
SQUARE = np.zeros((HEIGHT, WIDTH), bool)
SQUARE[10:20, 5:15] = True
RUNS = [int(run) for run in np.diff(np.flatnonzero(np.diff(SQUARE.T.reshape(-1), prepend=1, append=1)))]
UNCOMPRESSED = {"size": [HEIGHT, WIDTH], "counts": RUNS}


def annotation(segmentation: Any, image_id: Any = 1, **more: Any) -> dict[str, Any]:
    return {"id": 7, "image_id": image_id, "category_id": 1, "segmentation": segmentation, **more}


def write(folder: Path, annotations: list[dict[str, Any]], **changes: Any) -> tuple[Path, Path]:
    """A COCO file with one picture `a.png` and its folder."""
    images = [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}]
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, **changes}))
    (folder / "pictures").mkdir(exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), (10, 200, 30)).save(folder / "pictures" / "a.png")
    return path, folder / "pictures"


def test_compressed_and_uncompressed_rle_agree(tmp_path: Path) -> None:
    samples = CocoSamples(*write(tmp_path, [annotation(encode_rle(SQUARE)), annotation(UNCOMPRESSED)]))
    sample = samples[0]
    assert len(samples) == 1 and sample["image_id"] == 1
    assert sample["image"].mode == "RGB" and sample["image"].size == (WIDTH, HEIGHT)
    assert sample["masks"].dtype == bool
    np.testing.assert_array_equal(sample["masks"], [SQUARE, SQUARE])


def test_polygons_are_filled_and_joined(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    left = [5.0, 10.0, 10.0, 10.0, 10.0, 20.0, 5.0, 20.0]
    right = [10, 10, 15, 10, 15, 20, 10, 20]
    sample = CocoSamples(*write(tmp_path, [annotation([left, right])]))[0]
    np.testing.assert_array_equal(sample["masks"][0], SQUARE)


def test_without_pycocotools_rle_works_and_polygons_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert CocoSamples(*write(tmp_path, [annotation(UNCOMPRESSED)]))[0]["masks"].sum() == 100
    with pytest.raises(ImportError, match=r"efficientsam-hf\[eval\]"):
        rasterize_polygons([[0, 0, 5, 0, 5, 5]], (HEIGHT, WIDTH))


def test_crowds_are_left_out_unless_wanted(tmp_path: Path) -> None:
    paths = write(tmp_path, [annotation(UNCOMPRESSED), annotation(UNCOMPRESSED, iscrowd=1)])
    assert len(CocoSamples(*paths)[0]["masks"]) == 1
    assert len(CocoSamples(*paths, skip_crowd=False)[0]["masks"]) == 2


def test_pictures_without_objects_are_left_out_and_need_not_exist(tmp_path: Path) -> None:
    images = [
        {"id": "none", "file_name": "missing.png", "width": 9, "height": 9},
        {"id": "some", "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
    ]
    samples = CocoSamples(*write(tmp_path, [annotation(UNCOMPRESSED, "some")], images=images))
    assert [sample["image_id"] for sample in samples] == ["some"]
    with pytest.raises(IndexError):
        samples[1]


def test_annotations_that_are_boxes_alone_are_left_out(tmp_path: Path) -> None:
    images = [
        {"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
        {"id": 2, "file_name": "missing.png", "width": WIDTH, "height": HEIGHT},
    ]
    boxes = [annotation([], number, bbox=[1, 2, 3, 4]) for number in (1, 2)]
    samples = CocoSamples(*write(tmp_path, [*boxes, annotation(UNCOMPRESSED)], images=images))
    assert len(samples) == 1 and len(samples[0]["masks"]) == 1


def test_masks_without_a_pixel_are_left_out(tmp_path: Path) -> None:
    empty = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
    assert len(CocoSamples(*write(tmp_path, [annotation(empty), annotation(UNCOMPRESSED)]))[0]["masks"]) == 1
    assert CocoSamples(*write(tmp_path, [annotation(empty)]))[0]["masks"].shape == (0, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("annotations", "changes", "message"),
    [
        ([annotation(UNCOMPRESSED, 5)], {}, "annotation 7 belongs to image 5"),
        ([], {}, "no objects"),
        ([annotation(UNCOMPRESSED, iscrowd=1)], {}, "no objects to use: 1 annotations$"),
        (
            [annotation([]), annotation([], bbox=[1, 2, 3, 4])],
            {},
            r"instances\.json holds no objects to use: none of 2 annotations has a segmentation, and boxes alone",
        ),
        (
            [annotation(UNCOMPRESSED, iscrowd=1), annotation([])],
            {},
            "no objects to use: 2 annotations, 1 of them boxes without a segmentation$",
        ),
        (
            [annotation(UNCOMPRESSED), annotation({"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]})],
            {},
            r"instances\.json, picture a\.png: mask of \(40, 30\) in a picture of \(30, 40\) \(height, width\)",
        ),
        ([annotation("13j2")], {}, r"picture a\.png: an RLE mask"),
        ([{"image_id": 1}], {}, "entry 0 of 'annotations' lacks segmentation"),
        ([], {"images": [{"id": 1, "file_name": "a.png"}]}, "entry 0 of 'images' lacks width, height"),
        ([], {"images": None}, "no list 'images'"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, annotations: list[Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CocoSamples(*write(tmp_path, annotations, **changes))


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [HEIGHT, WIDTH], "counts": [5]}, "a.png: RLE counts"),
        ([[1, 2, 3, 4]], "a.png: a polygon"),
        ([1, 2, 3, 4, 5, 6], "a.png: a polygon"),
        ([["a", 2, 3, 4, 5, 6]], "a.png: a polygon"),
    ],
)
def test_segmentations_that_are_refused_on_access(tmp_path: Path, segmentation: Any, message: str) -> None:
    samples = CocoSamples(*write(tmp_path, [annotation(segmentation)]))
    with pytest.raises(ValueError, match=message):
        samples[0]


def test_picture_of_another_size(tmp_path: Path) -> None:
    samples = CocoSamples(*write(tmp_path, [annotation(UNCOMPRESSED)]))
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(tmp_path / "pictures" / "a.png")
    with pytest.raises(ValueError, match=r"41 x 30 pixels, but instances\.json says 40 x 30"):
        samples[0]


def test_missing_files(tmp_path: Path) -> None:
    path, folder = write(tmp_path, [annotation(UNCOMPRESSED)])
    with pytest.raises(FileNotFoundError, match=r"absent\.json does not exist"):
        CocoSamples(tmp_path / "absent.json", folder)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        CocoSamples(path, tmp_path / "absent")
    (folder / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 1 pictures .* first is a.png"):
        CocoSamples(path, folder)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]"])
def test_not_a_coco_file(tmp_path: Path, content: bytes) -> None:
    path, folder = write(tmp_path, [])
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a"):
        CocoSamples(path, folder)


def test_bsds500(shared: Path) -> None:
    data = shared / "data" / "bsds500"
    samples = CocoSamples(data / "instances_val.json", data / "val")
    assert len(samples) == 100
    assert sum(len(samples[index]["masks"]) for index in range(5)) > 20
