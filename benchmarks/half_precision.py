# SPDX-License-Identifier: Apache-2.0
"""Are masks in half precision those of float32? IoU of every mask of a grid of clicks, and of boxes, on photos.

Usage: python benchmarks/half_precision.py PHOTO... [--grid 8] [--dtypes bfloat16 float16] [--model NAME]

All three masks of every prompt are compared, enlarged from logits to 1024 pixels, where float32 has at least 100
pixels. Clicks go through the fast decoder of segment-everything, boxes, which are those around float32's masks of the
clicks, through the model's own; float32 is the model's own for both. Intersection and union are also summed over all
masks: a small mask with a blurred edge loses more by rounding than a large one.
"""

import argparse
import statistics

import torch
import torch.nn.functional as F

from efficientsam_hf import EfficientSamModel, EfficientSamProcessor, default_checkpoint
from efficientsam_hf.models.fast_decoding_efficientsam import EfficientSamFastDecoder
from efficientsam_hf.models.mask_geometry_efficientsam import masks_to_boxes, point_grid


SIDE = 1024
LEAST_AREA = 100


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+")
    parser.add_argument("--grid", type=int, default=8)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--model", default=default_checkpoint())
    return parser.parse_args()


def masks_of(model: EfficientSamModel, pixels: torch.Tensor, prompts: dict[str, torch.Tensor]) -> torch.Tensor:
    """-> (3 Q, SIDE, SIDE) bool."""
    embeddings = model.get_image_embeddings(pixels.to(model.dtype))
    if model.dtype != torch.float32 and "input_points" in prompts:
        points = prompts["input_points"][0]
        labels = torch.ones(points.shape[:2], dtype=torch.long)
        logits = EfficientSamFastDecoder(model, embeddings)(points, labels)[0][:, 1:].flatten(0, 1)
    else:
        logits = model(image_embeddings=embeddings, **prompts).pred_masks[0].flatten(0, 1)
    return F.interpolate(logits.float()[None], (SIDE, SIDE), mode="bilinear")[0] > 0


def compare(masks: torch.Tensor, exact: torch.Tensor) -> tuple[list[float], int, int]:
    """IoU of each mask with float32's, and their intersections and unions summed."""
    shared, union = (masks & exact).sum((1, 2)), (masks | exact).sum((1, 2))
    kept = exact.sum((1, 2)) >= LEAST_AREA
    return (shared / union)[kept].tolist(), int(shared[kept].sum()), int(union[kept].sum())


@torch.no_grad()
def main() -> None:
    args = parse_arguments()
    processor = EfficientSamProcessor.from_pretrained(args.model)
    models = {name: EfficientSamModel.from_pretrained(args.model, dtype=getattr(torch, name)) for name in args.dtypes}
    exact_model = EfficientSamModel.from_pretrained(args.model, dtype=torch.float32)
    found: dict[tuple[str, str], list] = {}
    for photo in args.photos:
        pixels = processor.image_processor(images=photo, return_tensors="pt")["pixel_values"]
        scale = pixels.shape[-1] / SIDE
        clicks = {"input_points": point_grid(args.grid)[None, :, None] * pixels.shape[-1]}
        exact = masks_of(exact_model, pixels, clicks)
        boxes = masks_to_boxes(exact[exact.sum((1, 2)) >= LEAST_AREA]).float() * scale
        for kind, prompts in (("clicks", clicks), ("boxes", {"input_boxes": boxes[None]})):
            exact = masks_of(exact_model, pixels, prompts)
            for name, model in models.items():
                found.setdefault((name, kind), []).append(compare(masks_of(model, pixels, prompts), exact))
    for (name, kind), parts in found.items():
        values = sorted(value for part in parts for value in part[0])
        together = sum(part[1] for part in parts) / sum(part[2] for part in parts)
        share = sum(value >= 0.99 for value in values) / len(values)
        print(
            f"{name:<9} {kind:<7} {len(values)} masks: IoU together {together:.4f}, median "
            f"{statistics.median(values):.4f}, lowest tenth {values[len(values) // 10]:.4f}, "
            f"{100 * share:.0f} % at least 0.99"
        )


if __name__ == "__main__":
    main()
