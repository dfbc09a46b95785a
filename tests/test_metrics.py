# SPDX-License-Identifier: Apache-2.0
"""IoU and the choice among candidates."""

import pytest
import torch

from efficientsam_hf.metrics import bootstrap_difference, chosen_and_best, mask_area, mask_iou


def rectangle(top: int, left: int, bottom: int, right: int) -> torch.Tensor:
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def test_iou_of_overlapping_rectangles() -> None:
    iou = mask_iou(rectangle(0, 0, 10, 10), rectangle(5, 0, 15, 10))
    assert iou.shape == () and iou.dtype == torch.float32
    assert iou.item() == pytest.approx(50 / 150)


def test_iou_broadcasts_candidates_against_one_mask() -> None:
    masks = torch.stack([rectangle(0, 0, 10, 10), rectangle(5, 5, 20, 30)])
    candidates = torch.stack([masks, masks.flip(0)], dim=1)
    assert torch.equal(mask_iou(candidates, masks[:, None])[:, 0], torch.ones(2))
    assert torch.equal(mask_iou(candidates, masks[:, None])[0, 1], mask_iou(masks[1], masks[0]))


def test_iou_of_empty_masks() -> None:
    empty, full = torch.zeros(4, 4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)
    assert mask_iou(empty, empty) == 1
    assert mask_iou(empty, full) == 0


@pytest.mark.parametrize(
    ("predictions", "masks", "message"),
    [
        (torch.zeros(4, 4), torch.ones(4, 4, dtype=torch.bool), "predictions must be a bool"),
        (torch.ones(4, 4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.uint8), "masks must be a bool"),
        (torch.ones(4, 5, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool), "agree in height and width"),
    ],
)
def test_iou_refuses(predictions: torch.Tensor, masks: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask_iou(predictions, masks)


def test_area_counts_beyond_a_byte() -> None:
    assert mask_area(torch.stack([rectangle(0, 0, 20, 30), rectangle(3, 4, 3, 9)])).tolist() == [600, 0]


def test_chosen_follows_the_scores_and_best_the_ious() -> None:
    ious = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.3]])
    scores = torch.tensor([[0.2, 0.1, 0.8], [0.9, 0.3, 0.1]])
    chosen, best = chosen_and_best(ious, scores)
    assert torch.equal(chosen, torch.tensor([0.5, 0.7]))
    assert torch.equal(best, torch.tensor([0.9, 0.7]))


def test_chosen_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="shape of ious"):
        chosen_and_best(torch.zeros(2, 3), torch.zeros(2, 4))


def test_bootstrap_draws_whole_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    # 50 pictures of 20 objects that differ between pictures only: the interval is that of 50 values, not of 1,000.
    values = torch.randn(50, generator=generator)
    groups = torch.arange(50).repeat_interleave(20)
    mean, low, high = bootstrap_difference(values.repeat_interleave(20), groups)
    assert mean == pytest.approx(values.double().mean().item())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std().item() / 50**0.5, rel=0.15)
    assert low < mean < high
    assert bootstrap_difference(values.repeat_interleave(20), groups) == (mean, low, high)


def test_bootstrap_of_groups_of_other_sizes_is_the_mean_over_objects() -> None:
    mean, low, high = bootstrap_difference(torch.tensor([1.0, 1.0, 1.0, -1.0]), torch.tensor([5, 5, 5, 9]))
    assert (mean, low, high) == (0.5, -1.0, 1.0)
