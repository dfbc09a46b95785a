# SPDX-License-Identifier: Apache-2.0
"""A click on a photo becomes a mask: `python segment_photo.py PHOTO X Y OUT.png`, X and Y in pixels of the photo."""

import sys

import torch
from PIL import Image

from efficientsam_hf import EfficientSamModel, EfficientSamProcessor, default_checkpoint


def main(photo: str, x: float, y: float, output: str) -> None:
    model = EfficientSamModel.from_pretrained(default_checkpoint()).eval()
    processor = EfficientSamProcessor.from_pretrained(default_checkpoint())

    # (image, object, point, xy): one image, one object, one point
    inputs = processor(images=photo, input_points=[[[[x, y]]]], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)

    # One click is ambiguous, so the model answers with three masks and the IoU it expects of each.
    (masks,) = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"], prompts=inputs)
    best = int(outputs.iou_scores[0, 0].argmax())
    Image.fromarray(masks[0, best].numpy()).save(output)
    print(f"{output}: predicted IoU {outputs.iou_scores[0, 0, best]:.2f}")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
