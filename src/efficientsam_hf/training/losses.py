# SPDX-License-Identifier: Apache-2.0
"""Losses of promptable segmentation: focal, dice and predicted IoU on low-resolution logits, in float32."""

import torch
import torch.nn.functional as F


def area_targets(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Share of each low-resolution cell that the mask covers: (B, Q, H, W) bool -> (B, Q, h, w) float32 in [0, 1].

    Soft targets keep the boundary's place inside a cell: logits trained on them cross zero, after upsampling, where
    the mask ends. Raises ValueError if the cells of `size` (h, w) do not divide the masks evenly into squares.
    """
    height, width = masks.shape[-2:]
    scale = height // size[0]
    if (size[0] * scale, size[1] * scale) != (height, width) or not 1 <= scale <= 15:
        raise ValueError(f"masks of {height}x{width} cannot be averaged into square cells of a grid {tuple(size)}")
    # Counts of at most 225 fit in a byte; summing bytes is 20 times faster on CPU than pooling floats.
    rows = masks.view(torch.uint8).unflatten(-2, (size[0], scale)).sum(-2, dtype=torch.uint8)
    counts = rows.unflatten(-1, (size[1], scale)).sum(-1, dtype=torch.uint8)
    return counts.float() / (scale * scale)


def binary_targets(targets: torch.Tensor) -> torch.Tensor:
    """Cells that count as mask: (B, Q, h, w) float -> bool, covered by half or more; never empty for a real object.

    An object too thin to cover half of any cell keeps the cells it covers most.
    """
    peak = targets.amax((-2, -1), keepdim=True)
    return (targets >= peak.clamp(max=0.5)) & (targets > 0)


def focal_loss(
    logits: torch.Tensor, targets: torch.Tensor, alpha: float | torch.Tensor = 0.25, gamma: float = 2.0
) -> torch.Tensor:
    """Mean focal loss of each mask: (..., h, w) logits, (..., h, w) targets in [0, 1] -> (...).

    With soft targets the modulating factor is |target - probability| ** gamma (Li et al. 2020, quality focal loss):
    equal to RetinaNet's for targets 0 and 1, and least exactly where the probability is the target. `alpha` weighs
    foreground, 1 - alpha background (RetinaNet and SAM: 0.25); a tensor is broadcast against the logits.
    """
    probability = logits.sigmoid()
    entropy = F.softplus(logits) - logits * targets
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return (weight * (targets - probability).abs().pow(gamma) * entropy).mean((-2, -1))


def dice_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """1 - dice of each mask, smoothed by one cell: (..., h, w) logits, (..., h, w) targets in [0, 1] -> (...).

    The overlap is what the two have in common, (p + t - |p - t|) / 2 in each cell (Wang et al. 2023, dice semimetric
    losses): the product p * t for targets 0 and 1, and least exactly where the probability is the target. With the
    product a cell that is half covered would be driven to 0 or 1, and a mask could end at a cell's border only.
    """
    probability = logits.sigmoid()
    total = probability.sum((-2, -1)) + targets.sum((-2, -1))
    shared = total - (probability - targets).abs().sum((-2, -1))  # twice the overlap
    return 1 - (shared + 1) / (total + 1)


def thresholded_iou(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """IoU of the masks at logit >= 0: (..., h, w) logits, (..., h, w) bool -> (...) float32; 0 if both are empty."""
    predictions = (logits >= 0).float()
    masks = masks.float()
    overlap = (predictions * masks).sum((-2, -1))
    union = predictions.sum((-2, -1)) + masks.sum((-2, -1)) - overlap
    return overlap / union.clamp(min=1)


def ranking_loss(predicted: torch.Tensor, actual: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """How far the order of predicted IoU is from that of actual IoU: (..., 3), (..., 3) -> (...).

    The divergence of the shares that a softmax gives each mask by both (Cao et al. 2007, ListNet): 0 where they are
    equal, and little where masks are equally good, whichever is chosen.
    """
    shares = F.softmax(actual / temperature, -1)
    return F.kl_div(F.log_softmax(predicted / temperature, -1), shares, reduction="none").sum(-1)


def segmentation_losses(
    logits: torch.Tensor,
    iou_predictions: torch.Tensor,
    targets: torch.Tensor,
    object_mask: torch.Tensor,
    focal_weight: float = 20.0,
    dice_weight: float = 1.0,
    iou_weight: float = 1.0,
    single_weight: float = 1.0,
    ranking_weight: float = 0.0,
    focal_alpha: float | torch.Tensor = 0.25,
    relaxation: float | torch.Tensor = 0.0,
) -> dict[str, torch.Tensor]:
    """Loss and metrics of one prompt round: scalars, and "iou" (B, Q), of which `miou` is the mean.

    `logits` (B, Q, 4, h, w), `iou_predictions` (B, Q, 4), `targets` (B, Q, h, w) in [0, 1], `object_mask` (B, Q) bool.
    Of mask tokens 1 to 3 only the one with the lowest loss is trained (SAM paper, section 3), so that they can settle
    on different readings of an ambiguous prompt; token 0, the single-mask answer, is trained with `single_weight`.
    `relaxation` is the share of that training which all three get alike (Rupprecht et al. 2017, relaxed winner takes
    all): with 0 a mask that never wins is good for nothing if it is chosen all the same, with 1 the three are copies.
    With `focal_alpha` below 0.5 a cell that is mask in every second case gets a negative logit (-0.41 for 0.25): masks
    of uncertain objects come out too small. The scores of all four learn the actual IoU, and with `ranking_weight`
    those of the three their order. `focal_alpha` and `relaxation` may differ by object: (B, Q). Objects where
    `object_mask` is False weigh nothing; what remains is averaged over the real objects. `miou` is that of the
    multimask token with the highest score, as it is used.
    """
    logits, iou_predictions = logits.float(), iou_predictions.float()
    expanded = targets[:, :, None]
    if isinstance(focal_alpha, torch.Tensor):
        focal_alpha = focal_alpha[:, :, None, None, None]
    focal, dice = focal_loss(logits, expanded, focal_alpha), dice_loss(logits, expanded)
    actual = thresholded_iou(logits.detach(), binary_targets(targets)[:, :, None])
    total = focal_weight * focal + dice_weight * dice
    chosen = total[..., 1:].argmin(-1, keepdim=True) + 1
    score = (iou_predictions - actual).square().mean(-1)
    best, mean = total.gather(-1, chosen)[..., 0], total[..., 1:].mean(-1)
    per_object = best + relaxation * (mean - best) + single_weight * total[..., 0] + iou_weight * score
    if ranking_weight:
        per_object = per_object + ranking_weight * ranking_loss(iou_predictions[..., 1:], actual[..., 1:])
    scored = actual.gather(-1, iou_predictions[..., 1:].argmax(-1, keepdim=True) + 1)[..., 0]

    def average(values: torch.Tensor) -> torch.Tensor:
        return torch.where(object_mask, values, 0.0).sum() / object_mask.sum().clamp(min=1)

    return {
        "loss": average(per_object),
        "focal": average(focal.gather(-1, chosen)[..., 0].detach()),
        "dice": average(dice.gather(-1, chosen)[..., 0].detach()),
        "iou_error": average(score.detach()),
        "miou": average(scored),
        "best_miou": average(actual[..., 1:].amax(-1)),
        "iou": scored,
    }
