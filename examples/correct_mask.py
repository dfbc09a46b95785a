# SPDX-License-Identifier: Apache-2.0
"""Correct a mask without embedding the photo again: `python correct_mask.py PHOTO X Y BACKGROUND_X BACKGROUND_Y`."""

import sys

import torch

from efficientsam_hf import EfficientSamModel, EfficientSamProcessor, default_checkpoint


@torch.no_grad()
def main(photo: str, click: tuple[float, float], background: tuple[float, float]) -> None:
    model = EfficientSamModel.from_pretrained(default_checkpoint()).eval()
    processor = EfficientSamProcessor.from_pretrained(default_checkpoint())

    # Both clicks of one object; 1 is on the object, 0 beside it.
    inputs = processor(
        images=photo, input_points=[[[click, background]]], input_labels=[[[1, 0]]], return_tensors="pt"
    )
    points, labels = inputs["input_points"], inputs["input_labels"]

    # The encoder is the expensive part and has seen the photo once; every further prompt costs the decoder alone.
    embeddings = model.get_image_embeddings(inputs["pixel_values"])
    first = model(image_embeddings=embeddings, input_points=points[:, :, :1], input_labels=labels[:, :, :1])
    best = int(first.iou_scores[0, 0].argmax())
    corrected = model(
        image_embeddings=embeddings,
        input_points=points,
        input_labels=labels,
        input_masks=first.pred_masks[:, :, best : best + 1],
        multimask_output=False,
    )

    for name, logits in (("one click", first.pred_masks[:, :, best : best + 1]), ("corrected", corrected.pred_masks)):
        (masks,) = processor.post_process_masks(logits, inputs["original_sizes"], prompts=inputs)
        print(f"{name}: {masks.float().mean():.1%} of the photo")


if __name__ == "__main__":
    numbers = [float(argument) for argument in sys.argv[2:6]]
    main(sys.argv[1], (numbers[0], numbers[1]), (numbers[2], numbers[3]))
