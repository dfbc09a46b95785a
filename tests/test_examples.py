# SPDX-License-Identifier: Apache-2.0
"""The scripts in examples/ run as their first line says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_mixture import write_files


@pytest.fixture
def photo_path(photo: Image.Image, tmp_path: Path) -> Path:
    photo.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def example(root: Path, name: str, *arguments: str | Path) -> str:
    """Standard output of a script in examples/; fails with what it wrote to standard error."""
    command = [sys.executable, root / "examples" / name, *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_segment_photo(root: Path, photo_path: Path, tmp_path: Path) -> None:
    printed = example(root, "segment_photo.py", photo_path, "230", "120", tmp_path / "mask.png")
    assert "predicted IoU" in printed
    with Image.open(tmp_path / "mask.png") as mask, Image.open(photo_path) as image:
        assert mask.size == image.size
        assert 0 < np.asarray(mask, dtype=bool).mean() < 1


def test_correct_mask(root: Path, photo_path: Path) -> None:
    lines = example(root, "correct_mask.py", photo_path, "230", "120", "30", "30").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["one click", "corrected"]
    assert lines[0].partition(":")[2] != lines[1].partition(":")[2], "the correction changed nothing"


def test_segment_everything(root: Path, photo_path: Path, tmp_path: Path) -> None:
    printed = example(root, "segment_everything.py", photo_path, tmp_path / "out")
    masks = json.loads((tmp_path / "out" / "masks.json").read_text())
    assert len(masks) == printed.count("predicted IoU") > 1
    assert (tmp_path / "out" / "everything.png").is_file()


def test_draw_pasted(root: Path, tmp_path: Path) -> None:
    mixture = write_files(tmp_path / "data")
    flags = ["--count", "3", "--size", "64", "--source", "pasted"]
    assert "3 pictures, " in example(root, "draw_pasted.py", mixture, tmp_path / "sheet.png", *flags)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 6 * 64
        tiles = [np.asarray(sheet)[2:66, 2 + 66 * k : 66 + 66 * k] for k in range(6)]
    assert all((picture != masks).any() for picture, masks in zip(tiles[::2], tiles[1::2]))


@pytest.mark.slow
def test_sami_claim_in_parts(root: Path, tmp_path: Path) -> None:
    flags = [
        "--seeds",
        "0",
        "--pretrain-minutes",
        "0.03",
        "--finetune-minutes",
        "0.03",
        "--size",
        "64",
        "--scenes",
        "2",
    ]
    printed = example(root, "sami_claim.py", tmp_path / "out", *flags, "--part-minutes", "0.06")
    assert "this part's time is used up before" in printed and "| sami |" not in printed
    printed = example(root, "sami_claim.py", tmp_path / "out", *flags)
    assert all(f"| {arm} | 0." in printed for arm in ("mae", "sami", "scratch", "scratch_long"))
    assert "Less mae on the same prompts" in printed
    with Image.open(tmp_path / "out" / "losses.png") as curves:
        assert curves.width > curves.height
    again = example(root, "sami_claim.py", tmp_path / "out", *flags, "--ablations")
    announced = re.findall(r"^.*seed_0/(\w+): \d+ steps$", again, re.MULTILINE)
    changes = ("cosine_loss", "full_decoder", "half_masked", "pixel_target")
    assert announced == [run for change in changes for run in (f"pretrain_{change}", change)]
    assert "seed_0/scratch" not in again
    assert all(f"| {arm} | 0." in again for arm in ("mae", "sami", "cosine_loss", "full_decoder", "pixel_target"))
    assert "Less sami on the same prompts" in again
