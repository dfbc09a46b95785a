# SPDX-License-Identifier: Apache-2.0
"""The picture of pretraining: image, what the encoder saw, target and reconstruction."""

import numpy as np
import torch
from PIL import Image

from efficientsam_hf.training.normalization import normalize
from efficientsam_hf.training.pictures import feature_sheet


def tiles(sheet: Image.Image, rows: int) -> list[list[np.ndarray]]:
    """The sheet cut into its 64-pixel tiles, 6 pixels apart."""
    pixels = np.asarray(sheet)
    return [
        [pixels[6 + 70 * row : 70 + 70 * row, 6 + 70 * column : 70 + 70 * column] for column in range(4)]
        for row in range(rows)
    ]


def test_tiles_show_what_they_are_named_for() -> None:
    images = torch.rand(2, 3, 64, 64)
    mask = torch.zeros(2, 16)
    mask[:, 5] = 1  # row 1, column 1
    target = torch.randn(2, 16, 10)
    reconstruction = target.clone()
    reconstruction[1] = torch.randn(16, 10)
    first, second = tiles(feature_sheet(normalize(images), mask, target, reconstruction), 2)
    np.testing.assert_allclose(first[0], images[0].permute(1, 2, 0) * 255, atol=1)
    hidden = np.zeros((64, 64), bool)
    hidden[16:32, 16:32] = True
    assert (first[1][hidden] == 0).all() and (first[1][~hidden] == first[0][~hidden]).all()
    assert (first[2] == first[3]).all() and (second[2] != second[3]).any()
    assert len(np.unique(first[2].reshape(-1, 3), axis=0)) > 8  # features are told apart
    assert (first[2][:16, :16] == first[2][0, 0]).all()  # and each patch has one colour


def test_half_precision_outside_changes_nothing() -> None:
    """It is drawn within the autocast of a run."""
    arguments = torch.rand(1, 3, 64, 64), torch.zeros(1, 16), torch.randn(1, 16, 10), torch.randn(1, 16, 10)
    plain = feature_sheet(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert feature_sheet(*arguments).tobytes() == plain.tobytes()
