# SPDX-License-Identifier: Apache-2.0
"""Whether a GPU computes what the CPU does, with the checkpoint that ships.

    python benchmarks/gpu_agreement.py PHOTO

Prints the largest absolute difference of embeddings and of low-resolution logits in float32 (with TF32 off), the
intersection over union of the masks of boxes in bfloat16 and float16, how many masks of everything have a partner of
an IoU above 0.95 on the other device, and the difference of the losses and gradients of one training step. Exits with
1 if a difference is larger than rounding explains.
"""

import argparse
import sys

import numpy as np
import torch
from PIL import Image

from efficientsam_hf import (
    EfficientSamMaskGenerator,
    EfficientSamModel,
    EfficientSamProcessor,
    default_checkpoint,
)
from efficientsam_hf.training.segmentation import InteractiveSegmentation, PromptSampling


SMALLEST_SHARE = 0.95  # of masks of everything that must have a partner
LIMITS = {"embeddings": 1e-3, "logits": 5e-3, "loss": 1e-3, "gradient": 1e-2}


def load(device: str, dtype: torch.dtype = torch.float32) -> EfficientSamModel:
    return EfficientSamModel.from_pretrained(default_checkpoint(), dtype=dtype).to(device).eval()


def boxes_of(photo: Image.Image, count: int = 16) -> torch.Tensor:
    """Boxes of many sizes all over the photo, (count, 4)."""
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([photo.width, photo.height])
    corner = torch.rand(count, 2, generator=generator) * size * 0.7
    return torch.cat([corner, corner + size * (0.1 + 0.2 * torch.rand(count, 2, generator=generator))], 1)


@torch.no_grad()
def answers(model: EfficientSamModel, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and low-resolution logits, on the CPU in float32."""
    weights = next(model.parameters())
    pixels = inputs["pixel_values"].to(weights.device, weights.dtype)
    embeddings = model.get_image_embeddings(pixels)
    boxes = inputs["input_boxes"].to(weights.device)
    return embeddings.float().cpu(), model(image_embeddings=embeddings, input_boxes=boxes).pred_masks.float().cpu()


def overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    """IoU of all masks together."""
    first, second = first >= 0, second >= 0
    return float((first & second).sum() / (first | second).sum())


def share_with_partner(masks: list[np.ndarray], others: list[np.ndarray]) -> float:
    flat, other = (np.stack(part).reshape(len(part), -1).astype(np.float32) for part in (masks, others))
    shared = flat @ other.T
    iou = shared / (flat.sum(1)[:, None] + other.sum(1) - shared)
    return float((iou.max(1) > 0.95).mean())


def step(device: str) -> tuple[float, torch.Tensor]:
    """Loss and gradient norm by parameter of a training step on discs."""
    torch.manual_seed(0)
    # Clicks are drawn on the device, by another generator than the CPU's: exact boxes are the same everywhere.
    sampling = PromptSampling(uniform=0.0, center=0.0, box=1.0, box_and_point=0.0, rounds=1, exact_boxes=1.0)
    module = InteractiveSegmentation(load(device), sampling=sampling).train()
    y, x = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    masks = torch.stack([(x - 40 * k) ** 2 + (y - 128) ** 2 < 30**2 for k in range(1, 5)]).expand(2, -1, -1, -1)
    pixels = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0)) + masks.sum(1, keepdim=True)
    batch = {
        "pixel_values": pixels, "masks": masks, "object_mask": torch.ones(2, 4, dtype=torch.bool),
        "seed": torch.tensor(1),
    }  # fmt: skip
    loss = module({name: value.to(device) for name, value in batch.items()})["loss"]
    loss.backward()
    return loss.item(), torch.stack([p.grad.norm().cpu() for p in module.parameters() if p.grad is not None])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    photo = Image.open(args.photo).convert("RGB")
    processor = EfficientSamProcessor.from_pretrained(default_checkpoint())
    inputs = processor(images=photo, input_boxes=[boxes_of(photo).tolist()], return_tensors="pt")
    embeddings, logits = answers(load("cpu"), inputs)
    there, there_logits = answers(load(args.device), inputs)
    found = {
        "embeddings": float((embeddings - there).abs().max()),
        "logits": float((logits - there_logits).abs().max()),
    }
    for dtype in (torch.bfloat16, torch.float16):
        print(f"{dtype}: IoU of masks {overlap(logits, answers(load(args.device, dtype), inputs)[1]):.4f}")
    everything = [
        EfficientSamMaskGenerator(load(device), processor)(photo, points_per_crop=16, pred_iou_thresh=0.3)["masks"]
        for device in ("cpu", args.device)
    ]
    share = min(share_with_partner(*everything), share_with_partner(*everything[::-1]))
    print(f"everything: {len(everything[0])} and {len(everything[1])} masks, {share:.3f} with a partner")
    (loss, gradient), (loss_there, gradient_there) = step("cpu"), step(args.device)
    found["loss"] = abs(loss - loss_there)
    found["gradient"] = float(((gradient - gradient_there).abs() / gradient.clamp(min=1e-3)).max())
    for name, value in found.items():
        print(f"{name}: {value:.2e} (limit {LIMITS[name]:g})")
    return int(share < SMALLEST_SHARE or any(value > LIMITS[name] for name, value in found.items()))


if __name__ == "__main__":
    sys.exit(main())
