# SPDX-License-Identifier: Apache-2.0
"""All masks of a photo: one picture of them, and COCO run lengths. Usage: segment_everything.py PHOTO OUT_DIR"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from efficientsam_hf import EfficientSamMaskGenerator, EfficientSamModel, EfficientSamProcessor, default_checkpoint
from efficientsam_hf.models.rle_efficientsam import decode_rle
from efficientsam_hf.visualization import draw_masks


photo, folder = Image.open(sys.argv[1]).convert("RGB"), Path(sys.argv[2])
generator = EfficientSamMaskGenerator(
    EfficientSamModel.from_pretrained(default_checkpoint()),
    EfficientSamProcessor.from_pretrained(default_checkpoint()),
)
result = generator(photo, points_per_crop=16, output_type="coco_rle", sort_by="area")

folder.mkdir(parents=True, exist_ok=True)
(folder / "masks.json").write_text(json.dumps(result["masks"]))
if result["masks"]:
    draw_masks(photo, np.stack([decode_rle(mask) for mask in result["masks"]])).save(folder / "everything.png")
for box, area, score in zip(result["boxes"].tolist(), result["areas"].tolist(), result["scores"].tolist()):
    print(f"{area:8d} pixels, predicted IoU {score:.2f}, box {box}")
