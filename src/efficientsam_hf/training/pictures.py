# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a model predicts during training."""

import torch
import torch.nn.functional as F
from PIL import Image

from ..visualization import contact_sheet, draw_masks, draw_prompts
from .normalization import denormalize


def prediction_sheet(
    batch: dict[str, torch.Tensor], logits: torch.Tensor, prompt: dict[str, torch.Tensor], count: int = 4
) -> Image.Image:
    """The first `count` images in rows of two: masks with prompts on the left, predictions on the right.

    `batch` as for `InteractiveSegmentation`, `logits` (B, Q, h, w), `prompt` in model pixels.
    """
    images = denormalize(batch["pixel_values"][:count]).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    predictions = F.interpolate(logits[:count].float(), batch["masks"].shape[-2:], mode="bilinear") >= 0
    tiles = []
    for index, array in enumerate(images):
        real = batch["object_mask"][index].cpu()
        truth, answer = batch["masks"][index].cpu()[real], predictions[index].cpu()[real]
        image = Image.fromarray(array)
        drawn = draw_masks(image, truth.numpy()) if len(truth) else image
        points, labels = prompt["input_points"][index].cpu()[real], prompt["input_labels"][index].cpu()[real]
        boxes = prompt["input_boxes"][index].cpu()[real]
        boxes = boxes[(boxes != -1).any(-1)]
        drawn = draw_prompts(drawn, points[labels >= 0].numpy(), labels[labels >= 0].numpy(), boxes.numpy())
        tiles += [drawn, draw_masks(image, answer.numpy()) if len(answer) else image]
    return contact_sheet(tiles, columns=2 if len(tiles) < 4 else 4)


def feature_sheet(
    pixel_values: torch.Tensor, mask: torch.Tensor, target: torch.Tensor, reconstruction: torch.Tensor
) -> Image.Image:
    """A row for each image: the image, its visible patches, target features and their reconstruction.

    (B, 3, H, W) normalised, (B, N) with 1 for hidden, (B, N, C) twice. Features are shown by their projections on the
    three main components of the image's target features, as red, green and blue; both by the same components and
    limits, so that equal colours are equal features.
    """
    images = denormalize(pixel_values)
    height, width = images.shape[2:]
    side = round((height * width / mask.shape[1]) ** 0.5)
    grid = (height // side, width // side)
    hidden = mask.unflatten(1, grid).repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None]
    with torch.autocast(target.device.type, enabled=False):  # quantiles have no half precision
        colours = [_main_components(*pair) for pair in zip(target.float(), reconstruction.float(), strict=True)]
    tiles = []
    for image, seen, pair in zip(images, images * (1 - hidden), colours, strict=True):
        maps = [colour.transpose(0, 1).unflatten(1, grid) for colour in pair]
        tiles += [image, seen, *(F.interpolate(m[None], (height, width), mode="nearest")[0] for m in maps)]
    arrays = [tile.mul(255).round().byte().permute(1, 2, 0).cpu().numpy() for tile in tiles]
    return contact_sheet([Image.fromarray(array) for array in arrays], columns=4)


def _main_components(target: torch.Tensor, reconstruction: torch.Tensor) -> list[torch.Tensor]:
    """(N, C) twice -> (N, 3) twice in [0, 1], by the main components of the first."""
    mean = target.mean(0)
    _, _, directions = torch.linalg.svd(target - mean, full_matrices=False)
    projected = [(features - mean) @ directions[:3].T for features in (target, reconstruction)]
    low, high = (torch.quantile(projected[0], q, dim=0) for q in (0.02, 0.98))
    return [((values - low) / (high - low).clamp(min=1e-6)).clamp(0, 1) for values in projected]
