# SPDX-License-Identifier: Apache-2.0
"""ImageNet normalisation on batches of tensors, equal to what the image processor does to one picture."""

import torch


MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """RGB in [0, 1] to ImageNet-normalised values, (B, 3, H, W) -> (B, 3, H, W)."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def denormalize(pixel_values: torch.Tensor) -> torch.Tensor:
    """The inverse of `normalize`, cut to [0, 1]."""
    mean, std = (torch.tensor(values, device=pixel_values.device).view(3, 1, 1) for values in (MEAN, STD))
    return (pixel_values.float() * std + mean).clamp(0, 1)
