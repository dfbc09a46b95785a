# SPDX-License-Identifier: Apache-2.0
"""Folders in SA-1B's own layout."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efficientsam_hf.data.sa1b import Sa1bFolder
from efficientsam_hf.models.rle_efficientsam import encode_rle


def write_picture(folder: Path, name: str, masks: np.ndarray) -> None:
    height, width = masks.shape[1:]
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (1, 2, 3)).save(folder / f"{name}.jpg")
    annotations = [
        {"id": k, "segmentation": encode_rle(mask), "area": int(mask.sum())} for k, mask in enumerate(masks)
    ]
    content = {"image": {"file_name": f"{name}.jpg", "height": height, "width": width}, "annotations": annotations}
    (folder / f"{name}.json").write_text(json.dumps(content))


def test_pictures_and_masks_of_all_subfolders(tmp_path: Path) -> None:
    masks = np.random.default_rng(0).random((3, 20, 30)) < 0.5
    write_picture(tmp_path / "sa_000001", "sa_7", masks)
    write_picture(tmp_path / "sa_000000", "sa_9", masks[:0])
    samples = Sa1bFolder(tmp_path)
    assert [sample["image_id"] for sample in samples] == ["sa_000000/sa_9", "sa_000001/sa_7"]
    assert samples[0]["masks"].shape == (0, 20, 30)
    assert samples[1]["image"].size == (30, 20)
    np.testing.assert_array_equal(samples[1]["masks"], masks)


def test_damage_is_named(tmp_path: Path) -> None:
    masks = np.ones((1, 20, 30), bool)
    for name in "abcd":
        write_picture(tmp_path, name, masks)
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c.json").write_text('{"annotations": 3}')
    Image.new("RGB", (10, 10)).save(tmp_path / "d.jpg")
    samples = Sa1bFolder(tmp_path)
    for index, (kind, words) in enumerate(
        [
            (FileNotFoundError, "a.jpg.*does not exist"),
            (ValueError, "b.json is not a JSON file"),
            (ValueError, "c.json is not an SA-1B file"),
            (ValueError, r"d.json: mask of \(20, 30\) in a picture of \(10, 10\)"),
        ]
    ):
        with pytest.raises(kind, match=words):
            samples[index]


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Sa1bFolder(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no .json"):
        Sa1bFolder(tmp_path)
