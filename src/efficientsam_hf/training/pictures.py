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
