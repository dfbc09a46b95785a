# SPDX-License-Identifier: Apache-2.0
"""`efficientsam segment --everything`: files, tiles, and every refusal."""

import json
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from efficientsam_hf import EfficientSamConfig, EfficientSamImageProcessor, EfficientSamModel, EfficientSamProcessor
from efficientsam_hf.cli import main
from efficientsam_hf.cli.everything import _overlay, large_pictures, write_labels
from efficientsam_hf.cli.segment import read_image
from efficientsam_hf.models.rle_efficientsam import decode_rle, encode_rle
from efficientsam_hf.visualization import draw_masks, object_color


LOW = ["--everything", "--pred-iou-thresh", "0.2", "--stability-score-thresh", "0.5", "--points-per-crop", "4"]


@pytest.fixture
def picture(photo: Image.Image, tmp_path: Path) -> str:
    photo.resize((200, 150)).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


@pytest.mark.parametrize("tile", [[], ["--tile", "128", "--tile-overlap", "32"]], ids=["whole", "tiles"])
def test_results_agree_with_each_other(picture: str, tmp_path: Path, capsys, tile: list[str]) -> None:
    out = tmp_path / "out"
    assert main(["segment", picture, "-o", str(out), "--device", "cpu", "--label-image", *LOW, *tile]) == 0
    content = json.loads((out / "masks.json").read_text())
    objects = content["objects"]
    assert content["size"] == [150, 200] and len(objects) > 2
    printed, bar = capsys.readouterr()
    grid = "4 x 4 points in each tile" if tile else "4 x 4 points"
    assert re.search(rf"^searched in [\d.]+ s with a grid of {grid}$", printed, re.MULTILINE)
    assert "100%" in bar and ("tile" in bar) == bool(tile)
    assert f"{len(objects)} masks" in printed and f"{out / 'masks.json'} and {out / 'labels.png'}" in printed
    labels = np.asarray(Image.open(out / "labels.png"))
    for index, record in enumerate(objects):
        mask = decode_rle(record["segmentation"])
        rows, columns = np.nonzero(mask)
        assert record["area"] == len(rows)
        assert record["box"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert ("point" in record) == (not tile)
        assert mask[labels == index + 1].all()
    assert labels.max() <= len(objects) and labels.max() > 0
    with Image.open(out / "overlay.png") as overlay, Image.open(picture) as image:
        assert overlay.size == image.size and np.mean(np.asarray(overlay) != np.asarray(image.convert("RGB"))) > 0.05


@pytest.mark.parametrize(("own", "grid"), [({"points_per_crop": 3}, 3), ({}, 32)], ids=["its own", "none"])
def test_the_grid_is_that_of_the_checkpoint(picture: str, tmp_path: Path, capsys, own: dict, grid: int) -> None:
    config = {"image_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    EfficientSamModel(EfficientSamConfig(vision_config=config)).save_pretrained(tmp_path / "model")
    image_processor = EfficientSamImageProcessor(size=64, mask_generation={**own, "pred_iou_thresh": 0.999})
    EfficientSamProcessor(image_processor).save_pretrained(tmp_path / "model")
    flags = ["--everything", "--device", "cpu", "--model", str(tmp_path / "model"), "-o", str(tmp_path / "out")]
    assert main(["segment", picture, *flags]) == 0
    assert f"with a grid of {grid} x {grid} points\n" in capsys.readouterr().out


@pytest.mark.parametrize("size", [(40, 30), (1, 5000)])
def test_a_picture_without_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str], size) -> None:
    Image.new("RGB", size).save(tmp_path / "black.png")
    flags = ["--everything", "--points-per-crop", "2", "--pred-iou-thresh", "0.999", "--device", "cpu"]
    assert main(["segment", str(tmp_path / "black.png"), "-o", str(tmp_path / "out"), *flags]) == 0
    assert "no masks" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "masks.json").read_text())["objects"] == []
    assert (tmp_path / "out" / "overlay.png").is_file()


@pytest.mark.parametrize(("count", "name"), [(2**16 - 1, "labels.png"), (2**16, "labels.tif"), (70_000, "labels.tif")])
def test_every_number_of_a_mask_fits_into_the_label_image(tmp_path: Path, count: int, name: str) -> None:
    labels = np.arange(400 * 250, dtype=np.int32).reshape(400, 250).T % (count + 1)  # down the columns, as from tiles
    assert labels.max() == count and write_labels(tmp_path, labels) == name
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with Image.open(tmp_path / name) as written:
        np.testing.assert_array_equal(np.asarray(written), labels)


def test_the_overlay_has_every_mask_as_draw_masks_draws_it(photo: Image.Image) -> None:
    image = photo.resize((120, 80))
    before = image.tobytes()
    masks = np.zeros((3, 80, 120), bool)
    masks[0, 5:20, 5:20], masks[1, 2:70, 3:110], masks[2, 40:60, 30:119] = True, True, True
    boxes = np.array([[5, 5, 19, 19], [3, 2, 109, 69], [30, 40, 118, 59]])
    drawn = _overlay(image, [encode_rle(mask) for mask in masks], [225, 7276, 1780], boxes)
    order = [1, 2, 0]  # the largest at the bottom
    expected = draw_masks(image, masks[order], [object_color(index) for index in order])
    assert drawn.tobytes() == expected.tobytes() and image.tobytes() == before


def test_only_tiles_lift_the_limit_on_large_pictures(picture: str, monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(ValueError, match="safety limit"), large_pictures(Namespace(tile=None)):
        read_image(picture)
    with large_pictures(Namespace(tile=128)):
        assert read_image(picture).size == (200, 150)
    assert Image.MAX_IMAGE_PIXELS == 10_000


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--everything", "--point", "3,3"], "--everything takes no prompts"),
        (["--point", "3,3", "--tile", "128"], "--tile is an option of --everything"),
        (["--point", "3,3", "--pred-iou-thresh", "0.5"], "--pred-iou-thresh is an option of --everything"),
        (["--point", "3,3", "--label-image"], "--label-image is an option of --everything"),
        (["--everything", "--tile-overlap", "9"], "--tile-overlap is an option of --tile"),
        (["--everything", "--points-per-crop", "0"], "points_per_crop must be a whole number of at least 1, got 0"),
        (["--everything", "--stability-score-thresh", "2"], "stability_score_thresh must be a number from 0 to 1"),
        (["--everything", "--crops-n-layers", "9"], "crops_n_layers 9 cuts"),
        (["--everything", "--tile", "10"], "tile must be at least 64"),
        (["--everything", "--all-masks"], "--all-masks"),
        (["--everything", "--within-box"], "--within-box is for prompts"),
        (["--everything", "--mask-nms-thresh", "7"], "mask_nms_thresh must be a number from 0 to 1, got 7"),
        (["--point", "3,3", "--fill-holes", "-1"], "fill_holes must be a fraction of at least 0, got -1"),
    ],
)
def test_refusals(picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags, words: str) -> None:
    assert main(["segment", picture, "-o", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "masks.json").exists()
