# SPDX-License-Identifier: Apache-2.0
"""COCO instance files: the three kinds of segmentation, what is left out, and what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from efficientsam_hf.data.coco import CocoSamples
from efficientsam_hf.data.coco_file import CocoFile
from efficientsam_hf.data.polygons import polygons_to_rle
from efficientsam_hf.models.rle_efficientsam import decode_rle, encode_rle


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
    assert CocoSamples(*write(tmp_path, [annotation(UNCOMPRESSED)]))[0]["masks"].areas().tolist() == [100]
    with pytest.raises(ImportError, match=r"efficientsam-hf\[eval\]"):
        CocoSamples(*write(tmp_path, [annotation([[0, 0, 5, 0, 5, 5]])]))


@pytest.mark.parametrize("value", [1, True, 1.0, "1", "true", " True "])
def test_crowds_are_left_out(tmp_path: Path, value: Any) -> None:
    samples = CocoSamples(*write(tmp_path, [annotation(UNCOMPRESSED), annotation(UNCOMPRESSED, iscrowd=value)]))
    assert len(samples[0]["masks"]) == 1
    assert [entry.crowd for entry in samples.objects(0)] == [False, True]


@pytest.mark.parametrize("value", [0, False, 0.0, "0", "false", None])
def test_what_is_no_crowd(tmp_path: Path, value: Any) -> None:
    assert len(CocoSamples(*write(tmp_path, [annotation(UNCOMPRESSED, iscrowd=value)]))[0]["masks"]) == 1


def test_pictures_without_objects_are_left_out_and_need_not_exist(tmp_path: Path) -> None:
    images = [
        {"id": "none", "file_name": "missing.png", "width": 9, "height": 9},
        {"id": "some", "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
    ]
    samples = CocoSamples(*write(tmp_path, [annotation(UNCOMPRESSED, "some")], images=images))
    assert [sample["image_id"] for sample in samples] == ["some"]
    with pytest.raises(IndexError):
        samples[1]


@pytest.mark.parametrize("segmentation", [[], None, {}, ""])
def test_annotations_that_are_boxes_alone_are_left_out(tmp_path: Path, segmentation: Any) -> None:
    images = [
        {"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
        {"id": 2, "file_name": "missing.png", "width": WIDTH, "height": HEIGHT},
    ]
    boxes = [annotation(segmentation, number, bbox=[1, 2, 3, 4]) for number in (1, 2)]
    samples = CocoSamples(*write(tmp_path, [*boxes, annotation(UNCOMPRESSED)], images=images))
    assert len(samples) == 1 and len(samples[0]["masks"]) == 1


def test_masks_without_a_pixel_are_left_out(tmp_path: Path) -> None:
    empty = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
    assert len(CocoSamples(*write(tmp_path, [annotation(empty), annotation(UNCOMPRESSED)]))[0]["masks"]) == 1
    assert CocoSamples(*write(tmp_path, [annotation(empty)]))[0]["masks"].shape == (0, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("annotations", "changes", "message"),
    [
        ([annotation(UNCOMPRESSED, 5)], {}, "entry 0 of 'annotations' belongs to image 5"),
        ([], {}, "no objects"),
        ([annotation(UNCOMPRESSED, iscrowd=1)], {}, "no objects to use: 1 annotations, 1 of them crowds$"),
        (
            [annotation([]), annotation([], bbox=[1, 2, 3, 4])],
            {},
            r"instances\.json holds no objects to use: none of 2 annotations has a segmentation, and boxes alone",
        ),
        (
            [annotation(UNCOMPRESSED, iscrowd=1), {"image_id": 1}],
            {},
            "no objects to use: 2 annotations, 1 of them boxes without a segmentation, 1 of them crowds$",
        ),
        ([], {"images": [{"id": 1, "file_name": "a.png"}]}, "entry 0 of 'images' lacks width, height"),
        ([], {"images": None}, "no list 'images'"),
        ([], {"images": [7]}, "entry 0 of 'images' must be an object, got 7"),
        ([annotation(UNCOMPRESSED, None)], {}, "entry 0 of 'annotations': image_id must be a whole number or text"),
        ([annotation(UNCOMPRESSED, [1])], {}, r"image_id must be a whole number or text, got \[1\]"),
        ([annotation(UNCOMPRESSED, 1.5)], {}, "image_id must be a whole number or text, got 1.5"),
        ([annotation(UNCOMPRESSED, category_id={})], {}, "category_id must be a whole number or text"),
        ([annotation(UNCOMPRESSED, iscrowd="no")], {}, "iscrowd must be 0 or 1, got 'no'"),
        ([annotation(UNCOMPRESSED, iscrowd=[0])], {}, r"iscrowd must be 0 or 1, got \[0\]"),
        ([annotation(UNCOMPRESSED)], {"categories": {"id": 1}}, "'categories' must be a list"),
        ([annotation(UNCOMPRESSED)], {"categories": [{"name": "cat"}]}, "entry 0 of 'categories' lacks id"),
        (
            [annotation(UNCOMPRESSED)],
            {"categories": [{"id": 1, "name": "cat"}, {"id": "1", "name": "dog"}]},
            "two categories have the id 1, 'cat' and 'dog'",
        ),
    ],
)
def test_files_that_are_refused(tmp_path: Path, annotations: list[Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CocoSamples(*write(tmp_path, annotations, **changes))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("id", None, "a whole number or text"),
        ("id", [1], "a whole number or text"),
        ("id", float("nan"), "a whole number or text"),
        ("file_name", 7, "the name of a file"),
        ("file_name", None, "the name of a file"),
        ("file_name", "a\0.png", "the name of a file"),
        ("width", 0, "a whole number of at least 1"),
        ("width", -40, "a whole number of at least 1"),
        ("height", 30.5, "a whole number of at least 1"),
        ("height", "tall", "a whole number of at least 1"),
        ("height", float("inf"), "a whole number of at least 1"),
    ],
)
def test_fields_of_images_that_are_refused(tmp_path: Path, field: str, value: Any, expected: str) -> None:
    image = {"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT} | {field: value}
    with pytest.raises(ValueError, match=f"entry 0 of 'images': {field} must be {expected}, got"):
        CocoSamples(*write(tmp_path, [annotation(UNCOMPRESSED)], images=[image]))


def test_two_images_of_one_id_are_refused(tmp_path: Path) -> None:
    images = [
        {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT} for number, name in ((1, "a"), ("1", "b"))
    ]
    with pytest.raises(ValueError, match=r"two images have the id 1, 'a' and 'b'; files that are merged"):
        CocoSamples(*write(tmp_path, [annotation(UNCOMPRESSED)], images=images))


def test_numbers_as_text_are_numbers(tmp_path: Path) -> None:
    images = [{"id": "1", "file_name": "a.png", "width": str(WIDTH), "height": float(HEIGHT)}]
    entry = annotation(UNCOMPRESSED, 1.0, category_id="3", area="large", bbox=None)
    samples = CocoSamples(*write(tmp_path, [entry], images=images, categories=[{"id": 3, "name": "thing"}]))
    assert samples[0]["image_id"] == 1 and len(samples[0]["masks"]) == 1
    samples.file.check_categories()
    assert samples.objects(0)[0].category == 3
    other = [{"id": "01", "file_name": "a.png", "width": WIDTH, "height": HEIGHT}]
    assert CocoSamples(*write(tmp_path, [annotation(UNCOMPRESSED, "01")], images=other))[0]["image_id"] == "01"


def test_area_and_box_are_those_of_the_mask(tmp_path: Path) -> None:
    samples = CocoSamples(
        *write(tmp_path, [annotation(UNCOMPRESSED, area=0, bbox=[9, 9, 9]), annotation(UNCOMPRESSED)])
    )
    for entry in samples.objects(0):
        assert entry.area == 100 and entry.box == [5, 10, 10, 10]


@pytest.mark.parametrize(
    ("listed", "given", "message"),
    [
        ([1, 2], None, "entry 0 of 'annotations' has no category_id, and there are 2"),
        ([1], 0, r"category_id 0 is not among those of 'categories': \[1\]"),
        (["1"], "one", r"category_id 'one' is not among those of 'categories': \[1\]"),
    ],
)
def test_categories_that_are_not_listed(tmp_path: Path, listed: list[Any], given: Any, message: str) -> None:
    categories = [{"id": number, "name": str(number)} for number in listed]
    file = CocoFile(write(tmp_path, [annotation(UNCOMPRESSED, category_id=given)], categories=categories)[0])
    with pytest.raises(ValueError, match=message):
        file.check_categories()


def test_categories_without_a_list_are_those_that_are_used(tmp_path: Path) -> None:
    entries = [annotation(UNCOMPRESSED, category_id=number) for number in (4, "2", "cat", None)]
    assert CocoFile(write(tmp_path, entries[:3])[0]).categories == [2, 4, "cat"]
    file = CocoFile(write(tmp_path, entries)[0])
    file.check_categories()
    assert file.categories == [1, 2, 4, "cat"] and [file.category(e) for e in file.annotations[0]] == [4, 2, "cat", 1]
    assert CocoFile(write(tmp_path, entries[3:])[0]).categories == [1]


@pytest.mark.parametrize(("stored", "named"), [("b/c d.png", "b\\c d.png"), ("b/c d.png", "b/c%20d.png")])
def test_names_of_pictures_as_other_tools_write_them(tmp_path: Path, stored: str, named: str) -> None:
    images = [{"id": 1, "file_name": named, "width": WIDTH, "height": HEIGHT}]
    paths = write(tmp_path, [annotation(UNCOMPRESSED)], images=images)
    (tmp_path / "pictures" / "b").mkdir()
    (tmp_path / "pictures" / "a.png").rename(tmp_path / "pictures" / stored)
    assert len(CocoSamples(*paths)[0]["masks"]) == 1


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    path, folder = write(tmp_path, [annotation(UNCOMPRESSED)])
    path.write_text(path.read_text(), encoding=encoding)
    assert len(CocoSamples(path, folder)) == 1


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [HEIGHT, WIDTH], "counts": [5]}, "RLE counts"),
        ({"size": [HEIGHT, WIDTH], "counts": [10, 20]}, "RLE counts"),
        ({"size": [HEIGHT, WIDTH], "counts": "~~~~"}, "RLE counts"),
        ({"size": [HEIGHT, WIDTH], "counts": None}, "RLE counts"),
        ({"size": [HEIGHT, WIDTH], "counts": [-5, 1205]}, "RLE counts"),
        ({"size": [WIDTH, HEIGHT], "counts": [WIDTH * HEIGHT]}, r"mask of \(40, 30\) in a picture of \(30, 40\)"),
        ({"size": [60000, 60000], "counts": [3_600_000_000]}, r"mask of \(60000, 60000\) in a picture"),
        ("13j2", "an RLE mask"),
        (7, "an RLE mask"),
        ([[1, 2, 3, 4]], "a polygon"),
        ([1, 2, 3, 4, 5, 6], "a polygon"),
        ([["a", 2, 3, 4, 5, 6]], "a polygon"),
        ([[[1, 2], [3, 4], [5, 6]]], "a polygon"),
        ([[]], "a polygon"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon"),
        ([[1, 2, 3, 4, 5, float("nan")]], "a polygon"),
        ([[1, 2, 3, 4, 5, float("inf")]], "a polygon"),
        ([[1, 2, 3, 4, 5, True]], "a polygon"),
        ([[1, 2, 3, 4, 5, 10**400]], "a polygon"),
        ([[0, 0, 9e4, 9e4, 0, 1] * 100], r"polygons with outlines of .* pixels"),
    ],
)
def test_segmentations_that_are_refused_on_access(tmp_path: Path, segmentation: Any, message: str) -> None:
    samples = CocoSamples(*write(tmp_path, [annotation(UNCOMPRESSED), annotation(segmentation)]))
    where = r"instances\.json, picture a\.png, entry 1 of 'annotations': "
    with pytest.raises(ValueError, match=where + message):
        samples[0]
    with pytest.raises(ValueError, match=where + message):
        samples.objects(0)


@pytest.mark.parametrize("far", [1e5, 1e7, 1e12, 1e300])
def test_polygons_that_reach_far_out_of_the_picture(far: float) -> None:
    pytest.importorskip("pycocotools")
    size = (HEIGHT, WIDTH)
    left = np.zeros(size, bool)
    left[:, :20] = True
    for polygon, expected in (
        ([-far, -far, 20, -far, 20, far, -far, far], left),
        ([-far, -far, far, -far, far, far, -far, far], np.ones(size, bool)),
        ([far, far, 2 * far, far, 2 * far, 2 * far], np.zeros(size, bool)),
    ):
        np.testing.assert_array_equal(decode_rle(polygons_to_rle([polygon], size)), expected)
    slope = decode_rle(polygons_to_rle([[0, 0, far, far, 0, far]], size))  # all below the diagonal
    below = np.greater_equal.outer(np.arange(HEIGHT), np.arange(WIDTH))
    assert (slope != below).sum() <= HEIGHT  # what touches the diagonal may fall on either side


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


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b"[" * 200_000, b"", b'{"images": [1' + b"0" * 5000])
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
