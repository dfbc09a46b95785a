# SPDX-License-Identifier: Apache-2.0
"""The least a box prompt must beat: mIoU of the tight box itself, filled, on a COCO file.

Usage: python benchmarks/filled_box.py ANNOTATIONS.json IMAGES
"""

import sys

import torch

from efficientsam_hf.data.coco import CocoSamples
from efficientsam_hf.metrics import mask_iou


def filled_box(mask: torch.Tensor) -> torch.Tensor:
    """Rows and columns between the first and last of the mask: (H, W) bool -> (H, W) bool."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    box = torch.zeros_like(mask)
    box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return box


def main(annotations: str, images: str) -> None:
    samples = CocoSamples(annotations, images)
    masks = [torch.from_numpy(mask) for index in range(len(samples)) for mask in samples[index]["masks"]]
    scores = torch.stack([mask_iou(filled_box(mask), mask) for mask in masks])
    print(f"filled box: mIoU {scores.mean():.4f} over {len(scores)} objects in {len(samples)} images")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
