# SPDX-License-Identifier: Apache-2.0
"""Folders in SA-1B's own layout."""

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from efficientsam_hf import EfficientSamImageProcessor
from efficientsam_hf.data import rle_masks
from efficientsam_hf.data.augmentation import Augmentation
from efficientsam_hf.data.rle_masks import RleMasks
from efficientsam_hf.data.sa1b import Sa1bFolder, read_row, stream_tars
from efficientsam_hf.data.tars import find_tars
from efficientsam_hf.models.rle_efficientsam import decode_rle, encode_rle
from efficientsam_hf.training.mask_preparation import MaskPreparation


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
    for name in "abcdef":
        write_picture(tmp_path, name, masks)
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c.json").write_text('{"annotations": 3}')
    Image.new("RGB", (10, 10)).save(tmp_path / "d.jpg")
    (tmp_path / "e.json").write_text('{"annotations": [{"segmentation": {"size": [20, 30], "counts": [7]}}]}')
    (tmp_path / "f.json").write_text('{"annotations": [{"area": 7}]}')
    samples = Sa1bFolder(tmp_path)
    for index, (kind, words) in enumerate(
        [
            (FileNotFoundError, "a.json has no a.jpg beside it"),
            (ValueError, "b.json is not a JSON file"),
            (ValueError, "c.json is not an SA-1B file"),
            (ValueError, r"d.json: mask of \(20, 30\) in a picture of \(10, 10\)"),
            (ValueError, "e.json: RLE counts must be runs that add up to 20 x 30"),
            (ValueError, "f.json: an RLE mask must be a dict"),
        ]
    ):
        with pytest.raises(kind, match=words):
            samples[index]


@pytest.fixture
def expanded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The RLE masks that `RleMasks` expands, as it does."""
    calls: list[Any] = []

    def counting(rle: dict[str, Any]) -> np.ndarray:
        calls.append(rle)
        return decode_rle(rle)

    monkeypatch.setattr(rle_masks, "decode_rle", counting)
    return calls


def test_masks_stand_for_an_array_and_expand_what_is_asked(expanded: list[Any]) -> None:
    masks = np.random.default_rng(0).random((5, 20, 30)) < 0.5
    lazy = RleMasks([encode_rle(mask) for mask in masks], (20, 30))
    assert (len(lazy), lazy.shape, lazy.ndim, lazy.dtype) == (5, masks.shape, 3, bool)
    np.testing.assert_array_equal(lazy.areas(), masks.sum((1, 2)))
    assert expanded == []
    for count, index in ((1, 2), (2, [3, 0]), (2, slice(1, 3)), (0, []), (3, np.arange(5) > 1)):
        np.testing.assert_array_equal(lazy[index], masks[index])
        assert len(expanded) == count
        expanded.clear()
    np.testing.assert_array_equal(lazy[:, 2:9, ::-1], masks[:, 2:9, ::-1])
    np.testing.assert_array_equal(list(lazy), masks)
    with pytest.raises(IndexError):
        lazy[5]


def test_numpy_and_torch_take_masks_as_an_array() -> None:
    masks = np.random.default_rng(0).random((3, 20, 30)) < 0.5
    for some in (masks, masks[:0]):
        lazy = RleMasks([encode_rle(mask) for mask in some], (20, 30))
        assert np.asarray(lazy).dtype == bool and np.asarray(lazy, np.uint8).dtype == np.uint8
        np.testing.assert_array_equal(np.asarray(lazy), some)
        assert torch.equal(torch.as_tensor(lazy), torch.from_numpy(some))  # as evaluation makes it a tensor
    with pytest.raises(ValueError, match="copy: "):
        np.asarray(lazy, copy=False)


def picture_of_objects(folder: Path, count: int) -> dict[str, Any]:
    """An SA-1B sample with rectangles of many sizes, some too large or too small to train on."""
    generator, masks = np.random.default_rng(0), np.zeros((count, 60, 90), bool)
    for mask in masks:
        (left, top), (width, height) = generator.integers(0, 50, 2), generator.integers(1, 40, 2)
        mask[top : top + height, left : left + width] = True
    masks[3], masks[5] = True, False
    write_picture(folder, "sa_1", masks)
    return Sa1bFolder(folder)[0]


@pytest.mark.parametrize("scale_of", [None, 64])
@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(0.5), Augmentation(0.5, 0.5, 2.0)])
def test_training_draws_the_same_from_lazy_masks_as_from_an_array(tmp_path: Path, augmentation, scale_of) -> None:
    sample = picture_of_objects(tmp_path, 30)
    dense = {**sample, "masks": np.asarray(sample["masks"])}
    processor = EfficientSamImageProcessor(size=32, do_normalize=False, antialias=True)
    preparation = MaskPreparation(processor, 8, 0.02, 0.5, augmentation, scale_of)
    for seed in range(10):
        lazy, whole = (preparation(given, 32, np.random.default_rng(seed)) for given in (sample, dense))
        assert lazy.keys() == whole.keys() and all(torch.equal(lazy[name], whole[name]) for name in lazy)
        assert lazy["object_mask"].any()


def test_only_drawn_masks_are_expanded_where_the_picture_stays_whole(tmp_path: Path, expanded: list[Any]) -> None:
    sample = picture_of_objects(tmp_path, 30)
    processor = EfficientSamImageProcessor(size=32, do_normalize=False, antialias=True)
    MaskPreparation(processor, objects=4)(sample, 32, np.random.default_rng(0))
    assert len(expanded) == 4
    expanded.clear()
    augmentation = Augmentation(flip=0.5)
    for seed in range(10):
        MaskPreparation(processor, objects=4, augmentation=augmentation)(sample, 32, np.random.default_rng(seed))
    assert len(expanded) == 4 * 10


def test_a_sample_without_a_usable_object_is_named(tmp_path: Path) -> None:
    write_picture(tmp_path, "sa_7", np.zeros((2, 20, 30), bool))
    with pytest.raises(ValueError, match=r"picture sa_7: none of 2 objects covers"):
        MaskPreparation(EfficientSamImageProcessor(size=32))(Sa1bFolder(tmp_path)[0], 32, np.random.default_rng(0))


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Sa1bFolder(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds neither .json files nor tars"):
        Sa1bFolder(tmp_path)


def pack(folder: Path, path: Path, names: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name in names:
            archive.add(folder / name, arcname=f"./{name}")


def test_tars_give_what_folders_give(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name in ("sa_1", "sa_2", "sa_3"):
        write_picture(tmp_path / "loose", name, generator.random((2, 20, 30)) < 0.5)
    pack(tmp_path / "loose", tmp_path / "tars" / "a.tar", ["sa_1.jpg", "sa_1.json"])
    pack(tmp_path / "loose", tmp_path / "tars" / "b.tar", ["sa_3.json", "sa_2.json", "sa_2.jpg", "sa_3.jpg"])
    stream = stream_tars(find_tars(tmp_path / "tars"))
    assert stream.num_shards == 2
    streamed = {sample["image_id"]: sample for sample in map(read_row, stream)}
    assert streamed.keys() == {"sa_1", "sa_2", "sa_3"}
    for sample in Sa1bFolder(tmp_path / "loose"):
        other = streamed[sample["image_id"]]
        np.testing.assert_array_equal(other["masks"], sample["masks"])
        np.testing.assert_array_equal(np.asarray(other["image"]), np.asarray(sample["image"]))


def test_damaged_tars_are_named_and_passed_over(tmp_path: Path) -> None:
    write_picture(tmp_path / "loose", "sa_1", np.ones((1, 20, 30), bool))
    write_picture(tmp_path / "loose", "sa_2", np.ones((1, 20, 30), bool))
    tars = tmp_path / "tars"
    pack(tmp_path / "loose", tars / "a.tar", ["sa_1.jpg", "sa_1.json", "sa_2.jpg", "sa_2.json"])
    (tars / "b.tar").write_bytes(b"no tar at all" * 100)
    whole = (tars / "a.tar").read_bytes()
    (tars / "c.tar").write_bytes(whole[: len(whole) // 10])
    pack(tmp_path / "loose", tars / "d.tar", ["sa_1.json", "sa_2.jpg", "sa_2.json"])
    good, bad = [], []
    for row in stream_tars(find_tars(tars)):
        try:
            good.append(read_row(row)["image_id"])
        except ValueError as error:
            bad.append(str(error))
    assert good[:2] == ["sa_1", "sa_2"] and good[-1] == "sa_2"
    assert any("b.tar is damaged" in text for text in bad) and any("c.tar" in text for text in bad)
    assert any("d.tar holds sa_1, but no sa_1.jpg near it" in text for text in bad)


def test_orphans_in_a_tar_do_not_cost_the_pairs_after_them(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("efficientsam_hf.data.sa1b.MOST_HALVES", 2)
    names = [f"sa_{k}" for k in range(7)]
    for name in names:
        write_picture(tmp_path / "loose", name, np.ones((1, 20, 30), bool))
    members = [f"{name}.jpg" for name in names[:2]] + [f"{n}.{kind}" for n in names[2:] for kind in ("jpg", "json")]
    pack(tmp_path / "loose", tmp_path / "tars" / "a.tar", members)
    rows = list(stream_tars(find_tars(tmp_path / "tars")))
    assert [row["name"] for row in rows if not row["problem"]] == names[2:]
    assert sorted(row["name"] for row in rows if row["problem"]) == names[:2]


def test_a_tar_with_all_pictures_first_is_not_held_in_memory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("efficientsam_hf.data.sa1b.MOST_HALVES", 2)
    names = [f"sa_{k}" for k in range(6)]
    for name in names:
        write_picture(tmp_path / "loose", name, np.ones((1, 20, 30), bool))
    pack(tmp_path / "loose", tmp_path / "tars" / "a.tar", [f"{n}.{kind}" for kind in ("jpg", "json") for n in names])
    rows = list(stream_tars(find_tars(tmp_path / "tars")))
    assert len(rows) == 12 and all("near it" in row["problem"] for row in rows)
