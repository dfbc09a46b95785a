# SPDX-License-Identifier: Apache-2.0
"""Segmentation losses against their definitions."""

import pytest
import torch
import torch.nn.functional as F

from efficientsam_hf.training.losses import (
    area_targets,
    binary_targets,
    dice_loss,
    focal_loss,
    segmentation_losses,
    thresholded_iou,
)


def example(objects: int = 3, size: int = 8) -> tuple[torch.Tensor, ...]:
    """Logits (2, Q, 4, s, s), scores, targets, object_mask."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, objects, 4, size, size, generator=generator) * 2
    scores = torch.rand(2, objects, 4, generator=generator)
    targets = (torch.rand(2, objects, size, size, generator=generator) < 0.4).float()
    return logits, scores, targets, torch.ones(2, objects, dtype=torch.bool)


def test_focal_loss_of_hard_targets_is_retinanets() -> None:
    logits, _, targets, _ = example()
    targets = targets[:, :, None].expand_as(logits)
    p = logits.sigmoid()
    p_t = torch.where(targets == 1, p, 1 - p)
    alpha_t = torch.where(targets == 1, 0.25, 0.75)
    expected = (-alpha_t * (1 - p_t) ** 2 * p_t.log()).mean((-2, -1))
    torch.testing.assert_close(focal_loss(logits, targets), expected)


@pytest.mark.parametrize("target", [0.0, 0.3, 0.7, 1.0])
def test_focal_loss_is_least_where_the_probability_is_the_target(target) -> None:
    logits = torch.linspace(-6, 6, 241)
    loss = focal_loss(logits[:, None, None], torch.full((241, 1, 1), target))
    assert logits[loss.argmin()].sigmoid().item() == pytest.approx(target, abs=0.02)


def test_dice_loss_spans_nothing_to_everything() -> None:
    target = torch.zeros(10, 10)
    target[2:8, 2:8] = 1
    sure = (target * 2 - 1) * 30
    assert dice_loss(sure, target).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(-sure, target).item() > 0.98


def test_dice_loss_of_binary_targets_is_that_of_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 9, 9, generator=generator)
    target = (torch.rand(3, 9, 9, generator=generator) < 0.4).float()
    p = logits.sigmoid()
    expected = 1 - (2 * (p * target).sum((1, 2)) + 1) / (p.sum((1, 2)) + target.sum((1, 2)) + 1)
    torch.testing.assert_close(dice_loss(logits, target), expected)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_dice_loss_is_least_where_the_probability_is_the_share_of_a_cell(share) -> None:
    """A column of whole cells and one of half covered ones, whose logit alone varies."""
    target = torch.zeros(1, 6, 6)
    target[..., 2], target[..., 3] = 1, share
    candidates = torch.linspace(-6, 6, 241)
    logits = ((target > 0.5).float() * 60 - 30).repeat(241, 1, 1)
    logits[..., 3] = candidates[:, None]
    loss = dice_loss(logits, target)
    assert candidates[loss.argmin()].sigmoid().item() == pytest.approx(share, abs=0.02)
    assert loss.min() < 1e-2


def test_losses_stay_finite_at_extreme_logits() -> None:
    logits = torch.tensor([-1e4, 1e4]).repeat(2).view(1, 1, 1, 2, 2).expand(1, 1, 4, 2, 2).clone().requires_grad_()
    loss = segmentation_losses(logits, torch.zeros(1, 1, 4), torch.ones(1, 1, 2, 2), torch.ones(1, 1).bool())["loss"]
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_area_targets_average_and_thin_objects_survive() -> None:
    masks = torch.zeros(1, 3, 16, 16, dtype=torch.bool)
    masks[0, 0, 3, :] = True  # a line covers a quarter of each cell of row 0
    masks[0, 1, 0:8, 0:10] = True
    targets = area_targets(masks, (4, 4))
    assert torch.equal(targets, F.avg_pool2d(masks.float(), 4))
    cells = binary_targets(targets)
    assert cells[0, 0].tolist() == [[True] * 4] + [[False] * 4] * 3
    assert cells[0, 1].sum() == 6  # half covered counts
    assert not cells[0, 2].any()
    with pytest.raises(ValueError, match="grid"):
        area_targets(masks, (4, 5))


def test_thresholded_iou() -> None:
    logits = torch.tensor([[1.0, 0.0], [-1.0, 2.0]])
    masks = torch.tensor([[True, False], [True, True]])
    assert thresholded_iou(logits, masks).item() == pytest.approx(2 / 4)
    assert thresholded_iou(torch.full((2, 2), -1.0), torch.zeros(2, 2).bool()).item() == 0


def test_only_the_best_of_three_and_the_single_token_are_trained() -> None:
    logits, scores, targets, real = example()
    with torch.no_grad():
        logits[:, :, 2] = (targets * 2 - 1) * 3
    logits.requires_grad_()
    scores.requires_grad_()
    segmentation_losses(logits, scores, targets, real)["loss"].backward()
    touched = logits.grad.abs().amax((0, 1, 3, 4)) > 0
    assert touched.tolist() == [True, False, True, False]
    assert (scores.grad != 0).all()
    logits.grad = None
    segmentation_losses(logits, scores, targets, real, single_weight=0.0)["loss"].backward()
    assert logits.grad[:, :, 0].abs().max() == 0


def test_loss_is_the_weighted_sum_of_its_parts() -> None:
    logits, scores, targets, real = example(objects=1)
    result = segmentation_losses(logits[:1], scores[:1], targets[:1], real[:1], single_weight=0.5, iou_weight=3.0)
    wide = targets[:1, :, None]
    mask_losses = 20 * focal_loss(logits[:1], wide) + dice_loss(logits[:1], wide)
    score = (scores[:1] - thresholded_iou(logits[:1], wide.bool())).square().mean()
    expected = mask_losses[0, 0, 1:].min() + 0.5 * mask_losses[0, 0, 0] + 3 * score
    torch.testing.assert_close(result["loss"], expected)


def test_relaxation_trains_the_other_masks_too() -> None:
    """Between the best of three at 0 and the mean of the three at 1, object by object."""
    logits, scores, targets, real = example()
    weights = {"single_weight": 0.0, "iou_weight": 0.0}
    three = (20 * focal_loss(logits, targets[:, :, None]) + dice_loss(logits, targets[:, :, None]))[..., 1:]
    share = torch.rand(real.shape, generator=torch.Generator().manual_seed(0))
    expected = (1 - share) * three.amin(-1) + share * three.mean(-1)
    result = segmentation_losses(logits, scores, targets, real, relaxation=share, **weights)
    torch.testing.assert_close(result["loss"], expected[real].mean())
    logits.requires_grad_()
    segmentation_losses(logits, scores, targets, real, relaxation=1.0, **weights)["loss"].backward()
    assert (logits.grad[:, :, 1:].abs().amax((-2, -1))[real] > 0).all()


def test_balanced_alpha_puts_an_even_chance_at_logit_zero() -> None:
    logits = torch.linspace(-3, 3, 601)
    targets = torch.tensor([1.0, 0.0])  # each cell is mask in one of two cases
    for alpha, expected in ((0.5, 0.0), (0.25, -0.41)):
        losses = [focal_loss(value.expand(2)[:, None, None], targets[:, None, None], alpha).mean() for value in logits]
        assert logits[torch.stack(losses).argmin()].item() == pytest.approx(expected, abs=0.02)
    example_logits, scores, targets, real = example()
    quarter, half = (
        segmentation_losses(example_logits, scores, targets, real, dice_weight=0.0, iou_weight=0.0, focal_alpha=alpha)
        for alpha in (0.25, 0.5)
    )
    assert quarter["loss"] != half["loss"]


def test_padding_weighs_nothing() -> None:
    logits, scores, targets, real = example()
    alone = segmentation_losses(logits[:, :2], scores[:, :2], targets[:, :2], real[:, :2])
    logits[:, 2], real[:, 2] = 50.0, False
    logits.requires_grad_()
    padded = segmentation_losses(logits, scores, targets, real)
    for name, value in alone.items():
        torch.testing.assert_close(padded[name][:, :2] if name == "iou" else padded[name], value)
    padded["loss"].backward()
    assert (logits.grad[:, 2] == 0).all() and logits.grad[:, :2].abs().sum() > 0


def test_iou_of_each_object_is_that_of_its_highest_score() -> None:
    logits, scores, targets, real = example()
    real[1, 2] = False
    result = segmentation_losses(logits, scores, targets, real)
    chosen = scores[..., 1:].argmax(-1) + 1
    for image, thing in ((0, 0), (1, 1)):
        expected = thresholded_iou(logits[image, thing, chosen[image, thing]], targets[image, thing].bool())
        assert result["iou"][image, thing] == expected
    torch.testing.assert_close(result["miou"], result["iou"][real].mean())


def test_a_batch_of_padding_alone_is_zero() -> None:
    logits, scores, targets, real = example()
    assert segmentation_losses(logits, scores, targets, ~real)["loss"].item() == 0


def test_half_precision_logits_are_reduced_in_float32() -> None:
    logits, scores, targets, real = example()
    half = segmentation_losses(logits.bfloat16(), scores.bfloat16(), targets, real)
    exact = segmentation_losses(logits.bfloat16().float(), scores.bfloat16().float(), targets, real)
    assert half["loss"].dtype == torch.float32
    assert torch.equal(half["loss"], exact["loss"])
