# SPDX-License-Identifier: Apache-2.0
"""Random crops: shape, share and ratio of what is drawn, and that student and teacher see the same part."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from efficientsam_hf.data.crops import RandomCrop, crop, part_of_map
from efficientsam_hf.training.crop_preparation import CropPreparation
from efficientsam_hf.training.normalization import denormalize


def ramp(width: int = 80, height: int = 60) -> Image.Image:
    """Red grows to the right, green downwards."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


def test_parts_have_the_asked_shares_and_ratios() -> None:
    crops = RandomCrop(min_scale=0.3, max_scale=0.6, flip=0.25)
    generator = np.random.default_rng(0)
    boxes, mirrored = zip(*(crops.draw((400, 300), generator) for _ in range(500)), strict=True)
    left, top, right, bottom = np.array(boxes).T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 400 and bottom.max() <= 300
    shares = (right - left) * (bottom - top) / 120000
    ratios = (right - left) / (bottom - top)
    assert 0.29 < shares.min() < 0.32 and 0.58 < shares.max() < 0.61
    assert 0.74 < ratios.min() < 0.8 and 1.25 < ratios.max() < 1.35
    assert 0.2 < np.mean(mirrored) < 0.3


def test_a_picture_that_no_part_fits_gives_its_middle() -> None:
    crops = RandomCrop(min_scale=1.0, max_scale=1.0, flip=0.0)
    assert crops.draw((300, 30), np.random.default_rng(0)) == ((130, 0, 170, 30), False)
    assert crops.draw((30, 300), np.random.default_rng(0)) == ((0, 130, 30, 170), False)


def test_student_and_teacher_see_the_same_part() -> None:
    preparation = CropPreparation(RandomCrop(flip=1.0), teacher_size=64)
    row = preparation({"image": ramp()}, 32, np.random.default_rng(3))
    assert row["pixel_values"].shape == (3, 32, 32) and row["teacher_images"].shape == (3, 64, 64)
    student = denormalize(row["pixel_values"][None])[0]
    smaller = F.interpolate(row["teacher_images"][None], (32, 32), mode="area")[0]
    torch.testing.assert_close(student, smaller, atol=0.02, rtol=0)
    assert row["teacher_images"][0, 0, 0] > row["teacher_images"][0, 0, -1]  # mirrored: red falls to the right
    again = preparation({"image": ramp()}, 32, np.random.default_rng(3))
    assert torch.equal(again["pixel_values"], row["pixel_values"])
    other = preparation({"image": ramp()}, 32, np.random.default_rng(4))
    assert not torch.equal(other["pixel_values"], row["pixel_values"])


def test_the_whole_picture_is_only_resized() -> None:
    whole = crop(ramp(), (0, 0, 80, 60), 16, mirrored=False)
    expected = np.asarray(ramp().resize((16, 16), Image.Resampling.BICUBIC)) / 255
    np.testing.assert_allclose(whole.permute(1, 2, 0).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_part_of_a_map_is_what_the_map_has_there(mirrored) -> None:
    """A map that is the picture itself: its part is the picture's part, cell by cell."""
    features = torch.from_numpy(np.array(ramp(64, 64))).permute(2, 0, 1).float() / 255
    size, box = (640, 320), (160, 40, 480, 280)  # the map covers a picture of another shape
    part = part_of_map(features, size, box, mirrored, (6, 8)).unflatten(0, (6, 8))
    red = (160 + (np.arange(8) + 0.5) * 40) / 640
    green = (40 + (np.arange(6) + 0.5) * 40) / 320
    np.testing.assert_allclose(part[0, :, 0].numpy(), red[::-1] if mirrored else red, atol=0.02)
    np.testing.assert_allclose(part[:, 0, 1].numpy(), green, atol=0.02)
    noise = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    coarse = part_of_map(noise, size, (0, 0, 640, 320), False, (8, 8))
    torch.testing.assert_close(coarse, F.avg_pool2d(noise[None], 8).flatten(1).T)  # averaged, not picked
    whole = part_of_map(features, size, (0, 0, 640, 320), False, (64, 64))
    torch.testing.assert_close(whole, features.flatten(1).T)


def test_a_good_row_or_the_mean_colour_stands_in() -> None:
    preparation = CropPreparation(teacher_size=16)
    good = preparation({"image": ramp()}, 16, np.random.default_rng(0))
    assert preparation.stand_in(16, [good]) is good
    row = preparation.stand_in(16, [])
    assert row["pixel_values"].abs().max() < 0.02 and row["teacher_images"].shape == (3, 16, 16)


@pytest.mark.parametrize("fields", [{"min_scale": 0.0}, {"min_scale": 0.9, "max_scale": 0.5}, {"flip": 1.5}])
def test_bad_fields_are_named(fields) -> None:
    with pytest.raises(ValueError, match="min_scale and max_scale|flip"):
        RandomCrop(**fields)
