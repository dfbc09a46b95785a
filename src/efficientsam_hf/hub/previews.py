# SPDX-License-Identifier: Apache-2.0
"""A picture of what a model does, for its card."""

import numpy as np
import torch
from PIL import Image

from ..data.scene_bank import SceneBank
from ..data.scenes import render_scenes
from ..models.modeling_efficientsam import EfficientSamModel
from ..models.processing_efficientsam import EfficientSamProcessor
from ..visualization import contact_sheet, draw_boxes, draw_masks


SCENES = 2
SIZE = 512
OBJECTS = 4  # the largest of a scene that leave room for others
LARGEST_SHARE = 0.3


@torch.no_grad()
def draw_scenes(model: EfficientSamModel, processor: EfficientSamProcessor, seed: int = 0) -> Image.Image:
    """Generated scenes with boxes around some objects, and the masks that the model gives for them."""
    batch = render_scenes(SceneBank.build(), range(SCENES), seed, SIZE)
    fitting = batch.areas.where(batch.areas < LARGEST_SHARE, torch.zeros(()))
    truth = batch.masks(fitting.topk(OBJECTS).indices)
    tiles = []
    for pixels, masks in zip(batch.images, truth):
        image = Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())
        boxes = _boxes(masks[masks.any(-1).any(-1)].numpy())
        inputs = processor(images=image, input_boxes=[boxes.tolist()], return_tensors="pt")
        outputs = model(**inputs)
        found = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"], prompts=inputs)[0]
        best = found[torch.arange(len(found)), outputs.iou_scores[0].argmax(-1)]
        tiles.append(draw_boxes(draw_masks(image, best.numpy()), boxes))
    return contact_sheet(tiles, columns=SCENES)


def _boxes(masks: np.ndarray) -> np.ndarray:
    """Tight boxes of masks, (K, H, W) -> (K, 4) xyxy in pixels, x1 and y1 exclusive."""
    boxes = []
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return np.array(boxes, dtype=float)
