# SPDX-License-Identifier: Apache-2.0
"""Annotations that no tool should write: each is read rightly, or refused in words, and nothing else happens."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from property_testing import bounded

from efficientsam_hf.data.coco import CocoSamples
from efficientsam_hf.data.coco_file import CocoFile
from efficientsam_hf.data.dataset_samples import read_row
from efficientsam_hf.data.polygons import polygons_to_rle
from efficientsam_hf.data.sa1b import make_sample
from efficientsam_hf.evaluation import read_detections
from efficientsam_hf.models.rle_efficientsam import decode_rle, encode_rle, rle_area, rle_box, rle_counts


pytestmark = [
    pytest.mark.property,
    # pycocotools' compiled part still speaks the array protocol of numpy 1.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

HEIGHT, WIDTH = 24, 32
MASK = np.zeros((HEIGHT, WIDTH), bool)
MASK[4:20, 6:30] = True
BOX = [6.0, 4.0, 30.0, 4.0, 30.0, 20.0, 6.0, 20.0]
FILE = {
    "images": [
        {"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
        {"id": 2, "file_name": "b.png", "width": WIDTH, "height": HEIGHT},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "segmentation": encode_rle(MASK), "iscrowd": 0, "area": 384},
        {"id": 2, "image_id": 1, "category_id": 3, "segmentation": [BOX], "bbox": [6, 4, 24, 16]},
        {"id": 3, "image_id": 2, "category_id": 4, "segmentation": {"size": [HEIGHT, WIDTH], "counts": [700, 68]}},
    ],
    "categories": [{"id": 3, "name": "one"}, {"id": 4, "name": "other"}],
}
DETECTIONS = [{"image_id": 1, "category_id": 3, "bbox": [6, 4, 24, 16], "score": 0.5} for _ in range(2)]

numbers = st.one_of(
    st.integers(-5, 60),
    st.integers(),
    st.floats(),
    st.sampled_from([1e5, 1e7, 5e7, 1e9, 1e300, 2**31, 2**63, 10**400, -1e8]),
)
scalars = st.one_of(
    st.none(), st.booleans(), numbers, st.text(max_size=6), st.sampled_from(["1", "0", "true", "~~~~"])
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=8), st.dictionaries(st.sampled_from(["size", "counts", "id", "a"]), inner, max_size=3)
    ),
    max_leaves=8,
)
polygons = st.lists(st.lists(numbers, max_size=12), max_size=3)
rles = st.fixed_dictionaries(
    {
        "size": st.one_of(st.just([HEIGHT, WIDTH]), st.lists(numbers, max_size=3)),
        "counts": st.one_of(
            st.text(st.characters(min_codepoint=40, max_codepoint=130), max_size=12),
            st.lists(st.one_of(st.integers(-3, 800), numbers), max_size=6),
            scalars,
        ),
    }
)
segmentations = st.one_of(polygons, rles, values)


def places(content: Any, path: tuple = ()) -> list[tuple]:
    """Paths to everything in a JSON value."""
    children = (
        content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    )
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn, content: Any) -> Any:
    """The content with some values replaced, removed or doubled."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(content)))
        if not path:
            continue
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        change = draw(st.sampled_from(["replace", "replace", "remove", "double"]))
        if change == "remove":
            del parent[path[-1]]
        elif change == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        else:
            parent[path[-1]] = draw(segmentations if path[-1] == "segmentation" else values)
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("annotations")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / name)
    return folder


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def check_error(error: Exception) -> None:
    """An error says something, and not a whole file of it."""
    assert 10 < len(str(error)) < 2000


@given(content=mutated(FILE))
@bounded
def test_coco_files(folder: Path, content: Any) -> None:
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    try:
        samples = CocoSamples(path, folder)
    except (ValueError, FileNotFoundError) as error:
        check_error(error)
        return
    for index in range(len(samples)):
        try:
            sample = samples[index]
        except (ValueError, OSError) as error:
            check_error(error)
            continue
        masks = np.asarray(sample["masks"])
        assert masks.shape[1:] == (HEIGHT, WIDTH) and masks.any((1, 2)).all()
        assert masks.sum((1, 2)).tolist() == sample["masks"].areas().tolist()
    for number in range(len(samples.file.images)):
        try:
            objects = samples.objects(number)
        except ValueError as error:
            check_error(error)
            continue
        for entry in objects:
            mask = decode_rle(entry.rle)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert entry.area == mask.sum() > 0 and isinstance(entry.crowd, bool)
            assert entry.box == [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]


@given(
    text=st.one_of(
        st.binary(max_size=60), st.text(max_size=60).map(str.encode), st.integers(1, 10**5).map(lambda n: b"[" * n)
    )
)
@bounded
def test_bytes_that_are_no_coco_file(folder: Path, text: bytes) -> None:
    path = folder / "bytes.json"
    path.write_bytes(text)
    for read in (CocoFile, read_detections):
        try:
            content = read(path)
        except ValueError as error:
            check_error(error)
        else:
            assert content == [] and json.loads(text) == []
    with pytest.raises(ValueError, match="photo"):
        make_sample("photo", (folder / "a.png").read_bytes(), text)


@given(content=mutated(DETECTIONS))
@bounded
def test_results_files(folder: Path, content: Any) -> None:
    path = folder / "results.json"
    path.write_text(json.dumps(content))
    try:
        found = read_detections(path)
    except ValueError as error:
        check_error(error)
        return
    for entry in found:
        assert np.isfinite(entry["bbox"]).all() and np.isfinite(entry["score"])


@given(segmentation=segmentations)
@bounded
def test_sa1b_files(folder: Path, segmentation: Any) -> None:
    text = json.dumps({"annotations": [{"segmentation": encode_rle(MASK)}, {"segmentation": segmentation}]})
    try:
        sample = make_sample("photo", (folder / "a.png").read_bytes(), text.encode())
    except ValueError as error:
        check_error(error)
        return
    assert np.asarray(sample["masks"]).shape == (2, HEIGHT, WIDTH)
    np.testing.assert_array_equal(sample["masks"][0], MASK)


pngs = st.sampled_from(
    [_png(MASK.astype(np.uint8)), _png(MASK.astype(np.uint16) * 700), _png(MASK[:9].astype(np.uint8)), b"", b"\x89PNG"]
)
pictures = st.fixed_dictionaries(
    {"bytes": st.one_of(pngs, scalars), "path": st.one_of(st.none(), st.text(max_size=5))}
)
arrays = st.sampled_from([MASK, MASK.tolist(), MASK * 1.5, MASK.T, MASK[None], MASK.astype(complex), MASK.astype(str)])


@given(value=st.one_of(pictures, st.lists(st.one_of(rles, pictures, arrays, values), max_size=3), arrays, values))
@bounded
def test_rows_of_data_sets(value: Any) -> None:
    row = {"image": Image.new("RGB", (WIDTH, HEIGHT)), "masks": value}
    try:
        sample = read_row(row)
    except (ValueError, OSError) as error:
        check_error(error)
        return
    masks = np.asarray(sample["masks"])
    assert masks.dtype == bool and masks.shape[1:] == (HEIGHT, WIDTH)


@given(rle=rles)
@bounded
def test_rle(rle: dict[str, Any]) -> None:
    try:
        area, box = rle_area(rle), rle_box(rle)
    except ValueError as error:
        check_error(error)
        return
    assert sum(rle_counts(rle)) == rle["size"][0] * rle["size"][1] >= area
    if rle["size"][0] * rle["size"][1] < 10**6:
        mask = decode_rle(rle)
        assert area == mask.sum()
        np.testing.assert_array_equal(decode_rle(encode_rle(mask)), mask)
        assert rle_box(encode_rle(mask)) == box


@given(
    corners=st.lists(st.tuples(st.floats(-20, 50), st.floats(-20, 50)), min_size=3, max_size=7),
    scale=st.sampled_from([1.0, 1e6, 1e12]),
)
@bounded
def test_polygons_far_away_are_cut_where_they_would_be_drawn(corners: list[tuple[float, float]], scale: float) -> None:
    """A polygon with one corner moved far out is what it is with the corner moved out a little, near the picture."""
    near = [value for corner in corners for value in corner]
    mask = decode_rle(polygons_to_rle([near], (HEIGHT, WIDTH)))
    assert mask.shape == (HEIGHT, WIDTH)
    outside = [value * scale for value in near]
    far = decode_rle(polygons_to_rle([outside], (HEIGHT, WIDTH)))
    assert far.shape == (HEIGHT, WIDTH)
    if scale == 1:
        np.testing.assert_array_equal(far, mask)
