# SPDX-License-Identifier: Apache-2.0
"""Simulated prompts against brute force and by their definition."""

import pytest
import torch

from efficientsam_hf.data.prompts import (
    center_points,
    distance_transform,
    error_points,
    jitter_boxes,
    points_in_cells,
    tight_boxes,
    uniform_points,
)


def brute_force_distance(mask: torch.Tensor) -> torch.Tensor:
    """Distance to every outside pixel, one by one, with a ring of outside pixels around the image."""
    padded = torch.nn.functional.pad(mask, (1, 1, 1, 1))
    outside = (~padded).nonzero().float()
    pixels = torch.ones_like(padded).nonzero().float()
    distance = torch.cdist(pixels, outside, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    return distance.reshape(padded.shape)[1:-1, 1:-1]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("size", [(1, 6), (6, 1), (2, 2), (7, 9), (24, 11), (19, 40)])
@pytest.mark.parametrize("share", [0.5, 0.95, 1.0])
def test_distance_transform_is_exact(size, share, generator) -> None:
    masks = torch.rand(3, *size, generator=generator) < share
    expected = torch.stack([brute_force_distance(mask) for mask in masks])
    assert torch.allclose(distance_transform(masks), expected, atol=1e-4)


def test_center_is_the_deepest_pixel_and_the_first_of_equals() -> None:
    masks = torch.zeros(2, 2, 12, 16, dtype=torch.bool)
    masks[0, 0, 2:9, 3:10] = True  # 7 x 7: one deepest pixel
    masks[0, 1, :, :] = True  # the border counts: depth 6 in rows 5 and 6, first column with it is 5
    masks[1, 0, 4:6, 4:6] = True  # all four pixels equally deep
    points = center_points(masks)
    assert points.dtype == torch.float32
    assert points.tolist() == [[[6, 5], [5, 5]], [[4, 4], [0, 0]]]


def test_uniform_points_reach_every_pixel_equally_often(generator) -> None:
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[1, 2:5] = mask[4, 6] = mask[0, 0] = True
    draws = uniform_points(mask.expand(5000, 5, 7), generator).long()
    counts = torch.zeros(5, 7).index_put((draws[:, 1], draws[:, 0]), torch.ones(5000), accumulate=True)
    assert (counts[~mask] == 0).all()
    assert (counts[mask] - 1000).abs().max() < 150  # five standard deviations


def test_uniform_points_depend_on_the_generator_alone() -> None:
    masks = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.4
    first, again, other = (uniform_points(masks, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_tight_boxes_are_exclusive_at_the_end() -> None:
    masks = torch.zeros(3, 8, 9, dtype=torch.bool)
    masks[0, 2, 3] = True
    masks[1, 1:5, 2:9] = True
    assert tight_boxes(masks).tolist() == [[3, 2, 4, 3], [2, 1, 9, 5], [0, 0, 0, 0]]


def test_jitter_stays_within_its_limits(generator) -> None:
    boxes = torch.tensor([[100.0, 50.0, 300.0, 90.0], [0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 400.0, 300.0]])
    moved = jitter_boxes(boxes.expand(2000, 3, 4), (300, 400), generator, fraction=0.1, max_pixels=20.0)
    shift = (moved - boxes)[:, 0]
    assert shift.abs().max() <= 20
    assert shift.std(0)[[1, 3]] == pytest.approx([4, 4], rel=0.1)  # a tenth of the height
    assert shift.std(0)[0] > 10
    assert (moved[..., 2:] - moved[..., :2] > 0.999).all()  # one pixel, less rounding
    assert (moved >= 0).all() and (moved <= torch.tensor([400, 300, 400, 300])).all()
    assert torch.equal(jitter_boxes(boxes, (300, 400), generator, fraction=0.0), boxes)


def test_error_points_click_on_what_is_wrong(generator) -> None:
    masks = torch.zeros(4, 300, 10, 10, dtype=torch.bool)
    predictions = masks.clone()
    masks[:3, :, 2:6, 2:6] = True
    predictions[0, :, 2:6, 2:8] = True  # too much on the right
    predictions[1, :, 2:6, 2:4] = True  # too little on the right
    predictions[2] = masks[2]
    points, labels = error_points(predictions, masks, generator)
    assert (labels[0] == 0).all() and (points[0, :, 0] >= 6).all() and (points[0, :, 0] < 8).all()
    assert (labels[1] == 1).all() and (points[1, :, 0] >= 4).all() and (points[1, :, 0] < 6).all()
    assert (labels[2] == 1).all() and (points[2] >= 2).all() and (points[2] < 6).all()
    assert (labels[3] == -1).all()


def test_error_points_without_background_never_click_outside(generator) -> None:
    masks = torch.rand(50, 12, 12, generator=generator) < 0.5
    predictions = torch.rand(50, 12, 12, generator=generator) < 0.5
    points, labels = error_points(predictions, masks, generator, background=False)
    x, y = points.long().unbind(-1)
    assert (labels == 1).all()
    assert masks[torch.arange(50), y, x].all() and not predictions[torch.arange(50), y, x].any()


def test_points_in_cells_land_on_their_side_of_the_mask(generator) -> None:
    masks = torch.zeros(1, 200, 16, 16, dtype=torch.bool)
    masks[..., 5:7, 4:7] = True  # part of the cell in row 1, column 1
    cells = torch.ones(1, 200, 2)
    for label in (0, 1):
        points = points_in_cells(cells, torch.full((1, 200), label), masks, 4, generator).long()
        assert (masks[0, torch.arange(200), points[0, :, 1], points[0, :, 0]] == label).all()
        assert (points // 4 == 1).all()
        assert len(points[0].unique(dim=0)) == (6 if label else 10)
