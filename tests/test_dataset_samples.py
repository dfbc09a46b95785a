# SPDX-License-Identifier: Apache-2.0
"""Data sets of the `datasets` library: the forms that masks may have, and what is refused."""

import io
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
from PIL import Image
from property_testing import within_bounds

from efficientsam_hf.data.dataset_samples import DatasetSamples, load_samples, load_stream, read_masks, read_row
from efficientsam_hf.models.rle_efficientsam import encode_rle


HEIGHT, WIDTH = 12, 16
MASKS = np.zeros((2, HEIGHT, WIDTH), bool)
MASKS[0, 2:6, 3:9] = True
MASKS[1, 7:11, 10:15] = True
PICTURE = Image.new("RGB", (WIDTH, HEIGHT), (10, 20, 30))
LABELS = Image.fromarray((3 * MASKS[0] + 7 * MASKS[1]).astype(np.uint8))
PICTURES = [Image.fromarray(mask.astype(np.uint8) * 255) for mask in MASKS]
RLES = [encode_rle(mask) for mask in MASKS]


def dataset(masks, feature, rows: int = 3) -> datasets.Dataset:
    features = datasets.Features({"photo": datasets.Image(), "objects": feature})
    return datasets.Dataset.from_dict({"photo": [PICTURE] * rows, "objects": [masks] * rows}, features)


RLE_FEATURE = datasets.List({"size": datasets.List(datasets.Value("int64")), "counts": datasets.Value("string")})


@pytest.mark.parametrize(
    ("masks", "feature"),
    [
        (LABELS, datasets.Image()),
        (PICTURES, datasets.List(datasets.Image())),
        (RLES, RLE_FEATURE),
        (MASKS.tolist(), datasets.List(datasets.List(datasets.List(datasets.Value("bool"))))),
    ],
    ids=["labels", "pictures", "rle", "arrays"],
)
def test_masks_in_every_form(masks, feature, tmp_path: Path) -> None:
    dataset(masks, feature).save_to_disk(tmp_path / "saved")
    samples = load_samples(str(tmp_path / "saved"), image_column="photo", masks_column="objects")
    assert len(samples) == 3
    assert samples[1]["image"].mode == "RGB" and samples[1]["image"].size == (WIDTH, HEIGHT)
    assert samples[1]["masks"].dtype == bool and samples[1]["image_id"] == 1
    np.testing.assert_array_equal(samples[1]["masks"], MASKS)
    assert [sample["image_id"] for sample in samples] == [0, 1, 2]


def test_a_row_without_objects() -> None:
    for masks, feature in (([], RLE_FEATURE), (Image.new("L", (WIDTH, HEIGHT)), datasets.Image())):
        assert DatasetSamples(dataset(masks, feature), "photo", "objects")[0]["masks"].shape == (0, HEIGHT, WIDTH)


def test_splits(tmp_path: Path) -> None:
    datasets.DatasetDict({"small": dataset(RLES, RLE_FEATURE)}).save_to_disk(tmp_path)
    assert len(load_samples(str(tmp_path), "small", "photo", "objects")) == 3
    with pytest.raises(ValueError, match="split 'train' is not in .* which has small"):
        load_samples(str(tmp_path), "train", "photo", "objects")


def test_columns_and_rows_are_checked_first() -> None:
    with pytest.raises(ValueError, match="image_column: no column 'image', there are photo, objects"):
        DatasetSamples(dataset(RLES, RLE_FEATURE))
    with pytest.raises(ValueError, match="masks_column: no column 'masks'"):
        DatasetSamples(dataset(RLES, RLE_FEATURE), "photo")
    with pytest.raises(ValueError, match="no rows"):
        DatasetSamples(dataset(RLES, RLE_FEATURE, rows=0), "photo", "objects")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, "expected a label picture"),
        ("missing.png", "a mask picture cannot be read"),
        (Image.new("RGB", (WIDTH, HEIGHT)), "one channel"),
        ([MASKS[0], np.zeros((4, 3))], r"mask of \(4, 3\) in a picture of \(12, 16\)"),
        ([np.zeros(4)], "two-dimensional"),
        ([MASKS[0].astype(complex)], "two-dimensional numbers, got complex128"),
        ([[["a"]]], "two-dimensional"),
        ([{"size": [HEIGHT, WIDTH], "counts": [1, 1]}], "add up"),
        ([{"size": [60_000, 60_000], "counts": [3_600_000_000]}], r"mask of \(60000, 60000\) in a picture"),
        ([RLES[0], None], "two-dimensional"),
        ({"bytes": 7, "path": None}, "an empty picture"),
        ([{"bytes": None, "path": 7}], "an empty picture"),
    ],
)
def test_masks_of_no_known_form(value, words) -> None:
    with pytest.raises(ValueError, match=words):
        read_masks(value, (HEIGHT, WIDTH))


def test_more_masks_than_memory_is_there_for() -> None:
    """A grey picture of 16 bits is no label picture; nothing is allocated for the masks it would be."""
    size = (1500, 1500)
    grey = Image.fromarray(np.arange(size[0] * size[1], dtype=np.uint32).reshape(size).astype(np.uint16))
    with within_bounds(memory=2**28), pytest.raises(ValueError, match=r"65535 masks of 1500 x 1500 pixels take"):
        read_masks(grey, size)
    with pytest.raises(ValueError, match=r"3000 masks of 1500 x 1500 pixels take"):
        read_masks([[[0]]] * 3000, size)


def test_masks_of_another_size_than_the_picture() -> None:
    masks = [encode_rle(np.ones((3, 3), bool))]
    with pytest.raises(ValueError, match=r"objects: mask of \(3, 3\) in a picture of \(12, 16\)"):
        DatasetSamples(dataset(masks, RLE_FEATURE), "photo", "objects")[0]


@pytest.mark.parametrize(
    ("masks", "feature"),
    [(LABELS, datasets.Image()), (PICTURES, datasets.List(datasets.Image())), (RLES, RLE_FEATURE)],
    ids=["labels", "pictures", "rle"],
)
def test_streams_give_the_same_and_damage_does_not_end_them(masks, feature, tmp_path: Path) -> None:
    table = dataset(masks, feature).cast_column("photo", datasets.Image(decode=False))
    damaged = {"bytes": b"no picture", "path": None}
    rows = [{**row, "photo": damaged if number == 1 else row["photo"]} for number, row in enumerate(table)]
    datasets.Dataset.from_list(rows, features=table.features).to_parquet(tmp_path / "train.parquet")
    stream = list(load_stream(str(tmp_path), "train", "photo", "objects"))
    assert len(stream) == 3
    for number in (0, 2):
        sample = read_row(stream[number], "photo", "objects")
        np.testing.assert_array_equal(sample["masks"], MASKS)
        assert sample["image"].size == (WIDTH, HEIGHT)
    with pytest.raises(ValueError, match="photo is not a picture"):
        read_row(stream[1], "photo", "objects")
    for empty, words in ((None, "is missing or empty"), ({"bytes": None, "path": None}, "an empty picture")):
        with pytest.raises(ValueError, match=words):
            read_row({**stream[0], "photo": empty}, "photo", "objects")
    with pytest.raises(ValueError, match="photo is a int, expected a path"):
        read_row({**stream[0], "photo": 7}, "photo", "objects")
    with pytest.raises(ValueError, match="masks_column: no column 'masks', there are photo, objects"):
        load_stream(str(tmp_path), image_column="photo")


def test_pictures_of_a_stream_may_lie_elsewhere() -> None:
    """As those of a folder of pictures on the Hub: rows hold hf://datasets/... and no bytes."""
    content = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), (9, 80, 160)).save(content, "PNG")
    fsspec.filesystem("memory").pipe_file("/pictures/a.png", content.getvalue())
    row = {"photo": {"bytes": None, "path": "memory://pictures/a.png"}, "objects": list(MASKS)}
    assert read_row(row, "photo", "objects")["image"].getpixel((3, 3)) == (9, 80, 160)
    row["photo"]["path"] = "memory://pictures/b.png"
    with pytest.raises(OSError, match=r"b\.png"):
        read_row(row, "photo", "objects")


@pytest.mark.parametrize("load", [load_samples, load_stream])
def test_a_data_set_that_is_not_there_is_named(load, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data set .*none', split 'train', cannot be loaded"):
        load(str(tmp_path / "none"))


@pytest.mark.parametrize("load", [load_samples, load_stream])
def test_a_configuration_is_chosen(load, tmp_path: Path) -> None:
    for name, rows in (("few", 1), ("many", 3)):
        dataset(RLES, RLE_FEATURE).select(range(rows)).to_parquet(tmp_path / f"{name}.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("few", "many"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    columns = {"image_column": "photo", "masks_column": "objects"}
    for name, rows in (("few", 1), ("many", 3)):
        found = load(str(tmp_path), config=name, **columns)
        assert len(found if load is load_samples else list(found)) == rows
    with pytest.raises(ValueError, match="configuration 'all', cannot be loaded"):
        load(str(tmp_path), config="all", **columns)


def test_data_that_datasets_cannot_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match="split 'train', cannot be loaded"):
        load_samples(str(tmp_path))


def test_a_saved_data_set_has_no_configurations(tmp_path: Path) -> None:
    dataset(RLES, RLE_FEATURE).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="got configuration 'few', revision None"):
        load_samples(str(tmp_path), config="few", image_column="photo", masks_column="objects")
