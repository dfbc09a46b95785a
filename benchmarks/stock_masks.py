# SPDX-License-Identifier: Apache-2.0
"""Are our generator's masks those of transformers' pipeline? Every mask of each side and its partner on the other.

Usage: python benchmarks/stock_masks.py PHOTO... [--grid 16] [--pred-iou-thresh 0.1] [--stability-score-thresh 0.3]

Both run the shipped checkpoint in float32 with equal thresholds, no crops and no removal of specks. A mask has a
partner if one on the other side has an IoU above 0.95 with it; what has none is listed with its score and stability,
which lie at a threshold where rounding decides.
"""

import argparse
import time

import numpy as np
from PIL import Image
from transformers import MaskGenerationPipeline

from efficientsam_hf import EfficientSamMaskGenerator, EfficientSamModel, EfficientSamProcessor, default_checkpoint


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+")
    parser.add_argument("--grid", type=int, default=16)
    parser.add_argument("--pred-iou-thresh", type=float, default=0.1)
    parser.add_argument("--stability-score-thresh", type=float, default=0.3)
    return parser.parse_args()


def partners(masks: list[np.ndarray], others: list[np.ndarray]) -> np.ndarray:
    """IoU of each mask with the other side's that fits it best."""
    best = np.zeros(len(masks))
    areas = [np.count_nonzero(mask) for mask in others]
    for index, mask in enumerate(masks):
        own = np.count_nonzero(mask)
        for other, area in zip(others, areas):
            if min(own, area) > 0.9 * max(own, area):  # others cannot reach 0.95
                shared = np.count_nonzero(mask & other)
                best[index] = max(best[index], shared / (own + area - shared))
    return best


def main() -> None:
    args = parse_arguments()
    model = EfficientSamModel.from_pretrained(default_checkpoint()).eval()
    processor = EfficientSamProcessor.from_pretrained(default_checkpoint())
    stock = MaskGenerationPipeline(model=model, image_processor=processor.image_processor)
    ours = EfficientSamMaskGenerator(model, processor)
    options = {
        "points_per_crop": args.grid,
        "pred_iou_thresh": args.pred_iou_thresh,
        "stability_score_thresh": args.stability_score_thresh,
    }
    for path in args.photos:
        with Image.open(path) as image:
            photo = image.convert("RGB")
        start = time.perf_counter()
        expected = stock(photo, **options)
        middle = time.perf_counter()
        result = ours(photo, **options)
        seconds = middle - start, time.perf_counter() - middle
        found, reference = partners(result["masks"], expected["masks"]), partners(expected["masks"], result["masks"])
        print(f"{path}: {len(reference)} masks of the pipeline, {len(found)} of ours; with a partner "
              f"{(reference > 0.95).mean():.1%} and {(found > 0.95).mean():.1%}; "
              f"{seconds[0]:.1f} and {seconds[1]:.1f} s")  # fmt: skip
        for index in np.flatnonzero(found <= 0.95):
            print(f"  ours alone: score {result['scores'][index]:.4f}, "
                  f"stability {result['stability_scores'][index]:.4f}, best IoU {found[index]:.3f}")  # fmt: skip
        for index in np.flatnonzero(reference <= 0.95):
            print(f"  the pipeline's alone: score {expected['scores'][index]:.4f}, best IoU {reference[index]:.3f}")


if __name__ == "__main__":
    main()
